"""`Prefetcher`: carries out what `readahead` decides, in the background, and counts its use."""

import logging
from collections import deque
from typing import Final

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range, clip, cover, split
from orion_iscsifs.cache.claims import Fetch, claim, first_absent_run, give_up, install
from orion_iscsifs.cache.frames import PAGE_BYTES, PAGE_SHIFT, Frame, FrameTable
from orion_iscsifs.cache.readahead import Readahead
from orion_iscsifs.cache.staging import StagingBuffers
from orion_iscsifs.cache.statistics import CacheStatistics
from orion_iscsifs.errors import OrionError

log = logging.getLogger(__name__)

WORKERS: Final = 8
"""Readahead requests in flight at most."""
REQUEST_BYTES: Final = 1 << 19
QUEUE_MAX: Final = 64
"""Requests that wait for a worker; more are forgotten."""


class Prefetcher:
    """See the module's docstring. `start` is its background."""

    def __init__(
        self,
        device: BlockDevice,
        table: FrameTable,
        exclusion: RangeLock,
        statistics: CacheStatistics,
        readahead: Readahead,
    ) -> None:
        self._device = device
        self._table = table
        self._exclusion = exclusion
        self._statistics = statistics
        self._readahead = readahead
        self._staging = StagingBuffers(keep_max=WORKERS)
        self._queue: deque[Range] = deque()
        self._idle = trio.lowlevel.ParkingLot()

    def start(self, nursery: trio.Nursery) -> None:
        """Start the background tasks; they never end by themselves."""
        for _ in range(WORKERS):
            nursery.start_soon(self._work)

    def observe(self, start: int, end: int) -> None:
        """A read that may be part of a stream: ask for what should be fetched ahead of it."""
        ahead = self._readahead.note(start, end, self._table.limit)
        if ahead is None:
            return
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
            if not self._queue:
                await self._idle.park()
                continue
            try:
                await self._bring(self._queue.popleft())
            except OrionError as error:
                # Whoever really wants these bytes will meet the error and report it.
                log.debug("readahead failed: %s", error)

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
        try:
            await self._device.read_into(fetch.start, buffer[:length])
        except BaseException:
            give_up(self._table, fetch)
            raise
        finally:
            self._staging.give_back(buffer)
        self._statistics.readahead_bytes += length
        install(self._table, fetch, buffer, ahead=True)
