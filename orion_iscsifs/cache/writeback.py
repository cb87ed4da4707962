"""`WritebackCache`: the RAM cache as a block device, write-back or write-through.

This file is the front door: it checks requests, serves what RAM alone can serve without a single
checkpoint, and hands everything else on.

    read:   frames have it → one copy.        otherwise → `fetch` (and `prefetch` for streams)
    write:  write-back     → one copy into the frame; `destage` brings it to the device later
            write-through  → device first, then the frames
    flush:  `destage` writes out what is dirty, then one `device.flush()`, shared where sound

The range lock `_exclusion` is for whoever changes the device past the frames (write-through,
discard, zeroing). Such a task holds the range alone and waits until nothing of it is being fetched
or written back. As long as it holds it, nobody fetches, absorbs or picks a page of it; reads of
valid pages go on.

The frames hold whole pages only. If the device's size is no multiple of 4 KiB, its last few blocks
(the *tail*) are not cached: they are read past the cache and written through.

A device that shrinks takes nothing with it that is not written yet: dirty pages beyond the new end
stay dirty, their write-back fails as long as they are out of range, and so does every flush. They
are written when the device has grown again. A dirty page that the new end cuts through (`_torn`)
goes to the device as far as that has it, before anything else touches the tail.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self

import trio

from orion_iscsifs.block.device import (
    BlockDevice,
    Buffer,
    Geometry,
    GeometryListener,
    check_request,
)
from orion_iscsifs.block.pages import (
    FRAME_BYTES,
    FRAME_MASK,
    FRAME_SHIFT,
    PAGE_BYTES,
    page_runs,
    pages_covered,
    pages_touched,
)
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range, cover, split, subtract, within
from orion_iscsifs.cache.destage import IDLE_S, Destager
from orion_iscsifs.cache.dirty import Obstacle
from orion_iscsifs.cache.fetch import Fetcher
from orion_iscsifs.cache.frames import Frame, FrameTable
from orion_iscsifs.cache.gauge import CACHE_SHARE, Gauge, link_for
from orion_iscsifs.cache.prefetch import Prefetcher
from orion_iscsifs.cache.statistics import CacheStatistics
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.errors import DeviceError, OrionError, UsageError, WriteProtected

log = logging.getLogger(__name__)

CACHE_BYTES_MIN: Final = 16 * FRAME_BYTES
ABSORBED_ZEROES_MAX_BYTES: Final = FRAME_BYTES
"""Longer zeroings go to the device as such, so that it can unmap."""
_ZEROES: Final = bytes(FRAME_BYTES)


class WritebackCache:
    """A cache on top of `device`, usable inside `async with` only.

    Leaving the block flushes, unless it was cancelled; the flush's error is raised.
    """

    def __init__(self, device: BlockDevice, config: CacheConfig, *, idle_s: float = IDLE_S) -> None:
        """`idle_s`: without a write for so long, everything is made durable on the device."""
        _check_config(config)
        self.statistics = CacheStatistics()
        self._device = device
        self._write_through = config.mode is CacheMode.WRITETHROUGH
        self._exclusion = RangeLock()
        self._table = FrameTable(config.size_bytes // FRAME_BYTES, self.statistics)
        self.link = link_for(config)
        gauge = Gauge(device, self.link)
        self._prefetcher = Prefetcher(
            gauge, self._table, self._exclusion, self.statistics, config.size_bytes // CACHE_SHARE
        )
        self._fetcher = Fetcher(
            gauge, self._table, self._exclusion, self.statistics, self._prefetcher
        )
        self._destager = Destager(
            device,
            self._table,
            self._exclusion,
            self.statistics,
            dirty_max_bytes=config.dirty_max_bytes,
            dirty_age_s=config.dirty_age_s,
            idle_s=idle_s,
        )
        self._books = self._destager.books
        # Names for the hot paths. The lists and the dict are the owners' own, never replaced.
        self._frames = self._table.frames
        self._excluded = self._exclusion.exclusive
        self._listeners: list[GeometryListener] = []
        self._apply_geometry(device.geometry)
        device.on_geometry_change(self._change_geometry)

    async def __aenter__(self) -> Self:
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        self._destager.start(self._nursery)
        self._prefetcher.start(self._nursery)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        # Only a cancellation (possibly by the nursery itself) concerns the nursery. An error of the
        # block or of the flush leaves as it is, not wrapped in a group.
        error: OrionError | None = None
        if exc is None or isinstance(exc, Exception):
            try:
                await self.flush()
            except OrionError as caught:
                error = caught
            except BaseException as caught:
                # Cancelled in the flush: the nursery has to be closed with that all the same.
                exc_type, exc, traceback = type(caught), caught, caught.__traceback__
        if self.statistics.dirty_bytes:
            log.warning("the cache ends with %d bytes unwritten", self.statistics.dirty_bytes)
        self._nursery.cancel_scope.cancel()
        if exc is not None and not isinstance(exc, Exception):
            if await self._nursery_manager.__aexit__(exc_type, exc, traceback):
                return True
            raise exc
        await self._nursery_manager.__aexit__(None, None, None)
        if exc is None and error is not None:
            raise error
        return False

    # -- the contract ----------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        # The hit in one frame, spelled out: no call but the copy.
        frame = self._frames.get(offset >> FRAME_SHIFT)
        if frame is not None:
            length = len(target)
            start = offset & FRAME_MASK
            end = start + length
            if (
                end <= FRAME_BYTES
                and not (offset | length) & self._block_mask
                and offset + length <= self._limit
            ):
                pages = (1 << (end + 4095 >> 12)) - (1 << (start >> 12))
                if frame.valid & pages == pages:
                    target[:] = frame.view[start:end]
                    self.statistics.hits += 1
                    if frame.ahead & pages:
                        self._prefetcher.used(frame, pages)
                        self._prefetcher.observe(offset, offset + length)
                    else:
                        frame.visited = True
                    return
        await self._read(offset, target)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        # The write into one known frame, spelled out, unless anything is unusual.
        frame = self._frames.get(offset >> FRAME_SHIFT)
        if frame is not None and self._absorbs and not (fua or self._excluded):
            length = len(source)
            start = offset & FRAME_MASK
            end = start + length
            if (
                end <= FRAME_BYTES
                and not (offset | length) & self._block_mask
                and offset + length <= self._limit
                and not self._destager.waiting_writers
                and self._books.absorb(frame, start, end, source) is None
            ):
                return
        await self._write(offset, source, fua=fua)

    async def flush(self) -> None:
        self.statistics.flushes += 1
        if self._torn is not None:
            await self._settle_torn_page()
        await self._destager.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Dirty pages are written first; what becomes dirty meanwhile keeps its content."""
        self._check_change(offset, length)
        if not length or not self._geometry.discard_granularity_bytes:
            return
        span = cover((offset, offset + length), PAGE_BYTES)
        await self._destager.write_out(self._table.in_range(span))
        async with self._alone(span):
            dirty = [
                (base + first, base + last)
                for frame in self._table.in_range(span)
                for base in (frame.span[0],)
                for first, last in page_runs(frame.dirty)
            ]
            for start, end in subtract((offset, offset + length), dirty):
                try:
                    await self._device.discard(start, end - start)
                finally:
                    self._destager.wrote()
                    self._forget(cover((start, end), PAGE_BYTES))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Short ranges are absorbed, long ones go down and take the cached pages with them."""
        self._check_change(offset, length)
        span = offset, offset + length
        start, end = within(span, PAGE_BYTES)
        if length <= ABSORBED_ZEROES_MAX_BYTES:
            await self._write(offset, _ZEROES[:length], fua=False)
            return
        await self._write(offset, _ZEROES[: start - offset], fua=False)
        await self._write(end, _ZEROES[: span[1] - end], fua=False)
        async with self._alone((start, end)):
            succeeded = False
            try:
                await self._device.write_zeroes(start, end - start, may_unmap=may_unmap)
                succeeded = True
            finally:
                self._destager.wrote()
                self._forget((start, end), dirty_too=succeeded)

    # -- status ----------------------------------------------------------------------------------

    @property
    def oldest_dirty_age_s(self) -> float:
        """For how long the oldest dirty page has been dirty; 0 when there is none."""
        since = self._books.oldest_since
        return 0.0 if since is None else trio.current_time() - since

    def check(self) -> None:
        """Assert the invariants; for tests, whenever no request is in the middle of something."""
        self._table.check()
        self._books.check()

    # -- reading and writing, the general way ------------------------------------------------------

    async def _read(self, offset: int, target: memoryview) -> None:
        length = len(target)
        check_request(self._geometry, offset, length)
        cached = min(max(self._limit - offset, 0), length)
        if cached == length and length and await self._fetcher.read_run(offset, target):
            return
        if cached:
            await self._fetcher.read_into(offset, target[:cached])
        if cached < length:
            if self._torn is not None:
                await self._settle_torn_page()
            await self._device.read_into(offset + cached, target[cached:])

    async def _write(self, offset: int, source: Buffer, *, fua: bool) -> None:
        length = len(source)
        self._check_change(offset, length)
        if self._write_through:
            await self._write_past(offset, source, fua=fua)
            return
        cached = min(max(self._limit - offset, 0), length)
        view = memoryview(source)
        for start, end in split((offset, offset + cached), FRAME_BYTES):
            await self._absorb(start, view[start - offset : end - offset])
        if fua and cached:
            await self._destager.write_out_durably((offset, offset + cached))
        if cached < length:
            if self._torn is not None:
                await self._settle_torn_page()
            await self._write_past(offset + cached, view[cached:], fua=fua)

    async def _absorb(self, offset: int, source: memoryview) -> None:
        """Take one frame's part of a write, waiting for whatever is in the way."""
        in_line, outages = False, 0
        try:
            while (obstacle := self._try_absorb(offset, source, in_line=in_line)) is not None:
                span = cover((offset, offset + len(source)), PAGE_BYTES)
                if obstacle is Obstacle.EXCLUDED:
                    await self._exclusion.wait_until_free(span)
                elif obstacle is Obstacle.INCOMPLETE:
                    await self._complete(span, offset, offset + len(source))
                elif in_line:
                    await self._destager.wait_for_room(outages)
                else:
                    outages = await self._destager.join_line()
                    in_line = True
                check_request(self._geometry, offset, len(source))  # it may have shrunk
        finally:
            if in_line:
                self._destager.leave_line()

    def _try_absorb(self, offset: int, source: memoryview, *, in_line: bool) -> Obstacle | None:
        start, end = offset & FRAME_MASK, (offset & FRAME_MASK) + len(source)
        if self._excluded:
            span = cover((offset, offset + len(source)), PAGE_BYTES)
            if self._exclusion.is_excluded(span):
                return Obstacle.EXCLUDED
        if self._destager.waiting_writers and not in_line:
            return Obstacle.NO_ROOM
        frame = self._table.obtain(offset >> FRAME_SHIFT)
        if frame is None:
            return Obstacle.NO_ROOM
        return self._books.absorb(frame, start, end, source)

    async def _complete(self, span: Range, start: int, end: int) -> None:
        """Fetch the first and the last page of the span if `[start, end)` covers them in part."""
        if start > span[0]:
            await self._fetcher.complete((span[0], span[0] + PAGE_BYTES))
        if end < span[1]:
            await self._fetcher.complete((span[1] - PAGE_BYTES, span[1]))

    async def _write_past(self, offset: int, source: Buffer, *, fua: bool) -> None:
        """Write to the device first, then refresh the frames."""
        if not len(source):
            return
        span = offset, offset + len(source)
        async with self._alone(cover(span, PAGE_BYTES)):
            succeeded = False
            try:
                await self._device.write(offset, source, fua=fua)
                succeeded = True
            finally:
                self._destager.wrote()
                if not succeeded:
                    self._forget(cover(span, PAGE_BYTES))
            self._refresh(offset, memoryview(source))

    # -- keeping the frames true -------------------------------------------------------------------

    @asynccontextmanager
    async def _alone(self, span: Range) -> AsyncIterator[None]:
        """Hold whole pages against everybody; nothing of them is fetched or written meanwhile."""
        async with self._exclusion.alone(span):
            try:
                for frame in self._table.in_range(span):
                    number, pages = frame.number, _pages_of(frame, span)
                    while frame.number == number and (frame.fetching | frame.writing) & pages:
                        await frame.wait()
                yield
            finally:
                self._destager.wake()  # these frames can be picked again

    def _forget(self, span: Range, *, dirty_too: bool = False) -> None:
        """Drop the cached pages of the span; dirty ones only if the device knows better."""
        for frame in self._table.in_range(span):
            pages = _pages_of(frame, span) & frame.valid
            self._books.supersede(frame, pages if dirty_too else pages & ~frame.dirty)

    def _refresh(self, offset: int, source: memoryview) -> None:
        """Put what the device has just taken into the frames, as far as they hold the pages."""
        end_of_all = min(offset + len(source), self._limit)
        for start, end in split((offset, end_of_all), FRAME_BYTES):
            frame = self._table.obtain(start >> FRAME_SHIFT)
            if frame is None:
                continue
            base = frame.span[0]
            whole = pages_covered(start - base, end - base)
            frame.fetched(whole & ~frame.valid)
            for run in page_runs(pages_touched(start - base, end - base) & frame.valid):
                first, last = max(base + run[0], start), min(base + run[1], end)
                frame.view[first - base : last - base] = source[first - offset : last - offset]

    # -- geometry --------------------------------------------------------------------------------

    def _apply_geometry(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._block_mask = geometry.logical_block_bytes - 1
        self._limit = self._table.limit = geometry.size_bytes & -PAGE_BYTES
        self._absorbs = not (self._write_through or geometry.read_only)
        self._torn: Range | None = None
        """The page that the end of the device cuts through, while it may be dirty."""

    def _change_geometry(self, geometry: Geometry) -> None:
        before = self._limit
        self._apply_geometry(geometry)
        if self._limit < before:
            self._drop_beyond_the_end(before)
        elif self._limit > before:
            self._books.end_rest()  # what was beyond the end is within reach again
            self._destager.wake()
        for listener in self._listeners:
            listener(geometry)

    def _drop_beyond_the_end(self, before: int) -> None:
        """Forget what is clean there; what is not stays, and is no secret."""
        unwritten = 0
        for frame in self._table.in_range((self._limit, before)):
            pages = self._table.beyond_the_end(frame) & frame.valid
            kept = pages & (frame.dirty | frame.writing)
            unwritten += kept.bit_count() * PAGE_BYTES
            # What is being written is dropped when that write has ended (`Destager`).
            self._books.supersede(frame, pages & ~kept)
        if not unwritten:
            return
        size = self._geometry.size_bytes
        log.error(
            "the device shrank to %d bytes: %d unwritten bytes lie beyond its end;"
            " they are kept until it grows again",
            size,
            unwritten,
        )
        if size > self._limit:
            self._torn = (self._limit, self._limit + PAGE_BYTES)

    async def _settle_torn_page(self) -> None:
        """Write the part of the torn page that the device still has, and forget the page.

        It can't stay: later writes of the tail go to the device, and it would undo them.
        """
        span = self._torn
        if span is None:
            return
        async with self._alone(span):
            # Checkpoints above: somebody else may have settled it, or the size changed again.
            if self._torn != span:
                return
            start = self._limit
            frame = self._table.frames.get(start >> FRAME_SHIFT)
            page = 0 if frame is None else _pages_of(frame, span) & frame.dirty
            if frame is not None and page:
                inside = bytes(
                    frame.view[start & FRAME_MASK :][: self._geometry.size_bytes - start]
                )
                await self._device.write(start, inside)
                self._destager.wrote()
                if self._torn != span:
                    return
                self._books.supersede(frame, page)
                lost = PAGE_BYTES - len(inside)
                self._destager.note_loss(
                    DeviceError(f"the device shrank: up to {lost} bytes beyond its end are lost")
                )
            self._torn = None

    def _check_change(self, offset: int, length: int) -> None:
        check_request(self._geometry, offset, length)
        if self._geometry.read_only:
            raise WriteProtected("the device is read-only")


def _pages_of(frame: Frame, span: Range) -> int:
    """The frame's pages that have a byte of the span."""
    base, end = frame.span
    first, last = max(span[0], base), min(span[1], end)
    return pages_touched(first - base, last - base) if first < last else 0


def _check_config(config: CacheConfig) -> None:
    if config.size_bytes < CACHE_BYTES_MIN:
        raise UsageError(f"cache_size: {config.size_bytes} bytes are less than {CACHE_BYTES_MIN}")
    if not FRAME_BYTES <= config.dirty_max_bytes <= config.size_bytes:
        raise UsageError(
            f"dirty_max: {config.dirty_max_bytes} bytes: not between {FRAME_BYTES} and cache_size"
        )
