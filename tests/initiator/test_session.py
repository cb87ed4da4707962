"""The full-feature phase against a target that is played PDU by PDU."""

import pytest
import trio

from orion_iscsifs.config import DigestPreference
from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.initiator.session import Session
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
from tests.initiator.peer import Running, offer, played_session, until

LUN = 0x0001_0000_0000_0000
TEST_UNIT_READY = cdb.test_unit_ready()


async def good(session: Session) -> None:
    task = Task(LUN, TEST_UNIT_READY)
    await session.execute(task)
    assert task.status == 0


@pytest.mark.checklist(10, "11.3.1")
@pytest.mark.checklist(20, "11.7.3")
async def test_a_read_lands_in_the_callers_buffer() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        buffer = bytearray(10)
        task = Task(LUN, cdb.read(5, 1), read_into=memoryview(buffer))
        running = Running(nursery, session, task)
        command = await peer.expect(ScsiCommand)
        assert (command.lun, command.cdb) == (LUN, cdb.read(5, 1))
        assert command.read
        assert command.final, "a command without unsolicited data has F=1 (checklist 10)"
        assert not command.write
        assert (command.cmd_sn, command.expected_data_transfer_length) == (1, 10)
        tag = command.initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"hello "), advance=False)
        await peer.reply(DataIn(tag, 1, 6, data=b"iscs", final=True, has_status=True))
        await running.done()
        assert bytes(buffer) == b"hello iscs"
        assert (task.status, task.residual_bytes) == (0, 0)


