"""SCSI Command, its data and its response on the wire (checks 9 to 26)."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    DataOut,
    NopIn,
    NopOut,
    ScsiCommand,
    ScsiResponse,
)
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.lun import encode_lun
from tests.initiator.peer import (
    LUN,
    PlayedConnection,
    Running,
    answer,
    offer,
    played_session,
    unit_ready,
)

FLAT_LUN = 0x412C_0000_0000_0000
"""Number 300: flat space addressing."""


def reads(length: int) -> Task:
    return Task(LUN, cdb.read(0, 1), read_into=memoryview(bytearray(length)))


def writes(data: bytes, lun: int = LUN) -> Task:
    return Task(lun, cdb.write(0, 1), write_from=memoryview(data))


def content(task: Task) -> bytes:
    assert task.read_into is not None
    return bytes(task.read_into)


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.checklist(9, "11.2.1.7")
async def test_all_eight_bytes_of_a_lun_are_carried() -> None:
    """In the command, its unsolicited and its solicited data; in the answer to a ping."""
    assert encode_lun(300) == FLAT_LUN
    async with (
        played_session(offer(immediate_data=False)) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, writes(bytes(9000), FLAT_LUN))
        command = await peer.expect(ScsiCommand)
        unsolicited = [await peer.expect(DataOut) for _ in range(2)]
        tag = command.initiator_task_tag
        await peer.reply(R2T(FLAT_LUN, tag, 1, 0, 8192, 808), advance=False)
        solicited = await peer.expect(DataOut)
        assert {command.lun, solicited.lun, *(pdu.lun for pdu in unsolicited)} == {FLAT_LUN}
        await peer.reply(ScsiResponse(tag))
        await running.done()
        deep = 0x4001_4002_4003_4004
        await peer.reply(NopIn(target_transfer_tag=1, lun=deep), advance=False)
        assert (await peer.expect(NopOut)).lun == deep


@pytest.mark.checklist(10, "11.3.1")
@pytest.mark.parametrize(
    ("length", "immediate_data", "immediate", "final"),
    [
        pytest.param(4096, True, 4096, True, id="all of it immediate: F=1"),
        pytest.param(4097, True, 4096, False, id="one more byte: F=0, a Data-Out follows"),
        pytest.param(1, False, 0, False, id="nothing immediate: F=0"),
    ],
)
async def test_f_of_a_write(length: int, immediate_data: bool, immediate: int, final: bool) -> None:
    offered = offer(initial_r2t=False, immediate_data=immediate_data)
    async with played_session(offered) as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, writes(bytes(length)))
        command = await peer.expect(ScsiCommand)
        assert (command.write, command.read, command.final) == (True, False, final)
        assert len(command.data) == immediate
        if not final:
            rest = await peer.expect(DataOut)
            assert (len(rest.data), rest.final) == (length - immediate, True)
        await peer.nothing()
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()


@pytest.mark.checklist(10, "11.3.1")
async def test_a_command_without_data_has_f_and_neither_r_nor_w() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await answer(peer)
        assert (command.final, command.read, command.write) == (True, False, False)
        assert (command.expected_data_transfer_length, len(command.data)) == (0, 0)
        await running.done()


@pytest.mark.checklist(14, "13.12")
async def test_segments_have_the_size_that_the_receiver_declared() -> None:
    """Ours to the target: its 4096. The target's to us: what we declared, and not a byte more."""
    async with (
        played_session(max_recv_data_segment_length_bytes=8192) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, writes(bytes(8192)))
        command = await peer.expect(ScsiCommand)
        rest = await peer.expect(DataOut)
        assert (len(command.data), len(rest.data)) == (4096, 4096)
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()
        running = Running(nursery, session, reads(20000))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, data=bytes(8192)), advance=False)
        await peer.reply(DataIn(tag, 1, 8192, data=bytes(8193)), advance=False)
        again = await (await target.accept()).login()
        assert "MaxRecvDataSegmentLength 8192" in str(session.last_error)
        tag = (await again.expect(ScsiCommand)).initiator_task_tag
        done = DataIn(tag, final=True, has_status=True, underflow=True, residual_count=20000)
        await again.reply(done)
        assert (await running.done()).status == 0


