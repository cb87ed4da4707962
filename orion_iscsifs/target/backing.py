"""Files and memory as `BlockDevice`s for the target.

A page-cached `pread` of 4 KiB costs one or two microseconds, handing it to a thread a hundred. So
these devices have a second face, `InlineDevice`: `read_now` and `write_now` do the work at once if
that needs no waiting. A read of a file asks the kernel for what is in the page cache only
(RWF_NOWAIT) and goes to a thread when something is missing; `fdatasync` and hole punching always
go to a thread.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol, Self, TypeVarTuple, runtime_checkable

import trio

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener, check_request
from orion_iscsifs.errors import BusyError, DeviceError, UsageError, WriteProtected

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10
_PAGE_BYTES: Final = 4096
_EXTENT_BYTES_MAX: Final = 4 << 20
_ZEROES: Final = bytes(1 << 20)
_Args = TypeVarTuple("_Args")


@runtime_checkable
class InlineDevice(Protocol):
    """A device that can often answer without waiting. False: not now, use the coroutine.

    Range and write protection are the caller's business; `read_now` may have filled part of
    `target` when it returns False.
    """

    def read_now(self, offset: int, target: memoryview) -> bool: ...

    def write_now(self, offset: int, source: Buffer) -> bool: ...


@runtime_checkable
class ExtentDevice(Protocol):
    """A device that knows which of its blocks hold data."""

    def extent(self, offset: int) -> tuple[int, bool]:
        """From `offset`: so many bytes (at least one block) hold data, or read as zeroes."""


@runtime_checkable
class ThresholdDevice(Protocol):
    """A device that says when its space is about to run out."""

    def on_threshold(self, listener: Callable[[], None]) -> None: ...


class _Listeners:
    """The geometry of a device and who wants to know about its changes."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._listeners: list[GeometryListener] = []

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    def set_read_only(self, read_only: bool = True) -> None:
        """Write protection comes or goes."""
        self._replace_geometry(replace(self.geometry, read_only=read_only))

    def _resized(self, size_bytes: int) -> None:
        self._replace_geometry(replace(self.geometry, size_bytes=size_bytes))

    def _replace_geometry(self, geometry: Geometry) -> None:
        self.geometry = geometry
        for listener in self._listeners:
            listener(self.geometry)


def _geometry(size_bytes: int, block_bytes: int, physical: int, *, read_only: bool) -> Geometry:
    return Geometry(
        size_bytes=size_bytes,
        logical_block_bytes=block_bytes,
        physical_block_bytes=max(physical, block_bytes),
        discard_granularity_bytes=max(physical, block_bytes),
        read_only=read_only,
    )


