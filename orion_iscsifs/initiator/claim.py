"""One writer on this host: a lock file for each LUN that is mounted read-write.

The lock (flock(2)) is the kernel's, so a daemon that dies holds nothing. The file's text says who
has it, for the one who is turned away. A daemon that is unmounting says so there: a new mount then
waits for its last flush instead of being refused.

The supervisor of a mount that may be taken over holds the lock too (`custody`): between two workers
nobody else gets the LUN, and the later one learns from the text whether it was reserved.
"""

import fcntl
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from orion_iscsifs.custody import CLAIM, custody
from orion_iscsifs.errors import BusyError
from orion_iscsifs.initiator.identity import open_lock
from orion_iscsifs.initiator.keys import lun_stem

log = logging.getLogger(__name__)

_POLL_S: Final = 0.1
_TEXT_BYTES_MAX: Final = 8192


class Claim:
    """A LUN that is ours on this host."""

    def __init__(self, lock: int, mountpoint: str, *, was_reserved: bool = False) -> None:
        self._lock = lock
        self._mountpoint = mountpoint
        self.was_reserved: Final = was_reserved
        """An earlier worker of this mount held the device's reservation when it died."""
        self._reserved = was_reserved
        self._say(unmounting=False)

    def reserved(self) -> None:
        """The device's reservation is ours."""
        self._reserved = True
        self._say(unmounting=False)

    def unmounting(self) -> None:
        """From now on a new mount waits."""
        self._say(unmounting=True)

    def _say(self, *, unmounting: bool) -> None:
        text = json.dumps(
            {
                "mountpoint": self._mountpoint,
                "pid": os.getpid(),
                "unmounting": unmounting,
                "reserved": self._reserved,
            }
        ).encode()
        # Longer than any other text of ours would be cut off first, so no mixture can be read.
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, text, 0)


@asynccontextmanager
async def hold_lun(
    state_dir: Path, lun_name: str, mountpoint: str, *, patience_s: float
) -> AsyncIterator[Claim]:
    """The right of this host's only writer to a LUN, for the time of the body.

    Waits up to `patience_s` for a daemon that is unmounting. Raises BusyError, which names the
    other mount, or MountError when the state directory can't be written.
    """
    stem = lun_stem(lun_name)
    lock = custody.inherit(CLAIM + stem)
    if lock is not None:
        claim = Claim(lock, mountpoint, was_reserved=bool(_other(lock).get("reserved")))
    else:
        lock = open_lock(state_dir / "claims" / f"{stem}.lock")
        try:
            await _take(lock, lun_name, patience_s)
            claim = Claim(lock, mountpoint)
        except BaseException:
            os.close(lock)
            raise
        custody.keep(CLAIM + stem, lock)
    try:
        yield claim
    finally:
        custody.release(CLAIM + stem, lock)


async def _take(lock: int, lun_name: str, patience_s: float) -> None:
    until = trio.current_time() + patience_s
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _other(lock)
        else:
            return
        who = f"{other.get('mountpoint') or 'another mount'} (pid {other.get('pid', 'unknown')})"
        waits = bool(other.get("unmounting")) or not other
        if not waits or trio.current_time() >= until:
            raise BusyError(
                f"{lun_name}: mounted for writing on {who}",
                advice="unmount it there, mount this one with -o ro, or use reserve=off",
            )
        if other and not told:
            log.info("%s: waiting for %s, which is unmounting", lun_name, who)
            told = True
        await trio.sleep(_POLL_S)


def _other(lock: int) -> dict[str, object]:
    """Who holds the lock; empty while that is not written yet."""
    try:
        found = json.loads(os.pread(lock, _TEXT_BYTES_MAX, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
