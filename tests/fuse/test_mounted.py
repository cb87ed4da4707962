"""The file system as programs see it: dd, cp, cmp, mmap, O_DIRECT, and what is refused."""

import errno
import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from orion_iscsifs.errors import BusyError, ConnectionLost
from orion_iscsifs.fuse import mountpoint, readers
from tests.fuse.conftest import MountFiles
from tests.fuse.devices import ByteDevice, filled

pytestmark = pytest.mark.fuse

SIZE = 8 << 20


def errno_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    try:
        function(*args, **kwargs)
    except OSError as error:
        return error.errno or -1
    return 0


def random_file(folder: Path, size: int) -> Path:
    path = folder / f"random-{size}"
    path.write_bytes(os.urandom(size))
    return path


@pytest.mark.parametrize(
    ("block", "flags"),
    [
        ("512", ["oflag=direct"]),
        ("4096", ["oflag=direct"]),
        ("1M", ["oflag=direct"]),
        ("7M", ["oflag=direct"]),
        ("13", []),
        ("511", []),
        ("4K", []),
        ("100K", []),
        ("4M", ["conv=fsync"]),
        ("64K", ["oflag=dsync"]),
        ("4097", ["conv=notrunc"]),
    ],
)
async def test_dd_writes_and_reads(
    mount_files: MountFiles, tmp_path: Path, block: str, flags: list[str]
) -> None:
    size = (200 * 13) if block == "13" else 300 * 512 if block in {"511", "512"} else 7 << 20
    source, back = random_file(tmp_path, size), tmp_path / "back"
    device = filled(SIZE)
    before = bytes(device.content)
    async with mount_files({"lun1": device}) as mounted:
        await mounted.run("dd", f"if={source}", f"of={mounted.lun}", f"bs={block}", *flags)
        await mounted.run("dd", f"if={mounted.lun}", f"of={back}", "bs=1M")
    assert bytes(device.content) == source.read_bytes() + before[size:]
    assert back.read_bytes() == bytes(device.content)
    assert device.fua_writes == (7 << 20 >> 16 if "oflag=dsync" in flags else 0)
    # With O_DSYNC the kernel sends an fsync of its own after each write.
    assert device.flushes == (device.fua_writes or "conv=fsync" in flags)


async def test_dd_to_the_end_says_no_space(mount_files: MountFiles) -> None:
    device = ByteDevice(SIZE)
    async with mount_files({"lun1": device}) as mounted:
        done = await trio.run_process(
            ["dd", "if=/dev/zero", f"of={mounted.lun}", "bs=3M"], capture_stderr=True, check=False
        )
        assert done.returncode == 1
        assert b"No space left on device" in done.stderr
        done = await trio.run_process(
            ["dd", f"if={mounted.lun}", "of=/dev/null", "bs=3M"], capture_stderr=True, check=False
        )
        assert b"8388608 bytes" in done.stderr


async def test_cp_and_cmp(mount_files: MountFiles, tmp_path: Path) -> None:
    source = random_file(tmp_path, SIZE)
    device = ByteDevice(SIZE)
    async with mount_files({"lun1": device}) as mounted:
        await mounted.run("cp", source, mounted.lun)
        await mounted.run("cmp", source, mounted.lun)
        await mounted.run("cp", "--sparse=auto", mounted.lun, tmp_path / "copy")
        await mounted.run("truncate", "-s", "0", mounted.lun)
        await mounted.run("truncate", "-s", "+1M", mounted.lun)
        await mounted.run("touch", mounted.lun)
        assert (await mounted.call(os.stat, mounted.lun)).st_size == SIZE
        await mounted.run("cmp", source, mounted.lun)
    assert bytes(device.content) == source.read_bytes() == (tmp_path / "copy").read_bytes()


MMAP_PROGRAM = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | (os.O_TRUNC if sys.argv[2] == "trunc" else 0))
with mmap.mmap(fd, os.fstat(fd).st_size) as m:
    assert m[5000:5003] == b"abc", m[5000:5003]
    m[100:103] = b"xyz"
    m[-1:] = b"!"
    m.flush()
