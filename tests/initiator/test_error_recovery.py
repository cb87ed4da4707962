"""ErrorRecoveryLevel 1 in its corners: several losses at once, damage on the way back, refusals."""

import pytest
import trio

from orion_iscsifs.initiator import recovering as recovering_module
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    DataOut,
    NopIn,
    Pdu,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    SnackType,
)
from tests.initiator.levels import LEVEL_1, content, reads, recovering, writes
from tests.initiator.peer import LUN, PlayedConnection, Running, answer, unit_ready, until


def run_of(snack: SnackRequest) -> tuple[int, int, int]:
    return snack.type, snack.beg_run, snack.run_length


async def sent_again(peer: PlayedConnection, stat_sn: int, pdu: ScsiResponse | DataIn) -> None:
    """A replica with its old StatSN (§11.16)."""
    pdu.stat_sn, pdu.exp_cmd_sn, pdu.max_cmd_sn = stat_sn, peer.exp_cmd_sn, peer.max_cmd_sn
    await peer.send(pdu)


async def commands(
    nursery: trio.Nursery, session: Session, peer: PlayedConnection, count: int
) -> tuple[list[Running], list[int]]:
    """So many commands under way, and their tags."""
    running = [Running(nursery, session, unit_ready()) for _ in range(count)]
    return running, [(await peer.expect(ScsiCommand)).initiator_task_tag for _ in running]


# -- statuses -------------------------------------------------------------------------------------


@pytest.mark.checklist(6, "7.9")
@pytest.mark.checklist(54, "11.16.6")
async def test_each_run_of_lost_statuses_is_asked_for_once() -> None:
    """A second gap behind the first one has a SNACK of its own, and the first is not repeated."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running, tags = await commands(nursery, session, peer, 5)
        due = peer.stat_sn
        for lost in (0, 2, 3):
            peer.stat_sn = due + lost + (2 if lost == 2 else 1)
            if lost == 3:
                break
            await peer.reply(ScsiResponse(tags[peer.stat_sn - due]))
            snack = await peer.expect(SnackRequest)
            assert snack.exp_stat_sn == due, "nothing is acknowledged past the first gap"
            assert (snack.initiator_task_tag, snack.target_transfer_tag) == (NO_TAG, NO_TAG)
            expected = (due, 1) if lost == 0 else (due + 2, 2)
            assert run_of(snack) == (SnackType.STATUS, *expected)
        for number in (3, 0, 2):
            await sent_again(peer, due + number, ScsiResponse(tags[number]))
        peer.stat_sn = due + 5
        for task in running:
            assert (await task.done()).status == 0
        await peer.nothing()
        nursery.start_soon(session.execute, unit_ready())
        assert (await answer(peer)).exp_stat_sn == due + 5


@pytest.mark.checklist(20, "11.7.3")
@pytest.mark.checklist(54, "7.9")
async def test_a_data_in_with_status_shows_a_gap_at_once() -> None:
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        first = Running(nursery, session, unit_ready())
        lost = (await peer.expect(ScsiCommand)).initiator_task_tag
        second = Running(nursery, session, reads(4))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        due = peer.stat_sn
        peer.stat_sn += 1
        await peer.reply(DataIn(tag, data=b"abcd", final=True, has_status=True))
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.STATUS, due, 1)
        await sent_again(peer, due, ScsiResponse(lost))
        assert (await first.done()).status == 0
        assert content(await second.done()) == b"abcd"


@pytest.mark.checklist(5, "11.8.3")
@pytest.mark.parametrize("shown_by", ["NOP-In", "R2T"])
async def test_a_status_number_that_is_only_carried_shows_a_gap(shown_by: str) -> None:
    """Both carry the next StatSN without using it up (§11.8.3, §11.19.2)."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        first = Running(nursery, session, unit_ready())
        lost = (await peer.expect(ScsiCommand)).initiator_task_tag
        second = Running(nursery, session, writes(12000))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.expect(DataOut)
        due = peer.stat_sn
        peer.stat_sn += 1
        r2t = R2T(LUN, tag, 1, 0, 8192, 3808)
        await peer.reply(NopIn() if shown_by == "NOP-In" else r2t, advance=False)
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.STATUS, due, 1)
        if shown_by == "R2T":
            await peer.expect(DataOut)
        await sent_again(peer, due, ScsiResponse(lost))
        assert (await first.done()).status == 0
        await peer.reply(ScsiResponse(tag))
        await second.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(45, "7.8")
