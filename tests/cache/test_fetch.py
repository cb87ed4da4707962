"""Reads: what they cost the device, and what may happen while they wait for it."""

import os
import random

import pytest
import trio
import trio.testing

from orion_iscsifs.block.pages import FRAME_BYTES, PAGE_BYTES
from orion_iscsifs.config import CacheMode
from orion_iscsifs.errors import OrionError, ScsiError
from tests.cache.helpers import KIB, MIB, rig


async def test_a_small_miss_costs_one_small_read(autojump_clock: object) -> None:
    async with rig() as r:
        r.memory.poke(0, os.urandom(MIB))
        assert await r.read(20 * KIB, 4 * KIB) == r.memory.peek(20 * KIB, 4 * KIB)
        assert r.reads() == [(20 * KIB, 4 * KIB)]
        assert await r.read(20 * KIB, 4 * KIB) == r.memory.peek(20 * KIB, 4 * KIB)
        assert await r.read(21 * KIB, 512) == r.memory.peek(21 * KIB, 512)
        assert len(r.reads()) == 1
        assert (r.cache.statistics.hits, r.cache.statistics.misses) == (2, 1)


async def test_a_sector_brings_its_page(autojump_clock: object) -> None:
    async with rig() as r:
        await r.read(21 * KIB, 512)
        assert r.reads() == [(20 * KIB, PAGE_BYTES)]


async def test_a_large_miss_is_one_read(autojump_clock: object) -> None:
    async with rig() as r:
        content = os.urandom(MIB)
        r.memory.poke(40 * KIB, content)
        assert await r.read(40 * KIB, MIB) == content
        assert r.reads() == [(40 * KIB, MIB)]
        assert await r.read(40 * KIB, MIB) == content
        assert len(r.reads()) == 1


async def test_only_what_is_missing_is_read_and_clean_gaps_are_bridged(
    autojump_clock: object,
) -> None:
    async with rig() as r:
        r.memory.poke(0, os.urandom(MIB))
        await r.cache.write(8 * KIB, b"d" * 4 * KIB)  # dirty: the device's content is stale
        await r.read(24 * KIB, 4 * KIB)  # clean
        before = len(r.reads())
        content = await r.read(0, FRAME_BYTES)
        assert content[8 * KIB : 12 * KIB] == b"d" * 4 * KIB
        assert content[12 * KIB :] == r.memory.peek(12 * KIB, 52 * KIB)
        assert sorted(r.reads()[before:]) == [(0, 8 * KIB), (12 * KIB, 52 * KIB)]


async def test_many_readers_share_one_fetch(autojump_clock: object) -> None:
    async with rig() as r:
        content = os.urandom(FRAME_BYTES)
        r.memory.poke(0, content)
        r.faults.hold("read")

        async def reader(offset: int, length: int) -> None:
            assert await r.read(offset, length) == content[offset : offset + length]

        async with trio.open_nursery() as nursery:
            for offset in (0, 0, 4 * KIB, 512, 8 * KIB):
                nursery.start_soon(reader, offset, 16 * KIB)
                await trio.testing.wait_all_tasks_blocked()
            r.faults.release("read")
        assert sum(length for _, length in r.reads()) == 24 * KIB, "no page was read twice"


async def test_a_failed_fetch_leaves_the_others_to_try_themselves(autojump_clock: object) -> None:
    async with rig() as r:
        content = os.urandom(4 * KIB)
        r.memory.poke(0, content)
        r.faults.hold("read")
        r.faults.fail("read", 1)
        failures = []

        async def reader() -> None:
            try:
                assert await r.read(0, 4 * KIB) == content
            except ScsiError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            r.faults.release("read")
        assert len(failures) == 1
        r.cache.check()


async def test_a_cancelled_fetch_leaves_the_others_to_try_themselves(
    autojump_clock: object,
) -> None:
    async with rig() as r:
        content = os.urandom(4 * KIB)
        r.memory.poke(0, content)
        r.faults.hold("read")
        async with trio.open_nursery() as nursery, trio.open_nursery() as doomed:
            doomed.start_soon(r.read, 0, 4 * KIB)
            await r.faults.wait_held("read")
            nursery.start_soon(r.read, 0, 4 * KIB)
            await trio.testing.wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
            r.faults.release("read")
        assert await r.read(0, 4 * KIB) == content
        assert r.reads() == [(0, 4 * KIB)]


