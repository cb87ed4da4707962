"""Whether what is on the disk may be believed, and how to make sure that it never is again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from orion_iscsifs.tier import journal, segments
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.superblock import TierError, TierSuperblock

_ANOTHER_SIZE: Final = 4
"""A tier that is to have segments so many times as large is made anew."""
_UNSYNCED_SEGMENTS: Final = 5
"""More than these have never been written without having been synced when they were full."""


def reason_against(block: TierSuperblock, boot_id: str, files: SegmentFiles) -> str:
    """Why nothing in the tier may be believed; "" if it may. Blocks."""
    if block.ended:
        return block.ended
    if block.clean:
        return ""
    if block.boot_id != boot_id:
        return "the host went down while it was in use"
    # What could not be written may have been replaced by what was there before: a sync would say.
    for number in files.numbers()[-_UNSYNCED_SEGMENTS:]:
        try:
            sync_path(files.path(number))
        except OSError as error:
            return f"it could not be written: {error.strerror}"
    return ""


def resized(block: TierSuperblock, tier_bytes: int | None) -> TierSuperblock:
    """With room for `tier_bytes`; with other segments only if these don't fit. Raises TierError."""
    if tier_bytes is None:
        return block
    size, count = journal.layout(tier_bytes)
    if count < journal.SEGMENTS_MIN:
        raise too_small(tier_bytes)
    fitting = (tier_bytes - 2 * journal.PAGE_BYTES) // block.segment_bytes
    if fitting < journal.SEGMENTS_MIN or size >= _ANOTHER_SIZE * block.segment_bytes:
        return msgspec.structs.replace(block, segment_bytes=size, segments=count)
    return msgspec.structs.replace(block, segments=min(fitting, journal.SEGMENTS_MAX))


def too_small(tier_bytes: int) -> TierError:
    """What to say of such a size."""
    least = journal.SEGMENTS_MIN * journal.SEGMENT_USUAL_MIN_BYTES + 2 * journal.PAGE_BYTES
    return TierError(f"tier_size: {tier_bytes} bytes are less than {least}")


def retire(folder: Path, write_superblock: Callable[[], None]) -> None:
    """Make sure that what is there is never believed. `write_superblock`: one that says so.

    The disk may be full, read-only or gone: the ways need less and less of it. Blocks; raises
    TierError if none of them works.
    """
    attempts: list[Callable[[], None]] = [
        write_superblock,
        lambda: segments.remove_all(folder),
        lambda: segments.truncate_all(folder),
    ]
    problems = []
    for attempt in attempts:
        try:
            attempt()
        except OSError as error:
            problems.append(error.strerror or str(error))
        else:
            return
    raise TierError(
        f"tier {folder}: can't be marked as ended: {'; '.join(problems)}",
        advice="remove that folder by hand before the next mount: it is out of date",
    )


def sync_path(path: Path) -> None:
    """What was written to the file is durable. Blocks; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
