"""What a device says about itself: parameter data and sense, decoded from arbitrary bytes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Final, cast

import trio
import trio.testing

from orion_iscsifs.errors import DeviceError
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.probe import probe, report_luns
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.transfer import ReadTransfer
from orion_iscsifs.scsi import capacity, cdb, inquiry, lun, mode, provisioning, sense, verdict
from orion_iscsifs.scsi.malformed import Buffer, MalformedData
from tests.hostile.draw import Draw

_U64: Final = (1 << 64) - 1
_PAGES: Final = tuple(inquiry.VpdPage)


def _decoded(decode: Callable[[Buffer], object], data: bytes) -> object:
    """The value, or None for data that its decoder refuses; the same from any kind of buffer."""
    try:
        value = decode(data)
    except MalformedData as error:
        assert str(error).isprintable()
        return None
    assert decode(memoryview(b"\xff" + data + b"\xff" * 64)[1:-64]) == value
    return value


def _stated(data: bytes, end: int, decode: Callable[[Buffer], object]) -> None:
    """What lies behind the length that the data states about itself changes nothing."""
    if len(data) > end:
        assert _decoded(decode, data[:end]) == _decoded(decode, data)


def sense_data(data: bytes) -> None:
    """Fixed, descriptor and unknown formats; with and without the length before them."""
    found = sense.decode_sense(data)
    assert 0 <= found.key <= 15
    assert 0 <= found.asc <= 255
    assert 0 <= found.ascq <= 255
    assert found.information is None or 0 <= found.information <= _U64
    assert found.describe().isprintable()
    if len(data) >= 8:
        _stated(data, 8 + data[7], sense.decode_sense)
    inside = sense.sense_of_response(data)
    assert inside == sense.decode_sense(data[2 : 2 + int.from_bytes(data[:2], "big")])
    for status in (*sense.Status, data[0] if data else 0):
        assert isinstance(verdict.judge(status, found), verdict.Action)
        assert isinstance(verdict.error("READ", status, found), DeviceError)
        assert sense.status_name(status).isprintable()
    for descriptor_format in (False, True):
        again = sense.decode_sense(sense.encode_sense(found, descriptor_format=descriptor_format))
        assert (again.key, again.asc, again.ascq) == (found.key, found.asc, found.ascq)


def vital_product_data(data: bytes) -> None:
    """INQUIRY and its pages; each page twice, as it came and under the right page code."""
    identity = _decoded(inquiry.decode_inquiry, data)
    if isinstance(identity, inquiry.StandardInquiry):
        shown = (identity.vendor, identity.product, identity.revision)
        assert all(text.isprintable() and len(text) <= 16 for text in shown)
    for page in _PAGES:
        for page_data in (data, data[:1] + bytes((page,)) + data[2:]):
            _page(page, page_data)


def _page(page: int, data: bytes) -> None:
    value = _decoded(_DECODERS[page], data)
    if value is None:
        assert len(data) < 4 or data[1] != page
        return
    _stated(data, 4 + int.from_bytes(data[2:4], "big"), _DECODERS[page])
    match value:
        case str():
            assert value.isprintable()
        case inquiry.BlockLimits():
            assert 0 <= value.write_same_blocks_max <= _U64
        case list():
            assert sum(4 + len(item.value) for item in value) <= len(data)
            best = inquiry.best_designator(value)
            assert best is None or best in value
            assert all(item.text.isprintable() for item in value)


_DECODERS: Final[dict[int, Callable[[Buffer], object]]] = {
    inquiry.VpdPage.SUPPORTED: inquiry.decode_supported_pages,
    inquiry.VpdPage.UNIT_SERIAL_NUMBER: inquiry.decode_serial_number,
    inquiry.VpdPage.DEVICE_IDENTIFICATION: inquiry.decode_designators,
    inquiry.VpdPage.BLOCK_LIMITS: inquiry.decode_block_limits,
    inquiry.VpdPage.BLOCK_DEVICE_CHARACTERISTICS: inquiry.decode_rotation_rate,
    inquiry.VpdPage.LOGICAL_BLOCK_PROVISIONING: inquiry.decode_provisioning,
}


def parameter_data(data: bytes) -> None:
    """Capacities, mode pages, LUN lists and ranges of blocks."""
    for decode in (capacity.decode_capacity_10, capacity.decode_capacity_16):
        found = _decoded(decode, data)
        if isinstance(found, capacity.Capacity):
            assert 0 < found.size_bytes < 1 << 63
            assert 512 <= found.block_bytes <= found.physical_block_bytes <= 1 << 16
            assert found.block_bytes.bit_count() == 1
    _decoded(mode.decode_mode_sense_6, data)
    _decoded(mode.decode_mode_sense_10, data)
    if len(data) >= 2:
        _stated(data, max(4, 1 + data[0]), mode.decode_mode_sense_6)
        stated = 2 + int.from_bytes(data[:2], "big")
        _stated(data, max(8, stated), mode.decode_mode_sense_10)
    luns = lun.decode_report_luns(data)
    assert 8 * len(luns) <= len(data)
    assert 8 <= lun.report_luns_length(data) <= 8 + 0xFFFF_FFFF
    for number in map(lun.decode_lun, luns):
        assert number is None or 0 <= number <= lun.LUN_MAX
    _ranges(data)


def _ranges(data: bytes) -> None:
    for decode in (provisioning.decode_unmap, provisioning.decode_lba_status):
        found = _decoded(decode, data)
        if isinstance(found, list):
            assert 16 * len(found) <= max(0, len(data) - 8)
    block = data[:16].ljust(16, b"\0")
    transfer = cdb.transfer(block)
    assert 0 <= transfer.lba <= _U64
    assert 0 <= transfer.blocks <= 0xFFFF_FFFF
    cdb.parse_compare_and_write(block)
    cdb.parse_inquiry(block)
    cdb.parse_mode_sense(block)
    cdb.parse_report_supported_operation_codes(block)


# -- a whole device that lies ----------------------------------------------------------------------


class _Liar:
    """Answers every command with drawn bytes and, now and then, a drawn status."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self.commands = 0
        self.is_one_of_several = False
        self.queue_depth = 32
        self.nexus = SimpleNamespace(config=SimpleNamespace(command_timeout_s=30.0))

    async def execute(self, task: Task) -> None:
        await trio.lowlevel.checkpoint()
        draw = self._draw
        self.commands += 1
        assert self.commands < 1000, "a device that keeps us busy for ever"
        task.status = draw.choice(tuple(sense.Status)) if draw.chance(4) else 0
        task.sense = draw.block() if task.status else b""
        if task.read_into is not None:
            data = _believable(task.cdb, draw)[: len(task.read_into)]
            task.read_into[: len(data)] = data
            task.read = ReadTransfer(len(task.read_into), received_bytes=len(data))


