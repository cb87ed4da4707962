"""Connection recovery at ErrorRecoveryLevel 2 (RFC 7143 §7.1.4.3, §7.2.2)."""

import pytest
import trio

from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    R2T,
    DataIn,
    DataOut,
    LogoutReason,
    ScsiCommand,
    ScsiResponse,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi import cdb
from tests.checklist.several import (
    LEVEL_2,
    acknowledge,
    content,
    logged_out,
    reads,
    reassigned,
    two_connections,
)
from tests.initiator.peer import (
    ISID,
    LUN,
    TSIH,
    Running,
    answer,
    offer,
    played_session,
    unit_ready,
)

# -- level 2 --------------------------------------------------------------------------------------


@pytest.mark.checklist(53, "7.2.2")
async def test_a_command_moves_to_the_connection_that_is_left() -> None:
    """Logout with reason 2, TASK REASSIGN with the original tag, and the read goes on."""
    async with (
        two_connections(LEVEL_2, erl=2) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await answer(first)
        await running.done()
        blocker = Running(nursery, session, unit_ready())
        blocking = await first.expect(ScsiCommand)
        moved = Running(nursery, session, reads(12))
        tag = (await second.expect(ScsiCommand)).initiator_task_tag
        await second.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await acknowledge(session, first)
        await trio.testing.wait_all_tasks_blocked(0.01)
        second.cut()
        await logged_out(first, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 1)
        request = await reassigned(first, tag)
        assert (request.exp_data_sn, request.ref_cmd_sn) == (1, 0)
        await first.reply(DataIn(tag, 1, 4, data=b"bbbb"), advance=False)
        await first.reply(DataIn(tag, 2, 8, data=b"cccc", final=True, has_status=True))
        task = await moved.done()
        assert (task.status, content(task)) == (0, b"aaaabbbbcccc")
        await first.reply(ScsiResponse(blocking.initiator_task_tag))
        await blocker.done()
        assert session.counters.logins == 1
        assert session.counters.commands_reassigned == 1


@pytest.mark.checklist(53, "11.5")
async def test_a_write_goes_on_where_the_target_wants_it() -> None:
    """After the reassignment the target asks for what it lacks, counting R2TSN on."""
    async with (
        two_connections(LEVEL_2, erl=2) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        blocker = Running(nursery, session, unit_ready())
        blocking = await first.expect(ScsiCommand)
        data = memoryview(bytes(position % 251 for position in range(12000)))
        moved = Running(nursery, session, Task(LUN, cdb.write(0, 1), write_from=data))
        tag = (await second.expect(ScsiCommand)).initiator_task_tag
        await second.expect(DataOut)
        await acknowledge(session, first)
        second.cut()
        await logged_out(first, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 1)
        await reassigned(first, tag)
        await first.reply(R2T(LUN, tag, 5, 0, 0, 12000), advance=False)
        got = bytearray()
        while len(got) < 12000:
            pdu = await first.expect(DataOut)
            assert (pdu.target_transfer_tag, pdu.buffer_offset) == (5, len(got))
            got += pdu.data
        assert got == data
        await first.reply(ScsiResponse(tag))
        await first.reply(ScsiResponse(blocking.initiator_task_tag))
        assert (await moved.done()).status == 0
        await blocker.done()


@pytest.mark.checklist(37, "6.3.4")
@pytest.mark.checklist(53, "7.2.2")
@pytest.mark.parametrize("code", [0, 255])
async def test_the_only_connection_is_reinstated(code: int) -> None:
    """A login with its TSIH and CID, then TASK REASSIGN; the session is the same."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await acknowledge(session, peer)
        peer.cut()
        again = await (await target.accept()).login(LEVEL_2, joins=peer)
        request = again.login_request
        assert request is not None
        assert (request.isid, request.tsih, request.cid) == (ISID, TSIH, 0)
        assert (await reassigned(again, tag, code)).exp_data_sn == 1
        await again.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True, has_status=True))
        assert content(await running.done()) == b"aaaabbbb"
        assert session.counters.logins == 1
        assert session.tsih == TSIH


@pytest.mark.checklist(47, "7.2.1")
@pytest.mark.checklist(53, "7.2.2")
async def test_a_command_that_never_arrived_is_retried_and_not_reassigned() -> None:
    """ExpCmdSN of the new login says so: same tag, same CmdSN."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        lost = await peer.expect(ScsiCommand)
        peer.exp_cmd_sn = lost.cmd_sn
        peer.cut()
        again = await (await target.accept()).login(LEVEL_2, joins=peer)
        command = await again.expect(ScsiCommand)
        assert command.initiator_task_tag == lost.initiator_task_tag
        assert command.cmd_sn == lost.cmd_sn
        await again.reply(ScsiResponse(command.initiator_task_tag))
        assert (await running.done()).status == 0


@pytest.mark.checklist(53, "11.6")
async def test_a_command_that_the_target_forgot_starts_anew() -> None:
    """Response 1, task does not exist; what came before counts for nothing."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"old!"), advance=False)
        await acknowledge(session, peer)
        peer.cut()
        again = await (await target.accept()).login(LEVEL_2, joins=peer)
        request = await again.expect(TaskManagementRequest)
        gone = TmfResponseCode.TASK_DOES_NOT_EXIST
        await again.reply(TaskManagementResponse(request.initiator_task_tag, gone))
        command = await again.expect(ScsiCommand)
        assert command.initiator_task_tag != tag
        new = command.initiator_task_tag
        await again.reply(DataIn(new, data=b"new data", final=True, has_status=True))
        assert content(await running.done()) == b"new data"


@pytest.mark.checklist(53, "11.6")
@pytest.mark.parametrize(
    "code",
    [
        TmfResponseCode.TASK_STILL_ALLEGIANT,
        TmfResponseCode.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED,
        TmfResponseCode.FUNCTION_NOT_SUPPORTED,
    ],
)
async def test_a_refused_reassignment_leads_to_a_new_session(code: int) -> None:
    """Only that excludes that the old command is still carried out: fall back to level 0."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await acknowledge(session, peer)
        peer.cut()
        second = await (await target.accept()).login(LEVEL_2, joins=peer)
        request = await second.expect(TaskManagementRequest)
        await second.reply(TaskManagementResponse(request.initiator_task_tag, code))
        third = await (await target.accept()).login(LEVEL_2)
        assert third.login_request is not None
        assert third.login_request.tsih == 0
        await answer(third)
        assert (await running.done()).status == 0
        assert session.counters.logins == 2


@pytest.mark.checklist(55, "7.5")
async def test_after_time2retain_the_session_is_given_up() -> None:
    """The target keeps nothing for longer: a new session instead of a reinstated connection."""
    offered = offer(error_recovery_level=2, max_outstanding_r2t=1, default_time2retain=1)
    async with (
        played_session(offered, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        assert session.parameters.default_time2retain == 1
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await acknowledge(session, peer)
        cut_at = trio.current_time()
        peer.cut()
        while True:
            connection = await target.accept()
            if trio.current_time() - cut_at > 1:
                break
            connection.cut()
        again = await connection.login(offered)
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(53, "7.2.2")
@pytest.mark.checklist(37, "6.3.4")
async def test_a_session_that_the_target_has_forgotten_is_opened_anew() -> None:
    """020a, session does not exist: recovery falls back to level 0."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await acknowledge(session, peer)
        peer.cut()
        refused = await (await target.accept()).refuse_login(0x020A)
        assert refused.tsih == TSIH
        again = await (await target.accept()).login(LEVEL_2)
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        await answer(again)
        assert (await running.done()).status == 0
        assert session.counters.logins == 2
