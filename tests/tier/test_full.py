"""A full tier, and one whose device changes its size."""

import random
from contextlib import suppress
from pathlib import Path

import trio

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier.store import TierStore
from tests.tier.tiers import (
    FRAME,
    LARGE,
    MIB,
    WIDE,
    Size,
    asked,
    device,
    fill,
    opened,
    read,
    same,
    settle,
    tiered,
)

# -- a full tier -----------------------------------------------------------------------------------


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a thread removes segments
            total += path.stat().st_size
    return total


async def test_the_size_is_never_exceeded(memory_path: Path) -> None:
    memory, folder, most = device(8 * MIB), memory_path / "tier", 0
    rng = random.Random(1)
    async with tiered(folder, memory) as tier:
        for _ in range(400):
            await read(tier, rng.randrange(128) * FRAME, FRAME)
            most = max(most, disk_bytes(folder))
            if rng.random() < 0.2:
                await settle(tier)
        assert tier.statistics.evicted_segments > 3
        assert most <= tier.store.size_bytes
        assert tier.store.used_bytes <= tier.store.size_bytes
    looked_at = TierStore.open(folder, shared=True)
    assert looked_at.used_bytes == disk_bytes(folder)
    looked_at.close()
    assert disk_bytes(folder) <= tier.store.size_bytes


async def test_what_is_used_stays(memory_path: Path) -> None:
    """A few frames that are read now and then, and a crowd of others."""
    memory = device(32 * MIB)
    async with tiered(memory_path / "tier", memory, size=WIDE) as tier:
        for number in range(4):
            await read(tier, number * FRAME, FRAME)
        await settle(tier)
        rng, asked_for = random.Random(1), 0
        for number in range(400):
            other = rng.randrange(16, 512)
            await read(tier, other * FRAME, FRAME)
            await read(tier, other * FRAME, FRAME)
            asked(memory)
            await read(tier, number % 4 * FRAME, FRAME)
            asked_for += len(asked(memory))
            await settle(tier)
        statistics = tier.statistics
        assert statistics.evicted_segments > 8
        assert asked_for < 20  # of 400
        assert statistics.reappended_bytes
        assert statistics.reappended_bytes <= (statistics.stored_bytes + MIB) / 3


async def test_a_flood_passes_by(memory_path: Path) -> None:
    memory = device(64 * MIB)
    async with tiered(memory_path / "tier", memory, size=WIDE) as tier:
        await fill(tier, 0, 8 * MIB)  # until it is full
        kept = [number for number in range(128) if tier.store.index.find(number)]
        assert len(kept) > 64
        before = tier.statistics.appended_records
        await fill(tier, 16 * MIB, 64 * MIB)
        assert tier.statistics.passed_by_bytes > 36 * MIB
        # A tenth of what came before it was known for a flood.
        assert tier.statistics.appended_records - before < 24
        assert sum(tier.store.index.find(number) is not None for number in kept) > len(kept) // 2


async def test_a_smaller_size_drops_the_oldest(memory_path: Path) -> None:
    memory, folder = device(), memory_path / "tier"
    async with tiered(folder, memory, size=Size(segment_bytes=MIB, segments=16)) as tier:
        await fill(tier, 0, 10 * MIB)
        frames, segment = tier.store.index.frames, tier.store.superblock.segment_bytes
    tier_bytes = 5 * segment + 8192
    store, dropped = opened(folder, 16 * MIB, tier_bytes=tier_bytes)
    assert not dropped
    assert 0 < store.index.frames < frames
    assert store.index.find(0) is None
    assert store.index.find((10 * MIB >> 16) - 1) is not None
    assert disk_bytes(folder) <= tier_bytes == store.size_bytes
    store.close()


async def test_a_very_different_size_is_a_new_tier(memory_path: Path) -> None:
    memory, folder = device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await read(tier, 0, MIB)
    store, dropped = opened(folder, 16 * MIB, tier_bytes=1 << 30)
    assert "size" in dropped
    assert store.superblock.segment_bytes == 32 * MIB
    assert not store.index.frames
    store.close()
    async with tiered(folder, memory) as tier:
        assert await same(tier, memory, 0, MIB)
        await settle(tier)
        assert tier.store.index.frames


# -- geometry --------------------------------------------------------------------------------------


async def test_what_lay_beyond_the_end_is_forgotten(memory_path: Path) -> None:
    memory = device(4 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        seen: list[int] = []
        tier.on_geometry_change(lambda geometry: seen.append(geometry.size_bytes))
        await fill(tier, 0, 4 * MIB)
        memory.change_geometry(size_bytes=2 * MIB + 512)
        memory.change_geometry(size_bytes=4 * MIB)
        memory.poke(2 * MIB, bytes(2 * MIB))
        assert seen == [2 * MIB + 512, 4 * MIB]
        assert await same(tier, memory, 0, 4 * MIB)
        with trio.fail_after(30):
            while tier.store.index.find(40) is not None:
                await trio.sleep(0.01)
        await fill(tier, 0, 4 * MIB)
        asked(memory)
        assert await same(tier, memory, 0, 4 * MIB)
        assert asked(memory) == []


async def test_a_device_that_shrank_between_two_mounts(memory_path: Path) -> None:
    memory = device(4 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await fill(tier, 0, 4 * MIB)
    memory.change_geometry(size_bytes=2 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE):
        pass
    memory.change_geometry(size_bytes=4 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        assert await same(tier, memory, 0, 4 * MIB)
        assert tier.statistics.hit_bytes == 2 * MIB


async def test_the_last_page_may_be_a_part(memory_path: Path) -> None:
    geometry = Geometry(size_bytes=MIB + 1536)
    memory = MemoryDevice(geometry=geometry, record=True)
    memory.poke(0, random.Random(1).randbytes(geometry.size_bytes))
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        for _ in range(2):
            assert await same(tier, memory, 0, MIB + 1536)
            await settle(tier)
        assert asked(memory) == [(0, MIB + 1536), (MIB, 1536)]
