"""ErrorRecoveryLevel 1: what is damaged or missing is asked for (checks 15, 18, 21, 45, 54)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from orion_iscsifs.config import DigestPreference
from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    AsyncMessage,
    DataIn,
    DataOut,
    NopIn,
    NopOut,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    SnackType,
)
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.sense import SenseData, SenseKey, encode_sense
from tests.initiator.peer import (
    LUN,
    PlayedConnection,
    PlayedTarget,
    Running,
    answer,
    offer,
    played_session,
    unit_ready,
)

Played = tuple[Session, PlayedConnection, PlayedTarget]
LEVEL_1 = {"error_recovery_level": 1, "max_outstanding_r2t": 1}
DIGESTS = {"header_digest": ("CRC32C",), "data_digest": ("CRC32C",)}


@asynccontextmanager
async def recovering(*, digests: bool = True, **changes: Any) -> AsyncIterator[Played]:
    """A session at level 1, with digests."""
    wish = DigestPreference.CRC32C if digests else DigestPreference.NONE
    offered = offer(**LEVEL_1, **(DIGESTS if digests else {}))
    async with played_session(
        offered, erl=1, header_digest=wish, data_digest=wish, **changes
    ) as played:
        assert played[0].parameters.error_recovery_level == 1
        yield played


def reads(length: int) -> Task:
    return Task(LUN, cdb.read(0, 1), read_into=memoryview(bytearray(length)))


def writes(length: int) -> Task:
    data = bytes(position % 251 for position in range(length))
    return Task(LUN, cdb.write(0, 1), write_from=memoryview(data))


def content(task: Task) -> bytes:
    assert task.read_into is not None
    return bytes(task.read_into)


def run_of(snack: SnackRequest) -> tuple[int, int, int]:
    return snack.type, snack.beg_run, snack.run_length


# -- data that comes ------------------------------------------------------------------------------


@pytest.mark.checklist(45, "7.8")
@pytest.mark.checklist(54, "11.16")
async def test_a_damaged_data_in_costs_one_pdu() -> None:
    """It is thrown away and asked for; what comes behind it counts already."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(12))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await peer.damage(DataIn(tag, 1, 4, data=b"bbbb"), advance=False)
        snack = await peer.expect(SnackRequest)
        assert run_of(snack) == (SnackType.DATA_OR_R2T, 1, 1)
        assert (snack.initiator_task_tag, snack.target_transfer_tag) == (tag, NO_TAG)
        assert snack.lun == LUN
        await peer.reply(DataIn(tag, 2, 8, data=b"cccc", final=True), advance=False)
        await peer.reply(DataIn(tag, 1, 4, data=b"bbbb"), advance=False)
        await peer.reply(ScsiResponse(tag, exp_data_sn=3))
        task = await running.done()
        assert (task.status, content(task)) == (0, b"aaaabbbbcccc")
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(15, "11.7.5")
@pytest.mark.checklist(54, "7.9")
async def test_a_gap_in_data_sn_is_asked_for() -> None:
    async with recovering(digests=False) as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(16))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 3, 12, data=b"dddd"), advance=False)
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.DATA_OR_R2T, 0, 3)
        for number, data in enumerate((b"aaaa", b"bbbb", b"cccc")):
            await peer.reply(DataIn(tag, number, 4 * number, data=data), advance=False)
        await peer.reply(ScsiResponse(tag, exp_data_sn=4))
        assert content(await running.done()) == b"aaaabbbbccccdddd"
        await peer.nothing()


@pytest.mark.checklist(26, "11.4.8")
@pytest.mark.checklist(54, "7.9")
async def test_a_status_is_not_acknowledged_before_its_data_is_there() -> None:
    """ExpDataSN says that the last Data-In is missing; the target must not forget it."""
    async with recovering(digests=False) as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        due = peer.stat_sn
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await peer.reply(ScsiResponse(tag, exp_data_sn=2))
        snack = await peer.expect(SnackRequest)
        assert run_of(snack) == (SnackType.DATA_OR_R2T, 1, 1)
        assert snack.exp_stat_sn == due
        await peer.reply(NopIn(target_transfer_tag=5, lun=LUN), advance=False)
        assert (await peer.expect(NopOut)).exp_stat_sn == due
        await peer.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True), advance=False)
        assert content(await running.done()) == b"aaaabbbb"
        await peer.reply(NopIn(target_transfer_tag=6, lun=LUN), advance=False)
        assert (await peer.expect(NopOut)).exp_stat_sn == due + 1


