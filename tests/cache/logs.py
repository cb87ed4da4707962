"""A write log in a folder of its own, over whatever device a test brings."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cache.writelog import WriteLog, open_write_log, recover
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.localstore.superblock import NAMES, Superblock

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """Of a log and its memory."""

    segment_bytes: int = 256 * KIB
    segments: int = 8
    dirty_max_bytes: int = MIB


USUAL = Size()


def superblock(size_bytes: int, size: Size) -> Superblock:
    """Of a log much smaller than users have."""
    return Superblock(
        store=secrets.token_bytes(16),
        lun="naa.test",
        size_bytes=size_bytes,
        block_bytes=512,
        segment_bytes=size.segment_bytes,
        segments=size.segments,
        created="2026-01-01T00:00:00+00:00",
    )


@asynccontextmanager
async def logged(
    folder: Path,
    device: BlockDevice,
    *,
    size: Size = USUAL,
    dirty_age_s: float = 5.0,
    ordered: bool = True,
    forgive_damage: bool = False,
    passphrase: bytes | None = None,
) -> AsyncIterator[WriteLog]:
    """Go on with the log in `folder`, or begin one; with a passphrase it is sealed."""
    if (folder / NAMES[0]).exists():
        store = LogStore.open(folder)
        store.unlock(passphrase)
    else:
        block = superblock(device.geometry.size_bytes, size)
        store = LogStore.create(folder, block, passphrase)
    try:
        epochs, scan = recover(store, trio.current_time())
        assert forgive_damage or not scan.damage, scan.damage
        store.resume(scan)
        async with open_write_log(
            device,
            store,
            epochs,
            dirty_max_bytes=size.dirty_max_bytes,
            dirty_age_s=dirty_age_s,
            ordered=ordered,
        ) as write_log:
            yield write_log
    finally:
        store.close()
