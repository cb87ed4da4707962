"""`LogDestager`: brings what is in the log to the device, epoch by epoch.

`ordered`: one epoch at a time, durable before the next one begins. `fast`: all that is there in one
batch. Inside a batch requests go in parallel. A small batch goes with FUA, one round trip in all; a
large one is followed by a flush; neither is needed on a device without a volatile cache.

What fails for its path is tried again for ever. What the device refuses is cut down to the page
that it refuses: that page is logged again, as if it had just been written, so that it holds up
neither the other epochs nor the log. The next flush says so.

When the log has failed, this goes on with what is in memory until the device has everything, and
then has the log retired: it must not be replayed over what is written past it from then on.
"""

import logging
from contextlib import suppress
from typing import Final

import trio

from orion_iscsifs.block.device import BlockDevice, check_request
from orion_iscsifs.block.flushing import SharedFlush
from orion_iscsifs.block.ranges import Range, split
from orion_iscsifs.cache.destage import (
    FUA_REQUESTS_MAX,
    IDLE_S,
    IN_FLIGHT_MAX_BYTES,
    WORKERS,
)
from orion_iscsifs.cache.epochs import Change, Epoch, Epochs, Request, requests
from orion_iscsifs.cache.extents import ExtentMap
from orion_iscsifs.cache.ring import Ring
from orion_iscsifs.cache.staging import STAGING_BYTES, StagingBuffers
from orion_iscsifs.cache.statistics import CacheStatistics
from orion_iscsifs.errors import DeviceError, OrionError
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.record import Flag, Kind
from orion_iscsifs.localstore.store import LogStore

log = logging.getLogger(__name__)

RETRY_DELAY_S: Final = 0.1
RETRY_DELAY_MAX_S: Final = 5.0
_PAGE_BYTES: Final = 4096


