"""`Destager`: brings absorbed writes to the device.

`dirty.DirtyFrames` keeps the books and says which request is next. `WORKERS` permanent tasks send
requests in parallel. A request's bytes are copied to a staging buffer right before it is sent, so a
writer may overwrite the frame while it is in flight (the page becomes REWRITTEN).

A failed write-back leaves its pages dirty; they are tried again after a delay, or at once when
somebody flushes. The failure is raised by each flush whose data it hit, and otherwise by the next
flush, once.

When nobody has written for a while, everything is brought to the device and made durable there.

Room: the dirty bytes never exceed their cap. Writers that don't fit stand in one line (a fair
lock), and only its head watches for room: they go on in the order in which they came.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import trio

from orion_iscsifs.block.device import BlockDevice, check_request
from orion_iscsifs.block.flushing import SharedFlush
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.cache.dirty import DirtyFrames, Extent
from orion_iscsifs.cache.frames import Frame, FrameTable
from orion_iscsifs.cache.staging import STAGING_BYTES, StagingBuffers
from orion_iscsifs.cache.statistics import CacheStatistics
from orion_iscsifs.errors import DeviceError, OrionError

log = logging.getLogger(__name__)

WORKERS: Final = 64
"""Write-back requests in flight at most."""
IN_FLIGHT_MAX_BYTES: Final = 16 << 20
"""Many small requests keep a distant device busy, few large ones fill the link."""
FUA_REQUESTS_MAX: Final = 16
"""A disk that has to write more than these one by one is better asked to flush once."""
IDLE_S: Final = 1.0
"""Without a write for so long, what is dirty goes to the device, and the device is flushed."""
AGE_TICK_S: Final = 0.1
AGE_NAP_S: Final = 0.5
"""While anything is dirty its age is looked at between every tick and every nap."""


class Destager:
    """See the module's docstring. `start` is its background."""

    def __init__(
        self,
        device: BlockDevice,
        table: FrameTable,
        exclusion: RangeLock,
        statistics: CacheStatistics,
        *,
        dirty_max_bytes: int,
        dirty_age_s: float,
        idle_s: float = IDLE_S,
    ) -> None:
        self._device = device
        self._table = table
        self._statistics = statistics
        self._age_s = dirty_age_s
        self._idle_s = idle_s
        self._idle = trio.lowlevel.ParkingLot()
        self._waking = False
        """A worker has been woken and has not looked yet."""
        self._timer = trio.lowlevel.ParkingLot()
        self._staging = StagingBuffers(keep_max_bytes=IN_FLIGHT_MAX_BYTES)
        self._sending_bytes = 0
        self._flusher = SharedFlush(device.flush)
        self.books = DirtyFrames(
            table,
            exclusion,
            statistics,
            dirty_max_bytes=dirty_max_bytes,
            extent_max_bytes=min(device.geometry.optimal_transfer_bytes, STAGING_BYTES),
            clock=trio.current_time,
            on_first=self._timer.unpark,
            on_due=self.wake,
        )
        self._failing = False
        """The last write-back failed."""
        self._outages = 0
        """Write-backs that did not reach the device at all."""
        self._unreported = False
        """A write-back has failed and no flush has raised its error yet."""
        self._last_error: OrionError = DeviceError("a write-back was cancelled")
        self._line = trio.Lock()
        self.waiting_writers = 0
        """Writers in the line; a newcomer must not overtake them."""

    # -- the line of writers ---------------------------------------------------------------------

    async def join_line(self) -> int:
        """Stand in the line; return at its head. `leave_line` is due afterwards.

        How many outages there had been when this began: for `wait_for_room`.
        """
        outages = self._outages
        self._statistics.throttled_writes += 1
        self.waiting_writers += 1
        try:
            await self._line.acquire()
        except BaseException:
            self.waiting_writers -= 1
            raise
        return outages

    def leave_line(self) -> None:
        self.waiting_writers -= 1
        self._line.release()

    async def wait_for_room(self, outages: int) -> None:
        """At the head of the line: park until dirty bytes became fewer or a frame became idle.

        Raises what keeps the device away, when a write-back is no longer held for it. Whoever came
        later than that waits for the next try: it may be back.
        """
        self.wake()
        if self._outages == outages:
            await self._table.freed.park()
        if self._outages != outages:
            raise self._last_error

    # -- flushing --------------------------------------------------------------------------------

    async def flush(self) -> None:
        """What is dirty now is durable when this returns; the error of a write-back is raised."""
        frames = self.books.unwritten()
        self._send_with_fua(frames)
        try:
            await self.write_out(frames)
        except OrionError:
            self._unreported = False
            raise
        await self._flusher.flush()
        if self._unreported:
            self._unreported = False
            raise self._last_error

    def _send_with_fua(self, frames: list[Frame]) -> None:
        """Save the device's flush, if all that is not durable can go in one wave of writes."""
        geometry = self._device.geometry
        if geometry.write_cache and geometry.fua and not self._flusher.is_needed:
            self.books.end_rest()
            if self.books.fits_one_wave(frames, FUA_REQUESTS_MAX):
                self.books.pick(sorted(frames, key=lambda frame: frame.number), fua=True)
                self.wake()

    def note_loss(self, error: DeviceError) -> None:
        """Something can never be written: the next flush says so."""
        log.error("%s", error)
        self._unreported, self._last_error = True, error

    def wrote(self) -> None:
        """The device has carried out a write: it needs a flush to be durable."""
        self._flusher.note_write()
        self._timer.unpark()

    async def write_out(self, frames: Iterable[Frame]) -> None:
        """Return once the device has what is dirty now in these frames; raise if it refuses."""
        books = self.books
        books.end_rest()
        goals = [(frame, frame.number, books.goal(frame), frame.failures) for frame in frames]
        books.want(frame for frame, *_ in goals)
        failed = False
        for frame, number, goal, failures in goals:
            # Another number: the frame was evicted, so it was clean, so it has reached its goal.
            while frame.number == number and frame.settled < goal and frame.failures == failures:
                if not (frame.dirty | frame.writing):
                    break  # superseded: zeroed on the device, for one
                books.want([frame])
                self.wake()
                await frame.wait()
            failed = failed or frame.failures != failures
        if failed:
            raise self._last_error

    async def write_out_durably(self, span: Range) -> None:
        """Return once what is cached of the range is durable: by FUA if all of it can go now."""
        frames = sorted(self._table.in_range(span), key=lambda frame: frame.number)
        if self.books.is_all_pickable(span):
            self.books.pick(frames, fua=True)
            self.wake()
            await self.write_out(frames)
        else:  # some of it is on its way or has arrived, without FUA
            await self.write_out(frames)
            await self._flusher.flush()

    # -- the background --------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        """Start the background tasks; they never end by themselves."""
        for _ in range(WORKERS):
            nursery.start_soon(self._work)
        nursery.start_soon(self._watch_age)

    def wake(self) -> None:
        """There may be something to write back. One worker looks; it wakes the next one."""
        if not self._waking:
            self._waking = bool(self._idle)
            self._idle.unpark()

    async def _work(self) -> None:
        while True:
            extent = None
            if self._sending_bytes < IN_FLIGHT_MAX_BYTES:  # else whoever ends goes on
                extent = self.books.next_extent(everything=bool(self.waiting_writers))
            if extent is None:
                await self._idle.park()
                self._waking = False
                continue
            if self.books.has_more:
                self.wake()  # the next worker looks whether it is due
            await self._write(extent)

    async def _watch_age(self) -> None:
        """Makes old data due, and all of it when nobody writes; lets resting frames go on."""
        books = self.books
        seen, quiet_since = -1, 0.0
        while True:
            now = trio.current_time()
            if books.absorbed != seen:
                seen, quiet_since = books.absorbed, now
            is_quiet = now >= quiet_since + self._idle_s
            deadline = books.next_deadline(self._age_s)
            if deadline is not None and (is_quiet or deadline <= now):
                books.make_due(now if is_quiet else now - self._age_s)
                books.end_rest(now)
                self.wake()
            elif deadline is None and not self._flusher.is_needed:
                await self._timer.park()
                continue
            elif deadline is None and is_quiet and not self._statistics.in_flight_bytes:
                # What is not durable then stays noted, and a flush that is asked for will say so.
                with suppress(OrionError):
                    await self._flusher.flush()
                quiet_since = trio.current_time()
                continue
            # Awake again early enough for a write-back that fails meanwhile and rests briefly.
            wait_s = min(AGE_NAP_S, self._idle_s) if deadline is None else deadline - now
            await trio.sleep(min(max(wait_s, AGE_TICK_S), AGE_NAP_S))

    async def _write(self, extent: Extent) -> None:
        """Send one extent and settle its pages, whatever happens."""
        error: Exception | None = None
        succeeded = False
        buffer = self._staging.take(extent.length)
        self._sending_bytes += extent.length
        try:
            # The device may have shrunk: what it no longer has waits until it grows again.
            check_request(self._device.geometry, extent.offset, extent.length)
            await self._device.write(extent.offset, _gather(extent, buffer), fua=extent.fua)
            succeeded = True
        except Exception as caught:
            error = caught
        finally:
            self._staging.give_back(buffer)
            self._sending_bytes -= extent.length
            if succeeded and not extent.fua:
                self.wrote()
            self.books.settle(extent, succeeded=succeeded, refused=isinstance(error, DeviceError))
        if error is not None:
            self._report(extent, error)
            return
        self._failing = False
        self._statistics.writebacks += 1
        self._statistics.writeback_bytes += extent.length
        self._table.freed.unpark()

    def _report(self, extent: Extent, error: Exception) -> None:
        """Keep the error for a flush to raise. The log gets one line for each series of them."""
        self._statistics.writeback_failures += 1
        where = f"write-back of {extent.length} bytes at {extent.offset}"
        if not isinstance(error, OrionError):
            log.error("%s: a bug below the cache", where, exc_info=error)
            error = DeviceError(f"{where}: {error!r}")
        elif not self._failing:
            log.warning("%s failed: %s (the data is kept and retried)", where, error)
        self._failing = True
        # A write with FUA raises its own failure; a flush is there for all the others.
        self._unreported = self._unreported or not extent.fua
        self._last_error = error
        if not isinstance(error, DeviceError):
            self._outages += 1
            self._table.freed.unpark()


def _gather(extent: Extent, buffer: memoryview) -> memoryview:
    """Copy the extent's bytes to the start of the buffer: from here on they can't change."""
    position = 0
    for frame, (start, end) in extent.pieces:
        buffer[position : position + end - start] = frame.view[start:end]
        position += end - start
    return buffer[:position]
