"""CmdSN, ExpCmdSN, MaxCmdSN, StatSN and the Initiator Task Tag on the wire (checks 1 to 8)."""

import pytest
import trio

from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    AsyncMessage,
    DataIn,
    NopIn,
    NopOut,
    ScsiCommand,
    ScsiResponse,
)
from orion_iscsifs.scsi import cdb
from tests.initiator.peer import LUN, Running, answer, played_session, unit_ready, until


@pytest.mark.checklist(1, "4.2.2.1")
async def test_stat_sn_passes_its_wrap() -> None:
    """ExpStatSN acknowledges 0xffffffff with 0 and goes on."""
    async with (
        played_session(stat_sn=0xFFFF_FFFB) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        acknowledged = []
        for _ in range(6):
            running = Running(nursery, session, unit_ready())
            acknowledged.append((await answer(peer)).exp_stat_sn)
            assert (await running.done()).status == 0
        # The login took two StatSNs.
        assert acknowledged == [0xFFFF_FFFD, 0xFFFF_FFFE, 0xFFFF_FFFF, 0, 1, 2]
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(1, "4.2.2.1")
@pytest.mark.checklist(2, "4.2.2.1")
async def test_cmd_sn_passes_its_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a window of two, so that every comparison at the wrap decides something."""
    monkeypatch.setattr("orion_iscsifs.initiator.supervisor.FIRST_CMD_SN", 0xFFFF_FFFD)
    async with played_session(window=2) as (session, peer, _), trio.open_nursery() as nursery:
        running = [Running(nursery, session, unit_ready()) for _ in range(6)]
        sent = [(await answer(peer)).cmd_sn for _ in range(6)]
        assert sent == [0xFFFF_FFFD, 0xFFFF_FFFE, 0xFFFF_FFFF, 0, 1, 2]
        for task in running:
            await task.done()
        assert session.window.cmd_sn == 3


@pytest.mark.checklist(3, "4.2.2.1")
async def test_a_window_that_contradicts_itself_is_ignored() -> None:
    """MaxCmdSN below ExpCmdSN - 1: neither of the two counts, the old window stays open."""
    async with played_session(window=4) as (session, peer, _), trio.open_nursery() as nursery:
        contradiction = NopIn(stat_sn=peer.stat_sn, exp_cmd_sn=1_000_000, max_cmd_sn=999_998)
        await peer.send(contradiction)
        running = Running(nursery, session, unit_ready())
        assert (await answer(peer)).cmd_sn == 1
        await running.done()
        assert session.window.exp_cmd_sn == 2


@pytest.mark.checklist(2, "4.2.2.1")
@pytest.mark.checklist(3, "4.2.2.1")
async def test_a_window_never_moves_backwards() -> None:
    """An older MaxCmdSN, overtaken on its way, does not close what a newer one opened."""
    async with played_session(window=1) as (session, peer, _), trio.open_nursery() as nursery:
        for exp_cmd_sn, max_cmd_sn in ((1, 3), (1, 1), (0, 2)):
            await peer.send(
                NopIn(stat_sn=peer.stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
            )
        await until(lambda: session.window.max_cmd_sn == 3)
        running = [Running(nursery, session, unit_ready()) for _ in range(4)]
        commands = [await peer.expect(ScsiCommand) for _ in range(3)]
        assert [command.cmd_sn for command in commands] == [1, 2, 3]
        await peer.nothing()
        for command in commands:
            await peer.reply(ScsiResponse(command.initiator_task_tag))
        assert (await answer(peer)).cmd_sn == 4
        for task in running:
            await task.done()


@pytest.mark.checklist(2, "4.2.2.1")
@pytest.mark.checklist(4, "4.2.2.1")
async def test_a_closed_window_holds_commands_and_lets_pings_through() -> None:
    """MaxCmdSN = ExpCmdSN - 1; a ping still goes, with the CmdSN that the next command gets."""
    async with (
        played_session(window=0, noop_interval_s=0.05, noop_timeout_s=5) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        ping = await peer.expect(NopOut)
        assert (ping.immediate, ping.cmd_sn) == (True, 1)
        peer.max_cmd_sn = 1
        await peer.reply(NopIn(ping.initiator_task_tag, data=bytes(ping.data)))
        command = await peer.expect(ScsiCommand)
        assert (command.immediate, command.cmd_sn) == (False, 1)
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()


@pytest.mark.checklist(5, "11.7.3")
async def test_an_async_message_uses_up_a_stat_sn_and_its_neighbours_do_not() -> None:
    """ITT ffffffff is no reason to skip the count; only R2T, Data-In without S and pings are."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        start = peer.stat_sn
        buffer = memoryview(bytearray(8))
        running = Running(nursery, session, Task(LUN, cdb.read(0, 1), read_into=buffer))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, data=b"abcd"), advance=False)
        await peer.reply(AsyncMessage(0))
        await peer.reply(NopIn(target_transfer_tag=1, lun=LUN), advance=False)
        assert (await peer.expect(NopOut)).exp_stat_sn == start + 1
        await peer.reply(DataIn(tag, 1, 4, final=True, has_status=True, data=b"efgh"))
        await running.done()
        await peer.reply(NopIn(target_transfer_tag=2, lun=LUN), advance=False)
        assert (await peer.expect(NopOut)).exp_stat_sn == start + 2
        assert bytes(buffer) == b"abcdefgh"


