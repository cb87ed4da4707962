"""fallocate on a device file: the rules, and through the kernel."""

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from pyfuse3 import FUSEError

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.fuse.allocation import KEEP_SIZE, PUNCH_HOLE, STEP_BYTES, ZERO_RANGE, allocate
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from tests.fuse.conftest import MountFiles

SIZE = 1 << 20
PUNCH = PUNCH_HOLE | KEEP_SIZE
GEOMETRY = Geometry(size_bytes=SIZE, discard_granularity_bytes=4096, zeroes_after_discard=True)


class Recorder(MemoryDevice):
    """Knows whether it was allowed to unmap."""

    def __init__(self, geometry: Geometry = GEOMETRY) -> None:
        super().__init__(geometry=geometry)
        self.zeroed: list[tuple[int, int, bool]] = []

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self.zeroed.append((offset, length, may_unmap))
        if length < STEP_BYTES // 2:
            await super().write_zeroes(offset, length, may_unmap=may_unmap)
        else:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("mode", "offset", "length", "zeroed"),
    [
        (PUNCH, 4096, 8192, (4096, 8192, True)),
        (PUNCH, 512, 5120, (512, 5120, True)),
        (ZERO_RANGE, 0, 512, (0, 512, False)),
        (ZERO_RANGE | KEEP_SIZE, SIZE - 512, 4096, (SIZE - 512, 512, False)),
        (PUNCH, SIZE - 4096, 1 << 40, (SIZE - 4096, 4096, True)),
        (PUNCH, SIZE, 4096, None),
        (PUNCH, 1 << 60, 4096, None),
    ],
)
async def test_what_is_zeroed(
    mode: int, offset: int, length: int, zeroed: tuple[int, int, bool] | None
) -> None:
    device = Recorder()
    device.poke(0, b"x" * SIZE)
    await allocate(device, mode, offset, length)
    assert device.zeroed == ([] if zeroed is None else [zeroed])
    expected = bytearray(b"x" * SIZE)
    if zeroed is not None:
        expected[zeroed[0] : zeroed[0] + zeroed[1]] = bytes(zeroed[1])
    assert device.peek(0, SIZE) == expected


@pytest.mark.parametrize(
    ("mode", "offset", "length", "code"),
    [
        (0, 0, 4096, errno.EOPNOTSUPP),
        (KEEP_SIZE, 0, 4096, errno.EOPNOTSUPP),
        (PUNCH_HOLE, 0, 4096, errno.EOPNOTSUPP),
        (PUNCH | ZERO_RANGE, 0, 4096, errno.EOPNOTSUPP),
        (0x08, 0, 4096, errno.EOPNOTSUPP),
        (PUNCH, -1, 4096, errno.EINVAL),
        (PUNCH, 0, 0, errno.EINVAL),
        (ZERO_RANGE, SIZE - 512, 1024, errno.ENOSPC),
    ],
)
async def test_what_is_refused(mode: int, offset: int, length: int, code: int) -> None:
    device = Recorder()
    with pytest.raises(FUSEError) as refused:
        await allocate(device, mode, offset, length)
    assert refused.value.errno == code
    assert device.zeroed == []


@pytest.mark.parametrize(
    ("geometry", "mode", "code"),
    [
        (Geometry(size_bytes=SIZE), PUNCH, errno.EOPNOTSUPP),
        (Geometry(size_bytes=SIZE, discard_granularity_bytes=4096), PUNCH, errno.EOPNOTSUPP),
        (Geometry(size_bytes=SIZE, read_only=True), ZERO_RANGE, errno.EROFS),
    ],
)
async def test_what_the_device_can_not_do(geometry: Geometry, mode: int, code: int) -> None:
    with pytest.raises(FUSEError) as refused:
        await allocate(Recorder(geometry), mode, 0, 4096)
    assert refused.value.errno == code