@pytest.mark.checklist(5, "4.2.2.2")
async def test_stat_sn_of_every_kind_of_pdu() -> None:
    """Checklist 5: R2T, NOP-In with ITT ffffffff and Data-In without S use up no StatSN."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        start = peer.stat_sn
        buffer = memoryview(bytearray(4))
        read = Running(nursery, session, Task(LUN, cdb.read(0, 1), read_into=buffer))
        command = await peer.expect(ScsiCommand)
        tag = command.initiator_task_tag
        assert command.exp_stat_sn == start
        await peer.reply(NopIn(), advance=False)
        await peer.reply(NopIn(target_transfer_tag=9, lun=LUN), advance=False)
        assert (await peer.expect(NopOut)).exp_stat_sn == start
        await peer.reply(DataIn(tag, data=b"abcd"), advance=False)
        await peer.reply(ScsiResponse(tag, exp_data_sn=1))
        await read.done()
        data = memoryview(bytes(12000))
        write = Running(nursery, session, Task(LUN, cdb.write(0, 1), write_from=data))
        command = await peer.expect(ScsiCommand)
        assert command.exp_stat_sn == start + 1
        assert (await peer.expect(DataOut)).exp_stat_sn == start + 1
        tag = command.initiator_task_tag
        await peer.reply(R2T(LUN, tag, 3, 0, 8192, 3808), advance=False)
        assert (await peer.expect(DataOut)).exp_stat_sn == start + 1
        await peer.reply(ScsiResponse(tag))
        await write.done()
        nursery.start_soon(good, session)
        command = await peer.expect(ScsiCommand)
        assert command.exp_stat_sn == start + 2
        await peer.reply(ScsiResponse(command.initiator_task_tag))


@pytest.mark.checklist(48, "11.18")
async def test_a_ping_of_the_target_is_answered_with_its_tag_and_lun() -> None:
    """Checklist 48."""
    async with played_session() as (_, peer, _target):
        await peer.reply(NopIn(target_transfer_tag=0x1234, lun=LUN), advance=False)
        answer = await peer.expect(NopOut)
        assert answer.immediate
        assert (answer.initiator_task_tag, answer.target_transfer_tag) == (NO_TAG, 0x1234)
        assert (answer.lun, answer.cmd_sn) == (LUN, 1)
        await peer.reply(NopIn(), advance=False)
        await peer.nothing()


@pytest.mark.checklist(4, "4.2.2.1")
@pytest.mark.checklist(49, "11.18")
async def test_an_idle_target_is_pinged_and_the_answer_taken() -> None:
    """Checklist 49: the ping is immediate and carries the next CmdSN without using it up."""
    async with played_session(noop_interval_s=0.05, noop_timeout_s=5) as (session, peer, _):
        ping = await peer.expect(NopOut)
        assert ping.immediate
        assert ping.target_transfer_tag == NO_TAG != ping.initiator_task_tag
        assert ping.cmd_sn == 1
        await peer.reply(NopIn(ping.initiator_task_tag, data=bytes(ping.data)))
        again = await peer.expect(NopOut)
        assert again.cmd_sn == 1
        assert again.exp_stat_sn == ping.exp_stat_sn + 1
        await peer.reply(NopIn(again.initiator_task_tag, data=bytes(again.data)))
        assert session.counters.connections_lost == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(good, session)
            command = await peer.expect(ScsiCommand)
            assert command.cmd_sn == 1
            await peer.reply(ScsiResponse(command.initiator_task_tag))


@pytest.mark.checklist(2, "4.2.2.1")
async def test_commands_go_out_in_cmd_sn_order_and_never_beyond_the_window() -> None:
    """Checklist 2: three slots, then a closed window, then two more."""
    async with played_session(window=3) as (session, peer, _), trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(good, session)
        limit = peer.max_cmd_sn
        commands = [await peer.expect(ScsiCommand) for _ in range(3)]
        assert [command.cmd_sn for command in commands] == [1, 2, 3]
        await peer.nothing()
        peer.max_cmd_sn = limit + 2
        await peer.reply(NopIn(), advance=False)
        commands += [await peer.expect(ScsiCommand) for _ in range(2)]
        assert [command.cmd_sn for command in commands] == [1, 2, 3, 4, 5]
        peer.max_cmd_sn = limit + 2
        await peer.nothing()
        peer.max_cmd_sn = limit + 3
        for command in commands:
            await peer.reply(ScsiResponse(command.initiator_task_tag))
        last = await peer.expect(ScsiCommand)
        assert last.cmd_sn == 6
        await peer.reply(ScsiResponse(last.initiator_task_tag))


async def test_a_session_has_a_limit_of_its_own() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        session.in_flight_max = 2
        for _ in range(3):
            nursery.start_soon(good, session)
        first, second = await peer.expect(ScsiCommand), await peer.expect(ScsiCommand)
        await peer.nothing()
        await peer.reply(ScsiResponse(first.initiator_task_tag))
        third = await peer.expect(ScsiCommand)
        tags = {first.initiator_task_tag, second.initiator_task_tag, third.initiator_task_tag}
        assert len(tags) == 3
        await peer.reply(ScsiResponse(second.initiator_task_tag))
        await peer.reply(ScsiResponse(third.initiator_task_tag))


@pytest.mark.parametrize("initial_r2t", [False, True])
@pytest.mark.parametrize("immediate_data", [False, True])
@pytest.mark.checklist(10, "11.3.1")
@pytest.mark.checklist(12, "13.11")
@pytest.mark.checklist(17, "11.8")
async def test_a_write_in_all_four_combinations(initial_r2t: bool, immediate_data: bool) -> None:
    """Checklist 10 to 12 and 17: every byte arrives once, as negotiated."""
    data = bytes(position % 253 for position in range(30000))
    offered = offer(initial_r2t=initial_r2t, immediate_data=immediate_data)
    async with played_session(offered) as (session, peer, _), trio.open_nursery() as nursery:
        task = Task(LUN, cdb.write(0, 1), write_from=memoryview(data))
        running = Running(nursery, session, task)
        command = await peer.expect(ScsiCommand)
        got = bytearray(command.data)
        assert len(got) == (4096 if immediate_data else 0)
        assert command.final is initial_r2t
        final = command.final
        while not final:
            pdu = await peer.expect(DataOut)
            assert (pdu.target_transfer_tag, pdu.buffer_offset) == (NO_TAG, len(got))
            got += pdu.data
            final = pdu.final
        if not initial_r2t:
            assert len(got) == 8192
        r2t_sn = 0
        while len(got) < len(data):
            want = min(16384, len(data) - len(got))
            tag = command.initiator_task_tag
            r2t = R2T(LUN, tag, 0x77 + r2t_sn, r2t_sn, len(got), want)
            await peer.reply(r2t, advance=False)
            end = len(got) + want
            while len(got) < end:
                pdu = await peer.expect(DataOut)
                assert (pdu.target_transfer_tag, pdu.lun) == (0x77 + r2t_sn, LUN)
                assert pdu.buffer_offset == len(got)
                assert len(pdu.data) <= 4096
                got += pdu.data
                assert pdu.final is (len(got) == end)
            r2t_sn += 1
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()
        assert task.status == 0
    assert got == data


@pytest.mark.checklist(18, "11.8")
async def test_several_r2ts_are_served_in_the_order_of_their_arrival() -> None:
    """Checklist 18."""
    data = bytes(position % 253 for position in range(24000))
    async with (
        played_session(offer(initial_r2t=True)) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(session.execute, Task(LUN, cdb.write(0, 1), write_from=memoryview(data)))
        command = await peer.expect(ScsiCommand)
        got = bytearray(command.data).ljust(len(data), b"\0")
        tag = command.initiator_task_tag
        await peer.reply(R2T(LUN, tag, 1, 0, 4096, 8000), advance=False)
        await peer.reply(R2T(LUN, tag, 2, 1, 12096, 11904), advance=False)
        order: list[tuple[int, bool]] = []
        while not order or order[-1] != (2, True):
            pdu = await peer.expect(DataOut)
            order.append((pdu.target_transfer_tag, pdu.final))
            got[pdu.buffer_offset : pdu.buffer_offset + len(pdu.data)] = pdu.data
        assert order == [(1, False), (1, True), (2, False), (2, False), (2, True)]
        assert got == data
        await peer.reply(ScsiResponse(tag))


@pytest.mark.parametrize("digest", [DigestPreference.CRC32C, DigestPreference.PREFER_CRC32C])
@pytest.mark.checklist(44, "11.2.3")
async def test_digests_cover_both_directions(digest: DigestPreference) -> None:
    offered = offer(header_digest=("None", "CRC32C"), data_digest=("None", "CRC32C"))
    async with (
        played_session(offered, header_digest=digest, data_digest=digest) as (session, peer, _),
        trio.open_nursery() as nursery,
    ):
        assert peer.wire.framer.header_digest
        assert peer.wire.framer.data_digest
        buffer = bytearray(5)
        running = Running(nursery, session, Task(LUN, cdb.read(0, 1), read_into=memoryview(buffer)))
        command = await peer.expect(ScsiCommand)
        tag = command.initiator_task_tag
        await peer.reply(DataIn(tag, data=b"hello", final=True, has_status=True))
        data = memoryview(b"abcdefg")
        nursery.start_soon(session.execute, Task(LUN, cdb.write(0, 1), write_from=data))
        command = await peer.expect(ScsiCommand)
        assert bytes(command.data) == b"abcdefg"
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()
        assert bytes(buffer) == b"hello"


@pytest.mark.checklist(24, "11.4.7")
async def test_check_condition_brings_its_sense() -> None:
    """Checklist 24: SenseLength is believed only as far as the segment reaches."""
    async with played_session() as (session, peer, _):
        for length, expected in ((18, 18), (6, 6), (500, 18)):
            sense = bytes([0x70, 0, 5, *range(15)])
            task = Task(LUN, TEST_UNIT_READY)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.execute, task)
                command = await peer.expect(ScsiCommand)
                await peer.reply(
                    ScsiResponse(
                        command.initiator_task_tag,
                        status=2,
                        data=length.to_bytes(2, "big") + sense,
                    )
                )
            assert task.status == 2
            assert task.sense == sense[:expected]


@pytest.mark.checklist(22, "11.4.3")
async def test_a_failed_service_response_is_no_success() -> None:
    """Checklist 22: with Response other than 0, status 0 means nothing (§11.4.3)."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:

        async def fails() -> None:
            with pytest.raises(ProtocolViolation, match="target failure"):
                await session.execute(Task(LUN, TEST_UNIT_READY))

        nursery.start_soon(fails)
        command = await peer.expect(ScsiCommand)
        await peer.reply(ScsiResponse(command.initiator_task_tag, response=1, status=0))


