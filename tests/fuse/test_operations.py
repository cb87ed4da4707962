"""Handlers called directly: ends of the device, handles, attributes. No kernel."""

import errno
import os
import stat
from typing import Any

import pyfuse3
import pytest
from pyfuse3 import FUSEError, SetattrFields

from orion_iscsifs.config import FuseConfig
from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.fuse.operations import DeviceFiles
from tests.fuse.devices import ByteDevice, filled

CTX: Any = None
SIZE = 10000 * 512


def filesystem(device: ByteDevice, **config: Any) -> DeviceFiles:
    return DeviceFiles(
        {"lun1": device},
        config=FuseConfig(**config),
        control={"status.json": lambda: b'{"version": 1}\n'},
    )


async def inode_of(fs: DeviceFiles, *names: bytes) -> int:
    inode: int = pyfuse3.ROOT_INODE
    for name in names:
        inode = (await fs.lookup(inode, name, CTX)).st_ino
    return inode


async def opened(fs: DeviceFiles, flags: int = os.O_RDWR) -> int:
    info = await fs.open(await inode_of(fs, b"lun1"), flags, CTX)
    assert info.keep_cache
    assert not info.direct_io
    fh: int = info.fh
    return fh


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 1, 1),
        (1, 4095, 4095),
        (SIZE - 1, 4096, 1),
        (SIZE, 4096, 0),
        (SIZE + 5, 1, 0),
        (3, 1 << 20, 1 << 20),
        (SIZE - 70000, 1 << 20, 70000),
        (0, 2 << 20, 2 << 20),
    ],
)
async def test_reads_are_clipped_at_the_end(offset: int, size: int, expected: int) -> None:
    device = filled(SIZE)
    fs = filesystem(device)
    reply = await fs.read(await opened(fs), offset, size)
    assert bytes(reply) == bytes(device.content[offset : offset + size])
    assert len(reply) == expected
    assert device.calls == ([("read", offset, expected)] if expected else [])


async def test_a_large_reads_buffer_is_used_again() -> None:
    device = filled(SIZE)
    fs = filesystem(device)
    fh = await opened(fs)
    first = await fs.read(fh, 0, 128 << 10)
    assert bytes(first) == bytes(device.content[: 128 << 10])
    second = await fs.read(fh, 4096, 128 << 10)
    assert bytes(second) == bytes(device.content[4096 : 4096 + (128 << 10)])
    assert memoryview(first).obj is memoryview(second).obj


async def test_writes_at_the_end() -> None:
    device = ByteDevice(SIZE)
    fs = filesystem(device)
    fh = await opened(fs)
    assert await fs.write(fh, SIZE - 3, b"abcdef") == 3
    assert device.content[-3:] == b"abc"
    for offset in (SIZE, SIZE + 1000):
        with pytest.raises(FUSEError) as caught:
            await fs.write(fh, offset, b"x")
        assert caught.value.errno == errno.ENOSPC
    assert len(device.content) == SIZE


async def test_sync_handles_write_through() -> None:
    device = ByteDevice()
    fs = filesystem(device)
    for flags, count in ((os.O_RDWR, 0), (os.O_WRONLY | os.O_DSYNC, 1), (os.O_RDWR | os.O_SYNC, 2)):
        await fs.write(await opened(fs, flags), 0, b"x")
        assert device.fua_writes == count


async def test_fsync_flushes_and_close_does_not() -> None:
    device = ByteDevice()
    fs = filesystem(device)
    fh = await opened(fs)
    await fs.flush(fh)
    await fs.release(fh)
    assert device.flushes == 0
    fh = await opened(fs)
    await fs.fsync(fh, True)
    await fs.fsyncdir(await fs.opendir(pyfuse3.ROOT_INODE, CTX), False)
    assert device.flushes == 2
    await fs.release(fh)
    with pytest.raises(FUSEError):
        await fs.read(fh, 0, 1)


@pytest.mark.parametrize("by_option", [True, False])
async def test_read_only(by_option: bool) -> None:
    fs = filesystem(ByteDevice(read_only=not by_option), read_only=by_option)
    inode = await inode_of(fs, b"lun1")
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(FUSEError) as caught:
            await fs.open(inode, flags, CTX)
        assert caught.value.errno == errno.EROFS
    assert len(await fs.read(await opened(fs, os.O_RDONLY), 0, 10)) == 10


async def test_attributes() -> None:
    fs = filesystem(ByteDevice(SIZE), mode=0o640, uid=12, gid=34)
    entry = await fs.getattr(await inode_of(fs, b"lun1"), CTX)
    assert entry.st_mode == stat.S_IFREG | 0o640
    assert (entry.st_uid, entry.st_gid, entry.st_size) == (12, 34, SIZE)
    assert entry.st_blocks * 512 == SIZE
    root = await fs.getattr(pyfuse3.ROOT_INODE, CTX)
    assert root.st_mode == stat.S_IFDIR | 0o550
    assert root.st_nlink == 3
    control = await fs.getattr(await inode_of(fs, b".orion"), CTX)
    assert control.st_mode == stat.S_IFDIR | 0o500
    with pytest.raises(FUSEError) as caught:
        await fs.getattr(99, CTX)
    assert caught.value.errno == errno.ESTALE


def fields(**chosen: bool) -> Any:
    class Fields:
        update_mode = update_uid = update_gid = update_size = False
        update_atime = update_mtime = update_ctime = False

    for name, value in chosen.items():
        setattr(Fields, name, value)
    return Fields


