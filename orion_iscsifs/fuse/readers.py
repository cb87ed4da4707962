"""Who reads /dev/fuse next: a cheaper wait for pyfuse3's request loop.

Theory of operation
-------------------
pyfuse3 runs up to `max_tasks` identical tasks. Each takes a `trio.Lock`, waits with
`trio.lowlevel.wait_readable` for /dev/fuse, reads one request, releases the lock, and carries the
request out. Every request therefore costs a checkpoint for the lock, an epoll registration with a
trip through trio's loop, and a hand-over to the task that was queueing for the lock. For a request
that is answered from memory that is more than the answer itself.

pyfuse3 reaches trio through its module global `trio` (its asyncio mode replaces that global, which
is how we know that it may be replaced). `install()` puts a `_Facade` there that differs in three
points:

* **The lock is barging** (`_ReaderLock`). Taking it when it is free and releasing it touch two
  attributes: no checkpoint and, above all, *no hand-over*. The task that has just answered from
  memory takes it again and reads the next request itself.
* **The wait polls first.** One `poll(0)` says whether a request is there already. Only if not, or
  after `REQUESTS_PER_CHECKPOINT` requests in a row, does the task go through trio, so that other
  tasks are never starved.
* **The next reader is woken when the present one blocks**, not when it releases the lock. Every
  handler passes through `orion_iscsifs.fuse.handlers.handler`, which calls `reader_blocks()` the
  first time the handler yields to trio. A handler that never yields wakes nobody.

Why no request is ever left unread (the invariant: *if the lock is free and a task is parked, then
some task runs that will either take the lock, or wake a parked task*). The lock becomes free only
in `__aexit__`, and the task that freed it then either
  1. carries a request out without blocking and comes back to take the lock; or
  2. blocks in a handler: `reader_blocks()` wakes a parked task; or
  3. ends (session over, too many idle tasks, an exception): the nursery's wrapper calls
     `wake()` as the task ends, so the end of the session passes through all parked tasks.
A woken task finds the lock free and takes it, or finds it held and parks again: its holder is then
under the same three cases.

A request may be withdrawn (its caller was killed) after the poll and before the read. A blocking
read would then stop the whole process, its control socket and its iSCSI sessions until the next
request comes. So /dev/fuse is read without blocking, and a loop that ends with EAGAIN, which
pyfuse3 knows nothing of, is begun anew.

When the kernel has closed the connection, requests that are still held (the target is away) have
nobody left to answer: the first loop that ends then calls `on_gone`, which cancels them.

If pyfuse3 should change its inside so that the names the facade relies on are gone, `install()`
does nothing and says so: the stock behaviour is slower and just as correct.
"""

import logging
import os
import select
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Final, Self

import pyfuse3
import trio

_log = logging.getLogger(__name__)

REQUESTS_PER_CHECKPOINT: Final = 8
"""Requests answered in a row before other trio tasks get their turn (about 0.2 ms)."""

_GONE: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


class _ReaderLock:
    """At most one task reads /dev/fuse. See the module's theory of operation."""

    def __init__(self) -> None:
        self._held = False
        self._waking: trio.lowlevel.Task | None = None
        self._parked: list[trio.lowlevel.Task] = []

    async def __aenter__(self) -> None:
        while self._held:
            await self._park()
        self._held = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held = False

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        # Last parked, first woken: its stack is warm, and the others stay idle.
        self._parked.append(task)

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._parked.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._waking = None

    def wake(self) -> None:
        """Let one parked task have a try, unless one is on its way or the lock is held."""
        if self._parked and not self._held and self._waking is None:
            self._waking = self._parked.pop()
            trio.lowlevel.reschedule(self._waking)


class _Lowlevel:
    """`trio.lowlevel` with a `wait_readable` that polls first."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fd = -1
        self._in_a_row = 0

    async def wait_readable(self, fd: int) -> None:
        if fd != self._fd:
            os.set_blocking(fd, False)
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        self._in_a_row += 1
        if self._in_a_row >= REQUESTS_PER_CHECKPOINT:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
        # Polled again after every wait: a request may be withdrawn (its caller was killed).
        while not self._poll.poll(0):
            self._in_a_row = 0
            await trio.lowlevel.wait_readable(fd)

    def is_gone(self) -> bool:
        """Whether the kernel has closed the connection."""
        return any(events & _GONE for _, events in self._poll.poll(0))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (everything else is trio's)
        return getattr(trio.lowlevel, name)


class _Nursery:
    """A nursery whose tasks wake a parked reader as they end (case 3 of the theory)."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._manager = trio.open_nursery()
        self._ended = ended
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        return bool(await self._manager.__aexit__(kind, error, traceback))

    def start_soon(
        self, task: Callable[..., Awaitable[object]], *args: object, name: object = None
    ) -> None:
        assert self._nursery is not None, "entered before used"
        self._nursery.start_soon(self._run, task, args, name=name)

    async def _run(self, task: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            while True:
                try:
                    await task(*args)
                except BlockingIOError:
                    continue  # a request was withdrawn between poll and read: begin anew
                return
        finally:
            self._ended()


class _Facade:
    """What pyfuse3 sees as the module `trio`. One per mount, so one lock."""

    def __init__(self, on_gone: Callable[[], None]) -> None:
        self._on_gone = on_gone
        self.lowlevel = _Lowlevel()
        self.lock = _ReaderLock()

    def Lock(self) -> _ReaderLock:
        return self.lock

    def open_nursery(self) -> _Nursery:
        return _Nursery(self._loop_ended)

    def _loop_ended(self) -> None:
        self.lock.wake()
        if self.lowlevel.is_gone():
            self._on_gone()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (everything else is trio's)
        return getattr(trio, name)


def _nobody() -> None:
    """Stock pyfuse3 wakes the next reader by itself."""


def install(on_gone: Callable[[], None]) -> Callable[[], None]:
    """Put the facade in place for the next `pyfuse3.main()`; returns `reader_blocks`.

    `on_gone` is called when the kernel has closed the connection, perhaps more than once.
    Without the names that the facade needs, pyfuse3 keeps trio itself.
    """
    if getattr(pyfuse3, "trio", None) is None or not hasattr(pyfuse3, "_wait_fuse_readable"):
        _log.warning("pyfuse3 %s is unknown inside: its own request loop is used", _version())
        return _nobody
    facade = _Facade(on_gone)
    pyfuse3.trio = facade  # type: ignore[attr-defined]  # a global that its stubs leave out
    return facade.lock.wake


def uninstall() -> None:
    """Give pyfuse3 trio back."""
    if hasattr(pyfuse3, "trio"):
        pyfuse3.trio = trio  # the stock module


def _version() -> str:
    return str(getattr(pyfuse3, "__version__", "?"))
