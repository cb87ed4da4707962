"""Frames of 64 KiB and their 16 pages of 4 KiB, as masks with bit n for page n. Pure."""

from collections.abc import Iterator
from typing import Final

from orion_iscsifs.block.ranges import Range

PAGE_SHIFT: Final = 12
PAGE_BYTES: Final = 1 << PAGE_SHIFT
FRAME_SHIFT: Final = 16
FRAME_BYTES: Final = 1 << FRAME_SHIFT
FRAME_MASK: Final = FRAME_BYTES - 1
PAGES_PER_FRAME: Final = FRAME_BYTES // PAGE_BYTES


def pages_touched(start: int, end: int) -> int:
    """The mask of the pages that have a byte of `[start, end)`, both inside a frame."""
    return (1 << (end + PAGE_BYTES - 1 >> PAGE_SHIFT)) - (1 << (start >> PAGE_SHIFT))


def pages_covered(start: int, end: int) -> int:
    """The mask of the pages that lie in `[start, end)` as a whole."""
    first, last = start + PAGE_BYTES - 1 >> PAGE_SHIFT, end >> PAGE_SHIFT
    return (1 << last) - (1 << first) if first < last else 0


def page_runs(mask: int) -> Iterator[Range]:
    """The runs of adjacent pages in a mask, as byte ranges inside the frame."""
    first = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        first += skip
        count = (~mask & (mask + 1)).bit_length() - 1
        yield first << PAGE_SHIFT, (first + count) << PAGE_SHIFT
        mask >>= count
        first += count