async def test_a_long_range_goes_in_steps() -> None:
    device = Recorder(
        Geometry(size_bytes=4 << 30, discard_granularity_bytes=4096, zeroes_after_discard=True)
    )
    await allocate(device, PUNCH, 4096, (4 << 30) - 4096)
    assert len(device.zeroed) == 4
    assert max(length for _, length, _ in device.zeroed) == STEP_BYTES
    assert sum(length for _, length, _ in device.zeroed) == (4 << 30) - 4096


# -- through the kernel ----------------------------------------------------------------------------


def kernel_fallocate(path: Path, mode: int, offset: int, length: int) -> int:
    """The errno; 0: done."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    descriptor = os.open(path, os.O_RDWR)
    try:
        return ctypes.get_errno() if libc.fallocate(descriptor, mode, offset, length) else 0
    finally:
        with suppress(OSError):  # the mount may have ended
            os.close(descriptor)


@pytest.mark.fuse
async def test_the_page_cache_shows_the_hole(mount_files: MountFiles) -> None:
    device = Recorder()
    device.poke(0, b"x" * SIZE)
    async with mount_files({"lun1": device}) as mounted:
        assert await mounted.call(mounted.lun.read_bytes) == b"x" * SIZE, "now it is cached"
        code = await mounted.call(kernel_fallocate, mounted.lun, PUNCH, 8192, 65536)
        assert code == 0
        expected = b"x" * 8192 + bytes(65536) + b"x" * (SIZE - 8192 - 65536)
        assert await mounted.call(mounted.lun.read_bytes) == expected
        assert device.zeroed == [(8192, 65536, True)]
        assert await mounted.call(kernel_fallocate, mounted.lun, 0, 0, 4096) == errno.EOPNOTSUPP


@pytest.mark.fuse
async def test_a_device_without_discards(mount_files: MountFiles) -> None:
    device = Recorder(Geometry(size_bytes=SIZE))
    async with mount_files({"lun1": device}) as mounted:
        code = await mounted.call(kernel_fallocate, mounted.lun, PUNCH, 0, 4096)
        assert code == errno.EOPNOTSUPP
        assert await mounted.call(kernel_fallocate, mounted.lun, ZERO_RANGE, 0, 4096) == 0
        assert device.zeroed == [(0, 4096, False)]


@pytest.mark.fuse
async def test_an_error_of_the_device_is_told_and_counted(mount_files: MountFiles) -> None:
    faulty = FaultyDevice(Recorder())
    faulty.fail("zero", 1)
    async with mount_files({"lun1": faulty}) as mounted:
        assert await mounted.call(kernel_fallocate, mounted.lun, PUNCH, 0, 4096) == errno.EIO
        assert mounted.filesystem.counters()["lun1"].errors == 1
        assert await mounted.call(kernel_fallocate, mounted.lun, PUNCH, 0, 4096) == 0


@pytest.mark.fuse
async def test_one_that_takes_long_keeps_nobody_waiting(mount_files: MountFiles) -> None:
    faulty = FaultyDevice(Recorder())
    faulty.hold("zero")
    codes: list[int] = []
    async with mount_files({"lun1": faulty}) as mounted:

        async def punch() -> None:
            codes.append(await mounted.call(kernel_fallocate, mounted.lun, PUNCH, 0, 4096))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(punch)
            with trio.fail_after(5):
                await faulty.wait_held("zero")
                await mounted.call(os.stat, mounted.lun)
                status = mounted.folder / ".orion" / "status.json"
                assert await mounted.call(status.read_bytes)
            assert codes == []
            faulty.release("zero")
    assert codes == [0]


@pytest.mark.fuse
async def test_a_mount_that_ends_meanwhile_answers_it(mount_files: MountFiles) -> None:
    faulty = FaultyDevice(Recorder())
    faulty.hold("zero")
    codes: list[int] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery, mount_files({"lun1": faulty}) as mounted:

            async def punch() -> None:
                codes.append(await mounted.call(kernel_fallocate, mounted.lun, PUNCH, 0, 4096))

            nursery.start_soon(punch)
            await faulty.wait_held("zero")
            mounted.mount.terminate()
            await mounted.mount.wait_ended()
    assert codes
    assert codes[0] != 0
