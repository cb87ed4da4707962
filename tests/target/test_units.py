"""Units that come, go, grow, shrink, run full and go bad while initiators use them."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.errors import DeviceError, MediumError, OutOfRange, UsageError, WriteProtected
from orion_iscsifs.protocol.pdu import R2T, ScsiResponse
from orion_iscsifs.scsi import cdb, inquiry, sense
from orion_iscsifs.scsi.capacity import decode_capacity_16
from orion_iscsifs.scsi.lun import decode_lun, decode_report_luns
from orion_iscsifs.scsi.provisioning import encode_unmap
from orion_iscsifs.scsi.sense import SenseData, SenseKey, sense_of_response
from orion_iscsifs.target import FileDevice, RamDevice, Running, open_backing, serve
from orion_iscsifs.target.troubled import FlawedDevice, ThinDevice
from orion_iscsifs.target.unit import MODE_PARAMETERS_CHANGED, SOFT_THRESHOLD_REACHED
from tests.target.client import SIZE, TUR, Client, config, data_out, logged_in

BLOCK = 512
CHUNK = 4096
OTHER_ISID = bytes.fromhex("80cafe000002")


async def luns(client: Client) -> list[int | None]:
    data, status = await client.run(cdb.report_luns(), read=4096)
    assert status.status == 0
    return [decode_lun(lun) for lun in decode_report_luns(data)]


async def status(client: Client, block: bytes = TUR, *, read: int = 0, lun: int = 0) -> int:
    return (await client.run(block, read=read, lun=lun))[1].status


async def blocks(client: Client) -> int:
    data, _ = await client.run(cdb.read_capacity_16(), read=32)
    return decode_capacity_16(data).blocks


async def send_data(client: Client, block: bytes, data: bytes) -> SenseData | None:
    """A command with immediate data; the sense it ends with, if any."""
    await client.send(client.command(block, write=len(data), data=data))
    answer = await client.expect(ScsiResponse)
    return sense_of_response(answer.data) if answer.status else None


@asynccontextmanager
async def running_with(device: RamDevice) -> AsyncIterator[tuple[Running, Client]]:
    async with serve([config(device)]) as running, logged_in(running) as client:
        yield running, client


class SlowDisk(RamDevice):
    """Writes wait for `go`; none is done at once."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.begun, self.go = trio.Event(), trio.Event()

    def write_now(self, offset: int, source: Buffer) -> bool:
        return False

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self.begun.set()
        await self.go.wait()
        super().write_now(offset, source)


# -- LUNs that come and go -------------------------------------------------------------------------


async def test_a_lun_appears() -> None:
    async with (
        RamDevice(SIZE) as disk,
        RamDevice(2 * SIZE) as further,
        serve([config(disk)]) as running,
        logged_in(running) as first,
        logged_in(running, isid=OTHER_ISID) as second,
    ):
        assert await first.sense(TUR, lun=300) == sense.LUN_NOT_SUPPORTED
        running.targets[0].add_unit(300, further)
        for client in (first, second):
            assert await client.sense(TUR) == sense.REPORTED_LUNS_CHANGED
            assert await luns(client) == [0, 300]
            assert await client.sense(TUR, lun=300) == sense.POWER_ON
        assert (await first.write(0, b"n" * BLOCK, lun=300)).status == 0
        assert await second.read(0, BLOCK, lun=300) == b"n" * BLOCK
        async with logged_in(running, isid=bytes.fromhex("80cafe000003")) as third:
            assert await luns(third) == [0, 300]


async def test_report_luns_clears_its_attention() -> None:
    async with RamDevice(SIZE) as disk, RamDevice(SIZE) as further, running_with(disk) as both:
        running, client = both
        running.targets[0].add_unit(1, further)
        assert await luns(client) == [0, 1]
        assert await status(client) == 0


