"""Sessions of several connections where things go wrong at the worst moment."""

from contextlib import suppress

import pytest
import trio

from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.initiator import supervisor as supervisor_module
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    R2T,
    DataIn,
    DataOut,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    NopOut,
    ScsiCommand,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from tests.initiator.levels import (
    acknowledge,
    confirm_logout,
    content,
    joinable,
    reads,
    several,
    writes,
)
from tests.initiator.peer import (
    ISID,
    TSIH,
    PlayedConnection,
    PlayedTarget,
    Running,
    answer,
    played_session,
    unit_ready,
    until,
)

Function = TaskManagementFunction


async def next_login(target: PlayedTarget, count: int, level: int = 0) -> PlayedConnection:
    """The next login of a new session; joining ones that the loss has overtaken are passed over."""
    while True:
        connection = await target.accept()
        with suppress(ConnectionLost):
            return await connection.login(joinable(count, level))


async def reassigned(
    peer: PlayedConnection, tag: int, code: int = TmfResponseCode.FUNCTION_COMPLETE
) -> TaskManagementRequest:
    request = await peer.expect(TaskManagementRequest)
    assert (request.function, request.immediate) == (Function.TASK_REASSIGN, True)
    assert (request.referenced_task_tag, request.lun, request.ref_cmd_sn) == (tag, 0, 0)
    await peer.reply(TaskManagementResponse(request.initiator_task_tag, code))
    return request


# -- joining --------------------------------------------------------------------------------------


@pytest.mark.checklist(37, "6.3.4")
async def test_a_reinstated_session_gets_all_its_connections_back() -> None:
    """Also where checks come between its login and its first command."""
    async with several(2) as (session, peers, target), trio.open_nursery() as nursery:
        session.checks.append(lambda: session.execute(_urgent()))
        for peer in peers:
            peer.cut()
        leading = await next_login(target, 2)
        assert leading.login_request is not None
        assert (leading.login_request.isid, leading.login_request.tsih) == (ISID, 0)
        await answer(leading)
        joining = await (await target.accept()).login(joinable(2), joins=leading)
        assert joining.login_request is not None
        assert joining.login_request.tsih == TSIH
        await until(lambda: len(session.connections) == 2)
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        for peer in (leading, joining):
            await answer(peer)
        for task in running:
            await task.done()


def _urgent() -> Task:
    task = unit_ready()
    task.urgent = True
    return task


@pytest.mark.checklist(39, "11.13.5")
async def test_a_refused_connection_leaves_the_session_as_it_is() -> None:
    """0206, "too many connections": what there is has to do, and nobody asks again."""
    async with (
        played_session(joinable(2), connections=2, logout=False) as (session, first, target),
        trio.open_nursery() as nursery,
    ):
        request = await (await target.accept()).refuse_login(0x0206)
        assert request.tsih == TSIH
        running = Running(nursery, session, unit_ready())
        await answer(first)
        await running.done()
        with trio.move_on_after(0.7) as scope:
            await target.accept()
        assert scope.cancelled_caught, "the target was asked again"
        target.close()


async def test_a_connection_that_fails_to_join_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor_module, "_JOIN_BACKOFF_FIRST_S", 0.02)
    async with played_session(joinable(2), connections=2, logout=False) as (session, first, target):
        (await target.accept()).cut()
        await (await target.accept()).refuse_login(0x0301)
        second = await (await target.accept()).login(joinable(2), joins=first)
        await until(lambda: len(session.connections) == 2)
        assert second.login_request is not None
        assert (second.login_request.tsih, second.login_request.cid) == (TSIH, 1)
        target.close()


# -- allegiance -----------------------------------------------------------------------------------


@pytest.mark.checklist(8, "4.2.5.1")
async def test_a_status_on_the_wrong_connection_is_a_violation() -> None:
    """The target is wrong, not the path: the session starts anew (§7.7)."""
    async with several(2) as (session, peers, target), trio.open_nursery() as nursery:
        first, second = peers
        running = Running(nursery, session, unit_ready())
        tag = (await first.expect(ScsiCommand)).initiator_task_tag
        await second.reply(ScsiResponse(tag))
        again = await (await target.accept()).login(joinable(2))
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        assert "no command here has the tag" in str(session.last_error)
        await again.reply(ScsiResponse((await again.expect(ScsiCommand)).initiator_task_tag))
        assert (await running.done()).status == 0
        await (await target.accept()).login(joinable(2), joins=again)
        await until(lambda: len(session.connections) == 2)
        assert session.counters.logins == 2