@pytest.mark.checklist(6, "7.9")
async def test_a_large_jump_of_stat_sn_ends_the_connection() -> None:
    """What was in flight is asked for again, on a new connection, and answered once."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        peer.stat_sn += 1 << 30
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        again = await (await target.accept()).login()
        assert "StatSN" in str(session.last_error)
        assert "4.2.2.2" in str(session.last_error)
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(7, "11.13.5")
async def test_the_numbers_of_a_refused_login_mean_nothing() -> None:
    """The response that accepts seeds ExpStatSN; the refusal before it leaves no trace."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        peer.cut()
        await (await target.accept()).refuse_login(0x0300)
        again = await target.accept()
        again.stat_sn = 0x5000
        await again.login()
        assert again.login_request is not None
        assert again.login_request.exp_stat_sn != 0xABCDF0
        command = await answer(again)
        assert command.exp_stat_sn == 0x5002
        assert command.cmd_sn == again.login_request.cmd_sn
        await running.done()


@pytest.mark.checklist(8, "11.2.1.8")
async def test_the_tag_of_a_command_is_never_the_reserved_one() -> None:
    """At the wrap the reserved tag and every tag in flight are stepped over."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        held = Running(nursery, session, unit_ready())
        first = await peer.expect(ScsiCommand)
        session._tag = first.initiator_task_tag - 1
        running = Running(nursery, session, unit_ready())
        second = await peer.expect(ScsiCommand)
        assert second.initiator_task_tag != first.initiator_task_tag
        await peer.reply(ScsiResponse(second.initiator_task_tag))
        await running.done()
        session._tag = NO_TAG - 1
        running = Running(nursery, session, unit_ready())
        third = await answer(peer)
        assert third.initiator_task_tag not in (NO_TAG, first.initiator_task_tag)
        await running.done()
        await peer.reply(ScsiResponse(first.initiator_task_tag))
        await held.done()


@pytest.mark.checklist(8, "11.2.1.8")
async def test_an_answer_to_a_task_of_the_old_session_reaches_nobody() -> None:
    """After session recovery a command has another tag; its old one is a violation."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        old = await peer.expect(ScsiCommand)
        peer.cut()
        again = await (await target.accept()).login()
        new = await again.expect(ScsiCommand)
        assert new.initiator_task_tag != old.initiator_task_tag
        await again.reply(ScsiResponse(old.initiator_task_tag, status=2))
        third = await (await target.accept()).login()
        await answer(third)
        assert (await running.done()).status == 0