async def test_a_lun_vanishes_and_another_takes_its_number() -> None:
    async with (
        RamDevice(SIZE) as disk,
        RamDevice(SIZE) as going,
        serve([config(disk, going)]) as running,
        logged_in(running) as client,
    ):
        target = running.targets[0]
        before = target.units.by_number[1]
        assert await target.remove_unit(1) is going
        assert await client.sense(TUR) == sense.REPORTED_LUNS_CHANGED
        assert await luns(client) == [0]
        assert await client.sense(cdb.read(0, 1), read=BLOCK, lun=1) == sense.LUN_NOT_SUPPORTED
        data, _ = await client.run(cdb.inquiry(), read=255, lun=1)
        assert not inquiry.decode_inquiry(data).is_disk
        # Nobody hears of what becomes of the device afterwards.
        going.resize(2 * SIZE)
        assert await status(client) == 0
        after = target.add_unit(1, going, identity="quite another")
        assert (after.serial, after.naa) != (before.serial, before.naa)
        assert await client.sense(TUR, lun=1) == sense.POWER_ON
        assert await status(client, lun=1) == 0


async def test_the_last_lun_vanishes() -> None:
    async with RamDevice(SIZE) as disk, running_with(disk) as (running, client):
        await running.targets[0].remove_unit(0)
        assert await luns(client) == []
        assert await client.sense(TUR) == sense.LUN_NOT_SUPPORTED


async def test_a_lun_is_given_back_when_its_last_write_has_ended() -> None:
    with trio.fail_after(5):
        async with SlowDisk() as disk, running_with(disk) as (running, client):
            given_back = trio.Event()

            async def remove() -> None:
                await running.targets[0].remove_unit(0)
                given_back.set()

            async with trio.open_nursery() as nursery:
                await client.send(client.command(cdb.write(0, 1), write=BLOCK, data=b"w" * BLOCK))
                await disk.begun.wait()
                nursery.start_soon(remove)
                await trio.testing.wait_all_tasks_blocked()
                assert not given_back.is_set()
                disk.go.set()
                assert (await client.expect(ScsiResponse)).status == 0
                await given_back.wait()
            assert bytes(disk.view[:BLOCK]) == b"w" * BLOCK


async def test_a_write_that_waits_for_data_is_refused() -> None:
    async with RamDevice(SIZE) as disk, running_with(disk) as (running, client):
        write = client.command(cdb.write(0, 512), write=512 * BLOCK)
        await client.send(write)
        r2t = await client.expect(R2T)
        wanted = r2t.desired_data_transfer_length
        assert wanted == 512 * BLOCK
        await running.targets[0].remove_unit(0)
        await client.send(data_out(write, b"w" * wanted, ttt=r2t.target_transfer_tag))
        answer = await client.expect(ScsiResponse)
        assert sense_of_response(answer.data) == sense.LUN_NOT_SUPPORTED
        assert bytes(disk.view[:BLOCK]) == bytes(BLOCK)


async def test_a_command_that_is_held_for_its_turn_is_refused() -> None:
    async with RamDevice(SIZE) as disk, running_with(disk) as (running, client):
        before, held = client.command(TUR), client.command(cdb.read(0, 1), read=BLOCK)
        await client.send(held)
        with trio.fail_after(5):
            while not running.sessions[0].tasks:
                await trio.sleep(0.001)
        await running.targets[0].remove_unit(0)
        await client.send(before)
        for _ in range(2):
            answer = await client.expect(ScsiResponse)
            assert sense_of_response(answer.data) == sense.LUN_NOT_SUPPORTED


# -- sizes and write protection --------------------------------------------------------------------