os.fsync(fd)
"""


@pytest.mark.parametrize("truncate", ["trunc", "keep"])
async def test_mmap(mount_files: MountFiles, truncate: str) -> None:
    device = ByteDevice(SIZE)
    device.content[5000:5003] = b"abc"
    async with mount_files({"lun1": device}) as mounted:
        await mounted.run(sys.executable, "-c", MMAP_PROGRAM, mounted.lun, truncate)
    assert device.content[100:103] == b"xyz"
    assert device.content[-1:] == b"!"
    assert device.content[5000:5003] == b"abc"
    assert device.flushes >= 1


@pytest.mark.parametrize("block", [512, 1024, 4096, 12288])
async def test_o_direct(mount_files: MountFiles, block: int) -> None:
    device = filled(SIZE)
    expected = bytearray(device.content)

    def exercise(path: Path) -> None:
        buffer = mmap.mmap(-1, block)
        file = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            for number in (0, 1, 3, SIZE // block - 1):
                assert os.preadv(file, [buffer], number * block) == block
                assert buffer[:] == expected[number * block : (number + 1) * block]
                buffer[:] = bytes([number % 256]) * block
                assert os.pwritev(file, [buffer], number * block) == block
                expected[number * block : (number + 1) * block] = buffer[:]
            assert os.preadv(file, [buffer], SIZE) == 0
            assert errno_of(os.pwritev, file, [buffer], SIZE) == errno.ENOSPC
        finally:
            os.close(file)
            buffer.close()

    async with mount_files({"lun1": device}) as mounted:
        await mounted.call(exercise, mounted.lun)
    assert device.content == expected
    assert {length for name, _, length in device.calls if name == "write"} == {block}


async def test_unaligned_buffered(mount_files: MountFiles) -> None:
    device = filled(SIZE)
    expected = bytearray(device.content)

    def exercise(path: Path) -> None:
        with path.open("r+b", buffering=0) as file:
            for offset, length in ((1, 1), (511, 2), (4095, 8194), (SIZE - 1, 1), (77777, 300001)):
                data = os.urandom(length)
                file.seek(offset)
                assert file.write(data) == length
                expected[offset : offset + length] = data
            file.seek(0)
            assert file.read() == expected

    async with mount_files({"lun1": device}) as mounted:
        await mounted.call(exercise, mounted.lun)
    assert device.content == expected


async def test_ends(mount_files: MountFiles) -> None:
    async with mount_files({"lun1": ByteDevice(SIZE)}) as mounted:

        def exercise() -> None:
            file = os.open(mounted.lun, os.O_RDWR)
            try:
                assert os.pread(file, 100, SIZE - 10) == bytes(10)
                assert os.pread(file, 100, SIZE) == b""
                assert os.pwrite(file, b"x" * 100, SIZE - 10) == 10
                assert errno_of(os.pwrite, file, b"x", SIZE) == errno.ENOSPC
                os.ftruncate(file, 0)
                assert os.fstat(file).st_size == SIZE
                os.ftruncate(file, SIZE * 3)
                assert os.fstat(file).st_size == SIZE
                assert os.lseek(file, 0, os.SEEK_END) == SIZE
                assert os.pread(file, 10, SIZE - 10) == b"x" * 10
            finally:
                os.close(file)

        await mounted.call(exercise)


async def test_what_is_refused(mount_files: MountFiles) -> None:
    async with mount_files({"lun1": ByteDevice(), "iqn.x:y/lun0": ByteDevice()}) as mounted:

        def exercise() -> None:
            folder, lun = mounted.folder, mounted.lun
            assert sorted(os.listdir(folder)) == [".orion", "iqn.x:y", "lun1"]
            assert os.listdir(folder / "iqn.x:y") == ["lun0"]
            refused = {errno.EPERM, errno.EROFS}
            assert errno_of((folder / "new").write_bytes, b"") in refused
            assert errno_of(os.mkdir, folder / "new") in refused
            assert errno_of(os.mknod, folder / "new") in refused
            assert errno_of(os.symlink, "x", folder / "new") in refused
            assert errno_of(os.link, lun, folder / "new") in refused
            assert errno_of(os.unlink, lun) in refused
            assert errno_of(os.rmdir, folder / "iqn.x:y") in refused
            assert errno_of(os.rename, lun, folder / "new") in refused
            assert errno_of(os.rename, lun, folder / "iqn.x:y" / "lun0") in refused
            assert errno_of(os.chmod, lun, 0o777) == errno.EPERM
            assert errno_of(os.chown, lun, 1, 1) == errno.EPERM
            assert errno_of(os.setxattr, lun, "user.x", b"y") == errno.ENOTSUP
            assert errno_of(os.getxattr, lun, "user.x") in {errno.ENODATA, errno.ENOTSUP}
            assert os.listxattr(lun) == []
            assert errno_of(os.stat, folder / "nothing") == errno.ENOENT
            assert errno_of((folder / ".orion" / "status.json").write_bytes, b"") == errno.EROFS
            assert (folder / ".orion" / "status.json").read_bytes() == b'{"version": 1}\n'
            os.chmod(lun, 0o600)
            os.utime(lun)
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            assert os.statvfs(folder).f_bavail == 0
            assert stat.S_IMODE(os.stat(lun).st_mode) == 0o600

        await mounted.call(exercise)


async def test_a_read_only_mount(mount_files: MountFiles) -> None:
    async with mount_files({"lun1": filled(SIZE)}, read_only=True) as mounted:
        assert await mounted.call(errno_of, os.open, mounted.lun, os.O_RDWR) == errno.EROFS
        await mounted.run("cmp", "-n", "1000", mounted.lun, mounted.lun)


async def test_a_write_protected_device_in_a_writable_mount(mount_files: MountFiles) -> None:
    files = {"lun1": ByteDevice(read_only=True), "lun2": ByteDevice()}
    async with mount_files(files) as mounted:
        assert await mounted.call(errno_of, os.open, mounted.lun, os.O_RDWR) == errno.EROFS
        assert await mounted.call(errno_of, os.truncate, mounted.lun, 0) == errno.EROFS
        assert await mounted.call((mounted.folder / "lun2").write_bytes, b"x" * 5000) == 5000


@pytest.mark.parametrize("error", [ValueError("a bug"), ConnectionLost("the target has gone")])
async def test_a_failing_handler_is_eio_and_the_mount_lives(
    mount_files: MountFiles, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    device = filled(SIZE)

    async def fail(_name: str) -> None:
        raise error

    async with mount_files({"lun1": device}) as mounted:
        device.before = fail
        assert await mounted.call(errno_of, mounted.lun.read_bytes) == errno.EIO
        assert await mounted.call(errno_of, mounted.lun.write_bytes, b"x") == errno.EIO

        def sync() -> int:
            file = os.open(mounted.lun, os.O_RDWR)
            try:
                return errno_of(os.fsync, file)
            finally:
                os.close(file)

        assert await mounted.call(sync) == errno.EIO
        device.before = None
        assert await mounted.call(mounted.lun.read_bytes) == bytes(device.content)
    assert str(error) in caplog.text


async def test_a_blocked_request_holds_up_no_other(mount_files: MountFiles) -> None:
    device, other = ByteDevice(SIZE), filled(SIZE)
    released, waiting = trio.Event(), 0

    async def hold(_name: str) -> None:
        nonlocal waiting
        waiting += 1
        await released.wait()

    async with mount_files({"lun1": device, "lun2": other}) as mounted:
        device.before = hold
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(mounted.call, pread_direct, mounted.lun, number * 4096)
            with trio.fail_after(20):
                while waiting < 20:
                    await trio.sleep(0.01)
                content = await mounted.call((mounted.folder / "lun2").read_bytes)
            assert content == bytes(other.content)
            released.set()


def pread_direct(path: Path, offset: int) -> bytes:
    buffer = mmap.mmap(-1, 4096)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(file, [buffer], offset)
        return buffer[:]
    finally:
        os.close(file)
        buffer.close()


async def test_a_device_that_grows(mount_files: MountFiles) -> None:
    device = ByteDevice(SIZE)
    async with mount_files({"lun1": device}) as mounted:
        assert (await mounted.call(os.stat, mounted.lun)).st_size == SIZE
        device.grow(2 * SIZE)
        assert (await mounted.call(os.stat, mounted.lun)).st_size == 2 * SIZE
        assert len(await mounted.call(mounted.lun.read_bytes)) == 2 * SIZE


async def test_names_in_proc_mounts(mount_files: MountFiles) -> None:
    async with mount_files({"lun1": ByteDevice()}, allow_other=True) as mounted:
        found = mountpoint.find(str(mounted.folder))
        assert found is not None
        assert (found.source, found.fs_type) == ("a,test%5C", "fuse.orion-iscsifs")
        lines = [line.split() for line in (await mounted.run("cat", "/proc/mounts")).splitlines()]
        options = next(line[3] for line in lines if line[1] == str(mounted.folder)).split(",")
        assert {"nosuid", "nodev", "allow_other", "default_permissions"} <= set(options)


async def test_a_busy_mount_names_who_uses_it(mount_files: MountFiles) -> None:
    async with mount_files({"lun1": ByteDevice()}) as mounted:
        with subprocess.Popen(["sleep", "60"], cwd=mounted.folder) as user:  # noqa: ASYNC220
            try:
                with pytest.raises(BusyError, match=f"sleep \\(process {user.pid}\\)"):
                    await mounted.call(mountpoint.unmount, str(mounted.folder))
            finally:
                user.kill()
        await mounted.call(mountpoint.unmount, str(mounted.folder))
        with trio.fail_after(10):
            await mounted.mount.wait_ended()


def force_unmount(folder: Path) -> None:
    """`umount -f` aborts the connection, whoever waits."""
    subprocess.run(["umount", "-i", "-l", "-f", folder], check=True)


@pytest.mark.parametrize("lazily", [True, False])
async def test_an_end_while_requests_are_held(mount_files: MountFiles, lazily: bool) -> None:
    device = ByteDevice(SIZE)
    arrived = trio.Event()

    async def hold(_name: str) -> None:
        arrived.set()
        await trio.sleep_forever()

    async with mount_files({"lun1": device}) as mounted:
        device.before = hold
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mounted.call, errno_of, pread_direct, mounted.lun, 0)
            with trio.fail_after(10):
                await arrived.wait()
                if lazily:
                    mounted.mount.terminate()
                else:
                    await mounted.call(force_unmount, mounted.folder)
                await mounted.mount.wait_ended()


@pytest.mark.loop
async def test_loop_device_with_ext4(mount_files: MountFiles, tmp_path: Path) -> None:
    device = ByteDevice(64 << 20)
    device.keeps_calls = False
    target = tmp_path / "ext4"
    target.mkdir()
    async with mount_files({"lun1": device}) as mounted:
        shown = await mounted.run("losetup", "--find", "--show", "--direct-io=on", mounted.lun)
        loop = shown.strip()
        try:
            await mounted.run("mkfs.ext4", "-q", loop)
            await mounted.run("mount", loop, target)
            try:
                await mounted.run("dd", "if=/dev/urandom", f"of={target}/f", "bs=1M", "count=16")
                await mounted.run("sync", f"{target}/f")
                before = await mounted.run("sha256sum", f"{target}/f")
            finally:
                await mounted.run("umount", target)
            await mounted.run("fsck.ext4", "-f", "-n", loop)
            await mounted.run("mount", loop, target)
            try:
                assert await mounted.run("sha256sum", f"{target}/f") == before
            finally:
                await mounted.run("umount", target)
        finally:
            await mounted.run("losetup", "-d", loop)
    assert device.flushes > 0


async def test_reading_dev_fuse_in_vain_blocks_nothing(
    mount_files: MountFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is withdrawn between poll and read: simulated by a poll that lies."""
    lies = 0

    class Lying(readers._Lowlevel):
        async def wait_readable(self, fd: int) -> None:
            nonlocal lies
            await super().wait_readable(fd)
            if lies < 200:
                lies += 1
                raise BlockingIOError

    monkeypatch.setattr(readers, "_Lowlevel", Lying)
    device = filled(SIZE)
    async with mount_files({"lun1": device}) as mounted:
        assert await mounted.call(mounted.lun.read_bytes) == bytes(device.content)
    assert lies == 200


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_what_was_mounted_over_a_detached_mount_stays(mount_files: MountFiles) -> None:
    async with mount_files({"lun1": filled(SIZE)}) as mounted:
        opened = await mounted.call(os.open, mounted.lun, os.O_RDONLY)
        try:
            await mounted.call(lambda: mountpoint.unmount(str(mounted.folder), lazy=True))
            await mounted.run("mount", "-t", "tmpfs", "none", mounted.folder)
            await mounted.mount.unmount()
            await mounted.mount.wait_ended()
            over = mountpoint.topmost(str(mounted.folder))
            assert over is not None
            assert over.fs_type == "tmpfs"
        finally:
            await mounted.call(errno_of, os.close, opened)
            await mounted.run("umount", mounted.folder)