@pytest.mark.checklist(1, "4.2.2.1")
@pytest.mark.checklist(2, "4.2.2.1")
async def test_cmd_sn_wraps_over_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One numbering, in the order of the requests, whatever the connection."""
    monkeypatch.setattr(supervisor_module, "FIRST_CMD_SN", 0xFFFF_FFFD)
    async with several(3) as (session, peers, _), trio.open_nursery() as nursery:
        running = [Running(nursery, session, unit_ready()) for _ in range(6)]
        commands = [await peers[number % 3].expect(ScsiCommand) for number in range(6)]
        numbers = [0xFFFF_FFFD, 0xFFFF_FFFE, 0xFFFF_FFFF, 0, 1, 2]
        assert sorted((command.cmd_sn for command in commands), key=numbers.index) == numbers
        assert len({command.initiator_task_tag for command in commands}) == 6
        for number, command in enumerate(commands):
            await peers[number % 3].reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            await task.done()
        assert session.window.exp_cmd_sn == 3


@pytest.mark.checklist(2, "4.2.2.1")
async def test_a_window_of_one_is_shared_by_all_connections() -> None:
    async with several(2, window=1) as (session, peers, _), trio.open_nursery() as nursery:
        running = [Running(nursery, session, unit_ready()) for _ in range(4)]
        for number in range(1, 5):
            # The window opens with a response, when its connection still is the busier one.
            peer, other = peers if number % 2 else reversed(peers)
            command = await peer.expect(ScsiCommand)
            assert command.cmd_sn == number
            await other.nothing(0.01)
            await peer.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            await task.done()


# -- cleanup --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "silent"])
async def test_a_logout_that_ends_the_wrong_connection(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tgt ends the connection that carries it: nothing is settled, and a new session ends all."""
    monkeypatch.setattr("orion_iscsifs.initiator.cleanup.LOGOUT_TIMEOUT_S", 0.2)
    async with several(3) as (session, peers, target), trio.open_nursery() as nursery:
        running = [Running(nursery, session, unit_ready()) for _ in range(3)]
        for peer in peers:
            await peer.expect(ScsiCommand)
        peers[2].cut()
        request = await peers[0].expect(LogoutRequest)
        assert request.cid == 2
        await peers[0].reply(LogoutResponse(request.initiator_task_tag))
        if how == "closed":
            peers[0].cut()
        else:
            await peers[0].expect(NopOut)
        try:
            again = await (await target.accept()).login(joinable(1))
        except ConnectionLost:  # one more for the session, which is over just now
            again = await (await target.accept()).login(joinable(1))
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        assert peers[1].received == []
        for _ in running:
            command = await again.next_of(ScsiCommand)
            await again.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            assert (await task.done()).status == 0
        assert session.counters.logins == 2


@pytest.mark.checklist(51, "11.15.1")
@pytest.mark.parametrize("level", [0, 2])
async def test_a_connection_that_the_target_has_forgotten_is_settled(level: int) -> None:
    """Response 1: its commands ended with it. The Time2Wait of that response means nothing."""
    async with several(2, level=level) as (session, peers, _), trio.open_nursery() as nursery:
        first, second = peers
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        mine = await first.expect(ScsiCommand)
        lost = await second.expect(ScsiCommand)
        await acknowledge(session, first)
        second.cut()
        request = await first.expect(LogoutRequest)
        response = LogoutResponse(request.initiator_task_tag, LogoutResponseCode.CID_NOT_FOUND)
        response.time2wait_s = 4000
        await first.reply(response)
        if level == 0:
            await first.pinged()
        again = await first.expect(ScsiCommand)
        assert again.cmd_sn == 3
        assert again.initiator_task_tag != lost.initiator_task_tag
        for command in (mine, again):
            await first.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            await task.done()


