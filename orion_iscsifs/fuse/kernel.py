"""Limits that the kernel sets for a FUSE mount, raised where we may. Never fatal.

At most 12 requests in the background throttle a block device badly: 1000 random reads/s from a
backend 10 ms away, 5000 with 128. The kernel's readahead of 128 KiB is raised a little only. What
hides a distant target is the cache's own readahead; behind a window of 4 MiB the two got in each
other's way, and a near target was read at half the speed (docs/performance.md).

pyfuse3 can't set either, so they are written to /sys, which needs root. Where that is refused the
mount is slower, and `status --json` says what is lower than it should be, and why.
"""

import ctypes
import errno
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

_log = logging.getLogger(__name__)

MAX_BACKGROUND: Final = 128
CONGESTION_THRESHOLD: Final = 96
READ_AHEAD_KB: Final = 512

_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
_BDI: Final = Path("/sys/class/bdi")
_MNT_DETACH: Final = 2


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """What is in force; None: not visible to us."""

    max_background: int | None = None
    congestion_threshold: int | None = None
    read_ahead_kb: int | None = None
    not_raised: Mapping[str, str] = field(default_factory=dict)
    """Why, for each limit that is lower than it should be, or not visible."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def raise_limits(device: str) -> KernelLimits:
    """Raise what we may for the mount whose `major:minor` is `device`; blocks for a moment.

    What could not be raised is logged once, and in the answer.
    """
    minor = device.partition(":")[2]
    not_raised: dict[str, str] = {}
    with _connections() as folder:
        limits = KernelLimits(
            max_background=_set(folder / minor / "max_background", MAX_BACKGROUND, not_raised),
            congestion_threshold=_set(
                folder / minor / "congestion_threshold", CONGESTION_THRESHOLD, not_raised
            ),
            read_ahead_kb=_set(_BDI / device / "read_ahead_kb", READ_AHEAD_KB, not_raised),
            not_raised=not_raised,
        )
    if not_raised:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_raised.items())
        _log.info("limits of the kernel that stay below what they should be: %s", reasons)
    return limits


def _set(path: Path, value: int, not_raised: dict[str, str]) -> int | None:
    """Raise one limit; what it is then. If it is lower all the same, note why."""
    reason = "the kernel keeps it lower"
    try:
        if int(path.read_text()) < value:
            path.write_text(str(value))
    except (OSError, ValueError) as error:
        reason = _reason(path, error)
    try:
        present = int(path.read_text())
    except (OSError, ValueError):
        present = None
    if present is None or present < value:
        shown = "unknown" if present is None else str(present)
        not_raised[path.name] = f"{shown} instead of {value}, {reason}"
    return present


def _reason(path: Path, error: OSError | ValueError) -> str:
    """Why a limit can't be raised, in words that say what would help."""
    code = error.errno if isinstance(error, OSError) else None
    if code in {errno.EACCES, errno.EPERM}:
        return "needs root" if os.geteuid() else "root may not, probably in a container"
    if code == errno.EROFS:
        return "/sys is read-only, as it is in containers"
    if code == errno.EINVAL:
        return "above what users may have (/sys/module/fuse/parameters/max_user_*)"
    if code == errno.ENOENT:
        hidden = path.is_relative_to(_CONNECTIONS)
        return "/sys/fs/fuse/connections is not mounted" if hidden else "not in /sys"
    return str(error)


@contextmanager
def _connections() -> Iterator[Path]:
    """The folder of fusectl: where systemd mounts it, else mounted in private for a moment."""
    if os.geteuid() != 0 or any(_CONNECTIONS.glob("*")):
        yield _CONNECTIONS
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory(prefix="orion-fusectl-") as folder:
        target = os.fsencode(folder)
        if libc.mount(b"fusectl", target, b"fusectl", 0, None) != 0:
            yield _CONNECTIONS
            return
        try:
            yield Path(folder)
        finally:
            libc.umount2(target, _MNT_DETACH)
