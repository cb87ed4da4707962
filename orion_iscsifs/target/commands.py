"""SCSI commands that move or change blocks (SBC-3 §5).

A handler takes the unit, the CDB and the Data-Out that arrived, and returns an `Outcome` at once
when the device can answer without waiting; otherwise a coroutine that a task of its own runs. A
check that fails raises `Refused`.
"""

from collections.abc import Coroutine
from typing import Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.scsi import cdb as cdbs
from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.cdb import Transfer
from orion_iscsifs.scsi.malformed import MalformedData
from orion_iscsifs.scsi.provisioning import decode_unmap
from orion_iscsifs.scsi.sense import SenseData
from orion_iscsifs.target.unit import GOOD, LogicalUnit, Outcome, Refused, check_condition

Result = Outcome | Coroutine[object, object, Outcome]

UNMAP_DESCRIPTORS_MAX: Final = 256
WRITE_SAME_BYTES_MAX: Final = 128 << 20
COMPARE_AND_WRITE_BLOCKS_MAX: Final = 255
_PATTERN_BYTES: Final = 1 << 20


# -- checks ----------------------------------------------------------------------------------------


def _in_range(unit: LogicalUnit, transfer: Transfer) -> int:
    """The byte offset of the first block."""
    if transfer.protect:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    blocks = unit.capacity.blocks
    if transfer.lba + transfer.blocks > blocks:
        bad = min(max(transfer.lba, blocks), (1 << 64) - 1)
        raise Refused(SenseData(sense.LBA_OUT_OF_RANGE.key, 0x21, 0x00, information=bad))
    return transfer.lba * unit.block_bytes


def _transfer_bytes(unit: LogicalUnit, transfer: Transfer) -> int:
    length = transfer.blocks * unit.block_bytes
    if length > unit.transfer_bytes_max:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return length


def _writable(unit: LogicalUnit) -> None:
    if unit.geometry.read_only:
        raise Refused(sense.WRITE_PROTECTED)


# -- how much Data-Out a command wants; everything that can be refused before it comes -------------


def write_length(unit: LogicalUnit, cdb: bytes) -> int:
    transfer = cdbs.transfer(cdb)
    _in_range(unit, transfer)
    _writable(unit)
    return _transfer_bytes(unit, transfer)


def verify_length(unit: LogicalUnit, cdb: bytes) -> int:
    transfer = cdbs.transfer(cdb)
    _in_range(unit, transfer)
    byte_check = transfer.flags >> 1 & 3
    if byte_check == 1:
        return _transfer_bytes(unit, transfer)
    return unit.block_bytes if byte_check == 3 else 0


def write_same_length(unit: LogicalUnit, cdb: bytes) -> int:
    no_data_out = cdb[0] == cdbs.OpCode.WRITE_SAME_16 and cdb[1] & 1
    return 0 if no_data_out else unit.block_bytes


def compare_and_write_length(unit: LogicalUnit, cdb: bytes) -> int:
    transfer = cdbs.parse_compare_and_write(cdb)
    _in_range(unit, transfer)
    _writable(unit)
    return 2 * transfer.blocks * unit.block_bytes


def unmap_length(_: LogicalUnit, cdb: bytes) -> int:
    return int.from_bytes(cdb[7:9], "big")


# -- reading ---------------------------------------------------------------------------------------


def read(unit: LogicalUnit, cdb: bytes, _: Buffer) -> Result:
    """READ(6), (10), (12), (16). FUA: the device below has no stale copy, nothing to do."""
    transfer = cdbs.transfer(cdb)
    offset = _in_range(unit, transfer)
    buffer = bytearray(_transfer_bytes(unit, transfer))
    if unit.inline is not None and unit.inline.read_now(offset, memoryview(buffer)):
        return Outcome(data=buffer)
    return _read_later(unit, offset, buffer)


async def _read_later(unit: LogicalUnit, offset: int, buffer: bytearray) -> Outcome:
    await unit.device.read_into(offset, memoryview(buffer))
    return Outcome(data=buffer)


