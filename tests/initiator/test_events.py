"""Async Messages and Rejects that come at a bad moment (RFC 7143 §11.9, §11.17)."""

from dataclasses import replace

import pytest
import trio

from orion_iscsifs.initiator import events as events_module
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.protocol.pdu import (
    R2T,
    AsyncEvent,
    AsyncMessage,
    DataIn,
    DataOut,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    NopIn,
    NopOut,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TextRequest,
    TextResponse,
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
    LUN,
    PlayedConnection,
    Running,
    answer,
    played_session,
    unit_ready,
    until,
)

Function = TaskManagementFunction


def asks_for_logout(within_s: int) -> AsyncMessage:
    return AsyncMessage(AsyncEvent.TARGET_REQUESTS_LOGOUT, parameter3=within_s)


# -- logout asked for -----------------------------------------------------------------------------


@pytest.mark.checklist(50, "11.9.1")
@pytest.mark.checklist(51, "11.14")
async def test_a_logout_of_one_of_two_connections() -> None:
    """No new command there, those in flight end first, nothing follows the Logout Request."""
    async with several(2) as (session, peers, target), trio.open_nursery() as nursery:
        first, second = peers
        old = [Running(nursery, session, unit_ready()) for _ in range(2)]
        commands = [await peer.expect(ScsiCommand) for peer in peers]
        await second.reply(asks_for_logout(5))
        await second.reply(asks_for_logout(5))
        await until(lambda: not session.connections[1].takes_commands)
        new = [Running(nursery, session, unit_ready()) for _ in range(2)]
        for _ in new:
            await answer(first)
        await second.nothing()
        for peer, command in zip(peers, commands, strict=True):
            await peer.reply(ScsiResponse(command.initiator_task_tag))
        await confirm_logout(second, LogoutReason.CLOSE_CONNECTION, 1)
        await second.reply(NopIn(target_transfer_tag=3), advance=False)
        await second.nothing()
        second.cut()
        for task in (*old, *new):
            await task.done()
        again = await (await target.accept()).login(joinable(2), joins=first)
        assert again.login_request is not None
        assert again.login_request.cid == 1
        assert session.counters.logins == 1


@pytest.mark.checklist(50, "11.9.1")
@pytest.mark.parametrize("logged_out", [False, True], ids=["lost", "asked again"])
async def test_a_connection_that_ends_while_its_logout_is_asked_for(logged_out: bool) -> None:
    """It is lost while its last command is waited for, or asked again after the Logout Request."""
    async with several(2) as (session, peers, _), trio.open_nursery() as nursery:
        first, second = peers
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        commands = [await peer.expect(ScsiCommand) for peer in peers]
        await acknowledge(session, first)
        await second.reply(asks_for_logout(1))
        if logged_out:
            request = await second.expect(LogoutRequest)
            await second.reply(asks_for_logout(1))
            await second.nothing()
            await second.reply(LogoutResponse(request.initiator_task_tag))
            second.cut()
        else:
            second.cut()
            await confirm_logout(first, LogoutReason.CLOSE_CONNECTION, 1)
        again = await first.expect(ScsiCommand)
        assert again.initiator_task_tag != commands[1].initiator_task_tag
        for command in (commands[0], again):
            await first.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            await task.done()
        await trio.sleep(0.6)
        assert session.state is State.LOGGED_IN
        assert session.counters.logins == 1


@pytest.mark.checklist(51, "11.15.1")
@pytest.mark.parametrize(
    "code", [LogoutResponseCode.CID_NOT_FOUND, LogoutResponseCode.CLEANUP_FAILED]
)
async def test_a_logout_that_is_refused_is_no_logout(code: int) -> None:
    """The connection is closed all the same, and settled over the other one."""
    async with several(2) as (session, peers, _), trio.open_nursery() as nursery:
        first, second = peers
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        commands = [await peer.expect(ScsiCommand) for peer in peers]
        await acknowledge(session, first)
        await second.reply(asks_for_logout(0))
        request = await second.expect(LogoutRequest)
        await second.reply(LogoutResponse(request.initiator_task_tag, code))
        await confirm_logout(first, LogoutReason.CLOSE_CONNECTION, 1)
        again = await first.expect(ScsiCommand)
        for command in (commands[0], again):
            await first.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            await task.done()


# -- drops ----------------------------------------------------------------------------------------