async def test_setattr() -> None:
    assert not SetattrFields().update_size
    fs = filesystem(ByteDevice(SIZE))
    inode = await inode_of(fs, b"lun1")
    wanted = await fs.getattr(inode, CTX)
    wanted.st_size, wanted.st_mode, wanted.st_uid = 0, stat.S_IFREG | 0o777, 4711
    kept = await fs.setattr(inode, wanted, fields(update_size=True, update_mtime=True), None, CTX)
    assert kept.st_size == SIZE
    for change in ("update_mode", "update_uid"):
        with pytest.raises(FUSEError) as caught:
            await fs.setattr(inode, wanted, fields(**{change: True}), None, CTX)
        assert caught.value.errno == errno.EPERM
    same = await fs.getattr(inode, CTX)
    await fs.setattr(inode, same, fields(update_mode=True, update_uid=True), None, CTX)


async def test_the_control_folder() -> None:
    fs = filesystem(ByteDevice())
    inode = await inode_of(fs, b".orion", b"status.json")
    info = await fs.open(inode, os.O_RDONLY, CTX)
    assert info.direct_io
    assert await fs.read(info.fh, 0, 4096) == b'{"version": 1}\n'
    assert await fs.read(info.fh, 5, 4) == b"sion"
    assert await fs.read(info.fh, 100, 4) == b""
    assert (await fs.getattr(inode, CTX)).st_size == 15
    await fs.fsync(info.fh, False)
    with pytest.raises(FUSEError) as caught:
        await fs.open(inode, os.O_RDWR, CTX)
    assert caught.value.errno == errno.EROFS
    hidden = filesystem(ByteDevice(), hide_control=True)
    with pytest.raises(FUSEError):
        await inode_of(hidden, b".orion")


async def test_nothing_can_be_created_or_removed() -> None:
    fs = filesystem(ByteDevice())
    root = pyfuse3.ROOT_INODE
    for attempt in (
        fs.create(root, b"x", 0o600, os.O_RDWR, CTX),
        fs.mknod(root, b"x", 0o600, 0, CTX),
        fs.mkdir(root, b"x", 0o700, CTX),
        fs.symlink(root, b"x", b"y", CTX),
        fs.link(2, root, b"x", CTX),
        fs.unlink(root, b"lun1", CTX),
        fs.rmdir(root, b".orion", CTX),
        fs.rename(root, b"lun1", root, b"x", 0, CTX),
    ):
        with pytest.raises(FUSEError) as caught:
            await attempt
        assert caught.value.errno in {errno.EPERM, errno.EROFS}
    with pytest.raises(FUSEError) as caught:
        await fs.getxattr(2, b"user.x", CTX)
    assert caught.value.errno == errno.ENOSYS
    assert list(await fs.listxattr(2, CTX)) == []


async def test_a_new_size_is_told_to_the_kernel() -> None:
    device = ByteDevice(SIZE)
    fs = filesystem(device)
    told: list[int] = []
    fs.invalidate = told.append
    inode = await inode_of(fs, b"lun1")
    device.grow(2 * SIZE)
    assert told == [inode]
    assert (await fs.getattr(inode, CTX)).st_size == 2 * SIZE
    assert await fs.write(await opened(fs), 2 * SIZE - 1, b"xy") == 1


async def test_a_handle_after_its_release() -> None:
    fs = filesystem(ByteDevice())
    fh = await opened(fs)
    await fs.release(fh)
    for attempt in (fs.read(fh, 0, 1), fs.write(fh, 0, b"x")):
        with pytest.raises(FUSEError) as caught:
            await attempt
        assert caught.value.errno == errno.EBADF


async def test_counters() -> None:
    device = ByteDevice()
    fs = filesystem(device)
    fh = await opened(fs)
    await fs.read(fh, 0, 1)
    await fs.write(fh, 0, b"x")

    async def fail(_name: str) -> None:
        raise ConnectionLost("gone")

    device.before = fail
    with pytest.raises(FUSEError):
        await fs.fsync(fh, False)
    counters = fs.counters()["lun1"]
    assert (counters.reads, counters.writes, counters.flushes, counters.errors) == (1, 1, 1, 1)


async def test_statfs() -> None:
    reply = await filesystem(ByteDevice(SIZE)).statfs(CTX)
    assert reply.f_blocks * reply.f_frsize >= SIZE
    assert (reply.f_bfree, reply.f_bavail, reply.f_files) == (0, 0, 1)


async def test_every_open_file_hears_of_a_failed_flush_once() -> None:
    """INTERFACE §6: by the next fsync on every open file; who opens later hears nothing."""
    device = filled(SIZE)
    fs = filesystem(device)
    first, second = await opened(fs), await opened(fs)

    async def fails(name: str) -> None:
        if name == "flush":
            raise ConnectionLost("the write-back failed")

    device.before = fails
    with pytest.raises(FUSEError) as caught:
        await fs.fsync(first, False)
    assert caught.value.errno == errno.EIO
    device.before = None
    third = await opened(fs)
    await fs.fsync(first, False)
    await fs.fsync(third, False)
    with pytest.raises(FUSEError) as caught:
        await fs.fsync(second, True)
    assert caught.value.errno == errno.EIO
    await fs.fsync(second, False)
    assert device.flushes == 4
