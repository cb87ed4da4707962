"""`Fetcher`: reads, out of frames where they have the pages and from the device where not.

A reader copies what is there and claims what is absent (`claims`). It fetches each run of absent
pages with one request, straight into its caller's buffer where the run lies in it, and copies it
from there to the frames. Then it waits for pages that somebody else was fetching, and looks again.

Races, and why they are harmless:

* A page is written while it is fetched. The write makes it valid, and `install` fills only pages
  that are not. The reader overlapped the write, so it may return either content.
* The device changes under a fetch (discard, zeroing, write-through). Whoever does that holds the
  range in the `RangeLock`, waits for the fetches there to end, and new ones wait for it.
* No frame is free. Then the reader reads past the cache: nothing is claimed, nothing installed.
* Two readers want pages of each other. Each carries out its own fetches before it waits, and
  holds no claim while it does.
"""

import trio

from orion_iscsifs.block.pages import (
    FRAME_BYTES,
    FRAME_MASK,
    FRAME_SHIFT,
    PAGE_BYTES,
    page_runs,
    pages_touched,
)
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range, clip, cover, split
from orion_iscsifs.cache.claims import (
    Fetch,
    absent_pages,
    bridged,
    claim,
    first_absent_run,
    give_up,
    install,
)
from orion_iscsifs.cache.frames import FrameTable
from orion_iscsifs.cache.gauge import Gauge
from orion_iscsifs.cache.prefetch import Prefetcher
from orion_iscsifs.cache.statistics import CacheStatistics
from orion_iscsifs.errors import OrionError


class Fetcher:
    """See the module's docstring."""

    def __init__(
        self,
        device: Gauge,
        table: FrameTable,
        exclusion: RangeLock,
        statistics: CacheStatistics,
        prefetcher: Prefetcher,
    ) -> None:
        self._device = device
        self._table = table
        self._exclusion = exclusion
        self._statistics = statistics
        self._prefetcher = prefetcher

    async def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target`. The range lies inside the table's limit and is not empty."""
        request = offset, offset + len(target)
        absent, shared = self._copy_valid([request], offset, target)
        if absent or shared:
            self._statistics.misses += 1
        else:
            self._statistics.hits += 1
        self._prefetcher.observe(*request)
        while absent or shared:
            pending = [clip(run, request) for run in absent + shared]
            excluded = [run for run in absent if self._exclusion.is_excluded(run)]
            if excluded:
                await self._exclusion.wait_until_free(excluded[0])
            else:
                if absent:  # no await since they were found absent
                    await self._fetch_all(absent, offset, target)
                pending = shared
                if shared:
                    await self._wait_for(shared[0])
            absent, shared = self._copy_valid(pending, offset, target)

    async def read_run(self, offset: int, target: memoryview) -> bool:
        """The common miss, spelled out: whole pages of one frame, all absent, nobody in the way.

        False: it is another case, and nothing has happened.
        """
        length = len(target)
        start = offset & FRAME_MASK
        end = start + length
        if (offset | length) & (PAGE_BYTES - 1) or end > FRAME_BYTES or self._exclusion.exclusive:
            return False
        frame = self._table.obtain(offset >> FRAME_SHIFT)
        pages = pages_touched(start, end)
        if frame is None or (frame.valid | frame.fetching) & pages:
            return False
        self._statistics.misses += 1
        self._prefetcher.observe(offset, offset + length)
        frame.fetching |= pages
        succeeded = False
        try:
            await self._device.read_into(offset, target)
            succeeded = True
        finally:
            frame.fetching ^= pages
            if succeeded:
                fresh = pages & ~(frame.valid | self._table.beyond_the_end(frame))
                if fresh == pages:
                    frame.view[start:end] = target
                else:
                    for first, last in page_runs(fresh):
                        frame.view[first:last] = target[first - start : last - start]
                frame.fetched(fresh)
            self._table.release(frame)
        return True

    async def complete(self, page: Range) -> None:
        """Bring a page into the cache. It may have gone again by the time the caller looks."""
        run = first_absent_run(self._table, page)
        if self._exclusion.is_excluded(page):
            await self._exclusion.wait_until_free(page)
        elif run is None:
            await self._wait_for(page)
        else:
            fetch = claim(self._table, run)
            await self._fetch(fetch, run[0], memoryview(bytearray(run[1] - run[0])))

    def _copy_valid(
        self, pending: list[Range], offset: int, target: memoryview
    ) -> tuple[list[Range], list[Range]]:
        """Copy what is there to the target.

        What is not there comes back as runs of whole pages that nobody fetches, and as ranges
        that somebody else is fetching.
        """
        absent: list[Range] = []
        shared: list[Range] = []
        for start, end in (piece for wanted in pending for piece in split(wanted, FRAME_BYTES)):
            frame = self._table.frames.get(start >> FRAME_SHIFT)
            if frame is None:
                _append_run(absent, cover((start, end), PAGE_BYTES))
                continue
            base = start & -FRAME_BYTES
            pages = pages_touched(start - base, end - base)
            if frame.ahead & pages:
                self._prefetcher.used(frame, pages)
            elif frame.valid & pages == pages:
                frame.visited = True
            for run in page_runs(pages & frame.valid):
                first, last = clip(run, (start - base, end - base))
                at = base - offset
                target[at + first : at + last] = frame.view[first:last]
            if frame.valid & pages != pages:
                clean = frame.valid & ~(frame.dirty | frame.writing)
                missing = bridged(absent_pages(frame, pages), clean & pages)
                for first, last in page_runs(missing):
                    _append_run(absent, (base + first, base + last))
                for first, last in page_runs(pages & frame.fetching & ~frame.valid):
                    shared.append(clip((base + first, base + last), (start, end)))
        return absent, shared

    async def _wait_for(self, wanted: Range) -> None:
        """Park if the first page of the range is being fetched by somebody else."""
        frame = self._table.frames.get(wanted[0] >> FRAME_SHIFT)
        start = wanted[0] & FRAME_MASK
        if frame is not None and frame.fetching & pages_touched(start, start + 1):
            await frame.wait()

    async def _fetch_all(self, runs: list[Range], offset: int, target: memoryview) -> None:
        fetches = [claim(self._table, run) for run in runs]
        if len(fetches) == 1:
            await self._fetch(fetches[0], offset, target)
            return
        errors: list[OrionError] = []

        async def fetch_one(fetch: Fetch) -> None:
            try:
                await self._fetch(fetch, offset, target)
            except OrionError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for fetch in fetches:
                nursery.start_soon(fetch_one, fetch)
        if errors:
            raise errors[0]

    async def _fetch(self, fetch: Fetch, offset: int, target: memoryview) -> None:
        """Read one run into the target and into its frames."""
        start, end = fetch.start, fetch.end
        direct = offset <= start and end <= offset + len(target)
        content = (
            target[start - offset : end - offset] if direct else memoryview(bytearray(end - start))
        )
        try:
            await self._device.read_into(start, content)
        except BaseException:
            give_up(self._table, fetch)
            raise
        install(self._table, fetch, content)
        if not direct:
            first, last = clip((offset, offset + len(target)), (start, end))
            target[first - offset : last - offset] = content[first - start : last - start]


def _append_run(runs: list[Range], run: Range) -> None:
    """Add a run, joined to the last one if it follows it."""
    if runs and runs[-1][1] == run[0]:
        runs[-1] = runs[-1][0], run[1]
    else:
        runs.append(run)