def pre_fetch(unit: LogicalUnit, cdb: bytes, _: Buffer) -> Result:
    """PRE-FETCH(10), (16): the page cache is the host's business."""
    _in_range(unit, cdbs.transfer(cdb))
    return GOOD


def verify(unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """VERIFY(10), (12), (16); BYTCHK 1 compares all blocks, 3 each with the same one."""
    transfer = cdbs.transfer(cdb)
    offset = _in_range(unit, transfer)
    byte_check = transfer.flags >> 1 & 3
    if byte_check == 2:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    if byte_check == 0:
        return GOOD
    length = _transfer_bytes(unit, transfer)
    expected = bytes(data) * transfer.blocks if byte_check == 3 else data
    if len(expected) != length:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return _compare(unit, offset, expected)


async def _compare(unit: LogicalUnit, offset: int, expected: Buffer) -> Outcome:
    found = bytearray(len(expected))
    await unit.device.read_into(offset, memoryview(found))
    return GOOD if found == expected else _miscompare(found, expected)


def _miscompare(found: Buffer, expected: Buffer) -> Outcome:
    """INFORMATION is the offset of the first byte that differs (SBC-3 §5.2)."""
    difference = int.from_bytes(found, "big") ^ int.from_bytes(expected, "big")
    first = len(expected) - (difference.bit_length() + 7) // 8
    return check_condition(SenseData(sense.MISCOMPARE.key, 0x1D, 0x00, information=first))


# -- writing ---------------------------------------------------------------------------------------


def write(unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """WRITE(6), (10), (12), (16). Fewer data than blocks (EDTL too small): whole blocks of it."""
    transfer = cdbs.transfer(cdb)
    return _write(unit, transfer, data, fua=transfer.fua and cdb[0] != cdbs.OpCode.WRITE_6)


def write_and_verify(unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """WRITE AND VERIFY(10), (12), (16): on stable storage before the answer."""
    transfer = cdbs.transfer(cdb)
    if transfer.flags >> 1 & 3 == 2:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return _write(unit, transfer, data, fua=True)


def _write(unit: LogicalUnit, transfer: Transfer, data: Buffer, *, fua: bool) -> Result:
    offset = _in_range(unit, transfer)
    _writable(unit)
    length = _transfer_bytes(unit, transfer)
    if len(data) != length:
        whole = min(len(data), length) // unit.block_bytes * unit.block_bytes
        data = memoryview(data)[:whole]
    if not fua and unit.inline is not None and unit.inline.write_now(offset, data):
        return GOOD
    return _write_later(unit, offset, data, fua)


async def _write_later(unit: LogicalUnit, offset: int, data: Buffer, fua: bool) -> Outcome:
    await unit.device.write(offset, data, fua=fua)
    return GOOD


def synchronize_cache(unit: LogicalUnit, cdb: bytes, _: Buffer) -> Result:
    """SYNCHRONIZE CACHE(10), (16): everything, whatever range is named."""
    _in_range(unit, cdbs.transfer(cdb))
    return _flush(unit)


async def _flush(unit: LogicalUnit) -> Outcome:
    await unit.device.flush()
    return GOOD


def compare_and_write(unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """COMPARE AND WRITE. Offered on inline devices only: see `_compare_and_write`."""
    if unit.inline is None:
        raise Refused(sense.INVALID_OPCODE)
    transfer = cdbs.parse_compare_and_write(cdb)
    offset = _in_range(unit, transfer)
    _writable(unit)
    half = transfer.blocks * unit.block_bytes
    if len(data) != 2 * half:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    view = memoryview(data)
    return _compare_and_write(unit, offset, view[:half], view[half:], fua=transfer.fua)


async def _compare_and_write(
    unit: LogicalUnit, offset: int, expected: memoryview, new: memoryview, *, fua: bool
) -> Outcome:
    """Atomic because nothing awaits between the comparison and the write."""
    inline = unit.inline
    assert inline is not None
    found = bytearray(len(expected))
    while not inline.read_now(offset, memoryview(found)):
        await unit.device.read_into(offset, memoryview(found))
    if found != expected:
        return _miscompare(found, expected)
    if not inline.write_now(offset, new):
        await unit.device.write(offset, new)  # meets the same obstacle, and names it
    if fua:
        await unit.device.flush()
    return GOOD


def or_write(unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """ORWRITE(16): what is there, with the bits of `data` set. Offered on inline devices only."""
    if unit.inline is None:
        raise Refused(sense.INVALID_OPCODE)
    transfer = cdbs.transfer(cdb)
    offset = _in_range(unit, transfer)
    _writable(unit)
    if len(data) != _transfer_bytes(unit, transfer):
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return _or_write(unit, offset, data, fua=transfer.fua)


async def _or_write(unit: LogicalUnit, offset: int, data: Buffer, *, fua: bool) -> Outcome:
    """Atomic because nothing awaits between reading and writing."""
    inline = unit.inline
    assert inline is not None
    found = bytearray(len(data))
    while not inline.read_now(offset, memoryview(found)):
        await unit.device.read_into(offset, memoryview(found))
    merged = int.from_bytes(found, "big") | int.from_bytes(data, "big")
    result = merged.to_bytes(len(data), "big")
    if not inline.write_now(offset, result):
        await unit.device.write(offset, result)  # meets the same obstacle, and names it
    if fua:
        await unit.device.flush()
    return GOOD


# -- zeroes and patterns ---------------------------------------------------------------------------


def unmap(unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """UNMAP: the blocks read as zeroes afterwards (LBPRZ)."""
    if not unit.provisioning:
        raise Refused(sense.INVALID_OPCODE)
    _writable(unit)
    if cdb[1] & 1:
        raise Refused(sense.INVALID_FIELD_IN_CDB)  # ANCHOR is not offered
    if not data:
        return GOOD
    try:
        ranges = decode_unmap(data)
    except MalformedData:
        raise Refused(sense.PARAMETER_LIST_LENGTH_ERROR) from None
    if len(ranges) > UNMAP_DESCRIPTORS_MAX:
        raise Refused(sense.INVALID_FIELD_IN_PARAMETER_LIST)
    offsets = [_in_range(unit, Transfer(lba, blocks)) for lba, blocks in ranges]
    lengths = [blocks * unit.block_bytes for _, blocks in ranges]
    return _unmap(unit, list(zip(offsets, lengths, strict=True)))


async def _unmap(unit: LogicalUnit, ranges: list[tuple[int, int]]) -> Outcome:
    for offset, length in ranges:
        await unit.device.write_zeroes(offset, length, may_unmap=True)
    return GOOD


def write_same(unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """WRITE SAME(10), (16). A block of zeroes becomes `write_zeroes`, with UNMAP perhaps a hole."""
    transfer = cdbs.transfer(cdb)
    long = cdb[0] == cdbs.OpCode.WRITE_SAME_16
    if cdb[1] & 0x16 or (not long and cdb[1] & 1) or transfer.blocks == 0:
        # ANCHOR, PBDATA and LBDATA are not offered; zero blocks: WSNZ is set.
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    may_unmap = bool(cdb[1] & 0x08)
    if may_unmap and not unit.provisioning:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    offset = _in_range(unit, transfer)
    _writable(unit)
    length = transfer.blocks * unit.block_bytes
    if length > WRITE_SAME_BYTES_MAX:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    if long and cdb[1] & 1:
        return _zero(unit, offset, length, may_unmap)
    if len(data) != unit.block_bytes:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    if not any(data):
        return _zero(unit, offset, length, may_unmap)
    return _repeat(unit, offset, length, bytes(data))


async def _zero(unit: LogicalUnit, offset: int, length: int, may_unmap: bool) -> Outcome:
    await unit.device.write_zeroes(offset, length, may_unmap=may_unmap)
    return GOOD


async def _repeat(unit: LogicalUnit, offset: int, length: int, block: bytes) -> Outcome:
    pattern = memoryview(block * (min(length, _PATTERN_BYTES) // len(block)))
    end = offset + length
    while offset < end:
        piece = pattern[: end - offset]
        await unit.device.write(offset, piece)
        offset += len(piece)
    return GOOD