# -- data in -------------------------------------------------------------------------------------


@pytest.mark.checklist(16, "11.7.7")
async def test_a_data_in_without_data_is_counted_and_changes_nothing() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(4))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0), advance=False)
        await peer.reply(DataIn(tag, 1, 0, data=b"data"), advance=False)
        await peer.reply(DataIn(tag, 2, 4, final=True), advance=False)
        await peer.reply(ScsiResponse(tag, exp_data_sn=3))
        task = await running.done()
        assert (task.status, content(task)) == (0, b"data")
        assert session.counters.connections_lost == 0


async def gap(peer: PlayedConnection, tag: int) -> None:
    await peer.reply(DataIn(tag, 1, 0, data=b"late"), advance=False)


async def beyond_the_end(peer: PlayedConnection, tag: int) -> None:
    await peer.reply(DataIn(tag, 0, 0, data=b"data" * 3), advance=False)


async def overlap(peer: PlayedConnection, tag: int) -> None:
    await peer.reply(DataIn(tag, 0, 0, data=b"data"), advance=False)
    await peer.reply(DataIn(tag, 1, 2, data=b"data"), advance=False)


async def skipped(peer: PlayedConnection, tag: int) -> None:
    await peer.reply(DataIn(tag, 0, 4, data=b"data"), advance=False)


async def one_is_missing(peer: PlayedConnection, tag: int) -> None:
    await peer.reply(DataIn(tag, 0, 0, data=b"data"), advance=False)
    await peer.reply(ScsiResponse(tag, exp_data_sn=2))


async def check_condition_in_data(peer: PlayedConnection, tag: int) -> None:
    await peer.reply(DataIn(tag, 0, 0, final=True, has_status=True, status=2, data=b"datadata"))


@pytest.mark.parametrize(
    ("misbehave", "section"),
    [
        pytest.param(gap, "11.7.5", marks=pytest.mark.checklist(15, "11.7.5")),
        pytest.param(beyond_the_end, "11.7.6", marks=pytest.mark.checklist(16, "11.7.6")),
        pytest.param(overlap, "11.7.6", marks=pytest.mark.checklist(16, "11.7.6")),
        pytest.param(skipped, "11.7.6", marks=pytest.mark.checklist(16, "11.7.6")),
        pytest.param(one_is_missing, "11.4.8", marks=pytest.mark.checklist(26, "11.4.8")),
        pytest.param(check_condition_in_data, "11.7.3", marks=pytest.mark.checklist(20, "11.7.3")),
    ],
)
async def test_data_that_does_not_add_up_never_counts_as_read(
    misbehave: Callable[[PlayedConnection, int], Awaitable[None]], section: str
) -> None:
    """Without recovery the connection ends, and the read starts over on the next one."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(8))
        await misbehave(peer, (await peer.expect(ScsiCommand)).initiator_task_tag)
        again = await (await target.accept()).login()
        assert isinstance(session.last_error, ProtocolViolation)
        assert session.last_error.section == section
        tag = (await again.expect(ScsiCommand)).initiator_task_tag
        await again.reply(DataIn(tag, final=True, has_status=True, data=b"in order"))
        task = await running.done()
        assert (task.status, content(task)) == (0, b"in order")


@pytest.mark.checklist(20, "11.7.3")
async def test_status_in_the_last_data_in_is_all_there_is() -> None:
    """No SCSI Response is waited for; the tag is free and the next command goes out."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        session.in_flight_max = 1
        for data in (b"first", b"other"):
            running = Running(nursery, session, reads(5))
            tag = (await peer.expect(ScsiCommand)).initiator_task_tag
            await peer.reply(DataIn(tag, final=True, has_status=True, data=data))
            task = await running.done()
            assert (task.status, content(task), session.tasks) == (0, data, {})


