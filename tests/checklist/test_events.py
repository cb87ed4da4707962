"""Async Messages and Rejects (checks 47 and 50)."""

import pytest
import trio

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    AsyncEvent,
    AsyncMessage,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.scsi.sense import SenseData, SenseKey, encode_sense
from tests.initiator.peer import (
    LUN,
    PlayedConnection,
    Running,
    answer,
    played_session,
    unit_ready,
    until,
)

# -- Async Messages -------------------------------------------------------------------------------


@pytest.mark.checklist(50, "11.9.1")
async def test_a_scsi_event_is_told_to_whoever_listens() -> None:
    heard: list[tuple[int, SenseData]] = []
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        session.scsi_event_listeners.append(lambda lun, sense: heard.append((lun, sense)))
        told = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)
        data = encode_sense(told)
        event = AsyncMessage(AsyncEvent.SCSI_EVENT, lun=LUN)
        event.data = len(data).to_bytes(2, "big") + data
        await peer.reply(event)
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
    assert [(lun, sense.key, sense.asc, sense.ascq) for lun, sense in heard] == [(LUN, 6, 0x2A, 9)]


@pytest.mark.checklist(50, "11.9.1")
@pytest.mark.checklist(51, "11.14")
async def test_a_logout_that_is_asked_for_is_sent_in_time() -> None:
    """No new command; those in flight may end; then reason 1 or 0, and a new session."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        asked_at = trio.current_time()
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_REQUESTS_LOGOUT, parameter3=2))
        await until(lambda: not session.connections[0].takes_commands)
        held = Running(nursery, session, unit_ready())
        await peer.nothing()
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        assert (await running.done()).status == 0
        logout = await peer.expect(LogoutRequest)
        assert trio.current_time() - asked_at < 2
        assert logout.reason in (LogoutReason.CLOSE_CONNECTION, LogoutReason.CLOSE_SESSION)
        await peer.nothing()
        await peer.reply(LogoutResponse(logout.initiator_task_tag))
        peer.cut()
        again = await (await target.accept()).login()
        await answer(again)
        assert (await held.done()).status == 0


@pytest.mark.checklist(50, "11.9.1")
async def test_a_logout_does_not_wait_for_a_command_that_takes_too_long() -> None:
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        asked_at = trio.current_time()
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_REQUESTS_LOGOUT, parameter3=1))
        logout = await peer.expect(LogoutRequest)
        assert trio.current_time() - asked_at < 1
        await peer.reply(LogoutResponse(logout.initiator_task_tag))
        peer.cut()
        again = await (await target.accept()).login()
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(50, "11.9.1")
@pytest.mark.checklist(55, "7.5")
@pytest.mark.parametrize(
    ("event", "parameter1"),
    [(AsyncEvent.TARGET_DROPS_CONNECTION, 0), (AsyncEvent.TARGET_DROPS_ALL_CONNECTIONS, 99)],
)
async def test_a_dropped_connection_is_left_alone_for_time2wait(
    event: AsyncEvent, parameter1: int
) -> None:
    """Parameter2 of the message counts, not what the login agreed on."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        dropped_at = trio.current_time()
        await peer.reply(AsyncMessage(event, parameter1=parameter1, parameter2=1, parameter3=5))
        connection = await target.accept()
        assert trio.current_time() - dropped_at >= 1
        await answer(await connection.login())
        assert (await running.done()).status == 0


@pytest.mark.checklist(50, "11.9.1")
async def test_the_end_of_another_connection_is_none_of_ours() -> None:
    """Event 2 names the connection by its CID."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_DROPS_CONNECTION, parameter1=41))
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(50, "11.9.1")
@pytest.mark.checklist(56, "11.10")
async def test_a_negotiation_that_is_asked_for_is_begun() -> None:
    """An empty Text Request; what the target then declares holds for what is sent to it."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_REQUESTS_NEGOTIATION, parameter3=3))
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_REQUESTS_NEGOTIATION, parameter3=3))
        request = await peer.expect(TextRequest)
        assert (bytes(request.data), request.target_transfer_tag) == (b"", NO_TAG)
        await peer.nothing()
        more = TextResponse(request.initiator_task_tag, final=False, target_transfer_tag=4)
        more.data = b"MaxRecvDataSegmentLength=1024\0"
        await peer.reply(more)
        request = await peer.expect(TextRequest)
        assert (request.target_transfer_tag, request.final) == (4, True)
        await peer.reply(TextResponse(request.initiator_task_tag))
        await until(lambda: session.connections[0].parameters.max_send_data_segment_length == 1024)
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(50, "11.9.1")
async def test_tasks_terminated_has_no_place_without_fast_abort() -> None:
    """FastAbort is never offered, so event 5 breaks the protocol."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        assert b"FastAbort" not in bytes(peer.login_request.data if peer.login_request else b"")
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await peer.reply(AsyncMessage(AsyncEvent.TASKS_TERMINATED, lun=LUN))
        again = await (await target.accept()).login()
        assert isinstance(session.last_error, ProtocolViolation)
        assert session.last_error.section == "11.9.1"
        await answer(again)
        assert (await running.done()).status == 0


# -- Rejects --------------------------------------------------------------------------------------


async def reject(peer: PlayedConnection, command: ScsiCommand, reason: int) -> None:
    """The command was never taken, so ExpCmdSN stays at its CmdSN (§7.3)."""
    peer.exp_cmd_sn, peer.max_cmd_sn = command.cmd_sn, command.cmd_sn + 31
    await peer.reply(Reject(reason, data=command.pack(0, len(command.data))))


@pytest.mark.checklist(47, "7.3")
async def test_a_damaged_command_is_sent_again_as_it_was() -> None:
    """Reason 02: the same tag and the same CmdSN, which plugs the gap."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        first = await peer.expect(ScsiCommand)
        await reject(peer, first, RejectReason.DATA_DIGEST_ERROR)
        again = await peer.expect(ScsiCommand)
        assert again.initiator_task_tag == first.initiator_task_tag
        assert (again.cmd_sn, again.cdb, again.lun) == (first.cmd_sn, first.cdb, first.lun)
        await peer.reply(ScsiResponse(again.initiator_task_tag))
        assert (await running.done()).status == 0
        assert session.counters.connections_lost == 0


