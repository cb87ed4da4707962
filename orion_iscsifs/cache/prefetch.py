"""`Prefetcher`: carries out what `readahead` decides, in the background, and counts its use."""

import logging
from collections import deque
from typing import Final

import trio

from orion_iscsifs.block.pages import PAGE_BYTES, PAGE_SHIFT
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range, clip, cover, split
from orion_iscsifs.cache.claims import Fetch, claim, first_absent_run, give_up, install
from orion_iscsifs.cache.frames import Frame, FrameTable
from orion_iscsifs.cache.gauge import WINDOW_AUTO_MIN_BYTES, Gauge
from orion_iscsifs.cache.readahead import STEP_BYTES, Readahead
from orion_iscsifs.cache.staging import STAGING_BYTES, StagingBuffers
from orion_iscsifs.cache.statistics import CacheStatistics
from orion_iscsifs.errors import OrionError

log = logging.getLogger(__name__)

WORKERS: Final = 64
"""Readahead requests in flight at most; large ones also have a limit in bytes."""
REQUEST_BYTES: Final = STEP_BYTES
STAGING_KEPT_BYTES: Final = 8 * REQUEST_BYTES
"""Of buffers, kept while nothing is in flight."""
QUEUE_MAX: Final = 256
"""Requests that wait for a worker; more are forgotten."""


class Prefetcher:
    """See the module's docstring. `start` is its background.

    What is in flight for all streams together is limited to the window that the link needs: more
    would not come sooner, and whoever reads something else would wait behind it.
    """

    def __init__(
        self,
        device: Gauge,
        table: FrameTable,
        exclusion: RangeLock,
        statistics: CacheStatistics,
        readahead_total_max_bytes: int,
    ) -> None:
        self._device = device
        self._table = table
        self._exclusion = exclusion
        self._statistics = statistics
        self._link = device.link
        self._readahead = Readahead(self._link.window_bytes, readahead_total_max_bytes)
        self._staging = StagingBuffers(keep_max_bytes=WORKERS * STAGING_BYTES)
        self._queue: deque[Range] = deque()
        self._in_flight_bytes = 0
        self._idle = trio.lowlevel.ParkingLot()

    def start(self, nursery: trio.Nursery) -> None:
        """Start the background tasks; they never end by themselves."""
        for _ in range(WORKERS):
            nursery.start_soon(self._work)

    def observe(self, start: int, end: int) -> None:
        """A read that may be part of a stream: ask for what should be fetched ahead of it."""
        for ahead in self._readahead.note(start, end, self._table.limit):
            for request in split(cover(ahead, PAGE_BYTES), REQUEST_BYTES):
                if len(self._queue) < QUEUE_MAX:
                    self._queue.append(request)
                    self._idle.unpark()

    def used(self, frame: Frame, pages: int) -> None:
        """Somebody reads pages that readahead brought: that is no second use of the frame."""
        used = frame.ahead & pages
        frame.ahead ^= used
        self._statistics.readahead_hit_bytes += used.bit_count() << PAGE_SHIFT

    async def _work(self) -> None:
        while True:
            if not self._queue or not self._may_send():
                await self._idle.park()
                continue
            if len(self._queue) > 1:
                self._idle.unpark()  # the limit may have grown, and nobody else would notice
            try:
                await self._bring(self._queue.popleft())
            except OrionError as error:
                # Whoever really wants these bytes will meet the error and report it.
                log.debug("readahead failed: %s", error)

    def _may_send(self) -> bool:
        """Whether more may be on its way. No await between this and `_fetch`'s count."""
        return self._in_flight_bytes < max(self._link.window_bytes, WINDOW_AUTO_MIN_BYTES)

    async def _bring(self, wanted: Range) -> None:
        """Fetch what is absent of the range, as far as frames are to be had."""
        start, end = wanted
        while start < end:
            rest = clip((start, end), (0, self._table.limit))
            run = first_absent_run(self._table, rest)
            if run is None or self._exclusion.is_excluded(run):
                return
            fetch = claim(self._table, run)
            if not fetch.claims:
                return
            await self._fetch(fetch)
            start = run[1]

    async def _fetch(self, fetch: Fetch) -> None:
        length = fetch.end - fetch.start
        buffer = self._staging.take(length)
        self._in_flight_bytes += length
        try:
            await self._device.read_into(fetch.start, buffer[:length])
        except BaseException:
            give_up(self._table, fetch)
            raise
        finally:
            self._in_flight_bytes -= length
            self._staging.give_back(buffer)
            if not self._in_flight_bytes:
                self._staging.shrink(STAGING_KEPT_BYTES)
        self._readahead.window_max_bytes = self._link.window_bytes
        self._statistics.readahead_bytes += length
        installed = install(self._table, fetch, buffer, ahead=True)
        self._statistics.readahead_waste_bytes += length - installed