@pytest.mark.checklist(21, "11.7.2")
async def test_the_a_bit_means_nothing_at_level_0() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, reads(4))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        asking = DataIn(tag, data=b"da", acknowledge=True, lun=LUN, target_transfer_tag=7)
        await peer.reply(asking, advance=False)
        await peer.nothing()
        await peer.reply(DataIn(tag, 1, 2, final=True, has_status=True, data=b"ta"))
        task = await running.done()
        assert (task.status, content(task)) == (0, b"data")


@pytest.mark.checklist(26, "11.4.8")
async def test_exp_data_sn_of_a_failed_response_is_not_compared() -> None:
    """It is 0 there whatever was sent; Response other than 0 fails the command, not the session."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:

        async def fails() -> None:
            with pytest.raises(ProtocolViolation, match="target failure"):
                await session.execute(reads(8))

        nursery.start_soon(fails)
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, data=b"data"), advance=False)
        await peer.reply(ScsiResponse(tag, response=0x80, status=0, exp_data_sn=0))
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


# -- data out ------------------------------------------------------------------------------------


@pytest.mark.checklist(11, "11.3.4")
async def test_unsolicited_data_is_a_full_first_burst_or_only_the_immediate_part() -> None:
    """FirstBurstLength 8192 counts the immediate 4096 as well."""
    for initial_r2t, rest in ((False, 4096), (True, 0)):
        offered = offer(initial_r2t=initial_r2t)
        async with played_session(offered) as (session, peer, _), trio.open_nursery() as nursery:
            running = Running(nursery, session, writes(bytes(30000)))
            command = await peer.expect(ScsiCommand)
            assert len(command.data) == 4096
            if rest:
                burst = await peer.expect(DataOut)
                assert (len(burst.data), burst.target_transfer_tag) == (rest, NO_TAG)
            await peer.nothing()
            await peer.reply(ScsiResponse(command.initiator_task_tag))
            await running.done()


@pytest.mark.checklist(11, "4.2.5.2")
async def test_unsolicited_data_goes_in_the_order_of_its_commands() -> None:
    """All of command N's comes before any of command N+1's, also when both wait to be sent."""
    async with (
        played_session(offer(immediate_data=False)) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        session.in_flight_max = 3
        running = [Running(nursery, session, writes(bytes(9000))) for _ in range(3)]
        commands: list[int] = []
        data: list[int] = []
        for _ in range(3 + 3 * 2):
            while not peer.received:
                peer.received += await peer.wire.receive()
            pdu = await peer.expect(type(peer.received[0]))
            assert isinstance(pdu, ScsiCommand | DataOut)
            (commands if isinstance(pdu, ScsiCommand) else data).append(pdu.initiator_task_tag)
            assert pdu.initiator_task_tag in commands
        assert data == [tag for tag in commands for _ in range(2)]
        for tag in commands:
            await peer.reply(ScsiResponse(tag))
        for task in running:
            await task.done()


@pytest.mark.checklist(15, "11.7.5")
async def test_data_sn_of_data_out_begins_at_0_in_every_sequence() -> None:
    async with (
        played_session(offer(immediate_data=False)) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, writes(bytes(8192 + 12288 + 5000)))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        numbers = [(await peer.expect(DataOut)).data_sn for _ in range(2)]
        await peer.reply(R2T(LUN, tag, 1, 0, 8192, 12288), advance=False)
        numbers += [(await peer.expect(DataOut)).data_sn for _ in range(3)]
        await peer.reply(R2T(LUN, tag, 2, 1, 20480, 5000), advance=False)
        numbers += [(await peer.expect(DataOut)).data_sn for _ in range(2)]
        assert numbers == [0, 1, 0, 1, 2, 0, 1]
        await peer.reply(ScsiResponse(tag))
        await running.done()


@pytest.mark.parametrize(
    ("r2t", "section"),
    [
        pytest.param(R2T(LUN, 0, 1, 0, 0, 0), "11.8.4", id="length 0"),
        pytest.param(R2T(LUN, 0, 1, 0, 0, 16385), "11.8.4", id="over MaxBurstLength"),
        pytest.param(R2T(LUN, 0, 1, 0, 30000, 1), "11.8.4", id="past the end"),
        pytest.param(R2T(LUN, 0, NO_TAG, 0, 4096, 100), "11.8.5", id="the reserved TTT"),
        pytest.param(
            R2T(LUN, 0, 1, 1, 4096, 100),
            "11.8.2",
            id="a gap in R2TSN",
            marks=pytest.mark.checklist(18, "11.8"),
        ),
    ],
)
@pytest.mark.checklist(17, "11.8")
async def test_an_r2t_that_no_data_can_answer_ends_the_connection(r2t: R2T, section: str) -> None:
    """Nothing is sent for it."""
    async with (
        played_session(offer(initial_r2t=True)) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, writes(bytes(30000)))
        r2t.initiator_task_tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(r2t, advance=False)
        again = await (await target.accept()).login()
        assert isinstance(session.last_error, ProtocolViolation)
        assert (session.last_error.pdu, session.last_error.section) == (R2T.name, section)
        await answer(again)
        assert (await running.done()).status == 0


# -- responses -----------------------------------------------------------------------------------


@pytest.mark.checklist(22, "11.4.3")
@pytest.mark.parametrize("response", [0x01, 0x80, 0xFF])
async def test_nothing_of_a_failed_response_is_believed(response: int) -> None:
    """Neither its GOOD, nor its residual, nor its sense."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        task = reads(100)

        async def fails() -> None:
            with pytest.raises(ProtocolViolation, match="target failure") as caught:
                await session.execute(task)
            assert caught.value.section == "11.4.3"

        nursery.start_soon(fails)
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        lie = ScsiResponse(tag, response=response, underflow=True, residual_count=100)
        lie.data = b"\0\x04\x70\0\x05\0"
        await peer.reply(lie)
        await trio.testing.wait_all_tasks_blocked()
        assert (task.status, task.residual_bytes, task.sense) == (-1, 0, b"")


