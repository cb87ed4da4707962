"""The contract of `block/device.py`, on the tier alone and between other layers."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
from tests.cache.logs import logged
from tests.tier.tiers import KIB, MIB, Size, tiered

GEOMETRIES = {
    "512": Geometry(size_bytes=2 * MIB, discard_granularity_bytes=4096),
    "4096": Geometry(
        size_bytes=2 * MIB, logical_block_bytes=4096, discard_granularity_bytes=64 * KIB
    ),
    # The last page is not whole, and nothing can be discarded.
    "tail": Geometry(size_bytes=2 * MIB - 1536),
}


def tier_alone(folder: Path, geometry: Geometry, *, sealed: bool = False) -> DeviceFactory:
    @asynccontextmanager
    async def factory() -> AsyncIterator[BlockDevice]:
        below = GuardedDevice(MemoryDevice(geometry=geometry))
        async with tiered(folder, below, sealed=sealed) as tier:
            yield GuardedDevice(tier)
            assert tier.store.state == "ok"
            assert not tier.statistics.bad_records

    return factory


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("check", CHECKS)
async def test_tier(
    memory_path: Path, geometry: Geometry, check: Check, autojump_clock: object
) -> None:
    async with tier_alone(memory_path / "tier", geometry)() as device:
        await check(device, random.Random(1))


@pytest.mark.parametrize("check", CHECKS)
async def test_sealed(memory_path: Path, check: Check, autojump_clock: object) -> None:
    async with tier_alone(memory_path / "tier", GEOMETRIES["512"], sealed=True)() as device:
        await check(device, random.Random(2))


@pytest.mark.parametrize("check", BYTE_GRANULAR_CHECKS)
async def test_under_a_cache(memory_path: Path, check: Check, autojump_clock: object) -> None:
    below = MemoryDevice(geometry=GEOMETRIES["tail"])
    config = CacheConfig(mode=CacheMode.WRITEBACK, size_bytes=MIB, dirty_max_bytes=256 * KIB)
    async with (
        tiered(memory_path / "tier", below) as tier,
        WritebackCache(GuardedDevice(tier, strict=True), config) as cache,
    ):
        await check(AlignedDevice(cache), random.Random(3))


@pytest.mark.parametrize("check", CHECKS)
async def test_under_a_write_log(memory_path: Path, check: Check, autojump_clock: object) -> None:
    below = MemoryDevice(geometry=GEOMETRIES["512"])
    async with (
        tiered(memory_path / "tier", below, size=Size(segments=16)) as tier,
        logged(memory_path / "log", GuardedDevice(tier)) as write_log,
    ):
        await check(write_log, random.Random(4))


async def test_read_only(memory_path: Path) -> None:
    geometry = Geometry(size_bytes=MIB, read_only=True)
    await check_read_only_device(tier_alone(memory_path / "tier", geometry))
