"""A tier in a folder of its own, over whatever device a test brings."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.localstore.seal import KDF, Cost, Seal, Sealing
from orion_iscsifs.localstore.superblock import NAMES
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.superblock import TierSuperblock
from orion_iscsifs.tier.tier import CompressedTier, Level, open_tier

KIB = 1 << 10
MIB = 1 << 20
BOOT = "this boot"
KEY = bytes(range(32))


@dataclass(frozen=True)
class Size:
    """Of a tier much smaller than users have."""

    segment_bytes: int = 256 * KIB
    segments: int = 6


USUAL = Size()


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
