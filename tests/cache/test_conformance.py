"""The contract of `block/device.py`, on the cache alone and between other layers."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.block.guard import GuardedDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.testing.conformance import (
    BYTE_GRANULAR_CHECKS,
    CHECKS,
    Check,
    DeviceFactory,
    check_read_only_device,
)
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.helpers import KIB, MIB

MODES = [CacheMode.WRITEBACK, CacheMode.WRITETHROUGH]
GEOMETRIES = {
    "512": Geometry(size_bytes=2 * MIB, discard_granularity_bytes=4096),
    "4096": Geometry(
        size_bytes=2 * MIB, logical_block_bytes=4096, discard_granularity_bytes=64 * KIB
    ),
    # The last page is not whole, and nothing can be discarded.
    "tail": Geometry(size_bytes=2 * MIB - 1536),
    "small transfers": Geometry(size_bytes=2 * MIB, optimal_transfer_bytes=32 * KIB),
}


def cached(
    mode: CacheMode, geometry: Geometry, *, aligned: bool = False, cache_bytes: int = MIB
) -> DeviceFactory:
    @asynccontextmanager
    async def factory() -> AsyncIterator[BlockDevice]:
        below = GuardedDevice(MemoryDevice(geometry=geometry), strict=True)
        config = CacheConfig(mode=mode, size_bytes=cache_bytes, dirty_max_bytes=cache_bytes // 4)
        async with WritebackCache(below, config) as cache:
            yield AlignedDevice(GuardedDevice(cache)) if aligned else GuardedDevice(cache)
            cache.check()

    return factory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("check", CHECKS)
async def test_cache(
    mode: CacheMode, geometry: Geometry, check: Check, autojump_clock: object
) -> None:
    async with cached(mode, geometry)() as device:
        await check(device, random.Random(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check", BYTE_GRANULAR_CHECKS)
async def test_aligned_on_guard_on_cache(
    mode: CacheMode, check: Check, autojump_clock: object
) -> None:
    async with cached(mode, GEOMETRIES["tail"], aligned=True)() as device:
        await check(device, random.Random(2))


@pytest.mark.parametrize("check", CHECKS)
async def test_cache_larger_than_the_device(check: Check, autojump_clock: object) -> None:
    async with cached(CacheMode.WRITEBACK, GEOMETRIES["512"], cache_bytes=8 * MIB)() as device:
        await check(device, random.Random(3))


@pytest.mark.parametrize("mode", MODES)
async def test_read_only(mode: CacheMode) -> None:
    await check_read_only_device(cached(mode, Geometry(size_bytes=MIB, read_only=True)))