@pytest.mark.checklist(23, "11.4.5")
async def test_a_short_read_says_how_short_it_was() -> None:
    """U in the last Data-In and U in a SCSI Response mean the same."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        for in_data in (True, False):
            running = Running(nursery, session, reads(10))
            tag = (await peer.expect(ScsiCommand)).initiator_task_tag
            short = DataIn(tag, final=True, data=b"short", has_status=in_data)
            short.underflow, short.residual_count = in_data, 5 if in_data else 0
            await peer.reply(short, advance=in_data)
            if not in_data:
                await peer.reply(ScsiResponse(tag, underflow=True, residual_count=5, exp_data_sn=1))
            task = await running.done()
            assert (task.status, task.residual_bytes) == (0, 5)
            assert task.read is not None
            assert task.read.received_bytes == 5


@pytest.mark.checklist(24, "11.4.7")
@pytest.mark.parametrize(
    ("segment", "sense"),
    [
        pytest.param(b"", b"", id="no segment"),
        pytest.param(b"\0", b"", id="half a length"),
        pytest.param(b"\0\0", b"", id="length 0"),
        pytest.param(b"\xff\xff\x70\0\6", b"\x70\0\6", id="longer than the segment"),
        pytest.param(b"\0\3\x70\0\6response data", b"\x70\0\6", id="response data behind it"),
    ],
)
async def test_sense_of_any_length_is_taken_as_far_as_it_goes(segment: bytes, sense: bytes) -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(ScsiResponse(tag, status=2, data=segment))
        task = await running.done()
        assert (task.status, task.sense) == (2, sense)
