"""Claims: which task fetches which absent pages.

A `Fetch` is one read from the device. It marks the absent pages of its run as `fetching` in their
frames, so that whoever else wants them waits instead of reading them again. A claim keeps its frame
in place (a frame that is fetching is busy), so the frame is the same one when the content comes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from orion_iscsifs.block.pages import (
    FRAME_BYTES,
    FRAME_SHIFT,
    PAGE_BYTES,
    PAGE_SHIFT,
    page_runs,
    pages_touched,
)
from orion_iscsifs.block.ranges import Range, cover, split
from orion_iscsifs.cache.frames import Frame, FrameTable


@dataclass(slots=True)
class Fetch:
    """A run of whole pages to read, and the claims on those of them that are absent."""

    start: int
    end: int
    claims: list[tuple[Frame, int]] = field(default_factory=list)
    """Frames in ascending order, each with the mask of the pages claimed."""


def claim(table: FrameTable, run: Range) -> Fetch:
    """Claim the absent pages of `run`, in as many frames as are to be had."""
    fetch = Fetch(*run)
    for start, end in split(run, FRAME_BYTES):
        frame = table.obtain(start >> FRAME_SHIFT)
        if frame is None:
            continue
        base = start & -FRAME_BYTES
        pages = pages_touched(start - base, end - base) & ~(frame.valid | frame.fetching)
        if pages:
            frame.fetching |= pages
            fetch.claims.append((frame, pages))
    return fetch


def install(table: FrameTable, fetch: Fetch, content: memoryview, *, ahead: bool = False) -> int:
    """End the claims: fill the claimed pages that nobody has written meanwhile; how many bytes.

    `content` is what the device holds from `fetch.start` on. `ahead`: readahead brought it.
    """
    installed = 0
    for frame, claimed in fetch.claims:
        frame.fetching &= ~claimed
        pages = claimed & ~frame.valid & ~table.beyond_the_end(frame)
        at = (frame.number << FRAME_SHIFT) - fetch.start
        for first, last in page_runs(pages):
            frame.view[first:last] = content[at + first : at + last]
        frame.fetched(pages)
        if ahead:
            frame.ahead |= pages
        installed += pages.bit_count() << PAGE_SHIFT
        table.release(frame)
    return installed


def give_up(table: FrameTable, fetch: Fetch) -> None:
    """End the claims without content: who waits for these pages tries for itself."""
    for frame, claimed in fetch.claims:
        frame.fetching &= ~claimed
        table.release(frame)


def first_absent_run(table: FrameTable, wanted: Range) -> Range | None:
    """The first run in `wanted` of pages that are neither in the cache nor on their way."""
    found: Range | None = None
    for start, end in split(cover(wanted, PAGE_BYTES), FRAME_BYTES):
        frame = table.frames.get(start >> FRAME_SHIFT)
        base = start & -FRAME_BYTES
        pages = pages_touched(start - base, end - base)
        for first, last in page_runs(absent_pages(frame, pages)):
            run = base + first, base + last
            if found is None:
                found = run
            elif found[1] == run[0]:
                found = found[0], run[1]
            else:
                return found
    return found


def absent_pages(frame: Frame | None, pages: int) -> int:
    """Those of `pages` that are neither valid nor being fetched."""
    return pages if frame is None else pages & ~(frame.valid | frame.fetching)


def bridged(absent: int, clean: int) -> int:
    """`absent`, and the runs of clean pages that have an absent page on either side.

    The device has the content of a clean page, so one request over it replaces two around it.
    """
    for first, last in _runs(clean):
        if absent >> last & 1 and first and absent >> (first - 1) & 1:
            absent |= (1 << last) - (1 << first)
    return absent


def _runs(mask: int) -> Iterator[Range]:
    for start, end in page_runs(mask):
        yield start // PAGE_BYTES, end // PAGE_BYTES