@pytest.mark.checklist(54, "7.9")
async def test_duplicates_are_thrown_away() -> None:
    """A Data-In and an R2T that come twice change nothing."""
    async with recovering(digests=False) as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await peer.reply(DataIn(tag, 0, 0, data=b"XXXX"), advance=False)
        await peer.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True, has_status=True))
        assert content(await running.done()) == b"aaaabbbb"
        running = Running(nursery, session, writes(12000))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.expect(DataOut)
        for _ in range(2):
            await peer.reply(R2T(LUN, tag, 1, 0, 8192, 3808), advance=False)
        assert (await peer.expect(DataOut)).final
        await peer.nothing()
        await peer.reply(ScsiResponse(tag))
        await running.done()


@pytest.mark.checklist(54, "11.16.1")
@pytest.mark.parametrize("is_sent", [False, True], ids=["status to come", "status under way"])
async def test_a_read_whose_snack_is_rejected_starts_anew(is_sent: bool) -> None:
    """§7.8: its status is waited for and not believed."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.damage(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        snack = await peer.expect(SnackRequest)
        await peer.reply(Reject(RejectReason.SNACK_REJECT, data=snack.pack(0, 0)))
        await peer.nothing()
        if is_sent:
            await peer.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True, has_status=True))
        else:
            await peer.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True), advance=False)
            rejected = encode_sense(SenseData(SenseKey.ABORTED_COMMAND, 0x11, 0x13))
            data = len(rejected).to_bytes(2, "big") + rejected
            await peer.reply(ScsiResponse(tag, status=2, exp_data_sn=2, data=data))
        again = await peer.expect(ScsiCommand)
        assert again.initiator_task_tag != tag
        done = DataIn(again.initiator_task_tag, final=True, has_status=True, data=b"aaaabbbb")
        await peer.reply(done)
        task = await running.done()
        assert (task.status, content(task)) == (0, b"aaaabbbb")
        assert session.counters.connections_lost == 0


# -- DataACK --------------------------------------------------------------------------------------


@pytest.mark.checklist(21, "11.16.2")
@pytest.mark.checklist(54, "11.16.5")
async def test_the_a_bit_is_answered_with_a_data_ack() -> None:
    """BegRun is the DataSN due next, RunLength 0; the tag is the target's."""
    async with recovering(digests=False) as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        first = DataIn(tag, 0, 0, data=b"aaaa", acknowledge=True, lun=LUN, target_transfer_tag=0x99)
        await peer.reply(first, advance=False)
        snack = await peer.expect(SnackRequest)
        assert run_of(snack) == (SnackType.DATA_ACK, 1, 0)
        assert (snack.initiator_task_tag, snack.target_transfer_tag) == (NO_TAG, 0x99)
        assert snack.lun == LUN
        await peer.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True, has_status=True))
        assert content(await running.done()) == b"aaaabbbb"


@pytest.mark.checklist(21, "11.7.2")
async def test_a_data_ack_waits_until_holes_are_filled() -> None:
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(12))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.damage(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.DATA_OR_R2T, 0, 1)
        asking = DataIn(tag, 1, 4, data=b"bbbb", acknowledge=True, lun=LUN)
        asking.target_transfer_tag = 3
        await peer.reply(asking, advance=False)
        await peer.nothing()
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        assert run_of(await peer.expect(SnackRequest)) == (SnackType.DATA_ACK, 2, 0)
        await peer.reply(DataIn(tag, 2, 8, data=b"cccc", final=True, has_status=True))
        assert content(await running.done()) == b"aaaabbbbcccc"


