"""Files and memory as devices."""

import os
from pathlib import Path

import pytest
import trio

from orion_iscsifs.errors import (
    BusyError,
    DeviceError,
    Misaligned,
    OutOfRange,
    UsageError,
    WriteProtected,
)
from orion_iscsifs.target import FileDevice, RamDevice, open_backing

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "disk.img")


def fill(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


def head(path: str) -> bytes:
    return Path(path).read_bytes()[:512]


async def check_contract(device: FileDevice | RamDevice) -> None:
    payload = os.urandom(8192)
    await device.write(4096, payload)
    found = bytearray(8192)
    await device.read_into(4096, memoryview(found))
    assert found == payload
    await device.write(0, payload[:512], fua=True)
    await device.write_zeroes(4096 + 512, 7000 // 512 * 512)
    await device.discard(65536, 8192)
    await device.flush()
    await device.read_into(4096, memoryview(found))
    assert found == payload[:512] + bytes(6656) + payload[7168:]
    await device.write_zeroes(4096, 512, may_unmap=False)
    await device.read_into(4096, memoryview(found))
    assert found[:512] == bytes(512)
    with pytest.raises(OutOfRange):
        await device.write(SIZE, bytes(512))
    with pytest.raises(Misaligned):
        await device.read_into(1, memoryview(found))


async def test_ram() -> None:
    async with RamDevice(SIZE) as device:
        await check_contract(device)


async def test_file(path: str) -> None:
    async with open_backing(path, size_bytes=SIZE) as device:
        await check_contract(device)
    assert len(head(path)) == 512


async def test_read_only(path: str) -> None:
    fill(path, b"x" * 1024)
    async with open_backing(path, read_only=True) as device:
        found = bytearray(512)
        await device.read_into(512, memoryview(found))
        assert found == b"x" * 512
        for attempt in (device.write(0, bytes(512)), device.write_zeroes(0, 512)):
            with pytest.raises(WriteProtected):
                await attempt
        await device.flush()


async def test_extents(path: str) -> None:
    async with open_backing(path, size_bytes=SIZE) as device:
        await device.write(65536, b"x" * 65536)
        await device.flush()
        assert device.extent(0) == (65536, False)
        assert device.extent(131072) == (SIZE - 131072, False)
        length, holds_data = device.extent(65536)
        assert holds_data
        assert length == 65536


async def test_extents_of_small_physical_blocks() -> None:
    async with RamDevice(1 << 20, physical_block_bytes=512) as device:
        assert device.geometry.physical_block_bytes == 512
        assert device.geometry.discard_granularity_bytes == 512
        await device.write(0, b"x" * 4096)
        await device.write_zeroes(512, 512)
        assert device.extent(0) == (512, True)
        assert device.extent(512) == (512, False)
        assert device.extent(1024) == (3072, True)
        device.resize(2 << 20)
        assert device.geometry.physical_block_bytes == 512


async def test_a_cold_file_is_read_in_a_thread(path: str) -> None:
    fill(path, b"c" * SIZE)
    async with open_backing(path) as device:
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = bytearray(SIZE)
        await device.read_into(0, memoryview(found))
        assert found == b"c" * SIZE


async def test_a_shortened_file_is_an_error_and_not_zeroes(path: str) -> None:
    async with open_backing(path, size_bytes=SIZE) as device:
        os.truncate(path, 512)
        with pytest.raises(DeviceError, match="became shorter"):
            await device.read_into(0, memoryview(bytearray(4096)))


async def test_a_second_user_is_refused(path: str) -> None:
    async with open_backing(path, size_bytes=SIZE):
        with pytest.raises(BusyError):
            open_backing(path)


async def test_sizes(path: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        open_backing(path)
    async with open_backing(path, size_bytes=SIZE):
        pass
    async with open_backing(path, size_bytes=2 * SIZE) as grown:
        assert grown.geometry.size_bytes == 2 * SIZE
    with pytest.raises(UsageError, match="has 2097152 bytes"):
        open_backing(path, size_bytes=SIZE)
    os.truncate(path, 1000)
    with pytest.raises(UsageError, match="whole blocks"):
        open_backing(path)
    with pytest.raises(UsageError):
        open_backing(str(tmp_path))
    with pytest.raises(UsageError, match="neither a file"):
        open_backing("/dev/null")


async def test_close_waits_for_the_flush_even_when_cancelled(path: str) -> None:
    with trio.CancelScope() as scope:
        async with open_backing(path, size_bytes=SIZE) as device:
            await device.write(0, b"x" * 512)
            scope.cancel()
            await trio.sleep_forever()
    assert head(path) == b"x" * 512
