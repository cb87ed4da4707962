"""Readahead as a reader meets it: a device with a distance and a bandwidth, on a mock clock."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import pytest
import trio

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.cache.prefetch import REQUEST_BYTES
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.helpers import KIB, MIB, rig

FAR_S = 0.020
NEAR_S = 0.0001


class Distant(MemoryDevice):
    """Reads take a round trip, and the link carries them one after the other."""

    def __init__(self, size_bytes: int, *, round_trip_s: float, bytes_per_s: float) -> None:
        super().__init__(size_bytes=size_bytes, record=True, yields=False)
        self._round_trip_s, self._bytes_per_s = round_trip_s, bytes_per_s
        self._busy_until = 0.0
        self._in_flight_bytes = self.in_flight_max_bytes = 0

    async def read_into(self, offset: int, target: memoryview) -> None:
        now = trio.current_time()
        self._busy_until = max(now, self._busy_until) + len(target) / self._bytes_per_s
        self._in_flight_bytes += len(target)
        self.in_flight_max_bytes = max(self._in_flight_bytes, self.in_flight_max_bytes)
        try:
            await trio.sleep_until(self._busy_until + self._round_trip_s)
        finally:
            self._in_flight_bytes -= len(target)
        await super().read_into(offset, target)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await trio.sleep(self._round_trip_s)
        await super().write(offset, source, fua=fua)

    def reads(self) -> list[tuple[int, int]]:
        return [(one.offset, one.length) for one in self.requests if one.kind == "read_into"]


@dataclass
class Reader:
    cache: WritebackCache
    device: Distant

    async def read(self, offsets: Sequence[int], length: int, *, pause_s: float = 0.0) -> float:
        """Read there, one after the other; how long it took."""
        began = trio.current_time()
        target = memoryview(bytearray(length))
        for offset in offsets:
            await self.cache.read_into(offset, target)
            await trio.sleep(pause_s)
        return trio.current_time() - began


@asynccontextmanager
async def reader(
    *,
    round_trip_s: float,
    bytes_per_s: float = 1e9,
    size_bytes: int = 1024 * MIB,
    cache_bytes: int = 256 * MIB,
    readahead: Literal["auto", "off"] | int = "auto",
) -> AsyncIterator[Reader]:
    device = Distant(size_bytes, round_trip_s=round_trip_s, bytes_per_s=bytes_per_s)
    config = CacheConfig(
        size_bytes=cache_bytes, dirty_max_bytes=cache_bytes // 2, readahead=readahead
    )
    async with WritebackCache(device, config) as cache:
        yield Reader(cache, device)
        cache.check()


@pytest.mark.parametrize(
    ("readahead", "mb_per_s"), [("off", (5, 7)), (4 * MIB, (90, 210)), ("auto", (600, 1000))]
)
async def test_a_distant_device_is_read_at_the_speed_of_the_link(
    readahead: Literal["auto", "off"] | int, mb_per_s: tuple[int, int], autojump_clock: object
) -> None:
    async with reader(round_trip_s=FAR_S, readahead=readahead) as r:
        await r.read(range(0, 64 * MIB, 128 * KIB), 128 * KIB)
        took = await r.read(range(64 * MIB, 192 * MIB, 128 * KIB), 128 * KIB)
        least, most = mb_per_s
        assert least < 128 * MIB / took / 1e6 < most
        assert r.cache.statistics.readahead_waste_bytes == 0


async def test_a_near_device_is_not_flooded(autojump_clock: object) -> None:
    async with reader(round_trip_s=NEAR_S) as r:
        await r.read(range(0, 128 * MIB, 128 * KIB), 128 * KIB)
        assert r.cache.link.window_bytes == 4 * MIB
        assert r.device.in_flight_max_bytes <= 4 * MIB + REQUEST_BYTES


async def test_a_slow_reader_is_not_far_ahead(autojump_clock: object) -> None:
    """10 MB/s need no more than the least window, however far the device is."""
    async with reader(round_trip_s=FAR_S) as r:
        await r.read(range(0, 64 * MIB, 128 * KIB), 128 * KIB, pause_s=0.0125)
        statistics = r.cache.statistics
        assert statistics.readahead_unread_bytes <= 4 * MIB
        assert r.cache.link.window_bytes < 16 * MIB


async def test_several_streams_share_the_link(autojump_clock: object) -> None:
    async with reader(round_trip_s=NEAR_S) as r, trio.open_nursery() as nursery:
        for base in range(0, 512 * MIB, 64 * MIB):
            nursery.start_soon(r.read, range(base, base + 16 * MIB, 128 * KIB), 128 * KIB)
    assert r.device.in_flight_max_bytes <= 4 * MIB + REQUEST_BYTES + 8 * 128 * KIB
    assert r.cache.statistics.readahead_waste_bytes == 0


@pytest.mark.parametrize("step", [100 * KIB, 3 * MIB, -100 * KIB])
async def test_a_stride_is_fetched_ahead_on_its_places_only(
    step: int, autojump_clock: object
) -> None:
    async with reader(round_trip_s=FAR_S) as r:
        places = [512 * MIB + number * step for number in range(150)]
        took = await r.read(places, 4 * KIB)
        assert took < 150 * FAR_S / 5
        assert r.cache.statistics.readahead_hit_bytes >= 140 * 4 * KIB
        on_the_way = {512 * MIB + number * step for number in range(300)}
        assert {(at, 4 * KIB) for at in on_the_way} >= set(r.device.reads())


async def test_a_stride_that_breaks_is_not_fetched_any_further(autojump_clock: object) -> None:
    async with reader(round_trip_s=FAR_S) as r:
        await r.read(range(0, 100 * MIB, MIB), 4 * KIB)
        await trio.sleep(1)
        before = r.cache.statistics.readahead_bytes
        await r.read([600 * MIB, 777 * MIB, 650 * MIB], 4 * KIB)
        await trio.sleep(1)
        assert r.cache.statistics.readahead_bytes == before
        assert r.cache.statistics.readahead_unread_bytes <= 128 * 4 * KIB


async def test_what_was_fetched_ahead_lives_until_it_is_read(autojump_clock: object) -> None:
    """Also where a set in use has all of the cache but the tenth that newcomers have."""
    async with reader(round_trip_s=FAR_S, cache_bytes=64 * MIB, readahead=8 * MIB) as r:
        for _ in range(3):
            await r.read(range(512 * MIB, 572 * MIB, 64 * KIB), 64 * KIB)
        await r.read(range(0, 256 * MIB, 128 * KIB), 128 * KIB)
        assert r.cache.link.window_bytes == 8 * MIB > 64 * MIB // 10
        # What the passes over that set have fetched beyond its end is waste, and no more.
        assert r.cache.statistics.readahead_waste_bytes <= 8 * MIB


async def test_every_byte_fetched_ahead_is_a_hit_or_waste_or_unread(
    autojump_clock: object,
) -> None:
    async with rig(size_bytes=64 * MIB, cache_bytes=4 * MIB, readahead="auto") as r:
        for offset in (0, 4 * KIB):
            await r.read(offset, 4 * KIB)
        await trio.sleep(1)
        statistics = r.cache.statistics
        assert (statistics.readahead_bytes, statistics.readahead_unread_bytes) == (128 * KIB,) * 2
        await r.read(8 * KIB, 4 * KIB)
        await r.cache.write(12 * KIB, bytes(4 * KIB))
        await r.cache.flush()
        await r.cache.discard(16 * KIB, 8 * KIB)
        assert statistics.readahead_hit_bytes == 4 * KIB
        assert statistics.readahead_waste_bytes == 12 * KIB
        await r.read(8 * KIB, 16 * KIB)
        assert statistics.readahead_hit_bytes == 4 * KIB, "what was overwritten is no hit"
        r.cache.check()


async def test_what_comes_too_late_is_waste(autojump_clock: object) -> None:
    """Written while it was fetched."""
    async with rig(readahead="auto") as r:
        r.faults.arrive_first = True
        await r.read(0, 4 * KIB)
        r.faults.hold("read")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.read, 4 * KIB, 4 * KIB)
            await r.faults.wait_held("read", 2)
            await r.cache.write(8 * KIB, bytes(8 * KIB))
            r.faults.release("read")
        await trio.sleep(0.1)
        assert r.cache.statistics.readahead_waste_bytes == 8 * KIB
        r.cache.check()


async def test_a_read_that_fails_or_is_cancelled_leaves_the_link(autojump_clock: object) -> None:
    async with rig(readahead="auto") as r:
        r.faults.fail("read", 1)
        with pytest.raises(Exception, match="failed"):
            await r.read(0, 128 * KIB)
        r.faults.hold("read")
        for length in (128 * KIB, 4 * KIB):
            with trio.move_on_after(1):
                await r.read(0, length)
        assert r.cache.link.in_flight == 0
        r.faults.release("read")