# -- R2T and what is written ----------------------------------------------------------------------


@pytest.mark.checklist(18, "11.8")
@pytest.mark.checklist(54, "11.16")
async def test_a_missing_r2t_is_asked_for() -> None:
    async with recovering(digests=False) as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, writes(20000))
        command = await peer.expect(ScsiCommand)
        tag = command.initiator_task_tag
        await peer.expect(DataOut)
        await peer.reply(R2T(LUN, tag, 2, 1, 12288, 4096), advance=False)
        snack = await peer.expect(SnackRequest)
        assert run_of(snack) == (SnackType.DATA_OR_R2T, 0, 1)
        assert snack.initiator_task_tag == tag
        assert (await peer.expect(DataOut)).buffer_offset == 12288
        await peer.reply(R2T(LUN, tag, 1, 0, 8192, 4096), advance=False)
        assert (await peer.expect(DataOut)).buffer_offset == 8192
        await peer.reply(R2T(LUN, tag, 3, 2, 16384, 3616), advance=False)
        assert (await peer.expect(DataOut)).buffer_offset == 16384
        await peer.reply(ScsiResponse(tag))
        await running.done()


@pytest.mark.checklist(17, "11.8")
@pytest.mark.checklist(45, "7.8")
async def test_a_recovery_r2t_is_served() -> None:
    """A Data-Out got damaged: the target says so, and asks for its bytes under a new R2TSN."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, writes(12000))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        lost = await peer.expect(DataOut)
        await peer.reply(Reject(RejectReason.DATA_DIGEST_ERROR, data=lost.pack(0, len(lost.data))))
        await peer.reply(R2T(LUN, tag, 1, 0, lost.buffer_offset, len(lost.data)), advance=False)
        again = await peer.expect(DataOut)
        assert (again.buffer_offset, bytes(again.data)) == (lost.buffer_offset, bytes(lost.data))
        assert (again.target_transfer_tag, again.data_sn, again.final) == (1, 0, True)
        await peer.reply(R2T(LUN, tag, 2, 1, 8192, 3808), advance=False)
        assert (await peer.expect(DataOut)).buffer_offset == 8192
        await peer.reply(ScsiResponse(tag))
        assert (await running.done()).status == 0
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(54, "7.1.4.1")
async def test_nothing_is_asked_for_because_an_r2t_is_slow() -> None:
    """Only the target knows whether it still wants data. The command itself it has taken."""
    async with (
        recovering(command_timeout_s=8) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, writes(12000))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.expect(DataOut)
        await peer.reply(NopIn(), advance=False)
        await peer.nothing(2.5)
        await peer.reply(R2T(LUN, tag, 1, 0, 8192, 3808), advance=False)
        await peer.expect(DataOut)
        await peer.reply(ScsiResponse(tag))
        await running.done()


@pytest.mark.checklist(47, "7.2.1")
async def test_a_command_that_is_not_acknowledged_is_retried_as_it_was() -> None:
    """The target may have thrown it away (§7.8); if not, it ignores the duplicate."""
    async with (
        recovering(command_timeout_s=8) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        first = await peer.expect(ScsiCommand)
        peer.exp_cmd_sn = first.cmd_sn
        again = await peer.expect(ScsiCommand)
        assert again.initiator_task_tag == first.initiator_task_tag
        assert (again.cmd_sn, again.cdb) == (first.cmd_sn, first.cdb)
        await peer.reply(ScsiResponse(again.initiator_task_tag))
        assert (await running.done()).status == 0
        running = Running(nursery, session, unit_ready())
        assert (await answer(peer)).cmd_sn == first.cmd_sn + 1
        await running.done()
        assert session.counters.connections_lost == 0


# -- statuses -------------------------------------------------------------------------------------


@pytest.mark.checklist(6, "7.9")
@pytest.mark.checklist(54, "11.16.4")
async def test_a_missing_status_is_asked_for() -> None:
    """The next one shows the gap; both are taken in order, neither is acknowledged too early."""
    async with recovering(digests=False) as (session, peer, _), trio.open_nursery() as nursery:
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        first, second = [await peer.expect(ScsiCommand) for _ in range(2)]
        due = peer.stat_sn
        peer.stat_sn += 1
        await peer.reply(ScsiResponse(second.initiator_task_tag))
        snack = await peer.expect(SnackRequest)
        assert run_of(snack) == (SnackType.STATUS, due, 1)
        assert (snack.initiator_task_tag, snack.target_transfer_tag) == (NO_TAG, NO_TAG)
        assert snack.exp_stat_sn == due
        lost = ScsiResponse(first.initiator_task_tag, stat_sn=due)
        lost.exp_cmd_sn, lost.max_cmd_sn = peer.exp_cmd_sn, peer.max_cmd_sn
        await peer.send(lost)
        for task in running:
            assert (await task.done()).status == 0
        assert session.counters.connections_lost == 0
        running.append(Running(nursery, session, unit_ready()))
        assert (await answer(peer)).exp_stat_sn == due + 2


@pytest.mark.checklist(45, "7.8")
@pytest.mark.checklist(54, "11.16")
@pytest.mark.parametrize("kind", ["response", "async message"])
async def test_a_damaged_status_is_asked_for(kind: str) -> None:
    """Its header is not believed either, so everything from the StatSN due on is asked for."""
    async with recovering() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        due = peer.stat_sn
        sense = b"\0\x08\x70\0\6\0\0\0\0\0"
        pdu = AsyncMessage(0, data=sense) if kind != "response" else ScsiResponse(tag, data=sense)
        await peer.damage(pdu)
        snack = await peer.expect(SnackRequest)
        assert snack.type == SnackType.STATUS
        assert (snack.beg_run, snack.exp_stat_sn) == (due, due)
        peer.stat_sn = due
        await peer.reply(pdu)
        if kind != "response":
            await peer.reply(ScsiResponse(tag))
        assert (await running.done()).status == 0
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(54, "11.16.1")
async def test_a_status_that_is_not_sent_again_ends_the_connection() -> None:
    """The SNACK is rejected: the next class of recovery, here a new session."""
    async with recovering(digests=False) as (session, peer, target), trio.open_nursery() as nursery:
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        commands = [await peer.expect(ScsiCommand) for _ in range(2)]
        peer.stat_sn += 1
        await peer.reply(ScsiResponse(commands[1].initiator_task_tag))
        snack = await peer.expect(SnackRequest)
        # Its own StatSN is beyond the gap too, and still it has to be heard.
        await peer.reply(Reject(RejectReason.SNACK_REJECT, data=snack.pack(0, 0)))
        again = await (await target.accept()).login(offer(**LEVEL_1))
        assert isinstance(session.last_error, ConnectionLost)
        for _ in running:
            await answer(again)
        for task in running:
            assert (await task.done()).status == 0


# -- headers, and the level below -----------------------------------------------------------------


@pytest.mark.checklist(45, "7.8")
async def test_a_damaged_header_ends_the_connection() -> None:
    """Nobody knows where the next PDU begins; at level 1 too."""
    async with recovering() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.damage(ScsiResponse(tag), where=20)
        again = await (await target.accept()).login(offer(**LEVEL_1, **DIGESTS))
        assert "header digest" in str(session.last_error)
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(45, "7.8")
@pytest.mark.checklist(54, "11.16")
async def test_without_recovery_a_damaged_segment_ends_the_connection() -> None:
    """Level 0 knows no SNACK."""
    wish = DigestPreference.CRC32C
    async with (
        played_session(offer(**DIGESTS), header_digest=wish, data_digest=wish) as (
            session,
            peer,
            target,
        ),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(4))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.damage(DataIn(tag, data=b"data", final=True, has_status=True))
        again = await (await target.accept()).login(offer(**DIGESTS))
        assert "data digest" in str(session.last_error)
        assert peer.received == []
        tag = (await again.expect(ScsiCommand)).initiator_task_tag
        await again.reply(DataIn(tag, data=b"data", final=True, has_status=True))
        assert content(await running.done()) == b"data"
