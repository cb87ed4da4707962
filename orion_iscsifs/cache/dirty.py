"""`DirtyFrames`: the books of the write-back. Which pages are dirty, what is due, what goes next.

Nothing here waits; `destage` does. Every method leaves the books consistent.

A frame with dirty pages and none in flight waits in `_dirty`, in the order in which frames became
dirty. A *pick* takes the first one that is due together with the neighbours that continue its dirty
run, up to the device's optimal transfer, moves **all** their dirty pages to WRITING, and cuts them
into *extents*: the longest runs of bytes, one request each.

*A frame is in one write-back at a time.* It is picked only when nothing of it is in flight, and as
a whole. Two things follow. Writes of one page never overtake each other. And `picked`/`settled`
count a frame's write-backs, so that a flush can name what it waits for (`goal`): the end of the
write-back under way, or of the next one if anything is dirty now. What is written later belongs to
a later one: no writer can keep a flush from ending.

What is due: everything above the low watermark, everything older than `dirty_age_s` (or all, when
nobody writes), everything while a writer waits for room, and what somebody waits for (`_wanted`).

A frame whose write-back failed sits out a delay that doubles each time (`_resting`). If it was the
device that refused (`suspect`), the frame goes alone and page by page until it has been written:
one bad block keeps nothing but its own page from the device.
"""

import enum
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import (
    FRAME_BYTES,
    FRAME_SHIFT,
    PAGE_BYTES,
    PAGE_SHIFT,
    PAGES_PER_FRAME,
    page_runs,
    pages_covered,
    pages_touched,
)
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range, split
from orion_iscsifs.cache.frames import Frame, FrameTable
from orion_iscsifs.cache.statistics import CacheStatistics

LOW_WATERMARK: Final = 4
"""Write-back begins at this fraction (1/n) of the dirty bytes or of the frames."""
RETRY_DELAY_S: Final = 0.1
RETRY_DELAY_MAX_S: Final = 5.0
_LAST_PAGE: Final = 1 << (PAGES_PER_FRAME - 1)


class Obstacle(enum.Enum):
    """Why a write can't be absorbed right now."""

    EXCLUDED = enum.auto()
    """Somebody holds the range alone."""
    NO_ROOM = enum.auto()
    """Too many dirty bytes, or no frame is free."""
    INCOMPLETE = enum.auto()
    """It covers a page in part whose rest is not in the cache."""


@dataclass(slots=True)
class Extent:
    """One write to the device: consecutive bytes, piece by piece out of one frame each."""

    offset: int
    length: int
    pieces: list[tuple[Frame, Range]]
    fua: bool = False