class RamDevice(_Listeners):
    """Memory that the kernel gives on first use: a large empty device costs nothing."""

    def __init__(
        self,
        size_bytes: int,
        *,
        block_bytes: int = 512,
        physical_block_bytes: int = _PAGE_BYTES,
        read_only: bool = False,
    ) -> None:
        super().__init__(
            _geometry(size_bytes, block_bytes, physical_block_bytes, read_only=read_only)
        )
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, max(size_bytes, 1), flags=flags)
        self.view = memoryview(self._map)
        """The content, for tests to look at."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.view.release()
        self._map.close()

    def read_now(self, offset: int, target: memoryview) -> bool:
        target[:] = self.view[offset : offset + len(target)]
        return True

    def write_now(self, offset: int, source: Buffer) -> bool:
        self.view[offset : offset + len(source)] = source
        return True

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self.geometry, offset, len(target))
        self.read_now(offset, target)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        _check_write(self.geometry, offset, len(source))
        self.write_now(offset, source)

    async def flush(self) -> None:
        """Memory is as durable as it gets."""

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        _check_write(self.geometry, offset, length)
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            self.view[offset : offset + length] = bytes(length)
            return
        self.view[offset:first] = bytes(first - offset)
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
        self.view[last : offset + length] = bytes(offset + length - last)

    def extent(self, offset: int) -> tuple[int, bool]:
        """By content, block by block: zeroes count as a hole, for LBPRZ that is the same."""
        step = self.geometry.physical_block_bytes
        end = min(self.geometry.size_bytes, offset + _EXTENT_BYTES_MAX)
        stop = min(end, (offset // step + 1) * step)
        holds_data = not self._is_zero(offset, stop)
        while stop < end:
            following = min(end, stop + step)
            if self._is_zero(stop, following) == holds_data:
                break
            stop = following
        return stop - offset, holds_data

    def _is_zero(self, start: int, stop: int) -> bool:
        # bytes: comparing memoryviews goes item by item.
        return bytes(self.view[start:stop]) == _ZEROES[: stop - start]

    def resize(self, size_bytes: int) -> None:
        """Grow or shrink; what stays keeps its content."""
        self.view.release()
        self._map.resize(size_bytes)
        self.view = memoryview(self._map)
        self._resized(size_bytes)


class FileDevice(_Listeners):
    """A regular file or a block device of the host, locked against a second user.

    `open_backing` makes one from the user's words; this class takes an open descriptor and
    closes it.
    """

    def __init__(
        self,
        fd: int,
        size_bytes: int,
        *,
        block_bytes: int = 512,
        physical_block_bytes: int = _PAGE_BYTES,
        read_only: bool = False,
    ) -> None:
        super().__init__(
            _geometry(size_bytes, block_bytes, physical_block_bytes, read_only=read_only)
        )
        self._fd = fd
        self._no_wait = getattr(os, "RWF_NOWAIT", 0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Flush, then close; both happen even when cancelled."""
        with trio.CancelScope(shield=True):
            try:
                if not self.geometry.read_only:
                    await self.flush()
            finally:
                os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def read_now(self, offset: int, target: memoryview) -> bool:
        try:
            return os.preadv(self._fd, (target,), offset, self._no_wait) == len(target)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not self._no_wait:
                # The coroutine will meet the same error and name it.
                return False
        # This file system knows no RWF_NOWAIT (an old tmpfs): its reads are taken as quick.
        self._no_wait = 0
        return self.read_now(offset, target)

    def write_now(self, offset: int, source: Buffer) -> bool:
        """Into the page cache."""
        try:
            return os.pwrite(self._fd, source, offset) == len(source)
        except OSError:
            return False

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self.geometry, offset, len(target))
        if not self.read_now(offset, target):
            await _in_thread("read", self._read_all, offset, target)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        _check_write(self.geometry, offset, len(source))
        if fua or not self.write_now(offset, source):
            await _in_thread("write", self._write_all, offset, memoryview(source), fua)

    async def flush(self) -> None:
        await _in_thread("flush", os.fdatasync, self._fd)

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        _check_write(self.geometry, offset, length)
        if length:
            await _in_thread("write zeroes", self._zero, offset, length, may_unmap)

    def extent(self, offset: int) -> tuple[int, bool]:
        """As the file system has it, in its own blocks."""
        size, block = self.geometry.size_bytes, self.geometry.logical_block_bytes
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError:
            start = size  # ENXIO: nothing but a hole from here on
        holds_data = start - offset < block
        stop = os.lseek(self._fd, offset, os.SEEK_HOLE) if holds_data else start
        return max(block, (min(stop, size) - offset) // block * block), holds_data

    def resize(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)
        self._resized(size_bytes)

    def follow(self) -> bool:
        """Take over the size that the file has got behind our back; whether it has changed.

        Whole blocks count, and an empty file is left for later: somebody is just writing it anew.
        """
        block = self.geometry.logical_block_bytes
        size = os.lseek(self._fd, 0, os.SEEK_END) // block * block
        if size in {0, self.geometry.size_bytes}:
            return False
        self._resized(size)
        return True

    def set_read_only(self, read_only: bool = True) -> None:
        """Raises UsageError: the file was opened for reading only."""
        if not read_only and fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise UsageError("the file was opened for reading only")
        super().set_read_only(read_only)

    # -- in a thread --------------------------------------------------------------------------

    def _read_all(self, offset: int, target: memoryview) -> None:
        while target:
            count = os.preadv(self._fd, (target,), offset)
            if count == 0:
                raise OSError(errno.EIO, "the file became shorter")
            offset, target = offset + count, target[count:]

    def _write_all(self, offset: int, source: memoryview, fua: bool) -> None:
        flags = os.RWF_DSYNC if fua else 0
        while source:
            count = os.pwritev(self._fd, (source,), offset, flags)
            offset, source = offset + count, source[count:]

    def _zero(self, offset: int, length: int, may_unmap: bool) -> None:
        mode = _KEEP_SIZE | (_PUNCH_HOLE if may_unmap else _ZERO_RANGE)
        if _fallocate(self._fd, mode, offset, length):
            return
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._fd, _ZEROES[: end - offset], offset)


def _check_write(geometry: Geometry, offset: int, length: int) -> None:
    if geometry.read_only:
        raise WriteProtected("the device is read-only")
    check_request(geometry, offset, length)


async def _in_thread(what: str, function: Callable[[*_Args], object], *args: *_Args) -> None:
    """Run a blocking call to its end, cancelled or not: a write never lands after its caller."""
    try:
        await trio.to_thread.run_sync(function, *args)
    except OSError as error:
        raise DeviceError(f"{what} on the backing file: {error.strerror}") from error


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2), which the standard library has without modes. False: not supported here."""
    if _libc.fallocate(fd, mode, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}:
        return False
    raise OSError(number, os.strerror(number))


# -- from the user's words -------------------------------------------------------------------------


def open_backing(
    path: str,
    *,
    size_bytes: int | None = None,
    block_bytes: int = 512,
    physical_block_bytes: int = _PAGE_BYTES,
    read_only: bool = False,
) -> FileDevice:
    """Open `path`, or create it sparse when `size_bytes` is given; raises UsageError or BusyError.

    An existing file that is smaller grows; a larger one is refused, since its end holds data.
    """
    try:
        fd = os.open(path, _open_flags(size_bytes, read_only=read_only), 0o600)
    except OSError as error:
        advice = "give a size to create it" if error.errno == errno.ENOENT else ""
        raise UsageError(f"{path}: {error.strerror}", advice=advice) from error
    try:
        size = _prepared_size(fd, path, size_bytes, block_bytes, read_only=read_only)
    except BaseException:
        os.close(fd)
        raise
    return FileDevice(
        fd,
        size,
        block_bytes=block_bytes,
        physical_block_bytes=physical_block_bytes,
        read_only=read_only,
    )


def _open_flags(size_bytes: int | None, *, read_only: bool) -> int:
    if read_only:
        return os.O_RDONLY | os.O_CLOEXEC
    return os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if size_bytes is not None else 0)


def _prepared_size(
    fd: int, path: str, size_bytes: int | None, block_bytes: int, *, read_only: bool
) -> int:
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise UsageError(f"{path}: neither a file nor a block device")
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        raise BusyError(f"{path}: in use by another target") from error
    size = os.lseek(fd, 0, os.SEEK_END)
    if size_bytes is not None and size_bytes != size:
        if size > size_bytes or read_only or not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path}: has {size} bytes, not {size_bytes}")
        os.ftruncate(fd, size_bytes)
        size = size_bytes
    if size == 0 or size % block_bytes:
        raise UsageError(f"{path}: {size} bytes are not whole blocks of {block_bytes}")
    return size