@pytest.mark.checklist(50, "11.9.1")
@pytest.mark.checklist(55, "7.5.2")
@pytest.mark.parametrize("event", [AsyncEvent.TARGET_DROPS_CONNECTION, 3])
async def test_time2wait_of_a_drop_is_waited_for(event: int) -> None:
    """Told on the other connection, or for the whole session: its Time2Wait, not the default."""
    async with several(2) as (session, peers, target), trio.open_nursery() as nursery:
        first, second = peers
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        commands = [await peer.expect(ScsiCommand) for peer in peers]
        started = trio.current_time()
        await first.reply(AsyncMessage(event, parameter1=1, parameter2=1, parameter3=9))
        if event == 3:
            again = await (await target.accept()).login(joinable(2))
            assert trio.current_time() - started >= 0.99
            for _ in running:
                await answer(again)
        else:
            await first.nothing(0.9)
            await confirm_logout(first, LogoutReason.CLOSE_CONNECTION, 1)
            assert trio.current_time() - started >= 0.99
            again_command = await first.expect(ScsiCommand)
            assert again_command.cmd_sn == 3
            for command in (commands[0], again_command):
                await first.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            await task.done()
        assert second is not first


@pytest.mark.checklist(50, "11.9.1")
async def test_the_drop_of_an_unknown_connection_is_none_of_ours() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_DROPS_CONNECTION, parameter1=77))
        for event in (6, 77, 247, *range(248, 256)):
            await peer.reply(AsyncMessage(event, async_vcode=3, data=b"whatever"))
        status = session.connections[0].inbound.status
        await until(lambda: status.exp_stat_sn == peer.stat_sn)
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


# -- negotiation ----------------------------------------------------------------------------------


