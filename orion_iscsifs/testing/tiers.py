"""The metadata of a large tier: all journals in full, and records that take no space."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

from orion_iscsifs.tier import journal, record
from orion_iscsifs.tier.fresh import new_tier_superblock
from orion_iscsifs.tier.journal import Entry, Kind, Scribe
from orion_iscsifs.tier.seals import NO_SALT
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.store import TierStore

BOOT = "this boot"


def make(folder: Path, *, tier_bytes: int, records: int, seed: int = 0) -> int:
    """A tier closed in order with so many records of random frames; how many frames it knows."""
    rng = random.Random(seed)
    block = new_tier_superblock(
        "naa.synthetic", size_bytes=1 << 46, block_bytes=512, tier_bytes=tier_bytes, boot_id=BOOT
    )
    store = TierStore.create(folder, block)
    per_segment = -(-records // (block.segments - 1))
    frames: set[int] = set()
    number, left = 0, records
    while left:
        count = min(per_segment, left)
        numbers = [rng.getrandbits(30) for _ in range(count)]
        frames.update(numbers)
        entries = _segment(folder, store, number, numbers)
        left -= count
        number += 1
    store.update(newest=number - 1, entries=entries, clean=True)
    store.close()
    return len(frames)


def _segment(folder: Path, store: TierStore, number: int, frames: list[int]) -> int:
    block = store.superblock
    size = block.segment_bytes
    descriptor = os.open(SegmentFiles(folder).path(number), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, size)
        header = journal.SegmentHeader(number, 1, journal.entries_max(size), NO_SALT)
        lines = [journal.encode_header(block.store, header)]
        scribe = Scribe(block.store, number)
        lines += [scribe.encode(*entry) for entry in enumerate(_entries(size, frames))]
        os.pwrite(descriptor, b"".join(lines), 0)
    finally:
        os.close(descriptor)
    return len(frames)


def _entries(segment_bytes: int, frames: list[int]) -> Iterator[Entry]:
    at = journal.records_start(segment_bytes)
    room = (segment_bytes - at) // len(frames) - record.HEADER_BYTES
    stored = min(room & -record.ALIGN_BYTES, record.STORED_MAX_BYTES) - record.HEADER_BYTES
    for seq, frame in enumerate(frames):
        yield Entry(Kind.FRAME, 0xFFFF, stored, frame, at, seq, 1)
        at += record.record_bytes(stored)
