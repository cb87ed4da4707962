"""Who we are towards a target: the initiator name and the ISID, both kept across restarts.

The pair (InitiatorName, ISID) names the initiator port. A new login with the same pair and TSIH 0
replaces the session that a crash has left behind (session reinstatement, RFC 7143 §6.3.5), so both
must survive a restart; and two live sessions to one target portal group must not share an ISID
(the ISID rule, §4.4.3). So each host keeps 24 random bits, and each session to a target takes the
lowest qualifier (the last 16 bits of the ISID, §11.12.5) whose lock file nobody holds: after a
crash the same mount finds the same ISID again.

A worker that takes a mount over must have the very ISID that the dead one had on the same path: its
login ends the dead one's session, so that no late write of that can land any more. The supervisor
has kept the lock for it (`custody`), under the name of the path.
"""

import fcntl
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from orion_iscsifs.custody import ISID, custody
from orion_iscsifs.errors import BusyError, MountError

SYSTEM_NAME_FILE: Final = Path("/etc/iscsi/initiatorname.iscsi")
_SESSIONS_MAX: Final = 256
_TYPE_RANDOM: Final = 0x80
"""T = 10b: the ISID's middle is a random number (§11.12.5)."""


def load_initiator_name(state_dir: Path, system_file: Path = SYSTEM_NAME_FILE) -> str:
    """The host's initiator name: open-iscsi's if there is one, else one made once and kept."""
    for path in (system_file, state_dir / "initiatorname.iscsi"):
        name = _read_name(path)
        if name is not None:
            return name
    label = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower()) or "host"
    name = f"iqn.2026-11.org.orion-iscsifs:{label[:60]}-{secrets.token_hex(6)}"
    keep(state_dir / "initiatorname.iscsi", f"InitiatorName={name}\n")
    return name


def _read_name(path: Path) -> str | None:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^\s*InitiatorName\s*=\s*(\S+)\s*$", text, re.MULTILINE)
    return found.group(1) if found else None


def keep(path: Path, text: str) -> None:
    """Write a small file as a whole or not at all; it is durable when this returns.

    That a log is out of date must not be forgotten with a loss of power. Raises MountError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _unusable(path.parent, error) from None


def forget(path: Path) -> None:
    """Remove what `keep` wrote, if it did; durable when this returns. Raises MountError.

    It works on a full disk, too.
    """
    try:
        if path.exists():
            path.unlink()
            _sync_folder(path.parent)
    except OSError as error:
        raise _unusable(path.parent, error) from None


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host_bits(state_dir: Path) -> bytes:
    """The 3 random bytes of this host's ISIDs, made once."""
    path = state_dir / "isid"
    try:
        kept = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError):
        kept = b""
    if len(kept) != 3:
        kept = secrets.token_bytes(3)
        keep(path, kept.hex() + "\n")
    return kept


def open_lock(path: Path) -> int:
    """A file to lock with flock(2), made if it is not there; raises MountError."""
    try:
        path.parent.mkdir(exist_ok=True, mode=0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unusable(path.parent, error) from None


def _unusable(folder: Path, error: OSError) -> MountError:
    return MountError(
        f"state directory {folder}: {error.strerror}",
        advice="set ORION_ISCSIFS_STATE to a directory that can be written",
    )


def session_stem(target_name: str) -> str:
    """The name of a target's locks in the state directory, and of what is kept of them."""
    return hashlib.sha256(target_name.encode()).hexdigest()[:16]


@contextmanager
def hold_isid(state_dir: Path, target_name: str, path: str = "") -> Iterator[bytes]:
    """An ISID (6 bytes) that no other live session of this host to the target uses.

    It is free again when the context ends or the process dies; with `path`, which tells the
    sessions of this mount to the target apart, only when the mount's supervisor dies. Raises
    BusyError when all qualifiers are taken, MountError when the state directory can't be written.
    """
    bits = _host_bits(state_dir)
    stem = session_stem(target_name)
    name, qualifier, lock = _inherited(stem, path) or _lowest_free(state_dir, target_name, stem)
    if path and not name:
        name = f"{ISID}{stem}/{qualifier}/{path}"
        custody.keep(name, lock)
    try:
        yield bytes((_TYPE_RANDOM,)) + bits + qualifier.to_bytes(2, "big")
    finally:
        if name:
            custody.release(name, lock)
        else:
            os.close(lock)


def _inherited(stem: str, path: str) -> tuple[str, int, int] | None:
    """Name, qualifier and lock of the same path of an earlier worker."""
    for name in custody.waiting(f"{ISID}{stem}/"):
        _, _, qualifier, held_by = name.split("/", 3)
        lock = custody.inherit(name) if path and held_by == path else None
        if lock is not None:
            return name, int(qualifier), lock
    return None


def _lowest_free(state_dir: Path, target_name: str, stem: str) -> tuple[str, int, int]:
    for qualifier in range(_SESSIONS_MAX):
        lock = open_lock(state_dir / "sessions" / f"{stem}-{qualifier}.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return "", qualifier, lock
    raise BusyError(f"{target_name}: this host has {_SESSIONS_MAX} sessions to it already")