@pytest.mark.parametrize("length", [4 * KIB, 16 * KIB, MIB], ids=["page", "run", "large"])
@pytest.mark.parametrize("flushed", [False, True])
async def test_a_late_fetch_does_not_undo_a_write(
    length: int, flushed: bool, autojump_clock: object
) -> None:
    """The page is written, and even clean again, while an older read is on its way."""
    async with rig() as r:
        r.memory.poke(0, b"o" * length)
        # The answer is late: the device was read before the write.
        r.faults.arrive_first = True
        r.faults.hold("read")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.read, 0, length)
            await r.faults.wait_held("read")
            await r.cache.write(0, b"n" * 4 * KIB)
            if flushed:
                await r.cache.flush()
            r.faults.release("read")
        assert (await r.read(0, length))[: 8 * KIB] == (b"n" * 4 * KIB + b"o" * length)[
            : min(length, 8 * KIB)
        ]
        await r.cache.flush()
        assert r.memory.peek(0, 4 * KIB) == b"n" * 4 * KIB


async def test_part_of_a_page_is_laid_over_its_old_content(autojump_clock: object) -> None:
    async with rig() as r:
        content = bytearray(os.urandom(8 * KIB))
        r.memory.poke(0, content)
        await r.cache.write(512, b"a" * 512)
        await r.cache.write(7 * KIB, b"b" * 512)
        content[512:1024] = b"a" * 512
        content[7 * KIB : 7 * KIB + 512] = b"b" * 512
        assert await r.read(0, 8 * KIB) == content
        await r.cache.flush()
        assert r.memory.peek(0, 8 * KIB) == content


@pytest.mark.parametrize("change", ["discard", "write_zeroes", "write"])
async def test_a_change_below_waits_for_a_fetch_and_the_next_fetch_for_it(
    change: str, autojump_clock: object
) -> None:
    """The cache must not keep what a fetch read before the device's content was changed."""
    mode = CacheMode.WRITETHROUGH if change == "write" else CacheMode.WRITEBACK
    async with rig(mode=mode) as r:
        length = 256 * KIB
        r.memory.poke(0, b"o" * length)
        r.faults.arrive_first = True
        r.faults.hold("read")

        async def alter() -> None:
            if change == "write":
                await r.cache.write(0, b"n" * length)
            else:
                await getattr(r.cache, change)(0, length)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.read, 0, 16 * KIB)
            await r.faults.wait_held("read")
            nursery.start_soon(alter)
            await trio.testing.wait_all_tasks_blocked()
            assert r.memory.peek(0, 4) == b"oooo", "the change overtook the fetch"
            nursery.start_soon(r.read, 128 * KIB, 4 * KIB)
            nursery.start_soon(r.read, 140 * KIB, 40 * KIB)
            await trio.testing.wait_all_tasks_blocked()
            assert r.faults.waiting["read"] == 1, "a fetch overtook the change"
            r.faults.release("read")
        assert await r.read(0, length) == r.memory.peek(0, length)
        assert r.memory.peek(0, 4) != b"oooo"


async def test_reads_pass_the_cache_when_every_frame_is_busy(autojump_clock: object) -> None:
    async with rig(cache_bytes=MIB, dirty_max_bytes=MIB) as r:
        r.faults.hold("write")
        for number in range(16):
            await r.cache.write(number * FRAME_BYTES, bytes(4 * KIB))
        content = os.urandom(128 * KIB)
        r.memory.poke(4 * MIB, content)
        assert await r.read(4 * MIB, 4 * KIB) == content[: 4 * KIB]
        assert await r.read(4 * MIB, 128 * KIB) == content
        r.faults.release("write")


async def test_the_blocks_behind_the_last_whole_page(autojump_clock: object) -> None:
    async with rig(size_bytes=MIB + 1536) as r:
        content = os.urandom(64 * KIB + 1536)
        r.memory.poke(MIB - 64 * KIB, content)
        assert await r.read(MIB - 64 * KIB, len(content)) == content
        content = os.urandom(64 * KIB + 1024)
        await r.cache.write(MIB - 64 * KIB, content)
        assert r.memory.peek(MIB, 1024) == content[64 * KIB :]
        assert await r.read(MIB - 64 * KIB, len(content)) == content


