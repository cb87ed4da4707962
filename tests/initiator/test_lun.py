"""A LUN as a block device, over a disk that the test answers for."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from orion_iscsifs.errors import (
    LunNotFound,
    Misaligned,
    NotADisk,
    OutOfRange,
    ProtocolViolation,
    ScsiError,
    WriteProtected,
)
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.protocol.keys import Offer
from orion_iscsifs.protocol.pdu import DataIn, NopOut, ScsiCommand, ScsiResponse
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.inquiry import VpdPage
from orion_iscsifs.scsi.sense import SenseData, SenseKey, Status, response_segment
from tests.initiator.peer import PlayedConnection, offer, played_session

BLOCKS, BLOCK_BYTES = 2048, 512
Answer = bytes | SenseData | Status


class Disk:
    """Answers SCSI commands; `script` may replace the answers of one operation code."""

    def __init__(self) -> None:
        self.content = bytearray(BLOCKS * BLOCK_BYTES)
        self.commands: list[ScsiCommand] = []
        self.script: dict[int, list[Answer]] = {}
        self.device_type = 0
        self.blocks = BLOCKS
        self.serial = b""
        self.surplus = 0
        """What a READ has more than was asked for, by the device's own count."""
        self.mode = bytes([23, 0, 0x10, 0, 0x08, 18, 0x04]) + bytes(17)

    def codes(self) -> list[int]:
        return [command.cdb[0] for command in self.commands]

    async def serve(self, peer: PlayedConnection) -> None:
        while True:
            pdus = peer.received or await peer.wire.receive()
            peer.received = []
            for pdu in pdus:
                if isinstance(pdu, ScsiCommand):
                    peer.exp_cmd_sn, peer.max_cmd_sn = pdu.cmd_sn + 1, pdu.cmd_sn + 32
                    self.commands.append(pdu)
                    await self._answer(peer, pdu)
                elif not isinstance(pdu, NopOut):
                    peer.received.append(pdu)
                    return

    async def _answer(self, peer: PlayedConnection, command: ScsiCommand) -> None:
        scripted = self.script.get(command.cdb[0])
        answer = scripted.pop(0) if scripted else self._execute(command)
        tag = command.initiator_task_tag
        if isinstance(answer, SenseData):
            await peer.reply(ScsiResponse(tag, status=2, data=response_segment(answer)))
        elif isinstance(answer, Status):
            await peer.reply(ScsiResponse(tag, status=answer))
        elif command.read:
            data = answer[: command.expected_data_transfer_length]
            short = command.expected_data_transfer_length - len(data)
            last = DataIn(tag, final=True, has_status=True, underflow=short > 0, data=data)
            last.overflow = self.surplus > 0
            last.residual_count = short or self.surplus
            await peer.reply(last)
        else:
            await peer.reply(ScsiResponse(tag))

    def _execute(self, command: ScsiCommand) -> Answer:
        cdb = command.cdb
        lba, blocks = int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big")
        match cdb[0]:
            case OpCode.INQUIRY if cdb[1] & 1 and self.serial:
                body = self.serial if cdb[2] else bytes([0, VpdPage.UNIT_SERIAL_NUMBER])
                return bytes([0, cdb[2], 0, len(body)]) + body
            case OpCode.INQUIRY if cdb[1] & 1:
                return bytes([0, cdb[2], 0, 1, 0])
            case OpCode.INQUIRY:
                return bytes([self.device_type, 0, 6, 2, 31, 0, 0, 2]) + b"example disk".ljust(28)
            case OpCode.SERVICE_ACTION_IN_16:
                return (
                    (self.blocks - 1).to_bytes(8, "big")
                    + BLOCK_BYTES.to_bytes(4, "big")
                    + bytes(20)
                )
            case OpCode.READ_CAPACITY_10:
                return (self.blocks - 1).to_bytes(4, "big") + BLOCK_BYTES.to_bytes(4, "big")
            case OpCode.MODE_SENSE_6:
                return self.mode
            case OpCode.READ_10:
                return bytes(self.content[lba * BLOCK_BYTES :][: blocks * BLOCK_BYTES])
            case OpCode.WRITE_10:
                start = lba * BLOCK_BYTES
                self.content[start : start + len(command.data)] = command.data
                return b""
            case _:
                return b""


