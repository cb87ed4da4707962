"""Unmounting so that nothing is lost: flush, unmount, wait for the daemon to end.

The order matters. Flushing comes first, while the mount still stands: if the target can't take the
data, the user is told and the mount is as it was. After the unmount the daemon flushes what came in
between, and its end, seen through a pidfd, is what says that the data is safe.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.cli.report import PROGRAM, Exit, Failed, say, warn
from orion_iscsifs.config.places import runtime_dir
from orion_iscsifs.errors import BusyError, MountError, OrionError
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.monitor.control import ControlClient, socket_path

FORCE_TIMEOUT_S: Final = 10.0
"""How long `--force` tries the gentle way, unless --timeout says otherwise."""
ABANDON_TIMEOUT_S: Final = 10.0
"""How long a daemon that was told to give up may take, before it is killed."""


@dataclass(slots=True)
class _Deadline:
    """Bounds the whole command; None: no bound."""

    timeout_s: float | None
    _ends: float = field(init=False)

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + (self.timeout_s or 0)

    def left_s(self) -> float | None:
        return None if self.timeout_s is None else max(0.0, self._ends - time.monotonic())


def unmount_safely(path: str, *, timeout_s: float | None = None, force: bool = False) -> None:
    """Return when the data is durable on the target and the daemon has exited.

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
        with _process(client) as process:
            _end(mountpoint, client, process, deadline, mounted=mount is not None, force=force)
    elif mountpoints.is_dead(mountpoint):
        _clean_up(mountpoint)
    else:
        _unmount_unseen(mountpoint, force=force)


def _end(
    mountpoint: str,
    client: ControlClient,
    process: int,
    deadline: _Deadline,
    *,
    mounted: bool,
    force: bool,
) -> None:
    """`process` is the daemon's pidfd."""
    flushed = True
    if mounted:
        flushed = _flush(mountpoint, client, deadline, force=force)
        try:
            mountpoints.unmount(mountpoint)
        except BusyError:
            if not force:
                raise
            mountpoints.unmount(mountpoint, lazy=True)
            warn(f"{mountpoint} was in use; its users see an error from now on")
            if flushed:
                # Detached lazily, it lives on while it is used: the daemon has to be told to end.
                _tell(process, signal.SIGTERM)
    if _exited(process, deadline.left_s() if flushed else 0.0):
        return
    if not force:
        raise Failed(
            f"umount {mountpoint}: unmounted, but the daemon still writes to the target",
            Exit.FAILED,
            advice=f"it goes on; `{PROGRAM} umount {mountpoint}` waits again, --force gives up",
        )
    _abandon(mountpoint, client, process)


def _flush(mountpoint: str, client: ControlClient, deadline: _Deadline, *, force: bool) -> bool:
    """Whether everything is durable. Without `force`, False is an exception instead."""
    try:
        flush_with_progress(client, timeout_s=deadline.left_s())
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
        for message in client.request("flush", timeout_s=timeout_s):
            if "ok" in message:
                return
            show(int(message.get("dirty_bytes") or 0))
            if ends is not None and time.monotonic() > ends:
                left = message.get("dirty_bytes")
                raise MountError(f"{left} bytes are not on the target after {timeout_s:g} s")


def _abandon(mountpoint: str, client: ControlClient, process: int) -> None:
    lost: object = "unknown"
    with suppress(MountError):
        lost = client.ask("abandon", timeout_s=ABANDON_TIMEOUT_S).get("dirty_bytes")
    if not _exited(process, ABANDON_TIMEOUT_S):
        _tell(process, signal.SIGKILL)
        _exited(process, None)
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
        for folder, _, names in os.walk(mountpoint):
            for name in names:
                _fsync(os.path.join(folder, name))
    except OSError as error:
        if not force:
            raise MountError(f"umount {mountpoint}: {error.strerror}") from None
    mountpoints.unmount(mountpoint, lazy=force)
    warn(f"umount {mountpoint}: its control socket was not found, so its end was not awaited")


def _fsync(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _process(client: ControlClient) -> Iterator[int]:
    """A pidfd of the daemon: its number may be given to another process, this may not."""
    try:
        process = os.pidfd_open(client.pid())
    except OSError as error:
        raise MountError(f"the daemon: {error.strerror}", advice="try again") from None
    try:
        yield process
    finally:
        os.close(process)


def _tell(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)


def _exited(process: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
