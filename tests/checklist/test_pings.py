"""NOP-Out and NOP-In (checks 48 and 49)."""

import pytest
import trio

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.pdu import NO_TAG, NopIn, NopOut, ScsiCommand, ScsiResponse
from tests.initiator.peer import LUN, Running, answer, played_session, unit_ready, until


@pytest.mark.checklist(49, "11.18")
async def test_a_ping_that_comes_back_changed_ends_the_connection() -> None:
    async with (
        played_session(noop_interval_s=0.05, noop_timeout_s=5) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        ping = await peer.expect(NopOut)
        changed = bytes(ping.data[:-1]) + b"?"
        assert len(ping.data) > 0
        await peer.reply(NopIn(ping.initiator_task_tag, data=changed))
        again = await (await target.accept()).login()
        assert isinstance(session.last_error, ProtocolViolation)
        assert session.last_error.pdu == NopIn.name
        running = Running(nursery, session, unit_ready())
        command = await again.next_of(ScsiCommand)
        await again.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()


@pytest.mark.checklist(49, "11.18")
@pytest.mark.parametrize("kept", [0, 5])
async def test_a_target_may_cut_the_echo(kept: int) -> None:
    """Up to its own MaxRecvDataSegmentLength comes back, or nothing."""
    async with played_session(noop_interval_s=0.05, noop_timeout_s=5) as (session, peer, _):
        for _ in range(2):
            ping = await peer.expect(NopOut)
            assert (ping.immediate, ping.target_transfer_tag) == (True, NO_TAG)
            await peer.reply(NopIn(ping.initiator_task_tag, data=bytes(ping.data[:kept])))
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(48, "11.18")
async def test_only_a_nop_in_with_a_transfer_tag_is_answered() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        await peer.reply(NopIn(), advance=False)
        await peer.reply(NopIn(lun=LUN), advance=False)
        await peer.nothing()
        await peer.reply(NopIn(target_transfer_tag=0, lun=0xFFFF_0000_1234_5678), advance=False)
        pong = await peer.expect(NopOut)
        assert (pong.initiator_task_tag, pong.target_transfer_tag) == (NO_TAG, 0)
        assert (pong.lun, pong.immediate, bytes(pong.data)) == (0xFFFF_0000_1234_5678, True, b"")
        running = Running(nursery, session, unit_ready())
        assert (await answer(peer)).cmd_sn == pong.cmd_sn
        await running.done()


@pytest.mark.checklist(48, "11.19")
async def test_a_nop_in_that_is_answer_and_question_at_once_is_a_violation() -> None:
    """§7.7: both tags valid is a format error, which ends the session's connections."""
    async with played_session(noop_interval_s=0.2, noop_timeout_s=5) as (session, peer, target):
        ping = await peer.expect(NopOut)
        both = NopIn(ping.initiator_task_tag, target_transfer_tag=3, lun=LUN)
        await peer.reply(both)
        await (await target.accept()).login()
        assert isinstance(session.last_error, ProtocolViolation)
        assert session.last_error.pdu == NopIn.name
        await until(lambda: session.counters.logins == 2)