async def test_a_status_that_is_damaged_again_is_asked_for_again() -> None:
    """Held statuses behind it don't hide it: the question starts at the first that is missing."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running, tags = await commands(nursery, session, peer, 2)
        due = peer.stat_sn
        sense = b"\0\x08\x70\0\6\0\0\0\0\0"
        await peer.damage(ScsiResponse(tags[0], data=sense))
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.STATUS, due, 0)
        await peer.reply(ScsiResponse(tags[1]))
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.STATUS, due, 1)
        peer.stat_sn = due
        await peer.damage(ScsiResponse(tags[0], data=sense))
        snack = await peer.expect(SnackRequest)
        assert (snack.type, snack.beg_run, snack.exp_stat_sn) == (SnackType.STATUS, due, due)
        await sent_again(peer, due, ScsiResponse(tags[0], data=sense))
        peer.stat_sn = due + 2
        for task in running:
            assert (await task.done()).status == 0


@pytest.mark.checklist(45, "7.8")
async def test_a_damaged_ping_that_had_no_status_costs_nothing() -> None:
    """Its header is not believed, so a status is asked for; that there is none ends nothing."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        await peer.damage(NopIn(target_transfer_tag=5, data=b"ping"), advance=False)
        snack = await peer.expect(SnackRequest)
        await peer.reply(Reject(RejectReason.PROTOCOL_ERROR, data=snack.pack(0, 0)))
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(6, "4.2.2.2")
async def test_a_status_far_ahead_ends_the_connection() -> None:
    async with recovering() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        peer.stat_sn += 5000
        await peer.reply(ScsiResponse(tag))
        again = await (await target.accept()).login(LEVEL_1)
        assert "StatSN" in str(session.last_error)
        await answer(again)
        await running.done()


# -- data -----------------------------------------------------------------------------------------