@pytest.mark.checklist(36, "6.3.5")
@pytest.mark.parametrize("level", [0, 2])
async def test_the_survivor_is_lost_during_the_cleanup(level: int) -> None:
    """Level 0: a new session. Level 2: both are reinstated in turn, and nothing starts anew."""
    async with several(2, level=level) as (session, peers, target), trio.open_nursery() as nursery:
        first, second = peers
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        tags = [(await peer.expect(ScsiCommand)).initiator_task_tag for peer in peers]
        await acknowledge(session, first)
        second.cut()
        await first.expect(LogoutRequest)
        first.cut()
        if level == 0:
            again = await next_login(target, 2)
            assert again.login_request is not None
            assert (again.login_request.isid, again.login_request.tsih) == (ISID, 0)
            for _ in running:
                await answer(again)
        else:
            again = await (await target.accept()).login(joinable(2, 2), joins=first)
            request = again.login_request
            assert request is not None
            assert (request.tsih, request.cid) == (TSIH, 1)
            await reassigned(again, tags[1])
            await again.reply(ScsiResponse(tags[1]))
            await confirm_logout(again, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 0)
            await reassigned(again, tags[0])
            await again.reply(ScsiResponse(tags[0]))
        for task in running:
            assert (await task.done()).status == 0
        assert session.state is State.LOGGED_IN
        assert session.counters.logins == (2 if level == 0 else 1)


# -- allegiance that moves ------------------------------------------------------------------------


@pytest.mark.checklist(53, "7.2.2")
async def test_a_write_is_asked_again_for_what_died_with_its_connection() -> None:
    """The R2T that was answered on the lost connection comes again under its old R2TSN."""
    async with several(1, level=2) as (session, peers, target), trio.open_nursery() as nursery:
        (first,) = peers
        task = writes(12000)
        running = Running(nursery, session, task)
        command = await first.expect(ScsiCommand)
        await first.expect(DataOut)
        tag = command.initiator_task_tag
        r2t = R2T(command.lun, tag, 1, 0, 8192, 3808)
        await first.reply(r2t, advance=False)
        await first.expect(DataOut)
        first.cut()
        again = await (await target.accept()).login(joinable(1, 2), joins=first)
        assert (await reassigned(again, tag)).exp_data_sn == 0
        r2t.target_transfer_tag = 2
        await again.reply(r2t, advance=False)
        data = await again.expect(DataOut)
        assert (data.target_transfer_tag, data.buffer_offset, data.data_sn) == (2, 8192, 0)
        assert task.write_from is not None
        assert bytes(data.data) == bytes(task.write_from[8192:])
        await again.reply(ScsiResponse(tag))
        assert (await running.done()).status == 0
        assert session.counters.logins == 1


@pytest.mark.checklist(46, "7.11")
@pytest.mark.checklist(53, "11.6.1")
@pytest.mark.parametrize("code", [0, 255])
async def test_a_reassigned_command_that_is_not_answered_is_aborted(code: int) -> None:
    """It had climbed on the lost connection before, which counts for nothing on the new one."""
    async with (
        several(1, level=2, command_timeout_s=0.2) as (session, peers, target),
        trio.open_nursery() as nursery,
    ):
        (first,) = peers
        running = Running(nursery, session, reads(4))
        tag = (await first.expect(ScsiCommand)).initiator_task_tag
        await acknowledge(session, first)
        abort = await first.expect(TaskManagementRequest)
        assert (abort.function, abort.referenced_task_tag) == (Function.ABORT_TASK, tag)
        first.cut()
        again = await (await target.accept()).login(joinable(1, 2), joins=first)
        assert again.login_request is not None
        assert again.login_request.tsih == TSIH, "no new session because an abort was cut off"
        await reassigned(again, tag, code)
        reset = await again.expect(TaskManagementRequest)
        assert (reset.function, reset.lun) == (Function.LOGICAL_UNIT_RESET, 1 << 48)
        await again.reply(TaskManagementResponse(reset.initiator_task_tag))
        command = await again.expect(ScsiCommand)
        assert command.initiator_task_tag != tag
        await again.reply(
            DataIn(command.initiator_task_tag, data=b"abcd", final=True, has_status=True)
        )
        assert content(await running.done()) == b"abcd"


# -- at random ------------------------------------------------------------------------------------
