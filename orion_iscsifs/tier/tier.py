"""`CompressedTier`: a read cache on a local disk, as a device over a device.

    read:   what is staged (memory), then what is on the disk, then the device for exactly the rest;
            what the device brought is a candidate for the tier
    write:  first an entry that nothing is true of the range any more, then the device; what was
            written is a candidate as well
    else:   the same without the candidate

The tier never holds anything that the device lacks, so it may drop whatever it likes, and an error
of its own disk is no error of a request: `store.failed` is set, and everything goes to the device.

What must not happen is that the tier answers with something old. `staging` has the rules for what
is on its way in, `store` and `loading` those for what is on the disk. Here, a change keeps to this
order: announce it (`begin_change`), write the entry, clear the index, ask the device, end it. The
entry comes before the index is cleared: were the change cancelled in between, with the index clear,
the next change would find nothing to invalidate and write no entry.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Literal

import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import (
    BlockDevice,
    Buffer,
    Geometry,
    GeometryListener,
    check_request,
)
from orion_iscsifs.block.pages import FRAME_BYTES, FRAME_SHIFT, PAGE_BYTES
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.errors import OrionError, WriteProtected
from orion_iscsifs.tier import spans
from orion_iscsifs.tier.appending import Appender
from orion_iscsifs.tier.batch import BatchWriter
from orion_iscsifs.tier.gathering import Gatherer
from orion_iscsifs.tier.index import frames_of, pages_in
from orion_iscsifs.tier.journal import records_max
from orion_iscsifs.tier.policy import Admission
from orion_iscsifs.tier.reading import Piece, RecordReader
from orion_iscsifs.tier.retiring import Retirement
from orion_iscsifs.tier.staging import Staging
from orion_iscsifs.tier.statistics import TierStatistics
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.superblock import TierError

log = logging.getLogger(__name__)

Level = int | Literal["adaptive"]

STAGING_MAX_BYTES: Final = 32 << 20
STAGING_MIN_BYTES: Final = 1 << 20
STAGING_SHARE: Final = 8
"""One such part of the tier's size may be in memory, on its way in, within these bounds."""
PIECES_NOW: Final = 2
"""Records that are read and decompressed between two requests; more of them are for a thread."""
DRAIN_S: Final = 10.0
_END: Final = 1 << 56


