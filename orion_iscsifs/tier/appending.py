"""`Appender`: the background task that brings what is staged to the disk.

One task does it all, one thing after the other, so that nothing of it needs a lock:

* It makes a segment ahead when there is none. If the tier is full, the oldest one goes first: what
  was read since it was written is written again, up to `KEPT_SHARE` of a segment; newcomers among
  the others leave their names.
* It takes a batch from the staging, has a thread compress and write it, and looks again: what the
  device has changed meanwhile is left out. Then the entries are written and the index learns of it,
  without a checkpoint in between.

A change that finds the journal full goes on in the segment made ahead. A batch that was under way
for the segment before is then given up: it is rare, and only costs what was in it.
"""

import logging
from typing import Final

import trio

from orion_iscsifs.block.pages import FRAME_SHIFT, PAGE_SHIFT
from orion_iscsifs.tier import index, record
from orion_iscsifs.tier.batch import BatchWriter, Item, Job
from orion_iscsifs.tier.index import Row
from orion_iscsifs.tier.journal import Entry, Kind
from orion_iscsifs.tier.level import AdaptiveLevel, Compressibility
from orion_iscsifs.tier.policy import Admission
from orion_iscsifs.tier.staging import Staged, Staging
from orion_iscsifs.tier.statistics import TierStatistics
from orion_iscsifs.tier.store import TierStore

log = logging.getLogger(__name__)

BATCH_FRAMES: Final = 32
LINGER_S: Final = 0.05
"""A batch that is not full waits so long for more: pages of one frame often arrive one by one."""
EVICTED_AT_ONCE: Final = 256
"""Rows, before other tasks get their turn."""
KEPT_SHARE: Final = 4
"""At most one such part of a segment is what an older one had."""


