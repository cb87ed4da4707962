"""Commands that take too long, and task management (checks 46 and 52)."""

import pytest
import trio

from orion_iscsifs.initiator.connection import CommandTimedOut
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    DataOut,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi import cdb
from tests.initiator.peer import (
    LUN,
    PlayedConnection,
    Running,
    answer,
    offer,
    played_session,
    unit_ready,
)

Function = TaskManagementFunction
Code = TmfResponseCode
OTHER_LUN = 0x0002_0000_0000_0000


async def complete(peer: PlayedConnection, request: TaskManagementRequest, code: int = 0) -> None:
    await peer.reply(TaskManagementResponse(request.initiator_task_tag, code))


def reads(length: int) -> Task:
    return Task(LUN, cdb.read(0, 1), read_into=memoryview(bytearray(length)))


def content(task: Task) -> bytes:
    assert task.read_into is not None
    return bytes(task.read_into)


# -- the ladder -----------------------------------------------------------------------------------


@pytest.mark.checklist(46, "7.11")
@pytest.mark.checklist(52, "11.5")
async def test_a_command_that_is_late_is_aborted_and_issued_anew() -> None:
    """ABORT TASK: immediate, RefCmdSN and tag of the command, over its connection."""
    async with (
        played_session(command_timeout_s=0.6) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        late = await peer.expect(ScsiCommand)
        abort = await peer.expect(TaskManagementRequest)
        assert abort.function == Function.ABORT_TASK
        assert (abort.lun, abort.immediate) == (LUN, True)
        assert abort.referenced_task_tag == late.initiator_task_tag
        assert (abort.ref_cmd_sn, abort.cmd_sn) == (late.cmd_sn, late.cmd_sn + 1)
        assert abort.initiator_task_tag not in (late.initiator_task_tag, NO_TAG)
        await peer.nothing()
        await complete(peer, abort)
        again = await answer(peer)
        assert again.initiator_task_tag != late.initiator_task_tag
        assert again.cmd_sn == late.cmd_sn + 1
        assert (await running.done()).status == 0
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(46, "7.11")
@pytest.mark.checklist(52, "11.5")
async def test_the_ladder_goes_on_to_a_reset_and_a_new_session() -> None:
    """ABORT TASK, LOGICAL UNIT RESET, reinstatement; no tag comes twice."""
    async with (
        played_session(command_timeout_s=0.6) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        tags = [(await peer.expect(ScsiCommand)).initiator_task_tag]
        abort = await peer.expect(TaskManagementRequest)
        await complete(peer, abort, Code.FUNCTION_NOT_SUPPORTED)
        reset = await peer.expect(TaskManagementRequest)
        assert (reset.function, reset.lun) == (Function.LOGICAL_UNIT_RESET, LUN)
        assert (reset.referenced_task_tag, reset.ref_cmd_sn) == (NO_TAG, 0)
        await complete(peer, reset, Code.FUNCTION_REJECTED)
        again = await (await target.accept()).login()
        command = await answer(again)
        tags += [command.initiator_task_tag, abort.initiator_task_tag, reset.initiator_task_tag]
        assert len(set(tags)) == 4
        assert isinstance(session.last_error, CommandTimedOut)
        assert (await running.done()).status == 0


@pytest.mark.checklist(46, "7.11")
async def test_a_reset_restarts_all_commands_of_the_unit_and_no_others() -> None:
    async with (
        played_session(command_timeout_s=0.6) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        late = Task(LUN, cdb.test_unit_ready())
        neighbour = Task(LUN, cdb.read_capacity_16(), patience=50.0)
        stranger = Task(OTHER_LUN, cdb.test_unit_ready(), patience=50.0)
        running = [Running(nursery, session, task) for task in (late, neighbour, stranger)]
        commands = [await peer.expect(ScsiCommand) for _ in range(3)]
        tags = {(command.lun, command.cdb[0]): command.initiator_task_tag for command in commands}
        abort = await peer.expect(TaskManagementRequest)
        assert abort.referenced_task_tag == tags[LUN, 0x00]
        await complete(peer, abort, Code.FUNCTION_REJECTED)
        reset = await peer.expect(TaskManagementRequest)
        await complete(peer, reset)
        again = [await peer.expect(ScsiCommand) for _ in range(2)]
        assert {command.cdb[0] for command in again} == {0x00, 0x9E}
        for tag in (*(command.initiator_task_tag for command in again), tags[OTHER_LUN, 0x00]):
            await peer.reply(ScsiResponse(tag))
        for task in running:
            assert (await task.done()).status == 0
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(46, "7.11")
@pytest.mark.checklist(52, "4.2.3")
async def test_an_answer_on_its_way_beats_the_abort() -> None:
    """It was sent before the function's response, so it counts; the response then says so."""
    async with (
        played_session(command_timeout_s=0.6) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(4))
        late = await peer.expect(ScsiCommand)
        abort = await peer.expect(TaskManagementRequest)
        tag = late.initiator_task_tag
        await peer.reply(DataIn(tag, data=b"data", final=True, has_status=True))
        assert content(await running.done()) == b"data"
        await complete(peer, abort, Code.TASK_DOES_NOT_EXIST)
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.commands_retried == 0
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(46, "7.11")
@pytest.mark.checklist(52, "4.2.3")
async def test_what_comes_for_an_aborted_command_harms_nobody() -> None:
    """Data, status and R2T under the old tag are dropped; StatSN is counted all the same."""
    async with (
        played_session(command_timeout_s=0.6) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(4))
        old = (await peer.expect(ScsiCommand)).initiator_task_tag
        await complete(peer, await peer.expect(TaskManagementRequest))
        new = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(R2T(LUN, old, 1, 0, 0, 4), advance=False)
        await peer.reply(DataIn(old, 0, 0, data=b"OLD!"), advance=False)
        await peer.reply(DataIn(old, 1, final=True, has_status=True))
        await peer.reply(ScsiResponse(old, status=2))
        await peer.reply(DataIn(new, data=b"new!", final=True, has_status=True))
        task = await running.done()
        assert (task.status, content(task)) == (0, b"new!")
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(52, "4.2.3")
async def test_r2ts_are_answered_until_the_abort_is_confirmed() -> None:
    """Some targets wait for the data that they asked for before they answer the abort."""
    async with (
        played_session(offer(initial_r2t=True), command_timeout_s=0.6) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        data = memoryview(bytes(12000))
        running = Running(nursery, session, Task(LUN, cdb.write(0, 1), write_from=data))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        abort = await peer.expect(TaskManagementRequest)
        await peer.reply(R2T(LUN, tag, 9, 0, 4096, 7904), advance=False)
        sent = [await peer.expect(DataOut) for _ in range(2)]
        assert [pdu.target_transfer_tag for pdu in sent] == [9, 9]
        assert sent[-1].final
        await complete(peer, abort)
        again = await peer.expect(ScsiCommand)
        assert again.initiator_task_tag != tag
        await peer.reply(ScsiResponse(again.initiator_task_tag))
        await running.done()


@pytest.mark.checklist(46, "7.11")
async def test_nothing_is_sent_twice_at_once() -> None:
    """While an abort has no answer, the command is not issued again."""
    async with (
        played_session(command_timeout_s=0.6) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        kinds: list[int] = []
        while len(kinds) < 2:
            request = await peer.expect(TaskManagementRequest)
            kinds.append(request.function)
        assert kinds == [Function.ABORT_TASK, Function.LOGICAL_UNIT_RESET]
        again = await (await target.accept()).login()
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        await answer(again)
        await running.done()


@pytest.mark.checklist(52, "11.5")
async def test_a_query_comes_first_where_rfc_7144_was_agreed_on() -> None:
    """A task that the target does not have any more needs no abort."""
    async with (
        played_session(offer(iscsi_protocol_level=2), command_timeout_s=0.6) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        assert session.parameters.iscsi_protocol_level == 2
        running = Running(nursery, session, unit_ready())
        late = await peer.expect(ScsiCommand)
        query = await peer.expect(TaskManagementRequest)
        assert (query.function, query.lun) == (Function.QUERY_TASK, LUN)
        assert query.referenced_task_tag == late.initiator_task_tag
        await complete(peer, query, Code.FUNCTION_SUCCEEDED)
        abort = await peer.expect(TaskManagementRequest)
        assert abort.function == Function.ABORT_TASK
        await complete(peer, abort)
        again = await peer.expect(ScsiCommand)
        query = await peer.expect(TaskManagementRequest)
        # The second time-out of a command goes straight to the reset.
        assert query.function == Function.LOGICAL_UNIT_RESET
        await complete(peer, query)
        third = await answer(peer)
        assert len({pdu.initiator_task_tag for pdu in (late, again, third)}) == 3
        await running.done()


# -- functions ------------------------------------------------------------------------------------


async def ask(session: Session, peer: PlayedConnection, function: Function) -> tuple[int, int, int]:
    """Function code, LUN and RefCmdSN on the wire."""
    seen: list[TaskManagementRequest] = []

    async def play() -> None:
        request = await peer.expect(TaskManagementRequest)
        seen.append(request)
        await complete(peer, request)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        assert await session.manager.manage(function, lun=LUN) == Code.FUNCTION_COMPLETE
    (request,) = seen
    assert request.immediate
    assert request.referenced_task_tag == NO_TAG
    return request.function, request.lun, request.ref_cmd_sn


@pytest.mark.checklist(52, "11.5")
@pytest.mark.parametrize(
    ("function", "number", "lun"),
    [
        (Function.ABORT_TASK_SET, 2, LUN),
        (Function.CLEAR_TASK_SET, 4, LUN),
        (Function.LOGICAL_UNIT_RESET, 5, LUN),
        (Function.TARGET_WARM_RESET, 6, 0),
        (Function.TARGET_COLD_RESET, 7, 0),
        (Function.QUERY_TASK_SET, 10, LUN),
        (Function.I_T_NEXUS_RESET, 11, 0),
        (Function.QUERY_ASYNC_EVENT, 12, LUN),
    ],
)
async def test_every_function_has_its_number_and_its_fields(
    function: Function, number: int, lun: int
) -> None:
    """No Referenced Task Tag and no RefCmdSN; a LUN where the function is about one."""
    async with played_session() as (session, peer, _):
        assert await ask(session, peer, function) == (number, lun, 0)


@pytest.mark.checklist(4, "4.2.2.1")
@pytest.mark.checklist(52, "11.6")
async def test_too_many_immediate_commands_are_asked_again() -> None:
    """Reject 06 says that it may be sent again; anything else is a refusal."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        codes: list[int | None] = []

        async def manage() -> None:
            codes.append(await session.manager.manage(Function.LOGICAL_UNIT_RESET, lun=LUN))

        nursery.start_soon(manage)
        request = await peer.expect(TaskManagementRequest)
        busy = Reject(RejectReason.IMMEDIATE_COMMAND_REJECT, data=request.pack(0, 0))
        await peer.reply(busy)
        again = await peer.expect(TaskManagementRequest)
        assert again.initiator_task_tag != request.initiator_task_tag
        await complete(peer, again)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert codes == [Code.FUNCTION_COMPLETE]
        nursery.start_soon(manage)
        request = await peer.expect(TaskManagementRequest)
        await peer.reply(Reject(RejectReason.COMMAND_NOT_SUPPORTED, data=request.pack(0, 0)))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert codes == [Code.FUNCTION_COMPLETE, None]


@pytest.mark.checklist(52, "11.6")
async def test_a_response_after_the_end_of_its_request_is_dropped() -> None:
    """§4.2.3.3: nobody waits for it any more."""
    async with (
        played_session(command_timeout_s=0.6) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        abort = await peer.expect(TaskManagementRequest)
        reset = await peer.expect(TaskManagementRequest)
        await complete(peer, abort)
        await complete(peer, reset)
        again = await peer.expect(ScsiCommand)
        assert again.initiator_task_tag != command.initiator_task_tag
        await peer.reply(ScsiResponse(again.initiator_task_tag))
        assert (await running.done()).status == 0
        assert session.counters.connections_lost == 0
        assert target.latest is peer
