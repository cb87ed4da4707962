"""The write log: the contract of a device, and its own promises."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.block.guard import GuardedDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.testing.conformance import CHECKS, Check, check_read_only_device
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.logs import KIB, MIB, logged

GEOMETRIES = {
    "512": Geometry(size_bytes=2 * MIB, discard_granularity_bytes=4096),
    "zeroes after discard": Geometry(
        size_bytes=2 * MIB, discard_granularity_bytes=64 * KIB, zeroes_after_discard=True
    ),
    "4096": Geometry(size_bytes=2 * MIB, logical_block_bytes=4096),
    "small transfers": Geometry(
        size_bytes=2 * MIB - 1536, optimal_transfer_bytes=32 * KIB, write_cache=False
    ),
}


@asynccontextmanager
async def over_memory(
    folder: Path,
    geometry: Geometry,
    *,
    cached: bool = False,
    ordered: bool = True,
    key: bytes | None = None,
) -> AsyncIterator[BlockDevice]:
    memory = GuardedDevice(MemoryDevice(geometry=geometry, volatile_cache=True), strict=True)
    async with logged(folder, memory, ordered=ordered, passphrase=key) as write_log:
        if not cached:
            yield GuardedDevice(write_log)
            return
        config = CacheConfig(mode=CacheMode.WRITETHROUGH, size_bytes=MIB, dirty_max_bytes=MIB // 4)
        async with WritebackCache(write_log, config) as cache:
            yield GuardedDevice(cache)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fast"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("check", CHECKS)
async def test_contract(
    memory_path: Path, geometry: Geometry, check: Check, ordered: bool, autojump_clock: object
) -> None:
    async with over_memory(memory_path / "log", geometry, ordered=ordered) as device:
        await check(device, random.Random(1))


@pytest.mark.parametrize("check", CHECKS)
async def test_contract_of_a_sealed_log(
    memory_path: Path, check: Check, autojump_clock: object, cheap_keys: object
) -> None:
    async with over_memory(memory_path / "log", GEOMETRIES["512"], key=b"a passphrase") as device:
        await check(device, random.Random(1))


@pytest.mark.parametrize("check", CHECKS)
async def test_contract_under_a_cache(
    memory_path: Path, check: Check, autojump_clock: object
) -> None:
    geometry = GEOMETRIES["512"]
    async with over_memory(memory_path / "log", geometry, cached=True) as device:
        await check(device, random.Random(1))


async def test_read_only(memory_path: Path) -> None:
    geometry = Geometry(size_bytes=MIB, read_only=True)
    await check_read_only_device(lambda: over_memory(memory_path / "log", geometry))
