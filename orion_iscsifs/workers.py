"""`Workers`: a few threads for short calls that come by the thousand.

`trio.to_thread.run_sync` costs 200 to 300 µs of processor time, most of it in the trio thread, and
more by the clock. Here a call goes through a queue and its end through an eventfd: 80 µs, and one
wake-up for all that have ended meanwhile. It is for calls that end by themselves, and soon: they
can't be cancelled, and the task that runs the threads waits for them at its end.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

SHARERS_MAX: Final = 4


def threads_to_share() -> int:
    """How many may share one piece of work that needs no interpreter: half of the processors."""
    return min(max(len(os.sched_getaffinity(0)) // 2, 1), SHARERS_MAX)


Done = Callable[[Exception | None], None]


class Workers:
    """`count` threads, for as long as `run` is running (`is_open`)."""

    def __init__(self, count: int, name: str) -> None:
        self.count: Final = count
        self.is_open = False
        """Whether `run` is running, and what is submitted will be called."""
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Done] | None]
        self._calls = queue.SimpleQueue()
        self._ended: deque[tuple[Done, Exception | None]] = deque()
        self._wake = -1

    def submit(self, call: Callable[[], None], done: Done) -> None:
        """Have `call` called in a thread, then `done` in the trio thread, with its exception."""
        assert self.is_open
        self._calls.put((call, done))

    async def run(self) -> None:
        """The background. When it is cancelled it waits for what was submitted, and calls `done`:
        the calls have what belongs to others, buffers above all.
        """
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        names = [f"{self._name} {number}" for number in range(self.count)]
        threads = [threading.Thread(target=self._work, name=name) for name in names]
        self.is_open = True
        try:
            for thread in threads:
                thread.start()
            while True:
                await trio.lowlevel.wait_readable(self._wake)
                os.eventfd_read(self._wake)
                self._call_back()
        finally:
            self.is_open = False
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._end, threads)
            os.close(self._wake)
            self._call_back()

    def _end(self, threads: list[threading.Thread]) -> None:
        started = [thread for thread in threads if thread.ident is not None]
        for _ in started:
            self._calls.put(None)
        for thread in started:
            thread.join()

    def _work(self) -> None:
        while (found := self._calls.get()) is not None:
            call, done = found
            error: Exception | None = None
            try:
                call()
            except Exception as caught:
                error = caught
            self._ended.append((done, error))
            os.eventfd_write(self._wake, 1)

    def _call_back(self) -> None:
        while self._ended:
            done, error = self._ended.popleft()
            done(error)