class DirtyFrames:
    """See the module's docstring.

    `on_first` is called when there is something to watch the age of, `on_due` when something may
    have become due by a write.
    """

    def __init__(
        self,
        table: FrameTable,
        exclusion: RangeLock,
        statistics: CacheStatistics,
        *,
        dirty_max_bytes: int,
        extent_max_bytes: int,
        clock: Callable[[], float],
        on_first: Callable[[], object],
        on_due: Callable[[], object],
    ) -> None:
        self.absorbed = 0
        """Writes that were taken so far."""
        self._table = table
        self._exclusion = exclusion
        self._statistics = statistics
        self._dirty_max = dirty_max_bytes
        self._dirty_low = dirty_max_bytes // LOW_WATERMARK
        self._frames_low = table.frames_max // LOW_WATERMARK
        self._extent_max = max(extent_max_bytes, FRAME_BYTES)
        self._clock = clock
        self._on_first = on_first
        self._on_due = on_due
        self._dirty: dict[int, Frame] = {}
        self._wanted: dict[int, Frame] = {}
        self._resting: dict[int, tuple[float, Frame]] = {}
        self._ready: deque[Extent] = deque()
        self._overdue_since = float("-inf")

    # -- absorbing -------------------------------------------------------------------------------

    def absorb(self, frame: Frame, start: int, end: int, source: Buffer) -> Obstacle | None:
        """Take `source` as the bytes `[start, end)` of the frame, unless something is in the way.

        Afterwards the write is in the cache as a whole, or nothing is. The caller has checked the
        exclusion and the line of writers.
        """
        pages = pages_touched(start, end)
        known = frame.valid
        if (start | end) & (PAGE_BYTES - 1) and (pages & ~pages_covered(start, end)) & ~known:
            return Obstacle.INCOMPLETE
        dirty = frame.dirty
        if dirty & pages != pages:
            statistics = self._statistics
            fresh = (pages & ~(dirty | frame.writing)).bit_count() << PAGE_SHIFT
            if statistics.dirty_bytes + fresh > self._dirty_max:
                return Obstacle.NO_ROOM
            statistics.dirty_bytes += fresh
            if not dirty:
                self._became_dirty(frame)
            elif self._waiting_bytes - fresh <= self._dirty_low < self._waiting_bytes:
                self._on_due()
            frame.write(pages)
            if frame.ahead & pages:
                self._table.waste(frame, pages)
        if known & pages == pages:
            frame.visited = True
        frame.view[start:end] = source
        self.absorbed += 1
        return None

    def _became_dirty(self, frame: Frame) -> None:
        frame.dirty_since = self._clock()
        if frame.writing:
            return  # `settle` lists it
        if not self._dirty:
            self._on_first()
        self._dirty[frame.number] = frame
        if self._is_above_watermark():
            self._on_due()

    def supersede(self, frame: Frame, pages: int) -> None:
        """Forget these pages, dirty or not: the device knows better. None is in flight."""
        pages &= frame.valid
        self._statistics.dirty_bytes -= (pages & frame.dirty).bit_count() << PAGE_SHIFT
        frame.supersede(pages)
        self._table.waste(frame, pages)
        if not frame.dirty:
            self._unlist(frame)
        self._table.release(frame)

    # -- what is due -----------------------------------------------------------------------------

    @property
    def oldest_since(self) -> float | None:
        """When the oldest dirty page became dirty; None when the device has everything."""
        if not self._statistics.dirty_bytes:
            return None
        return min(frame.dirty_since for frame in self.unwritten())

    def unwritten(self) -> list[Frame]:
        """Every frame with something that the device does not have yet."""
        return [frame for frame in self._table.frames.values() if frame.dirty | frame.writing]

    def goal(self, frame: Frame) -> int:
        """What `frame.settled` will be once all that is in it now has been written."""
        return frame.picked + bool(frame.dirty)

    def want(self, frames: Iterable[Frame]) -> None:
        """Somebody waits for these frames: they are due, before all others."""
        for frame in frames:
            if frame.dirty and not frame.writing:
                self._wanted[frame.number] = frame

    def make_due(self, since: float) -> None:
        """What became dirty at that time or earlier is due."""
        self._overdue_since = since

    def end_rest(self, now: float = float("inf")) -> None:
        """Give frames whose write-back failed another try, if their rest is over by `now`."""
        for number in [number for number, (at, _) in self._resting.items() if at <= now]:
            frame = self._resting.pop(number)[1]
            self._dirty[number] = self._wanted[number] = frame

    def next_deadline(self, age_s: float) -> float | None:
        """When data will be `age_s` old or a rest over, whichever is first."""
        deadlines = [at for at, _ in self._resting.values()]
        if self._dirty:
            deadlines.append(next(iter(self._dirty.values())).dirty_since + age_s)
        return min(deadlines, default=None)

    @property
    def _waiting_bytes(self) -> int:
        """Dirty and not being written."""
        return self._statistics.dirty_bytes - self._statistics.in_flight_bytes

    def _is_above_watermark(self) -> bool:
        return self._waiting_bytes > self._dirty_low or len(self._dirty) > self._frames_low

    # -- picking ---------------------------------------------------------------------------------

    @property
    def has_more(self) -> bool:
        """Another `next_extent` may find something."""
        return bool(self._ready or self._dirty)

    def next_extent(self, *, everything: bool) -> Extent | None:
        """The next request to send, its pages WRITING; None if nothing is due.

        `everything`: all that is dirty is due.
        """
        if not self._ready:
            frame = self._next_due(everything=everything)
            if frame is None:
                return None
            self.pick(self._with_neighbours(frame))
        return self._ready.popleft()

    def is_all_pickable(self, span: Range) -> bool:
        """Whether every page of the range is dirty and could be picked now."""
        for start, end in split(span, FRAME_BYTES):
            frame = self._table.frames.get(start >> FRAME_SHIFT)
            if frame is None or not self._is_pickable(frame):
                return False
            base = start & -FRAME_BYTES
            if pages_touched(start - base, end - base) & ~frame.dirty:
                return False
        return True

    def fits_one_wave(self, frames: Iterable[Frame], requests_max: int) -> bool:
        """Whether all of these frames could be picked now, for so many requests at most."""
        count = 0
        for frame in frames:
            if not self._is_pickable(frame) or frame.suspect:
                return False
            count += sum(1 for _ in page_runs(frame.dirty))
            if count > requests_max:
                return False
        return not self._ready

    def pick(self, frames: Iterable[Frame], *, fua: bool = False) -> None:
        """Move all that is dirty in these frames, in order of offset, to `next_extent`."""
        last: Extent | None = None
        for frame in frames:
            base = frame.span[0]
            runs = page_runs(frame.dirty)
            if frame.suspect:
                runs = (page for run in runs for page in split(run, PAGE_BYTES))
            for start, end in runs:
                if (
                    last is None
                    or frame.suspect
                    or last.offset + last.length != base + start
                    or last.length + end - start > self._extent_max
                ):
                    last = Extent(base + start, 0, [], fua)
                    self._ready.append(last)
                last.pieces.append((frame, (start, end)))
                last.length += end - start
            self._statistics.in_flight_bytes += frame.dirty.bit_count() << PAGE_SHIFT
            frame.writeback(frame.dirty)
            frame.picked += 1
            self._unlist(frame)

    def _next_due(self, *, everything: bool) -> Frame | None:
        for frame in self._wanted.values():
            if self._is_pickable(frame):
                return frame
        everything = everything or self._is_above_watermark()
        for frame in self._dirty.values():
            if not everything and frame.dirty_since > self._overdue_since:
                return None
            if self._is_pickable(frame):
                return frame
        return None

    def _is_pickable(self, frame: Frame) -> bool:
        if not frame.dirty or frame.writing:
            return False
        return not (self._exclusion.exclusive and self._exclusion.is_excluded(frame.span))

    def _goes_along(self, frame: Frame) -> bool:
        return self._is_pickable(frame) and not frame.suspect

    def _with_neighbours(self, frame: Frame) -> list[Frame]:
        """The frame and those around it that continue its dirty run, in the order of offset."""
        if frame.suspect:
            return [frame]
        budget = self._extent_max // FRAME_BYTES - 1
        before: list[Frame] = []
        after = [frame]
        while budget and after[-1].dirty & _LAST_PAGE:
            follower = self._dirty.get(after[-1].number + 1)
            if follower is None or not follower.dirty & 1 or not self._goes_along(follower):
                break
            after.append(follower)
            budget -= 1
        while budget and (before or after[:1])[-1].dirty & 1:
            leader = self._dirty.get((before or after[:1])[-1].number - 1)
            if leader is None or not leader.dirty & _LAST_PAGE or not self._goes_along(leader):
                break
            before.append(leader)
            budget -= 1
        return [*reversed(before), *after]

    def _unlist(self, frame: Frame) -> None:
        self._dirty.pop(frame.number, None)
        self._wanted.pop(frame.number, None)
        self._resting.pop(frame.number, None)

    # -- settling --------------------------------------------------------------------------------

    def settle(self, extent: Extent, *, succeeded: bool, refused: bool = False) -> None:
        """The request has ended: its pages are clean, or dirty again.

        `refused`: it failed, and for what it was, not for the path to the device.
        """
        for frame, (start, end) in extent.pieces:
            pages = pages_touched(start, end)
            self._statistics.in_flight_bytes -= end - start
            if succeeded:
                clean = pages & ~frame.dirty
                self._statistics.dirty_bytes -= clean.bit_count() << PAGE_SHIFT
                frame.done(pages)
            else:
                frame.failed(pages)
                frame.failures += 1
                frame.stumbled = True
                frame.suspect |= refused
            if not frame.writing:
                self._end_writeback(frame)

    def _end_writeback(self, frame: Frame) -> None:
        """Nothing of the frame is in flight any more: list it again if anything is dirty."""
        frame.settled += 1
        failed, frame.stumbled = frame.stumbled, False
        if beyond := self._table.beyond_the_end(frame) & frame.valid & ~frame.dirty:
            self.supersede(frame, beyond)  # the device shrank meanwhile
        if not failed:
            frame.retry_delay_s = 0.0
            frame.suspect = False
        if frame.dirty and failed:
            delay_s = min(max(2 * frame.retry_delay_s, RETRY_DELAY_S), RETRY_DELAY_MAX_S)
            frame.retry_delay_s = delay_s
            self._resting[frame.number] = self._clock() + delay_s, frame
            self._on_first()
        elif frame.dirty:
            self._dirty[frame.number] = frame
            self._on_first()
        self._table.release(frame)

    def check(self) -> None:
        """Assert that the books agree with the frames."""
        frames = self._table.frames.values()
        dirty = sum((f.dirty | f.writing).bit_count() for f in frames) << PAGE_SHIFT
        in_flight = sum(f.writing.bit_count() for f in frames) << PAGE_SHIFT
        assert self._statistics.dirty_bytes == dirty <= self._dirty_max
        assert self._statistics.in_flight_bytes == in_flight
        waiting = {f.number for f in frames if f.dirty and not f.writing}
        assert self._dirty.keys() | self._resting.keys() == waiting
        assert self._wanted.keys() <= waiting