async def test_a_unit_grows_and_shrinks() -> None:
    async with RamDevice(SIZE) as disk, running_with(disk) as (_, client):
        disk.resize(2 * SIZE)
        assert await client.sense(TUR) == sense.CAPACITY_CHANGED
        assert await blocks(client) == 2 * SIZE // BLOCK
        assert (await client.write(SIZE // BLOCK, b"g" * BLOCK)).status == 0
        disk.resize(SIZE // 2)
        assert await client.sense(TUR) == sense.CAPACITY_CHANGED
        assert await blocks(client) == SIZE // 2 // BLOCK
        beyond = await client.sense(cdb.read(SIZE // 2 // BLOCK, 1), read=BLOCK)
        assert (beyond.asc, beyond.ascq) == (0x21, 0x00)
        disk.resize(SIZE // 2)
        assert await status(client) == 0, "nothing has changed"


async def test_a_write_in_the_works_meets_a_shrunk_unit() -> None:
    async with RamDevice(SIZE) as disk, running_with(disk) as (_, client):
        write = client.command(cdb.write(SIZE // BLOCK - 512, 512), write=512 * BLOCK)
        await client.send(write)
        r2t = await client.expect(R2T)
        disk.resize(SIZE // 2)
        wanted = r2t.desired_data_transfer_length
        await client.send(data_out(write, b"w" * wanted, ttt=r2t.target_transfer_tag))
        answer = await client.expect(ScsiResponse)
        assert sense_of_response(answer.data).asc == 0x21


async def test_write_protection_comes_and_goes() -> None:
    async with RamDevice(SIZE) as disk, running_with(disk) as (_, client):
        disk.set_read_only()
        assert await client.sense(TUR) == MODE_PARAMETERS_CHANGED
        refused = await client.write(0, b"x" * BLOCK)
        assert sense_of_response(refused.data) == sense.WRITE_PROTECTED
        data, _ = await client.run(cdb.mode_sense_6(0x3F), read=255)
        assert data[2] & 0x80, "WP"
        disk.set_read_only(False)
        assert await client.sense(TUR) == MODE_PARAMETERS_CHANGED
        assert (await client.write(0, b"x" * BLOCK)).status == 0


async def test_a_file_that_is_resized_by_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    async with open_backing(str(path), size_bytes=SIZE) as disk:
        sizes: list[int] = []
        disk.on_geometry_change(lambda geometry: sizes.append(geometry.size_bytes))
        assert not disk.follow()
        os.truncate(path, 2 * SIZE + 100)
        assert disk.follow()
        os.truncate(path, 0)
        assert not disk.follow()
        os.truncate(path, SIZE)
        assert disk.follow()
        assert sizes == [2 * SIZE, SIZE]
        disk.set_read_only()
        with pytest.raises(WriteProtected):
            await disk.write(0, bytes(BLOCK))
        disk.set_read_only(False)
        await disk.write(0, b"w" * BLOCK)


async def test_a_file_opened_for_reading_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    async with open_backing(str(path), read_only=True) as disk:
        assert isinstance(disk, FileDevice)
        with pytest.raises(UsageError, match="for reading only"):
            disk.set_read_only(False)
        assert disk.geometry.read_only


# -- thin units ------------------------------------------------------------------------------------


async def test_a_pool_runs_full_and_unmap_makes_room() -> None:
    async with RamDevice(SIZE) as memory:
        disk = ThinDevice(memory, 2 * CHUNK)
        async with serve([config(disk)]) as running, logged_in(running) as client:
            assert (await client.write(0, b"a" * 2 * CHUNK)).status == 0
            assert disk.used_bytes == 2 * CHUNK
            refused = await client.write(16, b"b" * BLOCK)
            assert sense_of_response(refused.data) == sense.SPACE_ALLOCATION_FAILED
            assert (await client.write(1, b"c" * BLOCK)).status == 0, "that chunk is there already"
            assert await client.read(16, BLOCK) == bytes(BLOCK)
            same = cdb.write_same(16, 8)
            assert await send_data(client, same, bytes(BLOCK)) == sense.SPACE_ALLOCATION_FAILED
            swap = cdb.compare_and_write(16, 1)
            both = bytes(BLOCK) + b"d" * BLOCK
            assert await send_data(client, swap, both) == sense.SPACE_ALLOCATION_FAILED
            ranges = encode_unmap([(7, 9)])  # a part of the first chunk, all of the second
            assert await send_data(client, cdb.unmap(len(ranges)), ranges) is None
            assert disk.used_bytes == CHUNK
            assert await send_data(client, swap, both) is None
            assert await client.read(16, BLOCK) == b"d" * BLOCK
            disk.pool_bytes += CHUNK
            assert (await client.write(64, b"e" * BLOCK)).status == 0


async def test_the_soft_threshold_is_announced_once_each_time() -> None:
    async with RamDevice(SIZE) as memory:
        disk = ThinDevice(memory, 4 * CHUNK, soft_threshold_bytes=2 * CHUNK)
        async with serve([config(disk)]) as running, logged_in(running) as client:
            for turn in range(2):
                assert (await client.write(0, b"a" * CHUNK)).status == 0
                assert await status(client) == 0, turn
                assert (await client.write(8, b"a" * CHUNK)).status == 0
                assert await client.sense(TUR) == SOFT_THRESHOLD_REACHED
                assert (await client.write(16, b"a" * CHUNK)).status == 0
                await disk.discard(0, SIZE)
                assert disk.used_bytes == 0


async def test_a_refused_request_takes_no_space() -> None:
    async with RamDevice(SIZE) as memory:
        disk = ThinDevice(memory, 2 * CHUNK)
        with pytest.raises(OutOfRange):
            await disk.write(SIZE, bytes(BLOCK))
        memory.set_read_only()
        with pytest.raises(WriteProtected):
            await disk.write(0, bytes(BLOCK))
        assert disk.used_bytes == 0


# -- bad blocks ------------------------------------------------------------------------------------


async def test_a_bad_block_is_named_until_it_is_rewritten() -> None:
    async with RamDevice(SIZE) as memory:
        disk = FlawedDevice(memory)
        async with serve([config(disk)]) as running, logged_in(running) as client:
            assert (await client.write(0, b"a" * 4096)).status == 0
            disk.spoil(3, 2)
            for first, length in ((0, 8), (3, 1)):
                bad = await client.sense(cdb.read(first, length), read=length * BLOCK)
                assert bad == SenseData(SenseKey.MEDIUM_ERROR, 0x11, 0x00, information=3)
            assert await client.read(0, 3 * BLOCK) == b"a" * 3 * BLOCK
            assert (await client.write(3, b"b" * BLOCK)).status == 0
            bad = await client.sense(cdb.read(0, 8), read=8 * BLOCK)
            assert bad.information == 4
            same = cdb.write_same(4, 1)
            assert await send_data(client, same, bytes(BLOCK)) is None
            assert await client.read(3, 2 * BLOCK) == b"b" * BLOCK + bytes(BLOCK)
            assert disk.flaws == frozenset()


async def test_a_block_that_takes_no_writes() -> None:
    async with RamDevice(SIZE) as memory:
        disk = FlawedDevice(memory)
        async with serve([config(disk)]) as running, logged_in(running) as client:
            disk.spoil(5, reads=False, writes=True)
            refused = await client.write(0, b"a" * 4096)
            bad = sense_of_response(refused.data)
            assert bad == SenseData(SenseKey.MEDIUM_ERROR, 0x0C, 0x00, information=5)
            assert await client.read(0, 4096) == bytes(4096), "nothing was written"
            assert (await client.write(0, b"a" * 5 * BLOCK)).status == 0
            disk.mend()
            assert (await client.write(0, b"a" * 4096)).status == 0


async def test_a_bad_block_through_the_coroutines() -> None:
    async with RamDevice(SIZE) as memory:
        disk = FlawedDevice(memory)
        disk.spoil(0, writes=True)
        with pytest.raises(MediumError) as caught:
            await disk.read_into(0, memoryview(bytearray(BLOCK)))
        assert caught.value.lba == 0
        for work in (disk.write(0, bytes(BLOCK)), disk.write_zeroes(0, BLOCK)):
            with pytest.raises(DeviceError):
                await work
        await disk.write(BLOCK, b"w" * BLOCK)
        await disk.flush()
        target = bytearray(BLOCK)
        await disk.read_into(BLOCK, memoryview(target))
        assert target == b"w" * BLOCK
