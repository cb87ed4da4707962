"""Unmounting so that nothing is lost: flush, unmount, wait for the daemon to end.

The order matters. Flushing comes first, while the mount still stands: if the target can't take the
data, the user is told and the mount is as it was. After the unmount the daemon flushes what came in
between, and its end, seen through pidfds, is what says that the data is safe: the end of its worker
and that of its supervisor, which comes last.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.cli.report import PROGRAM, Exit, Failed, say, warn
from orion_iscsifs.config.places import runtime_dir
from orion_iscsifs.errors import BusyError, MountError, OrionError
from orion_iscsifs.fuse import apart
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.monitor.control import SILENCE_MAX_S, ControlClient, DaemonSilent, socket_path
from orion_iscsifs.monitor.status import dirty_bytes

FORCE_TIMEOUT_S: Final = 10.0
"""How long `--force` tries the gentle way, unless --timeout says otherwise."""
ABANDON_TIMEOUT_S: Final = 10.0
"""How long a daemon that was told to give up may take, before it is killed."""
CHECK_S: Final = 5.0
"""How often a daemon that is awaited is asked whether it still works."""
ENDING_MAX_S: Final = 60.0
"""How long it may take to end after its control socket has gone."""
UNSEEN_SYNC_S: Final = 300.0
"""How long the files of a mount without a control socket may take to be fsynced."""
SILENCE_MIN_S: Final = 2.0
"""A short --timeout must not make a busy daemon look like a hanging one."""
KILLED_S: Final = 10.0
"""How long the kernel may take to end a killed daemon."""


@dataclass(slots=True)
class _Deadline:
    """Bounds the whole command; None: no bound."""

    timeout_s: float | None
    _ends: float = field(init=False)

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + (self.timeout_s or 0)

    def left_s(self) -> float | None:
        return None if self.timeout_s is None else max(0.0, self._ends - time.monotonic())


def unmount_safely(
    path: str, *, timeout_s: float | None = None, force: bool = False, release: bool = False
) -> None:
    """Return when the data is durable on the target and the daemon has exited.

    `release`: the reservation does not outlast the mount.

    Raises `BusyError`, `MountError` or `Failed`; the mount then still stands, or the daemon goes on
    writing, as the message says.
    """
    mountpoint = mountpoints.resolve(path)
    mount = mountpoints.find(mountpoint)
    client = ControlClient(socket_path(runtime_dir(), mountpoint))
    alive = client.is_alive()
    if mount is None and not alive:
        raise MountError(
            f"{mountpoint}: no mount of {PROGRAM}", advice=f"`{PROGRAM} status` lists them"
        )
    deadline = _Deadline(FORCE_TIMEOUT_S if force and timeout_s is None else timeout_s)
    if alive:
        if release:
            client.ask("release")
        try:
            with _process(client) as process:
                _end(mountpoint, client, process, deadline, mounted=mount is not None, force=force)
        except KeyboardInterrupt:
            raise _interrupted(mountpoint) from None
    elif mountpoints.is_dead(mountpoint):
        _clean_up(mountpoint)
    else:
        _unmount_unseen(mountpoint, force=force)


def _interrupted(mountpoint: str) -> Failed:
    still_mounted = mountpoints.find(mountpoint) is not None
    advice = "still mounted" if still_mounted else "unmounted; the daemon goes on writing"
    return Failed(f"umount {mountpoint}: interrupted", Exit.FAILED, advice=advice)


def _end(
    mountpoint: str,
    client: ControlClient,
    process: "_Process",
    deadline: _Deadline,
    *,
    mounted: bool,
    force: bool,
) -> None:
    flushed = True
    if mounted:
        flushed = _flush(mountpoint, client, deadline, force=force)
        if force:
            _detach(mountpoint, process, flushed=flushed)
        else:
            mountpoints.unmount(mountpoint)
    if _await_end(mountpoint, client, process, deadline.left_s() if flushed else 0.0):
        return
    if not force:
        raise Failed(
            f"umount {mountpoint}: unmounted, but the daemon still writes to the target",
            Exit.FAILED,
            advice=f"it goes on; `{PROGRAM} umount {mountpoint}` waits again, --force gives up",
        )
    _abandon(mountpoint, client, process)
    if mountpoints.find(mountpoint) is not None:  # it could not be detached before
        mountpoints.unmount(mountpoint, lazy=True)


def _detach(mountpoint: str, process: "_Process", *, flushed: bool) -> None:
    """Unmount, whoever uses it; what can't be done now is done once the daemon has gone."""
    try:
        mountpoints.unmount(mountpoint)
    except BusyError:
        with suppress(MountError):
            mountpoints.unmount(mountpoint, lazy=True)
        warn(f"{mountpoint} was in use; its users see an error from now on")
        if flushed:
            # Detached lazily, it lives on while it is used: the daemon has to be told to end.
            process.tell(signal.SIGTERM)
    except MountError as error:
        warn(str(error))


def _await_end(
    mountpoint: str, client: ControlClient, process: "_Process", timeout_s: float | None
) -> bool:
    """Whether the daemon ended in time. Raises `Failed` if it hangs; None waits while it works."""
    deadline, told, mute_s = _Deadline(timeout_s), False, 0.0
    while True:
        left_s = deadline.left_s()
        if process.exited(CHECK_S if left_s is None else min(left_s, CHECK_S)):
            return True
        if left_s is not None and left_s <= CHECK_S:
            return False
        try:
            dirty = dirty_bytes(client.ask("status")["status"])
        except MountError as error:
            # Its socket goes first, then it logs out: that takes a moment, not minutes.
            mute_s += CHECK_S
            if isinstance(error, DaemonSilent) or mute_s > ENDING_MAX_S:
                raise Failed(
                    f"umount {mountpoint}: unmounted, but the daemon does not answer",
                    Exit.FAILED,
                    advice=f"`{PROGRAM} umount {mountpoint}` tries again, --force ends it",
                ) from None
        else:
            if not told:
                say(f"umount {mountpoint}: unmounted; still waiting for {dirty} bytes to be safe")
            told = True