@asynccontextmanager
async def played_lun(
    disk: Disk, *, read_only: bool = False, offered: Offer | None = None, **changes: Any
) -> AsyncIterator[LunDevice]:
    # Immediate data takes whole writes here, so the disk needs no R2T.
    offered = offered or offer(
        max_recv_data_segment_length=1 << 20,
        first_burst_length=1 << 20,
        max_burst_length=1 << 20,
    )
    async with (
        played_session(offered, first_burst_length_bytes=1 << 20, **changes) as (
            session,
            peer,
            _,
        ),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(disk.serve, peer)
        device = await LunDevice.open(session, 3, read_only=read_only)
        disk.commands.clear()
        yield device
        nursery.cancel_scope.cancel()


async def opening_fails(disk: Disk, kind: type[Exception], words: str) -> None:
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        nursery.start_soon(disk.serve, peer)
        with pytest.raises(kind, match=words):
            await LunDevice.open(session, 3, read_only=False)
        nursery.cancel_scope.cancel()


async def test_geometry_and_data() -> None:
    disk = Disk()
    async with played_lun(disk) as device:
        geometry = device.geometry
        assert (geometry.size_bytes, geometry.logical_block_bytes) == (1 << 20, 512)
        assert geometry.write_cache
        assert not geometry.read_only
        data = bytes(range(256)) * 4
        await device.write(512, data)
        await device.flush()
        buffer = bytearray(1024)
        await device.read_into(512, memoryview(buffer))
        assert buffer == data
        assert disk.content[512:1536] == data
        assert disk.commands[0].lun == 3 << 48
        assert disk.codes() == [OpCode.WRITE_10, OpCode.SYNCHRONIZE_CACHE_10, OpCode.READ_10]


async def test_fua_uses_the_bit_where_the_device_has_it() -> None:
    disk = Disk()
    async with played_lun(disk) as device:
        assert device.geometry.fua
        await device.write(0, bytes(512), fua=True)
        assert disk.codes() == [OpCode.WRITE_10]
        assert disk.commands[0].cdb[1] & 0x08


NEEDS_R2T = offer(initial_r2t=True, max_recv_data_segment_length=8192)


async def test_fua_does_not_wait_for_an_r2t() -> None:
    """Several commands with immediate data take one round trip; the disk here sends no R2T."""
    disk = Disk()
    data = bytes(range(256)) * 80
    async with played_lun(disk, offered=NEEDS_R2T) as device:
        await device.write(4096, data, fua=True)
        # In no particular order.
        assert sorted(len(command.data) for command in disk.commands) == [4096, 8192, 8192]
        assert all(command.cdb[1] & 0x08 for command in disk.commands)
        assert disk.content[4096 : 4096 + len(data)] == data


async def test_fua_in_several_commands_fails_as_one() -> None:
    disk = Disk()
    disk.script[OpCode.WRITE_10] = [b"", SenseData(SenseKey.MEDIUM_ERROR, 0x0C, 0), b""]
    async with played_lun(disk, offered=NEEDS_R2T) as device:
        with pytest.raises(ScsiError, match="medium error"):
            await device.write(0, bytes(range(256)) * 80, fua=True)
        assert len(disk.commands) == 3


async def test_fua_is_a_flush_where_the_device_lacks_the_bit() -> None:
    disk = Disk()
    disk.mode = bytes([23, 0, 0, 0, 0x08, 18, 0x04]) + bytes(17)
    async with played_lun(disk) as device:
        assert not device.geometry.fua
        await device.write(0, bytes(512), fua=True)
        assert disk.codes() == [OpCode.WRITE_10, OpCode.SYNCHRONIZE_CACHE_10]
        assert not disk.commands[0].cdb[1] & 0x08


async def test_without_a_volatile_cache_nothing_is_synchronized() -> None:
    disk = Disk()
    disk.mode = bytes([23, 0, 0, 0, 0x08, 18, 0x00]) + bytes(17)
    async with played_lun(disk) as device:
        await device.write(0, bytes(512), fua=True)
        await device.flush()
        assert disk.codes() == [OpCode.WRITE_10]


async def test_a_device_without_synchronize_cache_has_no_cache() -> None:
    disk = Disk()
    disk.script[OpCode.SYNCHRONIZE_CACHE_10] = [SenseData(SenseKey.ILLEGAL_REQUEST, 0x20, 0)]
    async with played_lun(disk) as device:
        await device.flush()
        await device.flush()
        assert disk.codes() == [OpCode.SYNCHRONIZE_CACHE_10]


async def test_a_long_request_is_split() -> None:
    disk = Disk()
    disk.content[:] = bytes(index % 249 for index in range(len(disk.content)))
    async with played_lun(disk) as device:
        step = 1 << 18
        device._geometry = type(device.geometry)(  # a device that takes 256 KiB at a time
            size_bytes=1 << 20, transfer_bytes_max=step
        )
        buffer = bytearray(1 << 20)
        await device.read_into(0, memoryview(buffer))
        assert buffer == disk.content
        assert [command.expected_data_transfer_length for command in disk.commands] == [step] * 4


@pytest.mark.parametrize(
    "answer",
    [
        SenseData(SenseKey.UNIT_ATTENTION, 0x29, 0),
        SenseData(SenseKey.NOT_READY, 0x04, 0x01),
        SenseData(SenseKey.ABORTED_COMMAND, 0x47, 0x05),
        Status.BUSY,
        Status.TASK_SET_FULL,
    ],
)
@pytest.mark.checklist(25, "11.4.7.2")
async def test_passing_conditions_are_retried(answer: Answer) -> None:
    """Checklist 25 among them: 0B/47/05 is the path's fault."""
    disk = Disk()
    disk.content[:4] = b"data"
    disk.script[OpCode.READ_10] = [answer, answer]
    async with played_lun(disk) as device:
        buffer = bytearray(512)
        await device.read_into(0, memoryview(buffer))
        assert buffer[:4] == b"data"
        assert len(disk.commands) == 3


async def test_a_busy_device_is_waited_for_and_then_given_up() -> None:
    disk = Disk()
    disk.script[OpCode.READ_10] = [Status.BUSY] * 1000
    async with played_lun(disk, command_timeout_s=0.2) as device:
        with pytest.raises(ScsiError, match="LUN 3: READ: BUSY"):
            await device.read_into(0, memoryview(bytearray(512)))


async def test_a_medium_error_is_told_in_words() -> None:
    disk = Disk()
    disk.script[OpCode.READ_10] = [SenseData(SenseKey.MEDIUM_ERROR, 0x11, 0)]
    async with played_lun(disk) as device:
        with pytest.raises(ScsiError, match=r"READ: medium error, unrecovered read error"):
            await device.read_into(0, memoryview(bytearray(512)))


async def test_good_with_too_little_data_is_no_success() -> None:
    """Checklist 23 and 26: a short read is never handed on as a full one."""
    disk = Disk()
    disk.script[OpCode.READ_10] = [b"x" * 100]
    async with played_lun(disk) as device:
        with pytest.raises(ProtocolViolation, match="100 of 512 bytes"):
            await device.read_into(0, memoryview(bytearray(512)))


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (lambda d: d.write(1, bytes(512)), Misaligned),
        (lambda d: d.read_into(0, memoryview(bytearray(100))), Misaligned),
        (lambda d: d.write(1 << 20, bytes(512)), OutOfRange),
        (lambda d: d.discard((1 << 20) - 512, 1024), OutOfRange),
    ],
)
async def test_requests_off_the_device_never_reach_it(
    request_: Callable[[LunDevice], Any], kind: type[Exception]
) -> None:
    disk = Disk()
    async with played_lun(disk) as device:
        with pytest.raises(kind):
            await request_(device)
        assert disk.commands == []


