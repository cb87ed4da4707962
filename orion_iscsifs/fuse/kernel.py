"""Limits that the kernel sets for a FUSE mount, raised where we may. Never fatal.

At most 12 requests in the background throttle a block device badly: 1000 random reads/s from a
backend 10 ms away, 5000 with 128. The kernel's readahead of 128 KiB is raised a little only. What
hides a distant target is the cache's own readahead; behind a window of 4 MiB the two got in each
other's way, and a near target was read at half the speed (docs/performance.md).

pyfuse3 can't set either, so they are written to /sys, which needs root.
"""

import ctypes
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

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

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)


def raise_limits(device: str) -> KernelLimits:
    """Raise what we may for the mount whose `major:minor` is `device`; blocks for a moment."""
    minor = device.partition(":")[2]
    with _connections() as folder:
        connection = folder / minor
        return KernelLimits(
            max_background=_set(connection / "max_background", MAX_BACKGROUND),
            congestion_threshold=_set(connection / "congestion_threshold", CONGESTION_THRESHOLD),
            read_ahead_kb=_set(_BDI / device / "read_ahead_kb", READ_AHEAD_KB),
        )


def _set(path: Path, value: int) -> int | None:
    try:
        if int(path.read_text()) < value:
            path.write_text(str(value))
    except (OSError, ValueError) as error:
        _log.debug("%s is not raised to %d: %s", path, value, error)
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


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