def _flush(mountpoint: str, client: ControlClient, deadline: _Deadline, *, force: bool) -> bool:
    """Whether everything is durable. Without `force`, False is an exception instead."""
    try:
        try:
            flush_with_progress(client, timeout_s=deadline.left_s())
        except DaemonSilent:
            raise
        except OrionError as error:
            # It may tell of a failure that has been mended meanwhile: the next one knows.
            flush_with_progress(client, timeout_s=deadline.left_s())
            say(f"umount {mountpoint}: an earlier flush had failed ({error}); all is written now")
    except DaemonSilent as error:
        if not force:
            raise Failed(
                f"umount {mountpoint}: {error}",
                Exit.FAILED,
                advice="still mounted; try again, or end the daemon with --force "
                "(what was not fsynced may be lost)",
            ) from None
        return False
    except OrionError as error:
        if not force:
            raise Failed(
                f"umount {mountpoint}: {error}",
                Exit.FAILED,
                advice="still mounted, nothing is lost; try again, or give the data up: --force",
            ) from None
        return False
    return True


def flush_with_progress(client: ControlClient, *, timeout_s: float | None = None) -> None:
    """The daemon's flush, with a bar on a terminal. Raises `MountError`."""
    from orion_iscsifs.cli.progress import dirty_bar

    ends = None if timeout_s is None else time.monotonic() + timeout_s
    with dirty_bar() as show:
        silence_s = SILENCE_MAX_S if timeout_s is None else min(timeout_s, SILENCE_MAX_S)
        for message in client.request("flush", timeout_s=max(silence_s, SILENCE_MIN_S)):
            if "ok" in message:
                return
            show(int(message.get("dirty_bytes") or 0))
            if ends is not None and time.monotonic() > ends:
                left = message.get("dirty_bytes")
                raise MountError(f"{left} bytes are not on the target after {timeout_s:g} s")


def _abandon(mountpoint: str, client: ControlClient, process: "_Process") -> None:
    lost: object = "unknown"
    patience_s = ABANDON_TIMEOUT_S
    try:
        lost = client.ask("abandon", timeout_s=CHECK_S).get("dirty_bytes")
    except DaemonSilent:
        patience_s = 0.0
    except MountError:
        pass  # it is ending already
    if not process.exited(patience_s):
        process.tell(signal.SIGKILL)
        if not process.exited(KILLED_S):
            warn(f"umount {mountpoint}: the kernel does not end the killed daemon")
    warn(f"umount {mountpoint}: given up, bytes that never reached the target: {lost}")


def _clean_up(mountpoint: str) -> None:
    mountpoints.unmount(mountpoint, lazy=True)
    say(
        f"umount {mountpoint}: its daemon had died; the dead mount is removed "
        "(what was not fsynced may be lost)"
    )


def _unmount_unseen(mountpoint: str, *, force: bool) -> None:
    """A living mount without a control socket that we may reach (another user's, as a rule)."""
    try:
        apart.ask("sync", mountpoint, timeout_s=UNSEEN_SYNC_S)
    except OSError as error:
        why = f"no answer after {UNSEEN_SYNC_S:g} s" if isinstance(error, apart.NoAnswer) else ""
        if not force:
            raise MountError(
                f"umount {mountpoint}: {why or error.strerror}",
                advice="still mounted; its daemon flushes it when it is told to end by SIGTERM",
            ) from None
    mountpoints.unmount(mountpoint, lazy=force)
    warn(f"umount {mountpoint}: its control socket was not found, so its end was not awaited")


class _Process:
    """The processes of a daemon, by pidfds: a number may be given to another process, these not."""

    def __init__(self, worker: int, supervisor: int | None) -> None:
        """`supervisor` is the parent: who tells it to end tells both."""
        self._all = [worker] if supervisor is None else [supervisor, worker]

    def tell(self, number: signal.Signals) -> None:
        """SIGKILL to all of them, any other to the first, which hands it on."""
        for process in self._all if number is signal.SIGKILL else self._all[:1]:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)

    def exited(self, timeout_s: float | None) -> bool:
        """Whether all of them have ended, which is awaited."""
        deadline = _Deadline(timeout_s)
        return all(_exited(process, deadline.left_s()) for process in self._all)


@contextmanager
def _process(client: ControlClient) -> Iterator[_Process]:
    """Raises MountError."""
    with ExitStack() as opened:

        def pidfd(pid: int) -> int:
            process = os.pidfd_open(pid)
            opened.callback(os.close, process)
            return process

        try:
            supervisor = client.supervisor_pid()
            worker = client.pid()
            if supervisor is None or supervisor == worker:
                found = _Process(pidfd(worker), None)
            else:
                found = _Process(*_both(pidfd, worker, supervisor))
        except OSError as error:
            raise MountError(f"the daemon: {error.strerror}", advice="try again") from None
        yield found


def _both(pidfd: Callable[[int], int], worker: int, supervisor: int) -> tuple[int, int]:
    """A worker that has just died is no obstacle: another one is on its way."""
    parent = pidfd(supervisor)
    try:
        return pidfd(worker), parent
    except ProcessLookupError:
        return parent, parent


def _exited(process: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