class LogDestager:
    """See the module's docstring. `run` is its background."""

    def __init__(
        self,
        device: BlockDevice,
        store: LogStore,
        epochs: Epochs,
        ring: Ring,
        statistics: CacheStatistics,
        *,
        ordered: bool,
        dirty_age_s: float,
    ) -> None:
        self.device_flush = SharedFlush(device.flush)
        self.waiting_writers = 0
        self.last_change = float("-inf")
        """When something was written last."""
        self.retired = False
        self._device = device
        self._store = store
        self._epochs = epochs
        self._ring = ring
        self._statistics = statistics
        self._ordered = ordered
        self._age_s = dirty_age_s
        self._staging = StagingBuffers(keep_max_bytes=IN_FLIGHT_MAX_BYTES)
        self._wake = trio.lowlevel.ParkingLot()
        self._drains = 0
        """Who waits until everything is on the device."""
        self._progress = trio.lowlevel.ParkingLot()
        """Unparked when a batch is done, or has failed."""
        self._refusals: list[tuple[int, int, Change]] = []
        """Of the batch under way."""
        self._failures = 0
        self._failing = False
        self._error: OrionError | None = None
        """Of a change that the device refused; for a flush to raise, once."""
        self._last_error: OrionError | None = None

    # -- from the device above -------------------------------------------------------------------

    def wake(self) -> None:
        """Something may be due."""
        self._wake.unpark()

    def raise_error(self) -> None:
        """Raise what has to be said, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def drain(self, *, forgive_refusals: bool = False) -> None:
        """Everything that is in the log now is durable on the device when this returns.

        Raises the error of a request that fails meanwhile; what is in the log stays there.
        `forgive_refusals`: but for what the device refuses for what it is.
        """
        self._epochs.seal()
        if not self._epochs.queue:
            return
        last = self._epochs.queue[-1].number
        failures = self._failures
        self._drains += 1
        self.wake()
        try:
            while self._is_left(last, refused_too=not forgive_refusals):
                error, known = self._last_error, failures
                failures = self._failures
                refused = isinstance(error, DeviceError) and not error.retry_may_help
                if known != failures and error and not (forgive_refusals and refused):
                    raise error
                await self._progress.park()
        finally:
            self._drains -= 1

    async def wait_retired(self) -> None:
        """A log that has failed will not be replayed any more when this returns.

        Else a replay would lay what is in it over what goes to the device from now on.
        """
        while self._store.failed is not None and not self.retired:
            self.wake()
            await self._progress.park()

    def _is_left(self, last: int, *, refused_too: bool) -> bool:
        """Whether something of the epochs up to `last` is not on the device."""
        queue = self._epochs.queue
        if not queue:
            return False
        if queue[0].number <= last:
            return True
        return refused_too and any(epoch.has_refused for epoch in queue)

    # -- when ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The background. It never ends by itself."""
        while True:
            batch = self._due()
            if batch:
                await self._bring(batch)
                continue
            if self._store.failed is not None and not self.retired and self._only_refused():
                await self._retire()
            with trio.move_on_at(self._deadline()):
                await self._wake.park()

    @property
    def is_nearly_full(self) -> bool:
        """The memory, or the log, fills faster than the device takes it."""
        return 4 * self._ring.used_bytes > 3 * self._ring.size_bytes or (
            self._store.free_segments < 2
        )

    def _due(self) -> list[Epoch]:
        queue = self._epochs.queue
        if not queue:
            return []
        first = queue[0]
        if self._ordered and first.sealed and not first.only_refused:
            # Waiting saves nothing: what a later epoch overwrites has to be sent all the same.
            return [first]
        if not self._is_due(first, trio.current_time()):
            return []
        self._epochs.seal()
        return [first] if self._ordered else list(queue)

    def _is_due(self, first: Epoch, now: float) -> bool:
        if first.only_refused:
            return bool(self._drains) or now >= first.since + RETRY_DELAY_MAX_S
        return bool(
            self._drains
            or self.waiting_writers
            or self._store.failed is not None
            or 2 * self._ring.used_bytes > self._ring.size_bytes
            or self._store.free_segments < 2
            or now >= min(first.since + self._age_s, self.last_change + IDLE_S)
        )

    def _deadline(self) -> float:
        queue = self._epochs.queue
        if not queue:
            return float("inf")
        if queue[0].only_refused:
            return queue[0].since + RETRY_DELAY_MAX_S
        return min(queue[0].since + self._age_s, self.last_change + IDLE_S)

    def _only_refused(self) -> bool:
        """The device has everything that it takes."""
        return all(epoch.only_refused for epoch in self._epochs.queue)

    # -- a batch ---------------------------------------------------------------------------------

    async def _bring(self, batch: list[Epoch]) -> None:
        changes = batch[0].changes if len(batch) == 1 else _merged(batch)
        length_max = min(self._device.geometry.optimal_transfer_bytes, STAGING_BYTES)
        everything = list(requests(changes, max(length_max, 64 << 10)))
        geometry = self._device.geometry
        fua = geometry.write_cache and geometry.fua and len(everything) <= FUA_REQUESTS_MAX
        delay_s, todo = RETRY_DELAY_S, everything
        while todo:
            todo = await self._send(todo, fua=fua)
            if not todo and not await self._flushed():
                # What the device had taken may be lost with its volatile cache.
                todo = everything
            if todo:
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_DELAY_MAX_S)
        await self._relog_refused()
        self._done(batch)

    def _done(self, batch: list[Epoch]) -> None:
        epochs = self._epochs
        epochs.done(batch)
        self._ring.give_back(batch[-1].memory_end)
        self._statistics.dirty_bytes = epochs.live.covered_bytes
        oldest = epochs.queue[0].first_seq if epochs.queue else None
        self._store.note_destaged(batch[-1].number, oldest)
        self._store.room.unpark_all()
        self._progress.unpark_all()

    async def _send(self, todo: list[Request], *, fua: bool) -> list[Request]:
        """Those that are to be tried again."""
        again: list[Request] = []
        line = iter(todo)
        longest = max(min(request.length, STAGING_BYTES) for request in todo)
        workers = min(WORKERS, IN_FLIGHT_MAX_BYTES // longest)

        async def work() -> None:
            for request in line:
                again.extend(await self._try(request, fua=fua))

        async with trio.open_nursery() as nursery:
            for _ in range(min(workers, len(todo))):
                nursery.start_soon(work)
        return again

    async def _try(self, request: Request, *, fua: bool) -> list[Request]:
        """Empty when the device has it, or it has been set aside; else what to try again."""
        try:
            check_request(self._device.geometry, request.offset, request.length)
            await self._request(request, fua=fua)
        except DeviceError as error:
            if not error.retry_may_help:
                return self._refused(request, error)
            self._note(request, error)
            return [request]
        except LogError as error:
            return self._unreadable(request, error)
        except OrionError as error:
            self._note(request, error)
            return [request]
        self._failing = False
        self._statistics.writebacks += 1
        self._statistics.writeback_bytes += request.length
        return []

    async def _request(self, request: Request, *, fua: bool) -> None:
        device, first = self._device, request.pieces[0][2]
        if first.zero:
            await device.write_zeroes(request.offset, request.length, may_unmap=first.may_unmap)
            self.device_flush.note_write()
            return
        if len(request.pieces) == 1 and first.view is not None:
            start = request.offset - first.offset
            content = first.view[start : start + request.length]
            await device.write(request.offset, content, fua=fua)
        else:
            buffer = self._staging.take(request.length)
            try:
                content = buffer[: request.length]
                await self._gather(request, content)
                await device.write(request.offset, content, fua=fua)
            finally:
                self._staging.give_back(buffer)
        if not fua:
            self.device_flush.note_write()

    async def _gather(self, request: Request, buffer: memoryview) -> None:
        for start, end, change in request.pieces:
            content = change.view
            if content is None:
                assert change.place is not None
                content = memoryview(
                    await self._store.read(change.place, change.checksum, change.length)
                )
            at = start - request.offset
            buffer[at : at + end - start] = content[start - change.offset : end - change.offset]

    async def _flushed(self) -> bool:
        """What has been sent without FUA is durable; False: not yet."""
        if not self._device.geometry.write_cache:
            return True
        try:
            await self.device_flush.flush()
        except OrionError as error:
            self._tell("flush", error)
            return False
        return True

    # -- what fails ------------------------------------------------------------------------------

    def _refused(self, request: Request, error: DeviceError) -> list[Request]:
        """The device does not want it: find out which page, and set that one aside."""
        if request.length > _PAGE_BYTES:
            pieces = [
                (first, last, change)
                for start, end, change in request.pieces
                for first, last in split((start, end), _PAGE_BYTES)
            ]
            return [Request(start, end - start, [(start, end, c)]) for start, end, c in pieces]
        self._refusals += request.pieces
        if all(change.was_refused for _, _, change in request.pieces):
            self._fail(error)
            return []
        for _, _, change in request.pieces:
            change.was_refused = True
        self._error = error
        self._note(request, error)
        return []

    async def _relog_refused(self) -> None:
        """What the device refused becomes part of the current epoch, unless it is old by now."""
        refusals, self._refusals = self._refusals, []
        for start, end, change in refusals:
            request = Request(start, end - start, [(start, end, change)])
            content = memoryview(bytearray(0 if change.zero else request.length))
            try:
                if not change.zero:
                    await self._gather(request, content)
            except LogError as error:
                self._unreadable(request, error)
                continue
            # Checkpoints: what is newer by now must stay so, hence the look inside.
            while not self._relog(change, start, end, content):
                await self._store.room.park()

    def _relog(self, change: Change, start: int, end: int, content: memoryview) -> bool:
        """Log again what nothing newer has replaced; False: no room. Without a checkpoint."""
        for first, last, newest in self._epochs.live.find((start, end)):
            part = content[first - start : last - start]
            if newest is change and not self._log(change, (first, last), part, was_refused=True):
                return False
        return True

    async def log_over(self, span: Range, source: memoryview | None) -> None:
        """Log what the device has got past the log, over what it had refused. None: zeroes.

        Else a replay, or a try that is under way, would lay what was refused over it. The caller
        holds the range alone.
        """
        zero = source is None
        content = memoryview(bytearray(b"" if source is None else source))
        change = Change(0, span[0], span[1] - span[0], zero=zero)
        while not self._log(change, span, content, was_refused=False):
            await self._store.room.park()

    def _log(self, like: Change, span: Range, content: memoryview, *, was_refused: bool) -> bool:
        """Log outside the ring; False: no room. Without a checkpoint."""
        epochs, store = self._epochs, self._store
        kind = Kind.ZERO if like.zero else Kind.DATA
        flags = Flag.MAY_UNMAP if like.may_unmap else Flag.NONE
        number, seq, length = epochs.current_number, store.next_seq, span[1] - span[0]
        place = None
        with suppress(LogError):  # then it stays in memory only
            place = store.append(kind, number, span[0], length, content, flags=flags, reserve=True)
            if place is None:
                return False
        change = Change(
            number,
            span[0],
            length,
            view=None if like.zero else content,
            place=place,
            zero=like.zero,
            may_unmap=like.may_unmap,
            was_refused=was_refused,
        )
        epochs.add(change, seq=seq, now=trio.current_time(), memory_end=self._ring.head)
        return True

    def _unreadable(self, request: Request, error: LogError) -> list[Request]:
        """The only copy of a change is gone with the disk that the log is on."""
        if len(request.pieces) > 1:
            return [Request(s, e - s, [(s, e, change)]) for s, e, change in request.pieces]
        request.pieces[0][2].is_lost = True
        self._error = DeviceError(f"{request.length} bytes at {request.offset} are lost: {error}")
        log.error("%s", self._error)
        self._fail(self._error)
        return []

    def _note(self, request: Request, error: OrionError) -> None:
        self._tell(f"write-back of {request.length} bytes at {request.offset}", error)

    def _tell(self, what: str, error: OrionError) -> None:
        """One line for a series of failures."""
        if not self._failing:
            log.warning("%s failed: %s (it is in the log, and tried again)", what, error)
        self._failing = True
        self._fail(error)

    def _fail(self, error: OrionError) -> None:
        self._statistics.writeback_failures += 1
        self._failures += 1
        self._last_error = error
        self._progress.unpark_all()

    async def _retire(self) -> None:
        why = str(self._store.failed)
        try:
            await trio.to_thread.run_sync(self._store.retire, why)
        except LogError as error:
            log.error("%s", error.line)
        self.retired = True
        self._progress.unpark_all()


def _merged(batch: list[Epoch]) -> ExtentMap[Change]:
    changes: ExtentMap[Change] = ExtentMap()
    for epoch in batch:
        for start, end, change in epoch.changes:
            changes.put((start, end), change)
    return changes