REASONS_WITHOUT_A_RETRY = [
    RejectReason.PROTOCOL_ERROR,
    RejectReason.COMMAND_NOT_SUPPORTED,
    RejectReason.INVALID_PDU_FIELD,
]


@pytest.mark.checklist(47, "11.17.1")
@pytest.mark.parametrize("reason", REASONS_WITHOUT_A_RETRY)
async def test_the_gap_of_a_refused_command_is_plugged_with_a_ping(reason: RejectReason) -> None:
    """Its CmdSN goes to a NOP-Out; the command itself has a new one, and fails in the end."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        failed = trio.Event()

        async def fails() -> None:
            with pytest.raises(ProtocolViolation, match="rejects a SCSI Command") as caught:
                await session.execute(unit_ready())
            assert caught.value.section == "11.17.1"
            failed.set()

        nursery.start_soon(fails)
        tags = set()
        for _ in range(3):
            command = await peer.expect(ScsiCommand)
            tags.add(command.initiator_task_tag)
            await reject(peer, command, reason)
            plug = await peer.expect(NopOut)
            assert (plug.immediate, plug.cmd_sn) == (False, command.cmd_sn)
            await peer.reply(NopIn(plug.initiator_task_tag))
        with trio.fail_after(2):
            await failed.wait()
        assert len(tags) == 3
        running = Running(nursery, session, unit_ready())
        assert (await answer(peer)).cmd_sn == command.cmd_sn + 1
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(47, "7.3")
async def test_commands_behind_a_refused_one_are_not_disturbed() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = [Running(nursery, session, unit_ready()) for _ in range(3)]
        commands = [await peer.expect(ScsiCommand) for _ in range(3)]
        await reject(peer, commands[0], RejectReason.PROTOCOL_ERROR)
        plug = await peer.expect(NopOut)
        assert plug.cmd_sn == commands[0].cmd_sn
        again = await peer.expect(ScsiCommand)
        assert again.cmd_sn == commands[2].cmd_sn + 1
        peer.exp_cmd_sn = again.cmd_sn + 1
        await peer.reply(NopIn(plug.initiator_task_tag))
        for command in (*commands[1:], again):
            await peer.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            assert (await task.done()).status == 0


@pytest.mark.checklist(47, "11.17.1")
async def test_waiting_for_logout_leaves_the_command_to_the_logout() -> None:
    """Reason 0c: it must not be sent again here; it goes on after the new login."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_REQUESTS_LOGOUT, parameter3=1))
        await reject(peer, command, RejectReason.WAITING_FOR_LOGOUT)
        logout = await peer.expect(LogoutRequest)
        await peer.reply(LogoutResponse(logout.initiator_task_tag))
        peer.cut()
        again = await (await target.accept()).login()
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(5, "4.2.2.2")
@pytest.mark.checklist(47, "7.3")
async def test_a_reject_of_anything_else_only_uses_up_a_stat_sn() -> None:
    """A pong that the target did not like: nothing to plug, nothing to send again."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        await peer.reply(NopIn(target_transfer_tag=5, lun=LUN), advance=False)
        pong = await peer.expect(NopOut)
        await peer.reply(Reject(RejectReason.INVALID_PDU_FIELD, data=pong.pack(0, 0)))
        await until(lambda: session.connections[0].inbound.status.exp_stat_sn == peer.stat_sn)
        running = Running(nursery, session, unit_ready())
        command = await answer(peer)
        assert command.exp_stat_sn == pong.exp_stat_sn + 1
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(47, "11.17.1")
async def test_the_deprecated_reason_ends_the_connection() -> None:
    """Reason 0b, negotiation reset, counts as a negotiation that failed (§7.12)."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        await reject(peer, command, RejectReason.NEGOTIATION_RESET)
        again = await (await target.accept()).login()
        assert isinstance(session.last_error, ProtocolViolation)
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(47, "11.17.1")
async def test_a_command_that_is_in_progress_is_left_alone() -> None:
    """Reason 07: a second copy was refused; a third, under another tag, would be done twice."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        await reject(peer, command, RejectReason.TASK_IN_PROGRESS)
        await peer.nothing()
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        assert (await running.done()).status == 0
