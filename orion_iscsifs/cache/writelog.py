"""`WriteLog`: a persistent log in front of a device, as a device (`cache=log`).

A write is done when it is in the log's file, a flush when that file is synced: no round trip to the
device in either. `logdestage` brings the changes to the device later, in the order of the flushes.

    write:  ring (memory) and log (file), in one step without a checkpoint  → `epochs`
    flush:  ends the epoch; one fdatasync for all who wait
    read:   the newest change, from memory; else the device

The content of what is not on the device yet is in memory, in a ring of `dirty_max` bytes, as well
as in the log: the log is read only after a crash. So a log that fails loses nothing; from then on
writes wait until the ring is empty and go to the device themselves.

Large requests may go *past* the log: zeroings and discards that are long, and long writes when the
log is nearly full. Whoever does so holds the range alone (`_exclusion`) and waits first until the
log holds nothing that it must not overtake, so that neither the destager nor a replay can lay
something older over it.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import (
    BlockDevice,
    Buffer,
    Geometry,
    GeometryListener,
    check_request,
)
from orion_iscsifs.block.flushing import SharedFlush
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range, split, subtract
from orion_iscsifs.cache.epochs import Change, Epochs
from orion_iscsifs.cache.logdestage import LogDestager
from orion_iscsifs.cache.ring import Ring
from orion_iscsifs.cache.statistics import CacheStatistics
from orion_iscsifs.errors import DeviceError, OrionError, WriteProtected
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.record import PAYLOAD_MAX_BYTES, Flag, Kind, UnknownRecord
from orion_iscsifs.localstore.scan import Scan
from orion_iscsifs.localstore.store import LogStore

log = logging.getLogger(__name__)

LOGGED_ZEROES_MAX_BYTES: Final = 16 << 20
"""Longer zeroings and discards go past the log."""
LARGE_WRITE_BYTES: Final = 256 << 10
"""Writes of this size go past a log that is nearly full."""


class WriteLog:
    """See the module's docstring. Made by `open_write_log`."""

    def __init__(
        self,
        device: BlockDevice,
        store: LogStore,
        epochs: Epochs,
        *,
        dirty_max_bytes: int,
        dirty_age_s: float,
        ordered: bool,
    ) -> None:
        self.statistics = CacheStatistics()
        self.statistics.dirty_bytes = epochs.live.covered_bytes
        self.store: Final = store
        self._device = device
        self._epochs = epochs
        self._live = epochs.live
        self._ring = Ring(dirty_max_bytes)
        room = min(dirty_max_bytes, store.superblock.segment_bytes) // 4
        self._payload_max = min(PAYLOAD_MAX_BYTES, room & -4096)
        self._exclusion = RangeLock()
        self._excluded = self._exclusion.exclusive
        self._line = trio.Lock()
        self._listeners: list[GeometryListener] = []
        self._geometry = _geometry(device.geometry)
        self.destager: Final = LogDestager(
            device,
            store,
            epochs,
            self._ring,
            self.statistics,
            ordered=ordered,
            dirty_age_s=dirty_age_s,
        )
        self._past_flush = SharedFlush(device.flush)
        """Of what went past the log."""
        self._to_replay = epochs.queue[-1].number if epochs.queue else 0
        store.on_failure = self.destager.wake
        device.on_geometry_change(self._change_geometry)

    # -- the contract ----------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self._geometry, offset, len(target))
        span = offset, offset + len(target)
        if self._epochs.lost and self._epochs.lost.find(span):
            raise DeviceError(f"bytes in {span[0]}+{len(target)} were lost with the log")
        found = self._live.find(span)
        # What is in memory is copied now: after a checkpoint its place may be another change's.
        for start, end, change in found:
            if change.view is not None:
                content = change.view[start - change.offset : end - change.offset]
                target[start - offset : end - offset] = content
            elif change.zero:
                target[start - offset : end - offset] = bytes(end - start)
        for start, end, change in found:
            if change.view is None and not change.zero:
                await self._read_logged((start, end), change, target[start - offset : end - offset])
        await self._read_gaps(
            subtract(span, [(start, end) for start, end, _ in found]), span, target
        )

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self._check_change(offset, len(source))
        view = memoryview(source)
        for start, end in split((offset, offset + len(source)), self._payload_max):
            part = view[start - offset : end - offset]
            packed = None if self._passes(part) else await self.store.pack(start, part)
            check_request(self._geometry, start, len(part))  # it may have shrunk meanwhile
            if (
                self._excluded
                or self.destager.waiting_writers
                or self.store.failed is not None
                or self._passes(part)
                or not self._log(Kind.DATA, start, end - start, part, packed=packed)
            ):
                await self._write_slowly(start, part, packed)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        """Durable in the log; on the device, once the log has failed."""
        self.statistics.flushes += 1
        self._epochs.seal(flushed=True)
        self.destager.wake()
        try:
            await self.store.commit()
        except LogError:
            await self.drain()
        else:
            await self._past_flush.flush()
        self.destager.raise_error()

    async def discard(self, offset: int, length: int) -> None:
        """As zeroes, where the device reads zeroes afterwards: then it can wait in the log."""
        self._check_change(offset, length)
        geometry = self._geometry
        if not length or not geometry.discard_granularity_bytes:
            return
        if geometry.zeroes_after_discard and length <= LOGGED_ZEROES_MAX_BYTES:
            await self._zero(offset, length, Flag.MAY_UNMAP)
            return
        await self._past((offset, offset + length), lambda: self._device.discard(offset, length))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._check_change(offset, length)
        if length and length <= LOGGED_ZEROES_MAX_BYTES:
            await self._zero(offset, length, Flag.MAY_UNMAP if may_unmap else Flag.NONE)
        elif length:
            await self._past(
                (offset, offset + length),
                lambda: self._device.write_zeroes(offset, length, may_unmap=may_unmap),
            )

    # -- for the owner ---------------------------------------------------------------------------

    async def drain(self) -> None:
        """Everything is durable on the device when this returns; raises what keeps it from that."""
        await self.destager.drain()
        await self._past_flush.flush()

    @property
    def state(self) -> str:
        """In one word, for `status`."""
        if self.store.failed is not None:
            return "failed"
        queue = self._epochs.queue
        return "replaying" if queue and queue[0].number <= self._to_replay else "ok"

    @property
    def oldest_dirty_age_s(self) -> float:
        """For how long the oldest change has been in the log; 0 when there is none."""
        queue = self._epochs.queue
        return trio.current_time() - queue[0].since if queue else 0.0

    # -- logging ---------------------------------------------------------------------------------

    def _passes(self, source: memoryview) -> bool:
        """Whether a write goes past the log if it may."""
        return len(source) >= LARGE_WRITE_BYTES and self.destager.is_nearly_full

    def _log(
        self,
        kind: Kind,
        offset: int,
        length: int,
        source: Buffer,
        flags: Flag = Flag.NONE,
        packed: bytes | None = None,
    ) -> bool:
        """Take a change; False: there is no room, or no log. Without a checkpoint.

        `packed`: what `LogStore.pack` has made of it.
        """
        epochs, store, ring = self._epochs, self.store, self._ring
        view = None
        if kind is Kind.DATA:
            view = ring.take(length)
            if view is None:
                return False
        number, seq = epochs.current_number, store.next_seq
        try:
            place = store.append(kind, number, offset, length, source, packed=packed, flags=flags)
        except LogError:
            place = None
        if place is None:
            ring.undo(0 if view is None else length)
            return False
        if view is not None:
            view[:] = source
        now = trio.current_time()
        change = Change(
            number,
            offset,
            length,
            view=view,
            place=place,
            zero=kind is Kind.ZERO,
            may_unmap=bool(flags),
        )
        was_empty = not epochs.queue
        epochs.add(change, seq=seq, now=now, memory_end=ring.head)
        self.statistics.dirty_bytes = self._live.covered_bytes
        destager = self.destager
        destager.last_change = now
        if was_empty or 2 * ring.used_bytes > ring.size_bytes:
            destager.wake()
        return True

    async def _write_slowly(self, offset: int, source: memoryview, packed: bytes | None) -> None:
        length = len(source)
        span = offset, offset + length
        passes = self._passes(source)
        if (passes and self._epochs.may_be_passed(span)) or not await self._take(
            Kind.DATA, offset, length, source, packed=packed
        ):
            await self._past(span, lambda: self._device.write(offset, source), source)

    async def _zero(self, offset: int, length: int, flags: Flag) -> None:
        if not await self._take(Kind.ZERO, offset, length, b"", flags):
            await self._past(
                (offset, offset + length),
                lambda: self._device.write_zeroes(offset, length, may_unmap=bool(flags)),
            )

    async def _take(
        self,
        kind: Kind,
        offset: int,
        length: int,
        source: Buffer,
        flags: Flag = Flag.NONE,
        packed: bytes | None = None,
    ) -> bool:
        """Stand in line for room and take the change. False: the log has failed."""
        span = offset, offset + length
        destager = self.destager
        destager.waiting_writers += 1
        try:
            async with self._line:
                self.statistics.throttled_writes += 1
                while self.store.failed is None:
                    await self._exclusion.wait_until_free(span)
                    check_request(self._geometry, offset, length)  # it may have shrunk
                    if self._log(kind, offset, length, source, flags, packed):
                        return True
                    destager.wake()
                    if self.store.failed is None:
                        await self.store.room.park()
                return False
        finally:
            destager.waiting_writers -= 1

    async def _past(
        self,
        span: Range,
        operation: Callable[[], Awaitable[None]],
        source: memoryview | None = None,
    ) -> None:
        """Change the device past the log. `source`: what is written there; None: zeroes."""
        async with self._exclusion.alone(span):
            if not self._epochs.may_be_passed(span):
                await self.destager.drain(forgive_refusals=True)
            await self.destager.wait_retired()
            try:
                await operation()
                refused = self._live.find(span)
                self._epochs.overwritten(span)
                for start, end, _ in refused:
                    part = None if source is None else source[start - span[0] : end - span[0]]
                    await self.destager.log_over((start, end), part)
                self.statistics.dirty_bytes = self._live.covered_bytes
            finally:
                self._past_flush.note_write()

    # -- reading ---------------------------------------------------------------------------------

    async def _read_logged(self, span: Range, change: Change, target: memoryview) -> None:
        """From the log: what was there before this mount."""
        assert change.place is not None
        try:
            content = await self.store.read(change.place, change.checksum, change.length)
        except LogError as error:
            if any(newest is change for _, _, newest in self._live.find(span)):
                raise DeviceError(str(error)) from None
            # It is on the device by now, and its place in the log was used again.
            await self.read_into(span[0], target)
            return
        target[:] = content[span[0] - change.offset : span[1] - change.offset]

    async def _read_gaps(self, gaps: list[Range], span: Range, target: memoryview) -> None:
        """What is not in the log, in one request."""
        if not gaps:
            return
        start, end = gaps[0][0], gaps[-1][1]
        if len(gaps) == 1:
            await self._device.read_into(start, target[start - span[0] : end - span[0]])
            return
        content = memoryview(bytearray(end - start))
        await self._device.read_into(start, content)
        for first, last in gaps:
            target[first - span[0] : last - span[0]] = content[first - start : last - start]

    # -- geometry --------------------------------------------------------------------------------

    def _change_geometry(self, geometry: Geometry) -> None:
        self._geometry = _geometry(geometry)
        for listener in self._listeners:
            listener(self._geometry)

    def _check_change(self, offset: int, length: int) -> None:
        check_request(self._geometry, offset, length)
        if self._geometry.read_only:
            raise WriteProtected("the device is read-only")


