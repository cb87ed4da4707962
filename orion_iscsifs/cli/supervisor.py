"""The parent of the worker that serves a mount. It outlives the worker, and starts the next one.

Theory of operation
-------------------
A mount whose daemon dies is dead: who uses it gets ENOTCONN, a file system on it turns read-only.
So the daemon is two processes. The *worker* does everything (`cli/daemon.py`). The *supervisor*
does nothing but wait: it never talks to the target and never answers a request. It is small and
hardly ever runs, so what kills a worker (a crash in C code, the kernel when memory runs out, an
operator) leaves it alone. It holds what must not end with a worker (`custody`), above all the FUSE
device: as long as that is open the kernel keeps the mount and every request, and a new worker goes
on where the dead one was (`fuse/takeover.py`). For programs that use the mount it is a pause.

**When that is safe.** The kernel believes in everything that was acknowledged. If the dead worker
had an acknowledged write in its memory only, going on would be silent corruption, worse than a dead
mount. So a mount is taken over only if `MountConfig.survives_the_worker`: `cache=none` and
`writethrough` (the target had it before it was acknowledged), `log` (the log had it, and the new
worker goes on with it), and read-only mounts. And no write
that a dead worker has sent may land after the kernel's repetition of it, or after a later one: the
new worker ends the dead one's sessions by logging in under the same ISIDs before it answers
anything (`cli/reopening.py`). Nobody else may have written meanwhile: the locks of the LUNs are
held on, and the reservation has to be still there.

**What becomes of a worker.**

| how it ended                                                | what follows                       |
| ----------------------------------------------------------- | ---------------------------------- |
| before it was ready for the first time                      | the mount command fails            |
| it had given the FUSE device back (the mount has ended)     | the supervisor ends with its code  |
| it says that it can't go on (an error with a name)          | given up                           |
| killed or crashed; told to end by a signal before           | the mount is detached              |
| killed or crashed; the mount must not be taken over         | given up                           |
| killed or crashed, too often in a minute (`restarts`)       | given up                           |
| killed or crashed                                           | a new worker                       |

Given up: the FUSE device is closed, so every request ends with an error and nothing hangs. The dead
mount stays until somebody unmounts it, so that nobody writes to the folder beneath by mistake.

Signals: what the supervisor gets it hands on (`daemon.FORWARDED`). A worker is in a session of its
own, so that Ctrl-C reaches it once; it is killed by the kernel when the supervisor dies.

A worker is forked, not executed: everything is imported before, so an upgrade of the program on
disk does not mix with what runs.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from orion_iscsifs.cli.daemon import FORWARDED, SIGNALS
from orion_iscsifs.cli.report import Exit, Failed, describe, exit_code, orion_error, verbosity
from orion_iscsifs.cli.restarts import LIMIT, WINDOW_S, Restarts
from orion_iscsifs.custody import FUSE, custody, receive
from orion_iscsifs.errors import BusyError, MountError
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.fuse import takeover

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1

Work = Callable[[Callable[[], None]], None]
"""A worker's whole life; calls its argument once the mount can be used."""


@dataclass(slots=True)
class _Worker:
    """A living or dead worker, and what it has said."""

    pid: int
    line: socket.socket
    ready: bool = False
    failure: tuple[str, int] | None = None
    """The line and the exit code of an error with a name."""
    status: int | None = None
    """As from waitpid(2); None: it lives."""

    @property
    def how(self) -> str:
        """What ended it, in words."""
        code = os.waitstatus_to_exitcode(self.status or 0)
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        return f"ended by itself (exit code {code})"


