"""The files of a log: what is done to them and their folder. Everything here blocks."""

import fcntl
import os
from pathlib import Path
from typing import Final

from orion_iscsifs.errors import BusyError, OrionError
from orion_iscsifs.localstore import superblock

_ZEROES: Final = bytes(1 << 20)


class LogError(OrionError):
    """The log can't be used, or not any more. The message names it and says why."""


def drop(folder: Path) -> None:
    """Remove a log with all that is in it. Raises LogError or BusyError."""
    try:
        held = lock(folder)
        try:
            remove_files(folder)
            folder.rmdir()
        finally:
            os.close(held)
    except OSError as error:
        raise LogError(f"log {folder}: can't be removed: {error.strerror}") from None


def is_in_use(folder: Path) -> bool:
    """Whether a process has it open for writing."""
    try:
        os.close(lock(folder))
    except BusyError:
        return True
    except OSError:
        return False
    return False


def lock(folder: Path) -> int:
    """A descriptor that keeps every other writer out until it is closed. Raises BusyError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BusyError(
            f"log {folder}: in use by another mount", advice="`orion-iscsifs status` shows them"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def prepare(descriptor: int, page: bytes, zeroed: int) -> None:
    """A new use of a segment. Zeroes first, where blocks were only reserved: written blocks make
    every fdatasync to come cheaper."""
    for position in range(0, zeroed, len(_ZEROES)):
        os.pwrite(descriptor, _ZEROES[: zeroed - position], position)
    os.pwrite(descriptor, page, 0)
    os.fdatasync(descriptor)


def fdatasync_all(descriptors: list[int]) -> None:
    """Each of them. Raises OSError."""
    for descriptor in descriptors:
        os.fdatasync(descriptor)


def superblock_pages(folder: Path) -> list[bytes]:
    """Both copies; empty where there is none. Raises OSError."""
    return [_page(folder / name) for name in superblock.NAMES]


def write_superblock_page(folder: Path, counter: int, page: bytes) -> None:
    """The copy that is next at this counter, durable. Raises OSError."""
    name = superblock.NAMES[counter % len(superblock.NAMES)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(folder / name, flags, 0o600)
    try:
        os.pwrite(descriptor, page, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _fsync_folder(folder)


def _page(path: Path) -> bytes:
    try:
        return path.read_bytes()[: superblock.PAGE_BYTES]
    except FileNotFoundError:
        return b""


def remove_files(folder: Path) -> None:
    """The superblocks last: without them nothing is replayed."""
    for pattern in ("wlog-*", "super.*"):
        for path in sorted(folder.glob(pattern)):
            path.unlink()
    _fsync_folder(folder)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