def _geometry(below: Geometry) -> Geometry:
    """A flush is needed here, whatever the device below needs."""
    return replace(below, write_cache=True)


def recover(store: LogStore, now: float) -> tuple[Epochs, Scan]:
    """What an earlier life has left in the log. Blocks; raises LogError.

    `Scan.damage` says whether something is missing: `resume` then forgets all that comes after it.
    """
    epochs, scan = Epochs(), store.scan()
    try:
        for found in scan.records:
            epochs.replay(found, now=now)
    except OSError as error:
        raise LogError(f"log {store.folder}: can't be read: {error.strerror}") from None
    except UnknownRecord as error:
        raise LogError(f"log {store.folder}: {error}: written by a newer version") from None
    epochs.end_replay(destaged=scan.destaged, last=scan.last_epoch)
    return epochs, scan


@asynccontextmanager
async def open_write_log(
    device: BlockDevice,
    store: LogStore,
    epochs: Epochs,
    *,
    dirty_max_bytes: int,
    dirty_age_s: float = 5.0,
    ordered: bool = True,
) -> AsyncIterator[WriteLog]:
    """The device for the time of the body. `epochs`: what an earlier life left in the log.

    In the end everything is brought to the device, unless the body was cancelled. What can't be is
    left in the log, which is said, and the error is raised.
    """
    write_log = WriteLog(
        device,
        store,
        epochs,
        dirty_max_bytes=dirty_max_bytes,
        dirty_age_s=dirty_age_s,
        ordered=ordered,
    )
    async with background(store.keep_prepared, write_log.destager.run):
        yield write_log
        try:
            await write_log.drain()
        except OrionError:
            left = write_log.statistics.dirty_bytes
            log.warning("%d bytes stay in the log %s for the next mount", left, store.folder)
            raise
