"""Frames: 64 KiB of device content each, with one bit per 4 KiB page for every fact.

A frame's `number` is its offset shifted right by 16. Pages are whole by construction: the cache
leaves a device's last bytes alone when they don't fill a page.

`FrameTable` bounds the memory: one mapping holds all `frames_max` buffers. The kernel backs a page
of it when it is first touched; from then on the buffer of an evicted frame, and its `Frame`, serve
the next one, so nothing is allocated and no page faults. So a reference to a frame held across an
`await` is only good while the frame is busy (dirty, writing or fetching), or its number must be
compared again.
"""

import mmap
from typing import Final

import trio

from orion_iscsifs.block.pages import (
    FRAME_BYTES,
    FRAME_MASK,
    FRAME_SHIFT,
    PAGE_SHIFT,
    pages_touched,
)
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.cache.replacement import S3Fifo
from orion_iscsifs.cache.states import broken_invariants
from orion_iscsifs.cache.statistics import CacheStatistics

_PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
UNREAD_SHARE: Final = 8
"""One such part of the cache is readahead's, on top of the share that newcomers have."""


class Frame:
    """The content and the facts of one frame. The masks have bit n for page n."""

    __slots__ = (
        "_changed",
        "ahead",
        "dirty",
        "dirty_since",
        "failures",
        "fetching",
        "number",
        "picked",
        "proven",
        "queued",
        "retry_delay_s",
        "settled",
        "stumbled",
        "suspect",
        "valid",
        "view",
        "visited",
        "writing",
    )

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.number = -1
        self.valid = self.dirty = self.writing = 0
        self.fetching = 0
        """Pages with a read from the device under way."""
        self.ahead = 0
        """Pages that readahead brought and nobody has read yet."""
        self.dirty_since = 0.0
        self.picked = self.settled = self.failures = 0
        """Write-backs of this frame begun, ended, and ended with an error. They only grow."""
        self.retry_delay_s = 0.0
        self.stumbled = False
        """A request of the write-back under way has failed."""
        self.suspect = False
        """The device refused a write here: something in it is bad, its neighbours may not be."""
        self.visited = self.queued = self.proven = False
        self._changed: trio.lowlevel.ParkingLot | None = None

    @property
    def busy(self) -> bool:
        return bool(self.dirty | self.writing | self.fetching)

    @property
    def span(self) -> Range:
        """Its bytes on the device."""
        start = self.number << FRAME_SHIFT
        return start, start + FRAME_BYTES

    async def wait(self) -> None:
        """Park until the next `wake`. The frame may be another one's afterwards."""
        if self._changed is None:
            self._changed = trio.lowlevel.ParkingLot()
        await self._changed.park()

    def wake(self) -> None:
        """Something other tasks may wait for has happened to this frame."""
        if self._changed is not None:
            self._changed.unpark_all()

    # -- transitions of whole masks; the names are those of states.Cause ---------------------------

    def fetched(self, pages: int) -> None:
        assert not pages & self.valid
        self.valid |= pages

    def write(self, pages: int) -> None:
        self.valid |= pages
        self.dirty |= pages

    def writeback(self, pages: int) -> None:
        assert pages & self.dirty & ~self.writing == pages
        self.dirty ^= pages
        self.writing |= pages

    def done(self, pages: int) -> None:
        assert pages & self.writing == pages
        self.writing ^= pages

    def failed(self, pages: int) -> None:
        assert pages & self.writing == pages
        self.writing ^= pages
        self.dirty |= pages

    def drop(self, pages: int) -> None:
        assert pages & self.valid & ~(self.dirty | self.writing) == pages
        self.valid ^= pages

    def supersede(self, pages: int) -> None:
        assert pages & self.valid & ~self.writing == pages
        self.valid ^= pages
        self.dirty &= ~pages


class FrameTable:
    """All frames by number, at most `frames_max` of them."""

    def __init__(self, frames_max: int, statistics: CacheStatistics) -> None:
        self.frames: dict[int, Frame] = {}
        self.frames_max = frames_max
        self.limit = 0
        """The end of what can be cached: the device's size in whole pages."""
        self.freed = trio.lowlevel.ParkingLot()
        """Who waits for a frame to become idle, or for dirty bytes to become fewer."""
        self._queues: S3Fifo[Frame] = S3Fifo(frames_max)
        self._statistics = statistics
        self._unread_frames_max = frames_max // UNREAD_SHARE
        self._allocated = 0
        self._memory = memoryview(mmap.mmap(-1, frames_max << FRAME_SHIFT, flags=_PRIVATE))

    def obtain(self, number: int) -> Frame | None:
        """The frame of this number, new if need be; None when every frame is busy.

        A new frame is idle: give it something to do before the next `obtain`, or it may be evicted.
        """
        frame = self.frames.get(number)
        return frame if frame is not None else self._new(number)

    def release(self, frame: Frame) -> None:
        """Its work has ended: let it be evicted again if it is idle, and tell who waits."""
        if not frame.busy:
            if not frame.queued:
                self._queues.add(frame)
            if self.freed:
                self.freed.unpark()
        frame.wake()

    def waste(self, frame: Frame, pages: int) -> None:
        """What readahead brought of these pages, and nobody has read, is of no use any more."""
        lost = frame.ahead & pages
        frame.ahead ^= lost
        self._statistics.readahead_waste_bytes += lost.bit_count() << PAGE_SHIFT

    def in_range(self, wanted: Range) -> list[Frame]:
        """The frames with a byte of the range, in no particular order."""
        first, last = wanted[0] >> FRAME_SHIFT, (wanted[1] + FRAME_MASK) >> FRAME_SHIFT
        if last - first > len(self.frames):
            return [frame for number, frame in self.frames.items() if first <= number < last]
        found = map(self.frames.get, range(first, last))
        return [frame for frame in found if frame is not None]

    def beyond_the_end(self, frame: Frame) -> int:
        """The frame's pages that the device does not have any more."""
        start, end = frame.span
        if end <= self.limit:
            return 0
        return pages_touched(max(self.limit - start, 0), FRAME_BYTES)

    def check(self) -> None:
        """Assert what must hold whenever no task is in the middle of something."""
        assert self._allocated <= self.frames_max, "more frames than the cache may have"
        unread = 0
        for number, frame in self.frames.items():
            assert frame.number == number
            assert frame.queued or frame.busy, f"frame {number} can never be evicted"
            assert not frame.ahead & ~frame.valid, f"frame {number}: unread and not there"
            unread += frame.ahead.bit_count() << PAGE_SHIFT
            wrong = broken_invariants(valid=frame.valid, dirty=frame.dirty, writing=frame.writing)
            assert not wrong, f"frame {number}: {wrong}"
        assert unread == self._statistics.readahead_unread_bytes, "readahead is miscounted"

    def _new(self, number: int) -> Frame | None:
        frame: Frame | None
        if self._allocated < self.frames_max:
            start = self._allocated << FRAME_SHIFT
            frame = Frame(self._memory[start : start + FRAME_BYTES])
            self._allocated += 1
        else:
            unread = self._statistics.readahead_unread_bytes >> FRAME_SHIFT
            frame = self._queues.evict(spared=min(unread, self._unread_frames_max))
            if frame is None:
                return None
            del self.frames[frame.number]
            if frame.ahead:
                self.waste(frame, frame.ahead)
            frame.drop(frame.valid)
        frame.number = number
        self.frames[number] = frame
        self._queues.admit(frame)
        return frame