@pytest.mark.parametrize(
    ("response", "residual"),
    [
        (ScsiResponse(0, underflow=True, residual_count=4), 4),
        (ScsiResponse(0, overflow=True, residual_count=4), -4),
        (ScsiResponse(0, residual_count=4), 0),
    ],
)
@pytest.mark.checklist(23, "11.4.5")
async def test_the_residual_counts_only_with_its_bit(response: ScsiResponse, residual: int) -> None:
    """Checklist 23."""
    async with played_session() as (session, peer, _):
        task = Task(LUN, TEST_UNIT_READY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.execute, task)
            command = await peer.expect(ScsiCommand)
            response.initiator_task_tag = command.initiator_task_tag
            await peer.reply(response)
        assert task.residual_bytes == residual


async def test_a_cancelled_read_never_touches_its_buffer_again() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        buffer = bytearray(200_000)
        task = Task(LUN, cdb.read(0, 1), read_into=memoryview(buffer))
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await session.execute(task)

        nursery.start_soon(cancelled)
        command = await peer.expect(ScsiCommand)
        tag = command.initiator_task_tag
        half = DataIn(tag, data=b"x" * 200_000, final=True, has_status=True)
        half.stat_sn, half.exp_cmd_sn, half.max_cmd_sn = peer.stat_sn, peer.exp_cmd_sn, 40
        stream = half.pack(0, 200_000) + bytes(half.data)
        await peer.wire.send([stream[:100_000]])
        await until(lambda: buffer[99_000] == ord("x"))
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        buffer[:] = bytes(len(buffer))
        await peer.wire.send([stream[100_000:]])
        peer.stat_sn += 1
        running = Running(nursery, session, Task(LUN, TEST_UNIT_READY))
        command = await peer.expect(ScsiCommand)
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await running.done()
        assert buffer == bytes(len(buffer))
        assert session.tasks == {}
        assert session.counters.connections_lost == 0


async def test_a_cancelled_write_is_waited_for_while_its_buffer_is_on_the_wire() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        done = trio.Event()
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                task = Task(LUN, cdb.write(0, 1), write_from=memoryview(bytes(100)))
                await session.execute(task)
            done.set()

        nursery.start_soon(cancelled)
        command = await peer.expect(ScsiCommand)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await done.wait()


async def test_a_cancelled_command_that_waits_for_a_slot_is_never_sent() -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        session.in_flight_max = 1
        nursery.start_soon(good, session)
        first = await peer.expect(ScsiCommand)
        with trio.move_on_after(0.02):
            await session.execute(Task(LUN, cdb.write(0, 1), write_from=memoryview(bytes(10))))
        await peer.reply(ScsiResponse(first.initiator_task_tag))
        await peer.nothing()