def _believable(block: bytes, draw: Draw) -> bytes:
    """Drawn bytes, mostly with the page code and the length that make them worth a look."""
    data = bytearray(draw.block())
    if block[0] == cdb.OpCode.INQUIRY and block[1] & 1 and len(data) >= 4 and not draw.chance(4):
        data[1:4] = (block[2], 0, len(data) - 4)
        if block[2] == inquiry.VpdPage.SUPPORTED:
            data[4:] = bytes(_PAGES)
            data[3] = len(_PAGES)
    elif block[0] == cdb.OpCode.INQUIRY and data and not draw.chance(4):
        data[0] = 0
    elif block[0] == cdb.OpCode.SERVICE_ACTION_IN_16 and len(data) >= 12 and not draw.chance(4):
        data[0], data[8:12] = 0, (512).to_bytes(4, "big")
    return bytes(data)


def probing(data: bytes) -> None:
    """A LUN is described with a geometry that can be used, or refused with a DeviceError."""
    draw = Draw(data)
    read_only = draw.flag()
    unit = LogicalUnit(cast("Session", _Liar(draw)), 0)

    async def ask() -> None:
        try:
            info = await probe(unit)
        except DeviceError as error:
            assert "\n" not in str(error)
        else:
            geometry = info.geometry(read_only=read_only)
            block = geometry.logical_block_bytes
            assert block <= geometry.transfer_bytes_max <= 1 << 20
            assert block <= geometry.optimal_transfer_bytes <= geometry.transfer_bytes_max
            assert geometry.transfer_bytes_max % block == 0
            assert geometry.discard_granularity_bytes % block == 0
            assert info.name.isprintable()
        try:
            numbers = await report_luns(unit)
        except DeviceError:
            return
        assert all(0 <= number <= lun.LUN_MAX for number in numbers)

    trio.run(ask, clock=trio.testing.MockClock(autojump_threshold=0))
