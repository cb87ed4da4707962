"""Writes on their way to the device: merging, order, room, age, errors, flushes."""

import os

import pytest
import trio
import trio.testing

from orion_iscsifs.block.pages import FRAME_BYTES, PAGE_BYTES
from orion_iscsifs.cache.destage import IN_FLIGHT_MAX_BYTES, WORKERS
from orion_iscsifs.errors import ConnectionLost, DeviceError, ReplacementTimedOut, ScsiError
from tests.cache.helpers import KIB, MIB, rig


async def test_an_absorbed_write_costs_nothing_until_the_flush(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(8 * KIB, b"x" * 4 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        assert not r.memory.calls
        assert r.cache.statistics.dirty_bytes == 4 * KIB
        await r.cache.flush()
        assert r.cache.statistics.dirty_bytes == 0
        assert r.writes() == [(8 * KIB, 4 * KIB)]
        assert r.memory.calls["flush"] == 1
        r.memory.crash()
        assert r.memory.peek(8 * KIB, 4 * KIB) == b"x" * 4 * KIB


async def test_absorbing_has_no_checkpoint(autojump_clock: object) -> None:
    async with rig() as r:
        await r.read(0, 4 * KIB)
        with trio.testing.assert_no_checkpoints():
            await r.cache.write(0, bytes(4 * KIB))
            await r.cache.write(0, bytes(4 * KIB))
            await r.cache.write(MIB, bytes(MIB))
            await r.read(0, 4 * KIB)
            await r.read(MIB, MIB)


async def test_adjacent_small_writes_become_few_large_ones(autojump_clock: object) -> None:
    async with rig() as r:
        content = os.urandom(2 * MIB)
        order = [*range(0, 2 * MIB, 8 * KIB), *range(4 * KIB, 2 * MIB, 8 * KIB)]
        r.faults.hold("write")
        for offset in order:
            if r.cache.statistics.dirty_bytes > MIB:
                break
            await r.cache.write(offset, content[offset : offset + 4 * KIB])
        r.faults.release("write")
        await r.cache.flush()
    async with rig(dirty_max_bytes=4 * MIB) as r:
        for offset in range(0, MIB, 4 * KIB):
            await r.cache.write(offset, content[offset : offset + 4 * KIB])
        await r.cache.flush()
        assert r.writes() == [(0, MIB)]
        assert r.memory.peek(0, MIB) == content[:MIB]


async def test_a_sequential_stream_reaches_the_device_in_large_writes(
    autojump_clock: object,
) -> None:
    async with rig(size_bytes=32 * MIB) as r:
        r.faults.delay("write", 0.001)
        for offset in range(0, 16 * MIB, 128 * KIB):
            await r.cache.write(offset, bytes([offset >> 17]) * 128 * KIB)
            await trio.sleep(0.0001)
        await r.cache.flush()
        assert len(r.writes()) <= 40
        assert sum(length for _, length in r.writes()) == 16 * MIB


async def test_many_small_requests_or_few_large_ones_are_in_flight(autojump_clock: object) -> None:
    async with rig(size_bytes=128 * MIB, cache_bytes=96 * MIB, dirty_max_bytes=90 * MIB) as r:
        r.faults.hold("write")
        for number in range(100):
            await r.cache.write(number * 256 * KIB, b"x" * 4 * KIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert r.faults.waiting["write"] == WORKERS
            r.faults.release("write")
        r.faults.hold("write")
        for number in range(30):
            await r.cache.write(number * 2 * MIB, b"x" * MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert r.faults.waiting["write"] * MIB == IN_FLIGHT_MAX_BYTES
            r.faults.release("write")
        assert r.cache.statistics.dirty_bytes == 0


async def test_runs_grow_in_both_directions(autojump_clock: object) -> None:
    async with rig() as r:
        for number in (4, 3, 5, 2, 6):
            await r.cache.write(number * FRAME_BYTES, bytes(FRAME_BYTES))
        await r.cache.write(7 * FRAME_BYTES, bytes(PAGE_BYTES))
        await r.cache.write(FRAME_BYTES + 60 * KIB, bytes(PAGE_BYTES))
        await r.cache.flush()
        assert r.writes() == [(FRAME_BYTES + 60 * KIB, 5 * FRAME_BYTES + 8 * KIB)]


async def test_holes_stay_holes(autojump_clock: object) -> None:
    async with rig() as r:
        for page in (0, 1, 5, 15):
            await r.cache.write(page * PAGE_BYTES, bytes([page + 1]) * PAGE_BYTES)
        await r.cache.flush()
        assert sorted(r.writes()) == [(0, 8 * KIB), (20 * KIB, 4 * KIB), (60 * KIB, 4 * KIB)]


async def test_a_write_during_its_own_write_back(autojump_clock: object) -> None:
    """The request in flight keeps its content; the new one follows it, never overtakes it."""
    async with rig() as r:
        await r.cache.write(0, b"1" * 4 * KIB)
        r.faults.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.flush)
            await r.faults.wait_held("write")
            await r.cache.write(0, b"2" * 4 * KIB)
            await r.cache.write(4 * KIB, b"3" * 4 * KIB)
            assert await r.read(0, 4 * KIB) == b"2" * 4 * KIB
            nursery.start_soon(r.cache.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert r.faults.waiting["write"] == 1, "two write-backs of one page at a time"
            r.faults.release("write")
        assert r.writes() == [(0, 4 * KIB), (0, 8 * KIB)]
        assert r.memory.peek(0, 8 * KIB) == b"2" * 4 * KIB + b"3" * 4 * KIB


async def test_old_data_goes_by_itself(autojump_clock: object) -> None:
    async with rig(dirty_age_s=5) as r:
        await r.cache.write(0, bytes(4 * KIB))
        await trio.sleep(3)
        assert not r.writes()
        assert r.cache.oldest_dirty_age_s == pytest.approx(3)
        await r.cache.write(MIB, bytes(4 * KIB))
        await trio.sleep(2.7)
        assert r.writes() == [(0, 4 * KIB)]
        await trio.sleep(3)
        assert len(r.writes()) == 2
        assert r.cache.oldest_dirty_age_s == 0
        assert "flush" not in r.memory.calls


async def test_when_nobody_writes_everything_becomes_durable(autojump_clock: object) -> None:
    async with rig(dirty_age_s=600, idle_s=1) as r:
        for _ in range(20):  # busy: the same page again and again
            await r.cache.write(0, b"1" * 4 * KIB)
            await r.cache.write(MIB, b"2" * 4 * KIB)
            await trio.sleep(0.3)
        assert not r.writes()
        await trio.sleep(2.5)
        assert sorted(r.writes()) == [(0, 4 * KIB), (MIB, 4 * KIB)]
        r.memory.crash()
        assert r.memory.peek(MIB, 4 * KIB) == b"2" * 4 * KIB
        await trio.sleep(60)
        assert r.memory.calls["flush"] == 1, "and then there is nothing to do"


async def test_a_device_that_fails_is_asked_again_when_nobody_writes(
    autojump_clock: object,
) -> None:
    async with rig(dirty_age_s=600, idle_s=1) as r:
        await r.cache.write(0, b"1" * 4 * KIB)
        r.faults.fail("write", 3, lambda: ConnectionLost("the target is gone"))
        r.faults.fail("flush", 3, lambda: ConnectionLost("the target is gone"))
        await trio.sleep(30)
        r.memory.crash()
        assert r.memory.peek(0, 4 * KIB) == b"1" * 4 * KIB
        with pytest.raises(ConnectionLost):
            await r.cache.flush()  # a write-back has failed, and nobody was told


async def test_write_back_begins_above_the_low_watermark(autojump_clock: object) -> None:
    async with rig(dirty_max_bytes=MIB) as r:
        for offset in range(0, MIB, 128 * KIB):
            await r.cache.write(offset, bytes(64 * KIB))
        await trio.sleep(0.1)
        assert r.writes()
        assert 0 < r.cache.statistics.dirty_bytes <= 256 * KIB


async def test_the_cap_is_never_exceeded_and_writers_go_in_order(autojump_clock: object) -> None:
    async with rig(dirty_max_bytes=256 * KIB) as r:
        r.faults.delay("write", 0.01)
        highest = 0
        finished: list[int] = []

        async def watch() -> None:
            nonlocal highest
            while True:
                highest = max(highest, r.cache.statistics.dirty_bytes)
                r.cache.check()
                await trio.sleep(0.0005)

        async def writer(number: int) -> None:
            await r.cache.write(number * 512 * KIB, bytes([number + 1]) * 128 * KIB)
            finished.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            async with trio.open_nursery() as writers:
                for number in range(12):
                    writers.start_soon(writer, number)
                    await trio.testing.wait_all_tasks_blocked(0.00001)
            nursery.cancel_scope.cancel()
        assert finished == sorted(finished)
        assert 128 * KIB < highest <= 256 * KIB
        assert r.cache.statistics.throttled_writes


async def test_a_writer_waits_for_a_frame_and_a_newcomer_for_the_writer(
    autojump_clock: object,
) -> None:
    """One dirty page in every frame: room in bytes, but none in frames."""
    async with rig(cache_bytes=MIB, dirty_max_bytes=MIB) as r:
        r.faults.hold("write")
        for number in range(16):
            await r.cache.write(number * FRAME_BYTES, bytes(4 * KIB))
        done: list[str] = []

        async def write(name: str, offset: int) -> None:
            await r.cache.write(offset, bytes(4 * KIB))
            done.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, "first", 2 * MIB)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(write, "second", 4 * KIB)
            await trio.testing.wait_all_tasks_blocked()
            assert done == []
            r.faults.release("write")
        assert done == ["first", "second"]


async def test_a_cancelled_waiting_writer_leaves_the_line(autojump_clock: object) -> None:
    async with rig(cache_bytes=MIB, dirty_max_bytes=64 * KIB) as r:
        r.faults.hold("write")
        await r.cache.write(0, bytes(64 * KIB))
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1):
                await r.cache.write(MIB, bytes(4 * KIB))
            with trio.move_on_after(1):
                nursery.start_soon(r.cache.write, 2 * MIB, b"x" * 4 * KIB)
                await trio.testing.wait_all_tasks_blocked()
                await r.cache.write(MIB, bytes(4 * KIB))
            r.faults.release("write")
        assert await r.read(2 * MIB, 4 * KIB) == b"x" * 4 * KIB


# -- errors --------------------------------------------------------------------------------------


async def test_a_failed_write_back_is_raised_by_the_flush_and_retried(
    autojump_clock: object,
) -> None:
    async with rig() as r:
        await r.cache.write(0, b"x" * 4 * KIB)
        r.faults.fail("write", 1)
        with pytest.raises(ScsiError):
            await r.cache.flush()
        assert r.cache.statistics.dirty_bytes == 4 * KIB
        assert await r.read(0, 4 * KIB) == b"x" * 4 * KIB
        await trio.sleep(1)
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB
        await r.cache.flush()
        assert r.cache.statistics.writeback_failures == 1


async def test_a_failure_in_the_background_is_raised_by_the_next_flush_once(
    autojump_clock: object,
) -> None:
    async with rig(dirty_age_s=1) as r:
        await r.cache.write(0, b"x" * 4 * KIB)
        r.faults.fail("write", 1, lambda: ConnectionLost("the target is gone"))
        await trio.sleep(10)
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB, "retried"
        with pytest.raises(ConnectionLost):
            await r.cache.flush()
        await r.cache.flush()


async def test_retries_become_rarer_and_a_flush_tries_at_once(autojump_clock: object) -> None:
    async with rig(dirty_age_s=0.1) as r:
        await r.cache.write(0, b"x" * 4 * KIB)
        r.faults.fail("write", 1000)
        await trio.sleep(100)
        failures = r.cache.statistics.writeback_failures
        assert 20 <= failures <= 40
        with trio.fail_after(0.001), pytest.raises(ScsiError):
            await r.cache.flush()
        assert r.cache.statistics.writeback_failures == failures + 1
        r.faults.fail("write", 0)
        await r.cache.flush()
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB


async def test_one_bad_frame_does_not_keep_the_others_back(autojump_clock: object) -> None:
    async with rig() as r:
        for number in range(0, 40, 2):
            await r.cache.write(number * FRAME_BYTES, b"x" * 4 * KIB)
        r.faults.fail("write", 1)
        with pytest.raises(ScsiError):
            await r.cache.flush()
        assert r.cache.statistics.dirty_bytes == 4 * KIB
        await r.cache.flush()


async def test_every_flush_whose_data_failed_raises(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, bytes(4 * KIB))
        r.faults.hold("write")
        r.faults.fail("write", 1)
        raised = 0

        async def flush() -> None:
            nonlocal raised
            try:
                await r.cache.flush()
            except ScsiError:
                raised += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(flush)
            await r.faults.wait_held("write")
            r.faults.release("write")
        assert raised == 3
        await r.cache.flush()


async def test_a_failed_device_flush_is_raised_and_tried_again(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"x" * 4 * KIB)
        r.faults.fail("flush", 1)
        with pytest.raises(ScsiError):
            await r.cache.flush()
        await r.cache.flush()
        r.memory.crash()
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB


async def test_a_rewrite_while_the_write_back_fails(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"1" * 4 * KIB)
        r.faults.hold("write")
        r.faults.fail("write", 1)
        async with trio.open_nursery() as nursery:

            async def flush() -> None:
                with pytest.raises(ScsiError):
                    await r.cache.flush()

            nursery.start_soon(flush)
            await r.faults.wait_held("write")
            await r.cache.write(0, b"2" * 4 * KIB)
            r.faults.release("write")
        await r.cache.flush()
        assert r.memory.peek(0, 4 * KIB) == b"2" * 4 * KIB


async def test_a_bug_below_keeps_the_data_too(
    caplog: pytest.LogCaptureFixture, autojump_clock: object
) -> None:
    async with rig() as r:

        def bug() -> ScsiError:
            raise RuntimeError("a bug")

        await r.cache.write(0, b"x" * 4 * KIB)
        r.faults.fail("write", 1, bug)
        with pytest.raises(DeviceError, match="a bug"):
            await r.cache.flush()
        await r.cache.flush()
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB
    assert "a bug below the cache" in caplog.text


async def test_a_write_that_finds_no_room_is_held_no_longer_than_the_device_holds_it(
    autojump_clock: object,
) -> None:
    async with rig(cache_bytes=MIB, dirty_max_bytes=256 * KIB) as r:
        r.faults.fail("write", 1 << 30, lambda: ReplacementTimedOut("no path for 120 s"))
        for number in range(64):
            await r.cache.write(number * 4096, bytes([number + 1]) * 4096)
        failed = []

        async def one_more(offset: int) -> None:
            try:
                await r.cache.write(offset, b"x" * 4096)
            except ReplacementTimedOut:
                failed.append(trio.current_time())

        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(one_more, MIB + number * 4096)
        assert len(failed) == 30
        assert max(failed) - min(failed) < 1, "all who waited, when the first try has failed"
        r.faults.fail("write", 0)
        with trio.fail_after(600):
            await r.cache.write(MIB, b"x" * 4096)
        with pytest.raises(ReplacementTimedOut):
            await r.cache.flush()  # says it, once
        await r.cache.flush()
        for number in range(64):
            assert r.memory.peek(number * 4096, 1) == bytes([number + 1])