@pytest.mark.parametrize("by_mount", [True, False])
async def test_a_read_only_lun_refuses_writes(by_mount: bool) -> None:
    disk = Disk()
    if not by_mount:
        disk.mode = bytes([23, 0, 0x80, 0, 0x08, 18, 0x04]) + bytes(17)
    async with played_lun(disk, read_only=by_mount) as device:
        assert device.geometry.read_only
        with pytest.raises(WriteProtected):
            await device.write(0, bytes(512))
        with pytest.raises(WriteProtected):
            await device.write_zeroes(0, 512)
        await device.flush()
        assert disk.commands == []


async def test_zeroes_and_a_discard_without_support() -> None:
    disk = Disk()
    disk.content[:] = b"\xff" * len(disk.content)
    async with played_lun(disk) as device:
        await device.write_zeroes(512, 1024)
        await device.discard(0, 512)
        assert disk.content[:2048] == b"\xff" * 512 + bytes(1024) + b"\xff" * 512


async def test_a_lun_that_is_no_disk() -> None:
    disk = Disk()
    disk.device_type = 0x0C
    await opening_fails(disk, NotADisk, "LUN 3: not a disk .*0x0c")


@pytest.mark.parametrize("first_byte", [0x7F, 0x3F])
async def test_a_lun_that_is_not_there(first_byte: int) -> None:
    """3Fh is how LIO says it (SPC-4 §6.6.2, qualifier 001b)."""
    disk = Disk()
    disk.device_type = first_byte
    await opening_fails(disk, LunNotFound, "LUN 3: the target has no such LUN")


async def test_read_capacity_10_where_16_is_unknown() -> None:
    disk = Disk()
    disk.script[OpCode.SERVICE_ACTION_IN_16] = [SenseData(SenseKey.ILLEGAL_REQUEST, 0x20, 0)]
    async with played_lun(disk) as device:
        assert device.geometry.size_bytes == 1 << 20


async def test_more_data_than_was_asked_for_is_no_success() -> None:
    """The device counts other blocks than we do: what it sent is from another place."""
    disk = Disk()
    async with played_lun(disk) as device:
        disk.surplus = 512
        with pytest.raises(ProtocolViolation, match="residual -512 of 512"):
            await device.read_into(0, memoryview(bytearray(512)))


async def test_an_error_told_late_fails_the_next_flush_once() -> None:
    """A deferred error is that of a write which was acknowledged from the device's cache."""
    disk = Disk()
    late = SenseData(SenseKey.MEDIUM_ERROR, 0x0C, 0, deferred=True)
    disk.script[OpCode.READ_10] = [late]
    async with played_lun(disk) as device:
        with pytest.raises(ScsiError, match="medium error"):
            await device.read_into(0, memoryview(bytearray(512)))
        with pytest.raises(ScsiError, match="medium error"):
            await device.flush()
        await device.flush()
        disk.script[OpCode.SYNCHRONIZE_CACHE_10] = [late]
        with pytest.raises(ScsiError, match="medium error"):
            await device.flush()
        await device.flush()