async def test_a_sequential_reader_finds_its_data_there(autojump_clock: object) -> None:
    async with rig(size_bytes=16 * MIB, cache_bytes=16 * MIB, readahead="auto") as r:
        content = random.Random(1).randbytes(16 * MIB)
        r.memory.poke(0, content)
        r.faults.delay("read", 0.001)
        for offset in range(0, 8 * MIB, 128 * KIB):
            assert await r.read(offset, 128 * KIB) == content[offset : offset + 128 * KIB]
            await trio.sleep(0.001)
        statistics = r.cache.statistics
        assert statistics.misses <= 8
        assert statistics.hits >= 56
        assert statistics.readahead_hit_bytes >= 6 * MIB
        assert sum(length for _, length in r.reads()) <= 16 * MIB
        large = [length for _, length in r.reads() if length >= 512 * KIB]
        assert sum(large) >= 6 * MIB, "most of it came in large requests"


async def test_waste_is_counted(autojump_clock: object) -> None:
    async with rig(size_bytes=64 * MIB, cache_bytes=4 * MIB, readahead="auto") as r:
        await r.read(0, 4 * KIB)
        await r.read(4 * KIB, 4 * KIB)
        await trio.sleep(1)
        brought = r.cache.statistics.readahead_bytes
        assert brought == 128 * KIB
        for offset in range(32 * MIB, 48 * MIB, 68 * KIB):
            await r.read(offset, 4 * KIB)
        assert r.cache.statistics.readahead_waste_bytes == brought


async def test_readahead_that_fails_is_nobodys_error(
    caplog: pytest.LogCaptureFixture, autojump_clock: object
) -> None:
    async with rig(readahead="auto") as r:
        await r.read(0, 4 * KIB)
        r.faults.hold("read")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.read, 4 * KIB, 4 * KIB)
            await r.faults.wait_held("read", 2)
            r.faults.release("read")
            r.faults.fail("read", 0)
        r.faults.fail("read", 10)
        await r.read(8 * KIB, 512)
        for offset in range(12 * KIB, 100 * KIB, 4 * KIB):
            await r.read(offset, 4 * KIB)
        await trio.sleep(1)
        r.faults.fail("read", 0)
        await r.read(200 * KIB, 4 * KIB)
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


async def test_an_error_of_one_of_several_fetches(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(32 * KIB, bytes(4 * KIB))
        r.faults.fail("read", 1)
        with pytest.raises(OrionError):
            await r.read(0, FRAME_BYTES)
        r.faults.fail("read", 0)
        assert await r.read(0, FRAME_BYTES) == bytes(FRAME_BYTES)


async def test_no_bridge_over_a_page_in_flight(autojump_clock: object) -> None:
    """The device does not have it yet, so the large read must not bring its old content."""
    async with rig() as r:
        r.memory.poke(0, b"o" * 12 * KIB)
        await r.cache.write(4 * KIB, b"n" * 4 * KIB)
        r.faults.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.flush)
            await r.faults.wait_held("write")
            assert await r.read(0, 12 * KIB) == b"o" * 4 * KIB + b"n" * 4 * KIB + b"o" * 4 * KIB
            r.faults.release("write")


async def test_readahead_keeps_out_of_a_range_that_is_being_changed(
    autojump_clock: object,
) -> None:
    """Otherwise an answer from before the change could come after it, and stay."""
    async with rig(readahead="auto") as r:
        r.memory.poke(0, b"o" * MIB)
        await r.read(0, 4 * KIB)
        r.faults.hold("zero")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.write_zeroes, 8 * KIB, MIB - 8 * KIB)
            await r.faults.wait_held("zero")
            r.faults.arrive_first = True
            r.faults.hold("read")
            nursery.start_soon(r.read, 4 * KIB, 4 * KIB)  # makes a stream
            await trio.testing.wait_all_tasks_blocked()
            r.faults.release("zero")
            await trio.testing.wait_all_tasks_blocked()
            r.faults.release("read")
        assert await r.read(8 * KIB, 64 * KIB) == bytes(64 * KIB)