class CompressedTier:
    """See the module's docstring. Made by `open_tier`."""

    def __init__(self, device: BlockDevice, store: TierStore, *, level: Level) -> None:
        self.store: Final = store
        self.statistics: Final = TierStatistics()
        self._device = device
        tier_bytes = store.size_bytes
        room = max(tier_bytes // STAGING_SHARE, STAGING_MIN_BYTES)
        self._staging = Staging(min(room, STAGING_MAX_BYTES))
        block = store.superblock
        self._admission = Admission(tier_bytes, block.segments * records_max(block.segment_bytes))
        self._reader = RecordReader(store.files, store.store_id, store.seals)
        self.gatherer: Final = Gatherer(store.files, self._reader)
        self._listeners: list[GeometryListener] = []
        self._vanishing: list[Range] = []
        """What is not true any more, until the index and the journal know it: ends that the device
        has lost, and records that are bad."""
        self._vanish = trio.lowlevel.ParkingLot()
        self.retirement: Final = Retirement(store)
        self.appender: Final = Appender(
            store,
            self._staging,
            self._admission,
            BatchWriter(self._reader, store.seals),
            self.statistics,
            level=None if level == "adaptive" else level,
        )
        self._changes = 0
        """How many have ended."""
        self._durable_changes = 0
        """So many of them ended before a flush that was good."""
        self._size = device.geometry.size_bytes
        store.on_end = self._end
        device.on_geometry_change(self._change_geometry)

    # -- the contract ----------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        return self._device.geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self.geometry, offset, len(target))
        if self.store.failed is not None or not len(target):
            await self._device.read_into(offset, target)
            return
        span = offset, offset + len(target)
        pieces, missing = self._find(span, target)
        if pieces:
            await self._read_pieces(pieces, span, target)
            for piece in pieces:
                if not piece.is_done:
                    missing[piece.frame] = missing.get(piece.frame, 0) | piece.pages
        if not missing:
            self.statistics.hits += 1
            self.statistics.hit_bytes += len(target)
            return
        runs = spans.runs(missing, span)
        asked = sum(end - start for start, end in runs)
        self.statistics.misses += 1
        self.statistics.miss_bytes += asked
        self.statistics.hit_bytes += len(target) - asked
        await self._read_device(runs, span, target)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self._check_change(offset, len(source))
        span = offset, offset + len(source)
        if self.store.failed is not None and self.retirement.is_certain.is_set():
            await self._device.write(offset, source, fua=fua)
            return
        known: set[int] = set()
        staging, touched = self._staging, dict[int, int]()

        async def write() -> None:
            nonlocal touched
            staging.watch(span)
            try:
                await self._device.write(offset, source, fua=fua)
            finally:
                touched = staging.unwatch(span)

        await self._change(span, write, known)
        passes_by = self._admission.passes_by(span)
        self._take_in(span, memoryview(source), touched, known, passes_by=passes_by)

    async def flush(self) -> None:
        covers = self._changes
        await self._device.flush()
        self._durable_changes = max(self._durable_changes, covers)

    async def discard(self, offset: int, length: int) -> None:
        self._check_change(offset, length)
        span = offset, offset + length
        await self._change(span, lambda: self._device.discard(offset, length))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._check_change(offset, length)
        await self._change(
            (offset, offset + length),
            lambda: self._device.write_zeroes(offset, length, may_unmap=may_unmap),
        )

    # -- for the owner ---------------------------------------------------------------------------

    async def update(self, **changes: object) -> None:
        """Change fields of the superblock, durably. Raises TierError; the tier has failed then."""
        try:
            await trio.to_thread.run_sync(lambda: self.store.update(**changes))
        except TierError as error:
            self.store.fail("writing the superblock", OSError(0, str(error)))
            raise

    # -- reading ---------------------------------------------------------------------------------

    def _find(self, span: Range, target: memoryview) -> tuple[list[Piece], dict[int, int]]:
        """Copy what is staged; what is on the disk, and what is missing. Without a checkpoint."""
        pieces: list[Piece] = []
        missing: dict[int, int] = {}
        leaving = self.store.leaving
        index, staging = self.store.index, self._staging
        for frame, touched in frames_of(span):
            pages = touched
            for gone in self._vanishing:
                pages &= ~pages_in(frame, gone)
            lacking = touched & ~pages
            for staged in staging.find(frame):
                if found := pages & staged.mask:
                    assert staged.buffer is not None
                    spans.copy(frame, found, staged.buffer, span, target)
                    pages &= ~found
            row = index.find(frame) if pages else None
            if row is not None and row.number != leaving and (found := pages & row.valid):
                index.visit(row)
                pieces.append(Piece(frame, row, found))
                pages &= ~found
            lacking |= pages
            if lacking:
                missing[frame] = lacking
        return pieces, missing

    async def _read_pieces(self, pieces: list[Piece], span: Range, target: memoryview) -> None:
        """Fill in what the disk has; what it has not after all stays undone."""
        try:
            if len(pieces) <= PIECES_NOW:
                for piece in pieces:
                    if not self._reader.try_now(piece, span, target):
                        break
                else:
                    self._judge(pieces)
                    return
            await self.gatherer.fetch(pieces, span, target)
        except OSError as error:
            self.store.fail("reading", error)
            return
        self._judge(pieces)

    def _judge(self, pieces: list[Piece]) -> None:
        """Forget records that can't be believed, here and for the next mount."""
        store = self.store
        for piece in pieces:
            if piece.problem is None or not store.index.is_current(piece.frame, piece.row):
                continue  # or it has moved on while it was read
            if isinstance(piece.problem, FileNotFoundError):
                if piece.row.number != store.leaving:
                    store.fail("reading", piece.problem)
                continue
            self.statistics.bad_records += 1
            start = piece.frame << FRAME_SHIFT
            if store.invalidate((start, start + FRAME_BYTES)):
                store.index.remove(piece.frame)
            else:
                self._lose((start, start + FRAME_BYTES))

    async def _read_device(self, runs: list[Range], span: Range, target: memoryview) -> None:
        if len(runs) == 1:
            start, end = runs[0]
            await self._read_run(runs[0], target[start - span[0] : end - span[0]])
            return
        errors: list[OrionError] = []

        async def read(run: Range) -> None:
            try:
                await self._read_run(run, target[run[0] - span[0] : run[1] - span[0]])
            except OrionError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for run in runs:
                nursery.start_soon(read, run)
        if errors:
            raise errors[0]

    async def _read_run(self, run: Range, target: memoryview) -> None:
        """From the device, and perhaps into the tier."""
        passes_by = self._admission.passes_by(run)
        staging = self._staging
        staging.watch(run)
        touched: dict[int, int] = {}
        try:
            await self._device.read_into(run[0], target)
        finally:
            touched = staging.unwatch(run)
        self._take_in(run, target, touched, set(), passes_by=passes_by)

    # -- candidates ------------------------------------------------------------------------------

    def _take_in(
        self,
        span: Range,
        content: memoryview,
        touched: dict[int, int],
        known: set[int],
        *,
        passes_by: bool,
    ) -> None:
        """The device has this content in the range: stage what is worth it. Without a checkpoint.

        `touched`: pages that are excepted. `known`: frames that had a place.
        """
        store, statistics, staging = self.store, self.statistics, self._staging
        if store.failed is not None:
            return
        staged_any = False
        for frame, pages in spans.whole_pages(span):
            pages &= ~touched.get(frame, 0)
            row = store.index.find(frame)
            if row is not None:
                pages &= ~row.valid
            if not pages:
                continue
            length = pages.bit_count() * PAGE_BYTES
            statistics.candidate_bytes += length
            has_place = row is not None or frame in staging.queue or frame in known
            if passes_by and not has_place:
                statistics.passed_by_bytes += length
            elif not self._admission.admits(frame, length, is_known=has_place):
                statistics.refused_bytes += length
            elif staging.stage(frame, pages, content, (frame << FRAME_SHIFT) - span[0]):
                staged_any = True
            else:
                statistics.dropped_bytes += length
        if staged_any:
            statistics.staged_bytes = staging.staged_bytes
            self.appender.wake()

    # -- changes ---------------------------------------------------------------------------------

    async def _change(
        self,
        span: Range,
        operation: Callable[[], Awaitable[None]],
        known: set[int] | None = None,
    ) -> None:
        """Change the device: nothing of the range is known meanwhile, or afterwards.

        `known` gets the frames that something was known of.
        """
        if span[0] == span[1]:
            await operation()
            return
        self._staging.begin_change(span)
        try:
            await self._invalidate(span, known)
            await operation()
        finally:
            self._changes += 1
            self._staging.end_change(span)

    async def _invalidate(self, span: Range, known: set[int] | None = None) -> None:
        """Nothing is true of the range any more, here and for the next mount."""
        store = self.store
        if store.index.is_few(span):
            while found := self._known(span):
                if known is not None:
                    known.update(found)
                if store.invalidate(span):
                    self.statistics.invalidations += 1
                    store.index.remove_range(span)
                elif store.failed is None:
                    await self._wait_for_room()
        elif numbers := await self._segments_with(span):
            while store.failed is None and not store.invalidate(span):
                await self._wait_for_room()
            self.statistics.invalidations += 1
            for number in numbers:
                store.index.remove_range_in(number, span)
                await trio.lowlevel.checkpoint()
        if store.needs_segment:
            self.appender.wake()
        if store.failed is not None:
            await self.retirement.is_certain.wait()

    def _known(self, span: Range) -> list[int]:
        find = self.store.index.find
        return [
            frame
            for frame, pages in frames_of(span)
            if (row := find(frame)) is not None and row.valid & pages
        ]

    async def _segments_with(self, span: Range) -> list[int]:
        """Those with something of the range. While it is announced, no other gets any of it."""
        found = []
        for number in self.store.index.numbers:
            if self.store.index.has_range_in(number, span):
                found.append(number)
            await trio.lowlevel.checkpoint()
        return found

    async def _wait_for_room(self) -> None:
        self.appender.wake()
        if self.store.failed is None:
            await self.store.room.park()

    def _check_change(self, offset: int, length: int) -> None:
        check_request(self.geometry, offset, length)
        if self.geometry.read_only:
            raise WriteProtected("the device is read-only")

    # -- geometry --------------------------------------------------------------------------------

    def _change_geometry(self, geometry: Geometry) -> None:
        if geometry.size_bytes < self._size:
            self._lose((geometry.size_bytes, _END))
        self._size = geometry.size_bytes
        for listener in self._listeners:
            listener(geometry)

    def _lose(self, gone: Range) -> None:
        """Nothing that lay there is true any more, whatever the device has there one day."""
        self._vanishing.append(gone)
        self._staging.begin_change(gone)
        self.store.invalidate(gone)
        self._vanish.unpark()

    async def forget_ends(self) -> None:
        """The background: makes good what `_lose` has begun."""
        while True:
            await self._forget_ends()
            await self._vanish.park()

    async def _forget_ends(self) -> None:
        while self._vanishing:
            gone = self._vanishing[0]
            await self._invalidate(gone)
            if gone in self._vanishing:
                self._vanishing.remove(gone)
                self._staging.end_change(gone)

    # -- the end ---------------------------------------------------------------------------------

    def _end(self) -> None:
        """The tier has failed."""
        self._staging.clear()
        self.retirement.wake()
        self.appender.wake()

    async def begin(self) -> None:
        """Forget what lies beyond the end: the device may have been larger at the last mount."""
        gone = self._size, _END
        self._vanishing.append(gone)
        self._staging.begin_change(gone)
        await self._forget_ends()

    async def finish(self) -> None:
        """The end in order, once nothing is appended any more."""
        store = self.store
        await self._forget_ends()
        if store.failed is None and await self._is_durable():
            try:
                await trio.to_thread.run_sync(store.mark_clean)
            except OSError as error:
                store.fail("closing", error)
        if store.failed is not None:
            await self.retirement.is_certain.wait()

    async def _is_durable(self) -> bool:
        """Whether the device has for certain what it was given, and the tier may have kept.

        It may lose what was not flushed, with its power: the tier would know better then.
        """
        if self._durable_changes < self._changes and self.geometry.write_cache:
            with trio.move_on_after(DRAIN_S):
                try:
                    await self.flush()
                except OrionError as error:
                    log.warning("tier %s: left as in use: %s", self.store.folder, error)
        return self._durable_changes == self._changes or not self.geometry.write_cache


@asynccontextmanager
async def open_tier(
    device: BlockDevice, store: TierStore, *, level: Level = 1
) -> AsyncIterator[CompressedTier]:
    """The device for the time of the body. `store` has been resumed; its owner closes it.

    If the body ends in order, what is staged is written, and the tier is marked clean: all of it is
    durable, and the next mount may believe it. Otherwise it has to be in the same boot of the host.
    """
    tier = CompressedTier(device, store, level=level)
    async with background(tier.retirement.run, tier.forget_ends, tier.gatherer.run):
        async with background(tier.appender.run):
            await tier.begin()
            yield tier
            with trio.move_on_after(DRAIN_S):
                await tier.appender.drain()
        await tier.finish()