@dataclass(slots=True)
class Supervisor:
    """Of one mount."""

    mountpoint: str
    obstacle: str | None
    """Why this mount must not be taken over; None: it may. A worker can still forbid it."""
    work: Work
    configure_log: Callable[[], None]
    """Again for each worker: the one before may have begun a new file."""
    foreground: bool
    """The workers' stderr stays theirs."""
    _kept: dict[str, int] = field(default_factory=dict)
    _restarts: Restarts = field(default_factory=Restarts)
    _had_device: bool = False
    _takeovers: int = 0
    _died_at: float = 0.0
    _was_ready: bool = False
    _told_to_end: bool = False

    def run(self, ready: Callable[[], None]) -> None:
        """Until the mount has ended. Raises `Failed` as the last worker did, or for its death."""
        with _signals() as wakeup:
            try:
                while True:
                    worker = self._start(wakeup)
                    self._watch(worker, wakeup, ready)
                    self.configure_log()
                    pause_s = self._next(worker)
                    if pause_s is None:
                        return
                    self._pause(pause_s, wakeup)
                    self._takeovers += 1
            finally:
                self._close_all()

    # -- what becomes of a worker ----------------------------------------------------------------

    def _next(self, worker: _Worker) -> float | None:
        """How long to wait before the next worker; None: it is over. Raises `Failed`."""
        assert worker.status is not None
        code = os.waitstatus_to_exitcode(worker.status)
        if not self._was_ready:
            line, said = worker.failure or ("mount: the daemon died at its start", code)
            raise Failed(line, said if said > 0 else Exit.MOUNT_FAILED)
        device = self._kept.get(FUSE)
        has_ended = device is None and self._had_device
        if code == 0 or has_ended or (device is not None and takeover.is_gone(device)):
            self._end(worker, code)
            return None
        if worker.failure is not None:
            raise Failed(*worker.failure) if device is None else self._give_up(*worker.failure)
        what = f"{self.mountpoint}: the worker (process {worker.pid}) {worker.how}"
        if self._told_to_end:
            self._detach()
            raise Failed(f"{what} while it was ending", Exit.FAILED)
        why = self.obstacle or ("its FUSE device could not be kept" if device is None else None)
        if why is not None:
            raise self._give_up(f"{what}; the mount ends with it: {why}")
        pause_s = self._restarts.next_pause_s(time.monotonic())
        if pause_s is None:
            often = f"{LIMIT + 1} times within {WINDOW_S:g} s"
            raise self._give_up(f"{what}, {often}: the mount is given up")
        self._died_at = time.monotonic()
        _log.error("%s; requests are held, a new one takes the mount over", what)
        return pause_s

    def _end(self, worker: _Worker, code: int) -> None:
        """The mount has ended, and so does the daemon."""
        if worker.failure is not None:
            raise Failed(*worker.failure)
        if code != 0:
            what = f"{self.mountpoint}: the worker {worker.how} after the mount had ended"
            raise Failed(what, Exit.FAILED)

    def _give_up(self, line: str, code: int = Exit.FAILED) -> Failed:
        """Every request of the kernel ends with an error from now on."""
        self._close_all()
        return Failed(line, code, advice=f"unmount {self.mountpoint}, then mount it again")

    def _detach(self) -> None:
        self._close_all()
        with suppress(MountError, BusyError):
            if mountpoints.find(self.mountpoint) is not None:
                mountpoints.unmount(self.mountpoint, lazy=True)

    def _close_all(self) -> None:
        while self._kept:
            os.close(self._kept.popitem()[1])

    # -- waiting ---------------------------------------------------------------------------------

    def _watch(self, worker: _Worker, wakeup: int, ready: Callable[[], None]) -> None:
        """Until it has ended and all that it has said is read."""
        process = os.pidfd_open(worker.pid)
        poll = select.poll()
        for descriptor in (process, worker.line.fileno(), wakeup):
            poll.register(descriptor, select.POLLIN)
        try:
            while worker.status is None:
                events = {descriptor for descriptor, _ in poll.poll()}
                if wakeup in events:
                    self._hand_on(worker, wakeup)
                if worker.line.fileno() in events and not self._listen(worker, ready):
                    poll.unregister(worker.line)
                if process in events:
                    _, worker.status = os.waitpid(worker.pid, 0)
            self._listen(worker, ready)
        finally:
            os.close(process)
            worker.line.close()

    def _listen(self, worker: _Worker, ready: Callable[[], None]) -> bool:
        """All that it says now. False: it has nothing more to say."""
        try:
            while (received := receive(worker.line)) is not None:
                self._take(worker, *received)
                if worker.ready and not self._was_ready:
                    self._was_ready = True
                    ready()
        except EOFError:
            return False
        return True

    def _take(self, worker: _Worker, message: dict[str, Any], descriptors: list[int]) -> None:
        match message:
            case {"keep": str(name)} if descriptors:
                self._drop(name)
                self._kept[name] = descriptors[0]
                self._had_device = self._had_device or name == FUSE
            case {"drop": str(name)}:
                self._drop(name)
            case {"ready": True}:
                worker.ready = True
                if self._takeovers:
                    pause_s = time.monotonic() - self._died_at
                    self.configure_log()
                    _log.warning(
                        "%s: taken over by process %d after %.1f s",
                        self.mountpoint,
                        worker.pid,
                        pause_s,
                    )
            case {"forbid": str(why)}:
                self.obstacle = why
            case {"error": str(line), "code": int(code)}:
                worker.failure = line, code

    def _drop(self, name: str) -> None:
        if (descriptor := self._kept.pop(name, None)) is not None:
            os.close(descriptor)

    def _hand_on(self, worker: _Worker, wakeup: int) -> None:
        """The signals that have come. Each byte is the number of one (`signal.set_wakeup_fd`)."""
        for _ in os.read(wakeup, 64):
            self._told_to_end = True
            os.kill(worker.pid, FORWARDED)  # it is not reaped yet: the number is its own

    def _pause(self, pause_s: float, wakeup: int) -> None:
        """Cut short by a signal, which the next worker is told."""
        select.select([wakeup], [], [], pause_s)

    # -- a new worker ----------------------------------------------------------------------------

    def _start(self, wakeup: int) -> _Worker:
        self.configure_log()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._be_worker(theirs, parent, wakeup)
        theirs.close()
        return _Worker(pid, ours)

    def _be_worker(self, line: socket.socket, parent: int, wakeup: int) -> NoReturn:
        code: int = Exit.FAILED
        try:
            _die_with(parent)
            signal.set_wakeup_fd(-1)
            os.close(wakeup)
            _default_signals()
            os.setsid()
            _add_to_title(" (worker)")
            custody.attach(line, self._kept, keeps=self.obstacle is None, takeovers=self._takeovers)
            self.work(self._ready)
            code = Exit.DONE
        except BaseException as error:  # the process ends here, whatever it was
            code = exit_code(error, failure=Exit.MOUNT_FAILED)
            self._report(error, code)
        os._exit(code)

    def _ready(self) -> None:
        self._was_ready = True
        custody.tell(ready=True)
        if not self.foreground:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 2)
            os.close(null)

    def _report(self, error: BaseException, code: int) -> None:
        """In the worker. An error without a name is a crash, unless it is the very start's."""
        is_named = orion_error(error) is not None
        if verbosity.debug and not self._takeovers:
            traceback.print_exception(error)
        if is_named or not self._takeovers:
            custody.tell(error=describe(error), code=code)
        if not is_named and self._was_ready:
            _log.critical("%s", describe(error), exc_info=error)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that becomes readable when one of `SIGNALS` has come."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.signal(number, _noted) for number in SIGNALS}
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def _noted(_number: int, _frame: object) -> None:
    """`set_wakeup_fd` does the rest."""


def _default_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _die_with(parent: int) -> None:
    """SIGKILL for this process as soon as its parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _add_to_title(words: str) -> None:
    import setproctitle

    setproctitle.setproctitle(setproctitle.getproctitle() + words)
