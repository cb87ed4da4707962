"""`Gatherer`: brings what many requests want from the disk together for few threads.

A hand-over to a thread and back costs more than to read a record, so it is made for all that wait.
A request goes to a thread that has nothing to do; if there is none it joins the queue, and a thread
that comes back takes as much of the queue as is good for one call of `Fetcher.fetch`.

A request that is cancelled leaves the queue. Once a thread has it, it has to wait for the thread,
which writes into its buffer.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from orion_iscsifs.block.ranges import Range
from orion_iscsifs.tier.fetching import Fetcher, Request
from orion_iscsifs.tier.reading import Piece, RecordReader
from orion_iscsifs.tier.segments import Held, SegmentFiles
from orion_iscsifs.workers import Workers

THREADS: Final = 2
BATCH_PIECES: Final = 32
"""2 MiB at most: the first of a batch waits for the last."""


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    task: trio.lowlevel.Task
    is_over: bool = False
    is_parked: bool = False
    error: Exception | None = None


class Gatherer:
    """See the module's docstring. Before `run` runs, and when it has ended, it does nothing."""

    def __init__(self, files: SegmentFiles, reader: RecordReader) -> None:
        self._files = files
        self._fetcher = Fetcher(reader)
        self._workers = Workers(THREADS, "tier reader")
        self._idle = 0
        """Threads that have nothing to do."""
        self._queue: deque[_Waiting] = deque()

    async def fetch(self, pieces: list[Piece], span: Range, target: memoryview) -> None:
        """Do these pieces, or set their `problem`. Raises OSError: some may not be done then."""
        if not self._workers.is_open:
            return
        waiting = _Waiting(Request(pieces, span, target), trio.lowlevel.current_task())
        self._queue.append(waiting)
        self._start()

        def leave(_: object) -> trio.lowlevel.Abort:
            if waiting not in self._queue:
                return trio.lowlevel.Abort.FAILED
            self._queue.remove(waiting)
            return trio.lowlevel.Abort.SUCCEEDED

        if not waiting.is_over:
            waiting.is_parked = True
            await trio.lowlevel.wait_task_rescheduled(leave)
        if waiting.error is not None:
            raise waiting.error

    async def run(self) -> None:
        """The background."""
        self._idle = THREADS
        try:
            await self._workers.run()
        finally:
            # Nothing is done of those that still wait, and the device is asked.
            self._end(list(self._queue), {}, None)
            self._queue.clear()

    def _start(self) -> None:
        """Give what waits to threads that have nothing to do."""
        while self._idle and self._queue:
            self._hand_over(self._take())

    def _take(self) -> list[_Waiting]:
        """From the queue, what makes a batch: one request at least."""
        batch, pieces = list[_Waiting](), 0
        while self._queue:
            pieces += len(self._queue[0].request.pieces)
            if batch and pieces > BATCH_PIECES:
                break
            batch.append(self._queue.popleft())
        return batch

    def _hand_over(self, batch: list[_Waiting]) -> None:
        held: dict[int, Held] = {}
        requests = [waiting.request for waiting in batch]
        try:
            self._hold(requests, held)
        except OSError as error:
            self._end(batch, held, error)
            return
        self._idle -= 1
        descriptors = {number: one.descriptor for number, one in held.items()}
        self._workers.submit(
            partial(self._fetcher.fetch, requests, descriptors),
            partial(self._come_back, batch, held),
        )

    def _hold(self, requests: list[Request], held: dict[int, Held]) -> None:
        """The files they need; what has gone is a problem of its pieces. Raises OSError."""
        for request in requests:
            for piece in request.pieces:
                number = piece.row.number
                if piece.is_done or not piece.row.size_bytes or number in held:
                    continue
                try:
                    held[number] = self._files.hold(number)
                except FileNotFoundError as error:
                    piece.problem = error

    def _come_back(
        self, batch: list[_Waiting], held: dict[int, Held], error: Exception | None
    ) -> None:
        self._idle += 1
        self._end(batch, held, error)
        if self._workers.is_open:
            self._start()

    def _end(self, batch: list[_Waiting], held: dict[int, Held], error: Exception | None) -> None:
        for one in held.values():
            one.release()
        for waiting in batch:
            waiting.is_over, waiting.error = True, error
            if waiting.is_parked:
                trio.lowlevel.reschedule(waiting.task)
