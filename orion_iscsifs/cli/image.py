"""A file or a block device of this host as a `BlockDevice`, for commands that work on volumes.

It waits in the kernel without a thread: nothing else goes on in such a command.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import trio

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener, check_request
from orion_iscsifs.errors import BusyError, DeviceError, UsageError, WriteProtected

_PIECE_BYTES: Final = 1 << 20
T = TypeVar("T")


class Image:
    """An open file; `open_image` makes it."""

    def __init__(self, descriptor: int, path: str, geometry: Geometry) -> None:
        self._descriptor = descriptor
        self._path = path
        self.geometry: Final = geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        """It is looked at once."""

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self.geometry, offset, len(target))
        await trio.lowlevel.checkpoint()
        while target:
            count = self._done(os.preadv, [target], offset)
            offset, target = offset + count, target[count:]

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self._check_write(offset, len(source))
        await trio.lowlevel.checkpoint()
        rest = memoryview(source)
        while rest:
            count = self._done(os.pwrite, rest, offset)
            offset, rest = offset + count, rest[count:]
        if fua:
            await self.flush()

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise DeviceError(f"{self._path}: {error.strerror}") from error

    async def discard(self, offset: int, length: int) -> None:
        """Nothing: the content stays as it is."""
        self._check_write(offset, length)
        await trio.lowlevel.checkpoint()

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        del may_unmap
        for at in range(0, length, _PIECE_BYTES):
            await self.write(offset + at, bytes(min(_PIECE_BYTES, length - at)))

    def _check_write(self, offset: int, length: int) -> None:
        if self.geometry.read_only:
            raise WriteProtected(f"{self._path}: opened for reading")
        check_request(self.geometry, offset, length)

    def _done(self, call: Callable[[int, T, int], int], buffer: T, offset: int) -> int:
        """How many bytes were moved."""
        try:
            count = call(self._descriptor, buffer, offset)
        except OSError as error:
            raise DeviceError(f"{self._path}: {error.strerror}") from error
        if count == 0:
            raise DeviceError(f"{self._path}: became shorter meanwhile")
        return count


@contextmanager
def open_image(path: str, *, writable: bool) -> Iterator[Image]:
    """Locked against other users of this kind; raises UsageError or BusyError."""
    flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
    try:
        mode = os.stat(path).st_mode
        _check_kind(path, mode)  # before it is opened: a pipe would wait for its other end
        is_device = stat.S_ISBLK(mode)
        # The kernel refuses an exclusive opening of a device that is mounted or in a RAID.
        descriptor = os.open(path, flags | (os.O_EXCL if is_device and writable else 0))
    except OSError as error:
        kind = BusyError if error.errno == errno.EBUSY else UsageError
        raise kind(f"{path}: {error.strerror}") from None
    try:
        yield _opened(descriptor, path, writable=writable)
    finally:
        os.close(descriptor)


def _opened(descriptor: int, path: str, *, writable: bool) -> Image:
    status = os.fstat(descriptor)
    _check_kind(path, status.st_mode)
    try:
        kind = fcntl.LOCK_EX if writable else fcntl.LOCK_SH
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"{path}: in use by another program (it holds a lock)") from None
    size = os.lseek(descriptor, 0, os.SEEK_END)
    physical = _physical_block_bytes(status)
    geometry = Geometry(
        size_bytes=size // 512 * 512, physical_block_bytes=physical, read_only=not writable
    )
    return Image(descriptor, path, geometry)


def _check_kind(path: str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"{path}: neither a file nor a block device")


def _physical_block_bytes(status: os.stat_result) -> int:
    """Of a block device as the kernel says; a file has the pages of the page cache."""
    if not stat.S_ISBLK(status.st_mode):
        return 4096
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    for queue in (
        Path("/sys/dev/block", number, "queue"),
        Path("/sys/dev/block", number, "..", "queue"),
    ):
        try:
            return int((queue / "physical_block_size").read_text())
        except (OSError, ValueError):
            continue
    return 512
