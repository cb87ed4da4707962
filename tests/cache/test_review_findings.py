"""Defects that a review of the cache has found, each with the test that showed it."""

import pytest
import trio
from trio.testing import MockClock

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.errors import OrionError, ScsiError
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.helpers import KIB, MIB, rig

CONFIG = CacheConfig(
    mode=CacheMode.WRITEBACK,
    size_bytes=4 * MIB,
    dirty_max_bytes=2 * MIB,
    dirty_age_s=0.5,
    readahead="off",
)


async def test_a_cancellation_while_the_last_flush_hangs(autojump_clock: MockClock) -> None:
    """`umount --force` in an outage: the block has ended in order, its flush is cancelled."""
    faults = FaultyDevice(MemoryDevice(8 * MIB))
    with trio.move_on_after(30) as scope:
        async with WritebackCache(faults, CONFIG) as cache:
            await cache.write(0, b"a" * 4096)
            faults.hold("write")
    assert scope.cancelled_caught


class BadPage(MemoryDevice):
    """Every write that touches one page is refused."""

    BAD = 512 * KIB

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        if offset <= self.BAD < offset + len(source):
            raise ScsiError("bad block", status=2, sense_key=3, asc=0x0C)
        await super().write(offset, source, fua=fua)


async def write_over_a_bad_page(device: BadPage) -> None:
    async with WritebackCache(device, CONFIG) as cache:
        await cache.write(0, b"x" * MIB)
        await trio.sleep(120)
        for _ in range(5):
            with pytest.raises(ScsiError):
                await cache.flush()
        assert cache.statistics.dirty_bytes == 4 * KIB, "only the bad page is kept back"
        cache.check()


async def test_one_bad_block_does_not_hold_back_its_neighbours(autojump_clock: MockClock) -> None:
    with pytest.raises(ScsiError):
        await write_over_a_bad_page(BadPage(8 * MIB))


async def test_after_an_outage_runs_are_merged_as_before(autojump_clock: MockClock) -> None:
    """Only a refusal makes a frame go alone: a path that was away says nothing about it."""
    async with rig(dirty_age_s=0.5) as r:
        r.faults.fail("write", 3, lambda: OrionError("no path"))
        await r.cache.write(0, b"x" * MIB)
        await trio.sleep(60)
        assert r.cache.statistics.dirty_bytes == 0
        assert len(r.writes()) <= 4
        with pytest.raises(OrionError, match="no path"):
            await r.cache.flush()


async def test_a_page_may_be_written_back_during_its_own_fetch(autojump_clock: MockClock) -> None:
    """The checker called that broken, and model tests stumbled over it now and then."""
    async with rig() as r, trio.open_nursery() as nursery:
        r.faults.hold("read")
        nursery.start_soon(r.read, 0, 4096)
        await r.faults.wait_held("read")
        await r.cache.write(0, b"n" * 4096)
        r.faults.hold("write")
        nursery.start_soon(r.cache.flush)
        await r.faults.wait_held("write")
        r.cache.check()
        r.faults.release("read")
        r.faults.release("write")


async def test_a_reader_is_not_starved_by_one_writer(autojump_clock: MockClock) -> None:
    async with rig(mode=CacheMode.WRITETHROUGH) as r:
        r.faults.delay("write", 0.01)

        async def writes() -> None:
            while True:
                await r.cache.write(0, b"x" * 512)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writes)
            await trio.sleep(1)
            with trio.fail_after(100):
                await r.read(512, 512)
            nursery.cancel_scope.cancel()


async def test_the_low_watermark_is_seen_where_dirty_frames_fill_up(
    autojump_clock: MockClock,
) -> None:
    async with rig(
        size_bytes=32 * MIB, cache_bytes=16 * MIB, dirty_max_bytes=2 * MIB, dirty_age_s=1000.0
    ) as r:
        await trio.sleep(1)
        for page in range(16):
            for frame in range(16):
                await r.cache.write((frame << 16) + page * 4096, b"a" * 4096)
        await trio.sleep(100)
        assert r.cache.statistics.dirty_bytes <= MIB // 2


async def test_a_failed_fua_write_does_not_swallow_anothers_failure(
    autojump_clock: MockClock,
) -> None:
    async with rig(dirty_age_s=0.5) as r:
        await r.cache.write(0, b"a" * 4096)
        r.faults.fail("write", 1)
        with trio.fail_after(60):
            while not r.cache.statistics.writeback_failures:
                await trio.sleep(0.01)
        r.faults.fail("write", 1)
        with pytest.raises(OrionError):
            await r.cache.write(MIB, b"b" * 4096, fua=True)
        await trio.sleep(20)
        with pytest.raises(OrionError):
            await r.cache.flush()
        await r.cache.flush()
