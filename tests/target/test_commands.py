"""SCSI commands of the embedded target, with their refusals."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener, check_request
from orion_iscsifs.errors import DeviceError
from orion_iscsifs.protocol.pdu import ScsiResponse
from orion_iscsifs.scsi import capacity, cdb, inquiry, lun, mode, provisioning, sense
from orion_iscsifs.scsi.sense import SenseData, sense_of_response
from orion_iscsifs.target import RamDevice, serve
from tests.target.client import IQN, SIZE, TUR, Client, config, logged_in

BLOCKS = SIZE // 512


@asynccontextmanager
async def on_disk(*, read_only: bool = False) -> AsyncIterator[tuple[Client, RamDevice]]:
    async with (
        RamDevice(SIZE, read_only=read_only) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        yield client, disk


async def out(client: Client, block: bytes, data: bytes) -> SenseData | None:
    """Run a command with immediate Data-Out: its sense, None for GOOD."""
    await client.send(client.command(block, write=len(data), data=data))
    status = await client.expect(ScsiResponse)
    return sense_of_response(status.data) if status.status == 2 else None


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (bytes((0xFE,)), (5, 0x20, 0)),
        (cdb.read(BLOCKS, 1), (5, 0x21, 0)),
        (cdb.read(BLOCKS - 1, 2), (5, 0x21, 0)),
        (cdb.read((1 << 64) - 1, 1), (5, 0x21, 0)),
        (cdb.synchronize_cache(BLOCKS, 1), (5, 0x21, 0)),
        (cdb.verify(BLOCKS, 1), (5, 0x21, 0)),
        (cdb.get_lba_status(BLOCKS), (5, 0x21, 0)),
        (cdb.inquiry(0xEE), (5, 0x24, 0)),
        (cdb.mode_sense_6(0x2F), (5, 0x24, 0)),
        (cdb.read(0, 1)[:1] + b"\x20" + cdb.read(0, 1)[2:], (5, 0x24, 0)),
        (cdb.verify(0, 1, byte_check=2), (5, 0x24, 0)),
        (cdb.write_same(0, 0, no_data_out=True), (5, 0x24, 0)),
        (cdb.report_luns(8), (5, 0x24, 0)),
        (cdb.report_supported_operation_codes(0x9E), (5, 0x24, 0)),
        (cdb.start_stop_unit(start=True)[:4] + b"\2" + bytes(11), (5, 0x24, 0)),
    ],
)
async def test_refused(block: bytes, reason: tuple[int, int, int]) -> None:
    async with on_disk() as (client, _):
        found = await client.sense(block, read=512)
        assert (found.key, found.asc, found.ascq) == reason


@pytest.mark.parametrize(
    ("block", "data"),
    [
        (cdb.write(0, 1), bytes(512)),
        (cdb.write_same(0, 1), bytes(512)),
        (cdb.compare_and_write(0, 1), bytes(1024)),
        (cdb.unmap(24), provisioning.encode_unmap([(0, 1)])),
    ],
)
async def test_write_protected(block: bytes, data: bytes) -> None:
    async with on_disk(read_only=True) as (client, _):
        assert await out(client, block, data) == sense.WRITE_PROTECTED
        await client.send(client.command(cdb.synchronize_cache()))
        assert (await client.expect(ScsiResponse)).status == 0
        data_in, _ = await client.run(cdb.mode_sense_6(0x3F), read=255)
        assert mode.decode_mode_sense_6(data_in).write_protected


async def test_a_lun_without_a_unit() -> None:
    async with on_disk() as (client, _):
        assert await client.sense(TUR, lun=5) == sense.LUN_NOT_SUPPORTED
        data, _ = await client.run(cdb.inquiry(), read=255, lun=5)
        assert data[0] == 0x7F
        data, _ = await client.run(cdb.report_luns(), read=4096, lun=5)
        assert lun.decode_report_luns(data) == [0]
        data, _ = await client.run(cdb.request_sense(), read=252, lun=5)
        assert sense.decode_sense(data) == sense.LUN_NOT_SUPPORTED
        assert await out(client, cdb.write(0, 1), bytes(512)) is None
        await client.send(client.command(cdb.write(0, 1), write=512, data=bytes(512), lun=5))
        assert (await client.expect(ScsiResponse)).status == 2


# -- identity --------------------------------------------------------------------------------------


async def test_identity_is_stable_and_differs_by_lun() -> None:
    names: list[set[str]] = []
    for _ in range(2):
        async with (
            RamDevice(SIZE) as one,
            RamDevice(SIZE, block_bytes=4096) as two,
            serve([config(one, two)]) as running,
            logged_in(running) as client,
        ):
            found = set()
            for number in (0, 1):
                data, _ = await client.run(cdb.inquiry(0x83, 512), read=512, lun=number)
                best = inquiry.best_designator(inquiry.decode_designators(data))
                assert best is not None
                assert best.kind == inquiry.DesignatorType.NAA
                data, _ = await client.run(cdb.inquiry(0x80), read=255, lun=number)
                found |= {best.text, inquiry.decode_serial_number(data)}
            data, _ = await client.run(cdb.inquiry(0x83, 512), read=512)
            assert f"{IQN},t,0x0001".encode() in data
            names.append(found)
    assert names[0] == names[1]
    assert len(names[0]) == 4


async def test_vpd_pages() -> None:
    async with on_disk() as (client, _):
        data, _ = await client.run(cdb.inquiry(0), read=255)
        pages = inquiry.decode_supported_pages(data)
        assert pages == {0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2}
        data, _ = await client.run(cdb.inquiry(0xB0), read=255)
        limits = inquiry.decode_block_limits(data)
        assert limits.transfer_blocks_max == 65536
        assert limits.compare_and_write_blocks_max == 255
        data, _ = await client.run(cdb.inquiry(0xB1), read=255)
        assert inquiry.decode_rotation_rate(data) == 1
        data, _ = await client.run(cdb.inquiry(0xB2), read=255)
        thin = inquiry.decode_provisioning(data)
        assert thin.unmap
        assert thin.reads_zeroes


async def test_capacity_and_mode() -> None:
    async with (
        RamDevice(SIZE, block_bytes=4096) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        data, _ = await client.run(cdb.read_capacity_10(), read=8)
        ten = capacity.decode_capacity_10(data)
        data, _ = await client.run(cdb.read_capacity_16(), read=32)
        sixteen = capacity.decode_capacity_16(data)
        assert ten is not None
        assert (ten.blocks, ten.block_bytes) == (256, 4096)
        assert (sixteen.blocks, sixteen.physical_block_bytes) == (256, 4096)
        for block in (cdb.mode_sense_6(0x3F), cdb.mode_sense_10(0x08)):
            data, _ = await client.run(block, read=512)
            decode = mode.decode_mode_sense_6 if block[0] == 0x1A else mode.decode_mode_sense_10
            assert decode(data) == mode.ModeParameters(dpofua=True)
        long_lba = cdb.mode_sense_10(0x08)[:1] + b"\x10" + cdb.mode_sense_10(0x08)[2:]
        data, _ = await client.run(long_lba, read=512)
        assert data[8:24] == (256).to_bytes(8, "big") + (4096).to_bytes(8, "big")


async def test_report_supported_operation_codes() -> None:
    async with on_disk() as (client, _):
        data, _ = await client.run(cdb.report_supported_operation_codes(), read=4096)
        assert int.from_bytes(data[:4], "big") == len(data) - 4
        codes = {data[offset] for offset in range(4, len(data), 8)}
        assert {0x00, 0x12, 0x28, 0x2A, 0x42, 0x88, 0x8A, 0x9E, 0xA0, 0xA3} <= codes
        data, _ = await client.run(cdb.report_supported_operation_codes(0x42), read=4096)
        assert data[1] == 3
        assert data[4] == 0x42
        data, _ = await client.run(cdb.report_supported_operation_codes(0x9E, 0x12), read=4096)
        assert data[1] == 3
        data, _ = await client.run(cdb.report_supported_operation_codes(0xC1), read=4096)
        assert data[1] == 1


# -- blocks ----------------------------------------------------------------------------------------


async def test_every_read_and_write() -> None:
    async with on_disk() as (client, disk):
        payload = os.urandom(1024)
        writes = [
            bytes((0x0A, 0, 0, 4, 2, 0)),
            cdb.write(4, 2, fua=True),
            bytes((0xAA, 0, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0)),
            bytes((0x8A, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0)),
            bytes((0x2E, 0, 0, 0, 0, 4, 0, 0, 2, 0)),
        ]
        reads = [bytes((block[0] & ~2,)) + block[1:] for block in writes[:4]]
        for block in writes:
            disk.view[2048:3072] = bytes(1024)
            assert await out(client, block.ljust(16, b"\0"), payload) is None
            assert bytes(disk.view[2048:3072]) == payload
        for block in reads:
            data, status = await client.run(block.ljust(16, b"\0"), read=1024)
            assert status.status == 0
            assert data == payload


async def test_compare_and_write() -> None:
    async with on_disk() as (client, disk):
        disk.view[:512] = b"a" * 512
        swap = cdb.compare_and_write(0, 1)
        assert await out(client, swap, b"a" * 512 + b"b" * 512) is None
        assert bytes(disk.view[:512]) == b"b" * 512
        expected = b"b" * 100 + b"x" * 412
        assert await out(client, swap, expected + b"c" * 512) == SenseData(0xE, 0x1D, 0, 100)
        assert bytes(disk.view[:512]) == b"b" * 512
        assert await out(client, swap, bytes(512)) == sense.INVALID_FIELD_IN_CDB


def orwrite(lba: int, blocks: int, *, fua: bool = False) -> bytes:
    return (
        bytes((cdb.OpCode.ORWRITE_16,))
        + cdb.compare_and_write(lba, 0, fua=fua)[1:10]
        + bytes((0, 0, 0, blocks, 0, 0))
    )


async def test_orwrite() -> None:
    async with on_disk() as (client, disk):
        disk.view[512:1536] = b"\x11" * 1024
        for fua in (False, True):
            assert await out(client, orwrite(1, 2, fua=fua), b"\x60" * 512 + bytes(512)) is None
        assert bytes(disk.view[512:1024]) == b"\x71" * 512
        assert bytes(disk.view[1024:1536]) == b"\x11" * 512
        short = await out(client, orwrite(1, 2), b"\xff" * 512)
        assert short is not None
        assert (short.key, short.asc) == (5, 0x24)
        beyond = await out(client, orwrite(BLOCKS, 1), bytes(512))
        assert beyond is not None
        assert (beyond.key, beyond.asc) == (5, 0x21)
        assert bytes(disk.view[512:1024]) == b"\x71" * 512


async def test_verify() -> None:
    async with on_disk() as (client, disk):
        disk.view[:1024] = b"v" * 1024
        _, status = await client.run(cdb.verify(0, 2))
        assert status.status == 0
        assert await out(client, cdb.verify(0, 2, byte_check=1), b"v" * 1024) is None
        assert await out(client, cdb.verify(0, 2, byte_check=3), b"v" * 512) is None
        wrong = await out(client, cdb.verify(0, 2, byte_check=1), b"v" * 1023 + b"w")
        assert wrong == SenseData(0xE, 0x1D, 0, 1023)


async def test_unmap_and_write_same() -> None:
    async with on_disk() as (client, disk):
        disk.view[:] = b"\xff" * SIZE
        ranges = [(1, 2), (100, 50)]
        assert await out(client, cdb.unmap(40), provisioning.encode_unmap(ranges)) is None
        image = bytearray(b"\xff" * SIZE)
        for first, count in ranges:
            image[first * 512 : (first + count) * 512] = bytes(count * 512)
        assert bytes(disk.view) == image
        assert await out(client, cdb.write_same(10, 5), b"ws" * 256) is None
        assert await out(client, cdb.write_same(20, 5, unmap=True), bytes(512)) is None
        image[5120:7680] = b"ws" * 1280
        image[10240:12800] = bytes(2560)
        await client.run(cdb.write_same(30, 5, no_data_out=True))
        image[15360:17920] = bytes(2560)
        assert bytes(disk.view) == image
        beyond = provisioning.encode_unmap([(BLOCKS, 1)])
        found = await out(client, cdb.unmap(24), beyond)
        assert found is not None
        assert found.asc == 0x21
        assert await out(client, cdb.unmap(4), b"abcd") == sense.PARAMETER_LIST_LENGTH_ERROR


async def test_lba_status() -> None:
    async with on_disk() as (client, disk):
        disk.view[8192:12288] = b"d" * 4096
        found = []
        for first in (0, 16, 24):
            data, _ = await client.run(cdb.get_lba_status(first), read=24)
            found += provisioning.decode_lba_status(data)
        assert [(e.lba, e.blocks, e.status) for e in found] == [
            (0, 16, 1),
            (16, 8, 0),
            (24, BLOCKS - 24, 1),
        ]


# -- a device that waits, and fails ----------------------------------------------------------------


class Failing:
    """Not inline; every request fails."""

    def __init__(self) -> None:
        self.geometry = Geometry(size_bytes=SIZE)

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self.geometry, offset, len(target))
        raise DeviceError("no")

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        raise DeviceError("no")

    async def flush(self) -> None:
        raise DeviceError("no")

    async def discard(self, offset: int, length: int) -> None:
        raise DeviceError("no")

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        raise DeviceError("no")

    def on_geometry_change(self, listener: GeometryListener) -> None:
        del listener


async def test_a_device_that_fails() -> None:
    async with serve([config(Failing())]) as running, logged_in(running) as client:
        assert await client.sense(cdb.read(0, 1), read=512) == sense.UNRECOVERED_READ_ERROR
        assert await out(client, cdb.write(0, 1), bytes(512)) == sense.WRITE_ERROR
        assert await client.sense(cdb.synchronize_cache()) == sense.WRITE_ERROR
        # No discard below, no atomic compare: neither is offered.
        unmap = provisioning.encode_unmap([(0, 1)])
        assert await out(client, cdb.unmap(24), unmap) == sense.INVALID_OPCODE
        assert await out(client, cdb.compare_and_write(0, 1), bytes(1024)) == sense.INVALID_OPCODE