@pytest.mark.checklist(50, "11.9.1")
@pytest.mark.checklist(56, "11.10")
@pytest.mark.checklist(14, "13.12")
async def test_a_smaller_segment_length_holds_for_writes_in_flight_too() -> None:
    """The target declares it in the exchange; later Data-Out PDUs are no longer than that."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, writes(12000))
        command = await peer.expect(ScsiCommand)
        await peer.expect(DataOut)
        for _ in range(2):  # one exchange at a time: the second request is the pending one
            await peer.reply(AsyncMessage(AsyncEvent.TARGET_REQUESTS_NEGOTIATION, parameter3=5))
        request = await peer.expect(TextRequest)
        assert (request.immediate, request.target_transfer_tag) == (True, 0xFFFF_FFFF)
        await peer.nothing()
        key = b"MaxRecvDataSegmentLength=1024\0"
        await peer.reply(TextResponse(request.initiator_task_tag, final=True, data=key))
        connection = session.connections[0]
        await until(lambda: connection.parameters.max_send_data_segment_length == 1024)
        tag = command.initiator_task_tag
        await peer.reply(R2T(LUN, tag, 1, 0, 8192, 3808), advance=False)
        parts = [await peer.expect(DataOut) for _ in range(4)]
        assert [(part.data_sn, len(part.data)) for part in parts] == [
            (0, 1024),
            (1, 1024),
            (2, 1024),
            (3, 736),
        ]
        assert [part.final for part in parts] == [False, False, False, True]
        await peer.reply(ScsiResponse(tag))
        await running.done()


# -- rejects --------------------------------------------------------------------------------------


@pytest.mark.checklist(47, "11.17.1")
@pytest.mark.parametrize("reason", [0x05, 0x06, 0x0C, 0x77])
async def test_a_rejected_ping_is_an_answer(reason: int) -> None:
    """Who rejects is alive, whatever the reason."""
    async with (
        played_session(noop_interval_s=0.05, noop_timeout_s=3, command_timeout_s=0.8) as (
            session,
            peer,
            _,
        ),
        trio.open_nursery() as nursery,
    ):
        ping = await peer.expect(NopOut)
        await peer.reply(Reject(reason, data=ping.pack(0, 0)))
        ping = await peer.expect(NopOut)
        await peer.reply(NopIn(ping.initiator_task_tag, data=bytes(ping.data)))
        running = Running(nursery, session, unit_ready())
        command = await peer.next_of(ScsiCommand)
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(47, "7.3")
async def test_a_rejected_data_out_is_left_to_the_status() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, writes(6000))
        command = await peer.expect(ScsiCommand)
        data = await peer.expect(DataOut)
        await peer.reply(Reject(RejectReason.PROTOCOL_ERROR, data=data.pack(0, 0)))
        await peer.nothing()
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        assert (await running.done()).status == 0
        assert session.counters.commands_retried == 0


@pytest.mark.parametrize("header", [b"", b"\x01" * 47, b"\xff" * 48, b"\x3f" * 60])
async def test_a_reject_that_names_nothing_of_ours_is_only_logged(header: bytes) -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        await peer.reply(Reject(RejectReason.PROTOCOL_ERROR, data=header))
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


# -- task management at bad moments ---------------------------------------------------------------


@pytest.mark.checklist(46, "7.11")
async def test_a_command_that_never_arrived_is_aborted_even_so() -> None:
    """QUERY TASK does not find it, but only the abort fills the gap of its CmdSN (§7.11)."""
    async with (
        played_session(joinable(1), command_timeout_s=0.1) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        session.parameters = replace(session.parameters, iscsi_protocol_level=2)
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        peer.exp_cmd_sn -= 1  # it was thrown away
        tag = command.initiator_task_tag
        query = await peer.expect(TaskManagementRequest)
        assert (query.function, query.referenced_task_tag, query.lun) == (9, tag, LUN)
        await peer.reply(TaskManagementResponse(query.initiator_task_tag))
        abort = await peer.expect(TaskManagementRequest)
        assert (abort.function, abort.referenced_task_tag) == (Function.ABORT_TASK, tag)
        assert (abort.ref_cmd_sn, abort.cmd_sn) == (command.cmd_sn, command.cmd_sn + 1)
        peer.exp_cmd_sn += 1
        await peer.reply(TaskManagementResponse(abort.initiator_task_tag))
        again = await answer(peer)
        assert again.cmd_sn == command.cmd_sn + 1
        assert again.initiator_task_tag != tag
        await running.done()


@pytest.mark.checklist(46, "7.11")
@pytest.mark.checklist(52, "4.2.3")
async def test_an_abort_does_not_follow_its_command_to_a_new_tag() -> None:
    """While an abort waits for room the unit is reset, and the command is issued anew."""
    async with (
        played_session(command_timeout_s=0.3) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        abort = await peer.expect(TaskManagementRequest)
        await peer.reply(Reject(RejectReason.IMMEDIATE_COMMAND_REJECT, data=abort.pack(0, 0)))
        task = running.task
        await until(lambda: not session.connections[0].replies)
        session.hold([task], ConnectionError("reset"))  # type: ignore[arg-type]
        session.pump()
        again = await peer.expect(ScsiCommand)
        assert again.initiator_task_tag != command.initiator_task_tag
        await peer.nothing(0.25)
        await peer.reply(ScsiResponse(again.initiator_task_tag))
        await running.done()


@pytest.mark.checklist(8, "11.2.1.8")
@pytest.mark.checklist(52, "4.2.3")
async def test_what_comes_late_for_an_aborted_read_leaves_its_buffer_alone() -> None:
    """The caller has been told and has its buffer back; Data-In and response are dropped."""
    async with (
        played_session(command_timeout_s=0.1) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(4))
        old = (await peer.expect(ScsiCommand)).initiator_task_tag
        abort = await peer.expect(TaskManagementRequest)
        await peer.reply(
            TaskManagementResponse(abort.initiator_task_tag, TmfResponseCode.TASK_DOES_NOT_EXIST)
        )
        new = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(new, data=b"good", final=True, has_status=True))
        assert content(await running.done()) == b"good"
        await peer.reply(DataIn(old, data=b"late"), advance=False)
        await peer.reply(ScsiResponse(old, exp_data_sn=1))
        await peer.reply(R2T(LUN, old, 1, 0, 0, 4), advance=False)
        after = Running(nursery, session, unit_ready())
        await answer(peer)
        await after.done()
        assert content(running.task) == b"good"
        assert session.counters.connections_lost == 0


async def test_a_bug_beside_the_connections_costs_the_session_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The mount has to outlive it."""

    async def broken(*_: object) -> None:
        monkeypatch.undo()
        raise KeyError("a bug")

    monkeypatch.setattr(events_module.Events, "_log_out", broken)
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await peer.reply(asks_for_logout(3))
        again: PlayedConnection = await (await target.accept()).login()
        await answer(again)
        await running.done()
        assert "internal error" in str(session.last_error)
    assert "the session is given up" in caplog.text
