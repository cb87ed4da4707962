"""A tier in a folder of its own, over whatever device a test brings."""

import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.localstore.seal import KDF, Cost, Seal, Sealing
from orion_iscsifs.localstore.superblock import NAMES
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.superblock import TierSuperblock
from orion_iscsifs.tier.tier import CompressedTier, Level, open_tier

KIB = 1 << 10
MIB = 1 << 20
FRAME = 64 * KIB
BOOT = "this boot"
KEY = bytes(range(32))


@dataclass(frozen=True)
class Size:
    """Of a tier much smaller than users have."""

    segment_bytes: int = 256 * KIB
    segments: int = 6


USUAL = Size()
LARGE = Size(segments=64)
WIDE = Size(segment_bytes=MIB, segments=8)
"""Its segments have room for some frames of noise."""


def superblock(size_bytes: int, size: Size = USUAL, *, sealed: bool = False) -> TierSuperblock:
    sealing = Sealing(kdf=KDF, salt=b"", cost=Cost(), nonce=b"", wrapped=b"")
    return TierSuperblock(
        store=secrets.token_bytes(16),
        lun="naa.test",
        size_bytes=size_bytes,
        block_bytes=512,
        segment_bytes=size.segment_bytes,
        segments=size.segments,
        created="2026-01-01T00:00:00+00:00",
        boot_id=BOOT,
        sealing=sealing if sealed else None,
    )


def opened(
    folder: Path,
    size_bytes: int,
    *,
    size: Size = USUAL,
    sealed: bool = False,
    boot_id: str = BOOT,
    tier_bytes: int | None = None,
) -> tuple[TierStore, str]:
    """The store in `folder`, or a new one; and why what was in it was dropped."""
    seal = Seal(KEY) if sealed else None
    if any((folder / name).exists() for name in NAMES):
        store = TierStore.open(folder)
        store.seal = seal
    else:
        store = TierStore.create(folder, superblock(size_bytes, size, sealed=sealed), seal=seal)
    try:
        return store, store.resume(boot_id=boot_id, tier_bytes=tier_bytes)
    except BaseException:
        store.close()
        raise


@asynccontextmanager
async def tiered(
    folder: Path,
    device: BlockDevice,
    *,
    size: Size = USUAL,
    level: Level = 1,
    sealed: bool = False,
    boot_id: str = BOOT,
    may_fail: bool = False,
) -> AsyncIterator[CompressedTier]:
    """Go on with the tier in `folder`, or begin one. It has to end well, unless it `may_fail`."""
    store, _ = opened(
        folder,
        device.geometry.size_bytes,
        size=size,
        sealed=sealed,
        boot_id=boot_id,
    )
    try:
        async with open_tier(device, store, level=level) as tier:
            yield tier
        assert may_fail or (store.superblock.clean and store.failed is None)
    finally:
        store.close()


async def settle(tier: CompressedTier) -> None:
    """Return when everything staged is on the disk."""
    with trio.fail_after(30):
        await tier.appender.drain()


async def read(tier: BlockDevice, offset: int, length: int) -> bytes:
    target = bytearray(length)
    await tier.read_into(offset, memoryview(target))
    return bytes(target)


def device(size_bytes: int = 16 * MIB, *, seed: int = 1) -> MemoryDevice:
    """Of noise, with a record of what it is asked for."""
    geometry = Geometry(size_bytes=size_bytes, discard_granularity_bytes=4096)
    memory = MemoryDevice(geometry=geometry, record=True)
    memory.poke(0, random.Random(seed).randbytes(size_bytes))
    return memory


def asked(memory: MemoryDevice) -> list[tuple[int, int]]:
    """The reads that reached the device since the last time."""
    found = [(r.offset, r.length) for r in memory.requests if r.kind == "read_into"]
    memory.requests.clear()
    return found


async def same(tier: CompressedTier, memory: MemoryDevice, offset: int, length: int) -> bool:
    return await read(tier, offset, length) == memory.peek(offset, length)


async def fill(tier: CompressedTier, start: int, end: int) -> None:
    """Read all of it, no faster than the tier can take it in."""
    for at in range(start, end, MIB):
        await read(tier, at, min(MIB, end - at))
        await settle(tier)
