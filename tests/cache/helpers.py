"""A cache over a guarded, scriptable device in memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.block.guard import GuardedDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice

KIB = 1 << 10
MIB = 1 << 20


@dataclass
class Rig:
    cache: WritebackCache
    faults: FaultyDevice
    memory: MemoryDevice

    def writes(self) -> list[tuple[int, int]]:
        """Offset and length of the writes that reached the device so far."""
        return [(r.offset, r.length) for r in self.memory.requests if r.kind == "write"]

    def reads(self) -> list[tuple[int, int]]:
        return [(r.offset, r.length) for r in self.memory.requests if r.kind == "read_into"]

    async def read(self, offset: int, length: int) -> bytes:
        target = bytearray(length)
        await self.cache.read_into(offset, memoryview(target))
        return bytes(target)


@asynccontextmanager
async def rig(
    *,
    size_bytes: int = 8 * MIB,
    block_bytes: int = 512,
    cache_bytes: int = 4 * MIB,
    dirty_max_bytes: int = 2 * MIB,
    dirty_age_s: float = 5.0,
    mode: CacheMode = CacheMode.WRITEBACK,
    readahead: Literal["auto", "off"] | int = "off",
    discard_granularity_bytes: int = 4096,
    fua: bool = False,
    write_cache: bool = True,
    idle_s: float = float("inf"),
) -> AsyncIterator[Rig]:
    """`fua`: small flushes may go as writes with FUA; else each is followed by the device's."""
    geometry = Geometry(
        size_bytes=size_bytes,
        logical_block_bytes=block_bytes,
        discard_granularity_bytes=discard_granularity_bytes,
        fua=fua,
        write_cache=write_cache,
    )
    memory = MemoryDevice(geometry=geometry, volatile_cache=True, record=True)
    faults = FaultyDevice(memory)
    config = CacheConfig(
        mode=mode,
        size_bytes=cache_bytes,
        dirty_max_bytes=dirty_max_bytes,
        dirty_age_s=dirty_age_s,
        readahead=readahead,
    )
    async with WritebackCache(GuardedDevice(faults, strict=True), config, idle_s=idle_s) as cache:
        yield Rig(cache, faults, memory)
        cache.check()