@pytest.mark.checklist(26, "11.4.8")
@pytest.mark.checklist(54, "7.9")
async def test_a_response_reveals_data_that_is_missing() -> None:
    """Its ExpDataSN counts two more Data-In PDUs; it is not acknowledged before they are there."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(12))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        due = peer.stat_sn
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await peer.reply(ScsiResponse(tag, exp_data_sn=3))
        snack = await peer.expect(SnackRequest)
        assert run_of(snack) == (SnackType.DATA_OR_R2T, 1, 2)
        assert (snack.initiator_task_tag, snack.target_transfer_tag) == (tag, NO_TAG)
        assert (snack.lun, snack.exp_stat_sn) == (LUN, due)
        await peer.reply(DataIn(tag, 2, 8, data=b"cccc", final=True), advance=False)
        await peer.reply(DataIn(tag, 1, 4, data=b"bbbb"), advance=False)
        assert content(await running.done()) == b"aaaabbbbcccc"


@pytest.mark.checklist(54, "7.8")
@pytest.mark.parametrize("held", [0, 3])
async def test_a_rejected_snack_counts_although_its_command_holds_the_status_up(held: int) -> None:
    """§7.8 a.2: the status came before the Reject, which waits behind it in order of StatSN."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        others, tags = await commands(nursery, session, peer, held)
        await peer.damage(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await peer.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True, has_status=True))
        for other in tags:
            await peer.reply(ScsiResponse(other))
        snack = await peer.expect(SnackRequest)
        await peer.reply(Reject(RejectReason.SNACK_REJECT, data=snack.pack(0, 0)))
        again = await peer.expect(ScsiCommand)
        assert again.initiator_task_tag != tag
        for other_task in others:
            await other_task.done()
        await peer.reply(
            DataIn(again.initiator_task_tag, data=b"aaaabbbb", final=True, has_status=True)
        )
        assert content(await running.done()) == b"aaaabbbb"
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(54, "7.9")
async def test_a_read_that_was_given_up_ends_however_little_comes() -> None:
    """More of it may be lost after the Reject: nothing more is asked for, the status is enough."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(16))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.damage(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        snack = await peer.expect(SnackRequest)
        await peer.reply(Reject(RejectReason.SNACK_REJECT, data=snack.pack(0, 0)))
        last = DataIn(tag, 3, 12, data=b"dddd", final=True, acknowledge=True, has_status=True)
        last.target_transfer_tag = 9
        await peer.reply(last)
        again = await peer.expect(ScsiCommand)
        tag = again.initiator_task_tag
        await peer.reply(DataIn(tag, data=b"x" * 16, final=True, has_status=True))
        assert content(await running.done()) == b"x" * 16
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(54, "11.17.1")
async def test_a_reject_for_what_has_come_meanwhile_changes_nothing() -> None:
    """Data that was asked for twice came once, the command is over, the second one is refused."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(4))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.damage(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        snack = await peer.expect(SnackRequest)
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa", final=True, has_status=True))
        assert content(await running.done()) == b"aaaa"
        await peer.reply(Reject(RejectReason.PROTOCOL_ERROR, data=snack.pack(0, 0)))
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(45, "7.8")
@pytest.mark.checklist(20, "11.7.3")
async def test_a_damaged_data_in_with_status_is_asked_for_as_data_only() -> None:
    """Its replica brings the status too; a status behind it raises no second question."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        first = Running(nursery, session, reads(4))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        second = Running(nursery, session, unit_ready())
        other = (await peer.expect(ScsiCommand)).initiator_task_tag
        due = peer.stat_sn
        await peer.damage(DataIn(tag, data=b"abcd", final=True, has_status=True))
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.DATA_OR_R2T, 0, 1)
        await peer.reply(ScsiResponse(other))
        await peer.nothing()
        await sent_again(peer, due, DataIn(tag, data=b"abcd", final=True, has_status=True))
        assert content(await first.done()) == b"abcd"
        await second.done()


@pytest.mark.checklist(54, "11.7.2")
async def test_a_status_in_a_data_in_without_data_ends_a_read() -> None:
    """Some targets put BufferOffset 0 there."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(4))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"abcd"), advance=False)
        await peer.reply(DataIn(tag, 1, 0, final=True, has_status=True))
        assert content(await running.done()) == b"abcd"
        assert session.counters.connections_lost == 0


# -- asking again ---------------------------------------------------------------------------------


@pytest.mark.checklist(54, "11.16")
@pytest.mark.parametrize("kind", ["data", "R2T", "status"])
async def test_what_stays_away_is_asked_for_again_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(recovering_module, "_ASK_AGAIN_S", 0.02)
    async with (
        recovering(command_timeout_s=0.4) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        task = {"data": reads(8), "R2T": writes(20000), "status": unit_ready()}[kind]
        task.patience = 20
        running = Running(nursery, session, task)
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        due = peer.stat_sn
        expected: tuple[int, int, int]
        pdu: Pdu
        if kind == "data":
            pdu, expected = DataIn(tag, 1, 4, data=b"bbbb"), (SnackType.DATA_OR_R2T, 0, 1)
        elif kind == "R2T":
            await peer.expect(DataOut)
            pdu, expected = R2T(LUN, tag, 1, 1, 8192, 4096), (SnackType.DATA_OR_R2T, 0, 1)
        else:
            peer.stat_sn += 1
            pdu, expected = NopIn(), (SnackType.STATUS, due, 1)
        await peer.reply(pdu, advance=False)
        for _ in range(recovering_module._ASKS_MAX):
            snack = await peer.next()
            if isinstance(snack, DataOut):
                snack = await peer.next()
            assert isinstance(snack, SnackRequest)
            assert run_of(snack) == expected
            assert snack.initiator_task_tag == (NO_TAG if kind == "status" else tag)
            assert snack.exp_stat_sn == due
        again = await (await target.accept()).login(LEVEL_1)
        assert "does not send again" in str(session.last_error)
        await again.expect(ScsiCommand)
        await until(lambda: session.counters.connections_lost == 1)
        command = task.initiator_task_tag
        if kind == "data":
            await again.reply(DataIn(command, data=b"12345678", final=True, has_status=True))
        else:
            if kind == "R2T":
                await again.expect(DataOut)
            await again.reply(ScsiResponse(command))
        assert (await running.done()).status == 0