class Appender:
    """See the module's docstring."""

    def __init__(
        self,
        store: TierStore,
        staging: Staging,
        admission: Admission,
        writer: BatchWriter,
        statistics: TierStatistics,
        *,
        level: int | None,
    ) -> None:
        """`level`: None: adaptive."""
        self._store = store
        self._staging = staging
        self._admission = admission
        self._writer = writer
        self._statistics = statistics
        self._level = level
        self._adaptive = AdaptiveLevel()
        self._compressibility = Compressibility()
        self._wake = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        self._is_busy = False
        self._hurry = False
        self._limiter = trio.CapacityLimiter(1)
        statistics.level = self.level
        admission.is_full = store.is_nearly_full

    @property
    def level(self) -> int:
        """In use now."""
        return self._adaptive.level if self._level is None else self._level

    def wake(self) -> None:
        """Something was staged, or a segment was begun."""
        self._wake.unpark()

    async def drain(self) -> None:
        """Return when nothing is staged any more."""
        self._hurry = True
        while self._store.failed is None and (self._staging.queue or self._is_busy):
            self.wake()
            await self._idle.park()

    # -- the task --------------------------------------------------------------------------------

    async def run(self) -> None:
        """The background. It ends when the tier has failed."""
        store = self._store
        while store.failed is None:
            if not (store.needs_segment or self._staging.queue):
                self._idle.unpark_all()
                await self._wake.park()
                continue
            is_short = len(self._staging.queue) < BATCH_FRAMES
            if is_short and not self._hurry and not store.needs_segment:
                await trio.sleep(LINGER_S)
            self._is_busy = True
            try:
                await self._work()
            except OSError as error:
                store.fail("writing", error)
            finally:
                self._is_busy = False
        self._idle.unpark_all()

    async def _work(self) -> None:
        store = self._store
        if store.needs_segment:
            await self._prepare()
        if not self._staging.queue or store.failed is not None:
            return
        if not store.records_left and not store.begin_segment():
            return
        count = min(BATCH_FRAMES, store.records_left)
        is_behind = self._staging.is_full
        staged = self._staging.begin_batch(count)
        await self._append(staged, [self._item(one) for one in staged], is_behind=is_behind)

    def _item(self, staged: Staged) -> Item:
        """A frame for the thread, with what the disk has of it and is true now."""
        old = self._true(staged.frame, self._store.index.find(staged.frame))
        compress = bool(self.level) and self._compressibility.is_worth_trying(
            staged.frame << FRAME_SHIFT
        )
        return Item(staged.frame, staged.mask, staged.buffer, old, compress)

    def _true(self, frame: int, row: Row | None) -> Row | None:
        """A row without the pages that are being changed: they may still be in the index."""
        if row is None:
            return None
        valid = self._staging.unchanging(frame, row.valid)
        return row._replace(valid=valid) if valid else None

    async def _append(self, staged: list[Staged], items: list[Item], *, is_behind: bool) -> None:
        """Have the batch written, and enter what is still true of it. Raises OSError."""
        store = self._store
        current = store.current
        assert current is not None
        job = Job(
            items=items,
            descriptor=current.descriptor,
            number=current.number,
            position=current.position,
            store_id=store.store_id,
            life=store.superblock.life,
            seq=store.take_seqs(len(items)),
            level=self.level,
        )
        try:
            await trio.to_thread.run_sync(self._writer.run, job, limiter=self._limiter)
            # Checkpoint above: changes have been noted in `staged`, another segment may have begun.
            if store.failed is None and store.current is current:
                current.position = job.end
                self._enter(staged, items)
        finally:
            self._staging.end_batch()
            self._statistics.staged_bytes = self._staging.staged_bytes
        self._learn(job, is_behind=is_behind)

    def _enter(self, staged: list[Staged], items: list[Item]) -> None:
        """Entries and index, without a checkpoint."""
        store = self._store
        assert store.current is not None
        number, entries, rows = store.current.number, [], []
        for one, item in zip(staged, items, strict=True):
            known = one.mask if item.buffer is None else item.valid
            valid = item.valid & known & ~one.changed
            if not valid:
                continue
            kind = Kind.ZERO if item.is_zero else Kind.FRAME
            entries.append(
                Entry(
                    kind, valid, item.stored, item.frame, item.place, item.seq,
                    store.superblock.life,
                )
            )  # fmt: skip
            size = 0 if item.is_zero else record.record_bytes(item.stored)
            proven = one.proven or self._admission.is_proven(item.frame)
            flags = (index.ZERO if item.is_zero else 0) | (index.PROVEN if proven else 0)
            rows.append((item.frame, item.place, size, valid, flags))
        # Changes meanwhile have made entries of their own.
        if entries and store.has_room(len(entries)) and store.add(entries):
            for row in rows:
                store.index.put(number, *row)
            self._count(items)

    def _count(self, items: list[Item]) -> None:
        statistics = self._statistics
        for item in items:
            if item.buffer is None:
                statistics.reappended_bytes += record.record_bytes(item.stored)
            elif item.valid:
                statistics.appended_records += 1
                statistics.raw_bytes += item.valid.bit_count() << PAGE_SHIFT
                statistics.stored_bytes += item.stored

    def _learn(self, job: Job, *, is_behind: bool) -> None:
        raw = 0
        for item in job.items:
            if item.buffer is not None and item.raw and item.compress:
                raw += item.raw
                self._compressibility.note(item.frame << FRAME_SHIFT, saved=item.saved)
        self._statistics.compress_s += job.compress_s
        if self._level is None:
            self._adaptive.note(
                compress_s=job.compress_s,
                write_s=job.write_s,
                raw_bytes=raw,
                is_behind=is_behind,
            )
            self._statistics.level = self.level

    # -- segments --------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Make a segment ahead. Raises OSError."""
        store = self._store
        await trio.to_thread.run_sync(store.sync_filled, limiter=self._limiter)
        if store.failed is not None:
            return
        if store.is_full:
            await self._evict()
            if store.failed is not None:
                return
        await trio.to_thread.run_sync(store.prepare, limiter=self._limiter)
        store.room.unpark_all()

    async def _evict(self) -> None:
        """The oldest segment goes; what was used of it is written again. Raises OSError.

        The index keeps its rows until the file is gone: as long as the next mount could find them,
        a change has to invalidate them.
        """
        store, statistics = self._store, self._statistics
        self._admission.is_full = True
        oldest = store.numbers[0]
        kept = self._kept(oldest)
        while kept and store.failed is None:
            count = min(BATCH_FRAMES, store.records_left, len(kept))
            if not count:
                break
            await self._keep(kept[:count])
            del kept[:count]
        if store.failed is not None:
            return
        store.leaving = oldest
        await trio.to_thread.run_sync(store.files.remove, oldest, limiter=self._limiter)
        if store.failed is not None:
            return
        statistics.evicted_segments += 1
        statistics.evicted_records += store.index.live(oldest)
        for first in range(0, store.index.count(oldest), EVICTED_AT_ONCE):
            for frame in store.index.forget_rows(oldest, first, first + EVICTED_AT_ONCE):
                self._admission.ghosts.add(frame)
            await trio.lowlevel.checkpoint()
            if store.failed is not None:
                return
        store.forget_oldest()

    def _kept(self, number: int) -> list[tuple[int, Row]]:
        """What is worth writing again, as far as there is room for it."""
        room = self._store.superblock.segment_bytes // KEPT_SHARE
        rows = self._store.index.count(number) // KEPT_SHARE
        kept: list[tuple[int, Row]] = []
        for frame, row in self._store.index.rows(number):
            if row.flags & index.VISITED and row.size_bytes <= room and len(kept) < rows:
                room -= row.size_bytes
                kept.append((frame, row))
        return kept

    async def _keep(self, rows: list[tuple[int, Row]]) -> None:
        """Write these again, as far as they are still true."""
        staged, items = [], []
        for frame, row in rows:
            found = self._store.index.find(frame)
            if found is None or (found.id, found.number) != (row.id, row.number):
                continue  # it has moved on
            true = self._true(frame, found)
            if true is None:
                continue
            one = self._staging.put_in_batch(frame, true.valid)
            staged.append(one)
            items.append(Item(frame, 0, None, true))
        if items:
            await self._append(staged, items, is_behind=False)
