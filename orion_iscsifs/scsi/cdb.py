"""Command descriptor blocks (SPC-4 §6, SBC-3 §5): builders and parsers.

A builder returns 16 bytes, zero padded: the CDB field of a SCSI Command PDU (RFC 7143 §11.3.5).
READ, WRITE and their kin share one layout per CDB length, told by the top three bits of the
operation code (SPC-4 §4.2.5.1); `transfer()` parses them all.
"""

import enum
from dataclasses import dataclass
from struct import Struct
from typing import Final

from orion_iscsifs.scsi.malformed import Buffer, field

CDB_BYTES: Final = 16


class OpCode(enum.IntEnum):
    """Operation codes of a direct-access block device."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    WRITE_AND_VERIFY_10 = 0x2E
    VERIFY_10 = 0x2F
    PRE_FETCH_10 = 0x34
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    PERSISTENT_RESERVE_IN = 0x5E
    PERSISTENT_RESERVE_OUT = 0x5F
    READ_16 = 0x88
    COMPARE_AND_WRITE = 0x89
    WRITE_16 = 0x8A
    ORWRITE_16 = 0x8B
    WRITE_AND_VERIFY_16 = 0x8E
    VERIFY_16 = 0x8F
    PRE_FETCH_16 = 0x90
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    MAINTENANCE_IN = 0xA3
    MAINTENANCE_OUT = 0xA4
    READ_12 = 0xA8
    WRITE_12 = 0xAA
    WRITE_AND_VERIFY_12 = 0xAE
    VERIFY_12 = 0xAF


class ServiceAction(enum.IntEnum):
    """Service actions, each of the operation code in its comment."""

    REPORT_SUPPORTED_OPERATION_CODES = 0x0C  # MAINTENANCE IN
    READ_CAPACITY_16 = 0x10  # SERVICE ACTION IN(16)
    GET_LBA_STATUS = 0x12  # SERVICE ACTION IN(16)


# Group number and CONTROL are zero throughout.
_TRANSFER_10: Final = Struct(">BBIxHx6x")
_TRANSFER_16: Final = Struct(">BBQIxx")
_ALLOCATION_10: Final = Struct(">BBB4xHx6x")

DPO: Final = 0x10
FUA: Final = 0x08
_LBA_10_MAX: Final = 0xFFFF_FFFF
_BLOCKS_10_MAX: Final = 0xFFFF


# -- data transfer ---------------------------------------------------------------------------------


def read(lba: int, blocks: int, *, fua: bool = False, dpo: bool = False) -> bytes:
    """READ(10) where it reaches, READ(16) elsewhere; `lba` and `blocks` in logical blocks."""
    flags = fua << 3 | dpo << 4
    if blocks <= _BLOCKS_10_MAX and lba <= _LBA_10_MAX:
        return _TRANSFER_10.pack(0x28, flags, lba, blocks)
    return _TRANSFER_16.pack(0x88, flags, lba, blocks)


def write(lba: int, blocks: int, *, fua: bool = False, dpo: bool = False) -> bytes:
    """WRITE(10) where it reaches, WRITE(16) elsewhere."""
    flags = fua << 3 | dpo << 4
    if blocks <= _BLOCKS_10_MAX and lba <= _LBA_10_MAX:
        return _TRANSFER_10.pack(0x2A, flags, lba, blocks)
    return _TRANSFER_16.pack(0x8A, flags, lba, blocks)


def verify(lba: int, blocks: int, *, byte_check: int = 0) -> bytes:
    """VERIFY(10) or (16). `byte_check`: BYTCHK; 0 needs no data."""
    flags = byte_check << 1
    if blocks <= _BLOCKS_10_MAX and lba <= _LBA_10_MAX:
        return _TRANSFER_10.pack(OpCode.VERIFY_10, flags, lba, blocks)
    return _TRANSFER_16.pack(OpCode.VERIFY_16, flags, lba, blocks)


def synchronize_cache(lba: int = 0, blocks: int = 0, *, immediate: bool = False) -> bytes:
    """SYNCHRONIZE CACHE(10) or (16); zero blocks: to the end of the medium."""
    flags = immediate << 1
    if blocks <= _BLOCKS_10_MAX and lba <= _LBA_10_MAX:
        return _TRANSFER_10.pack(OpCode.SYNCHRONIZE_CACHE_10, flags, lba, blocks)
    return _TRANSFER_16.pack(OpCode.SYNCHRONIZE_CACHE_16, flags, lba, blocks)


def write_same(lba: int, blocks: int, *, unmap: bool = False, no_data_out: bool = False) -> bytes:
    """WRITE SAME(10) or (16). `no_data_out` (NDOB, zeroes without a data buffer) exists in 16."""
    if not no_data_out and 0 < blocks <= _BLOCKS_10_MAX and lba <= _LBA_10_MAX:
        return _TRANSFER_10.pack(OpCode.WRITE_SAME_10, unmap << 3, lba, blocks)
    return write_same_16(lba, blocks, unmap=unmap, no_data_out=no_data_out)


def write_same_16(
    lba: int, blocks: int, *, unmap: bool = False, no_data_out: bool = False
) -> bytes:
    """WRITE SAME(16), however few the blocks: a device may have the one and not the other."""
    return _TRANSFER_16.pack(OpCode.WRITE_SAME_16, unmap << 3 | no_data_out, lba, blocks)


def compare_and_write(lba: int, blocks: int, *, fua: bool = False) -> bytes:
    """COMPARE AND WRITE; the data is `blocks` to compare, then as many to write."""
    return Struct(">BBQ3xBxx").pack(OpCode.COMPARE_AND_WRITE, fua << 3, lba, blocks)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What READ, WRITE, VERIFY, SYNCHRONIZE CACHE and WRITE SAME have in common.

    `flags` is byte 1 as it came: RDPROTECT/WRPROTECT in bits 7-5, DPO, FUA and so on.
    """

    lba: int
    blocks: int
    flags: int = 0
    group: int = 0

    @property
    def fua(self) -> bool:
        return bool(self.flags & FUA)

    @property
    def dpo(self) -> bool:
        return bool(self.flags & DPO)

    @property
    def protect(self) -> int:
        return self.flags >> 5


def transfer(cdb: Buffer) -> Transfer:
    """Parse any CDB of the read/write family by its length class. `cdb` has 16 bytes."""
    length_class = cdb[0] >> 5
    if length_class == 0:
        # READ(6) and WRITE(6): 21-bit address; 0 blocks means 256 (SBC-3 §5.7).
        lba = (cdb[1] & 0x1F) << 16 | cdb[2] << 8 | cdb[3]
        return Transfer(lba, cdb[4] or 256)
    if length_class == 4:
        return Transfer(field(cdb, 2, 8), field(cdb, 10, 4), cdb[1], cdb[14])
    if length_class == 5:
        return Transfer(field(cdb, 2, 4), field(cdb, 6, 4), cdb[1], cdb[10])
    return Transfer(field(cdb, 2, 4), field(cdb, 7, 2), cdb[1], cdb[6])


def parse_compare_and_write(cdb: Buffer) -> Transfer:
    """Here the NUMBER OF LOGICAL BLOCKS is one byte (SBC-3 §5.2)."""
    return Transfer(field(cdb, 2, 8), cdb[13], cdb[1], cdb[14])


def unmap(parameter_list_length: int, *, anchor: bool = False) -> bytes:
    """UNMAP; the list itself is `provisioning.encode_unmap`."""
    return _ALLOCATION_10.pack(OpCode.UNMAP, anchor, 0, parameter_list_length)


# -- asking the device -----------------------------------------------------------------------------


def test_unit_ready() -> bytes:
    return bytes(CDB_BYTES)


def inquiry(page: int | None = None, allocation_length: int = 255) -> bytes:
    """Standard INQUIRY, or the vital product data page `page` (EVPD)."""
    return Struct(">BBBHx10x").pack(
        OpCode.INQUIRY, page is not None, page if page is not None else 0, allocation_length
    )


@dataclass(frozen=True, slots=True)
class Inquiry:
    evpd: bool
    page: int
    allocation_length: int


def parse_inquiry(cdb: Buffer) -> Inquiry:
    return Inquiry(bool(cdb[1] & 1), cdb[2], field(cdb, 3, 2))


def read_capacity_10() -> bytes:
    return bytes((OpCode.READ_CAPACITY_10,)).ljust(CDB_BYTES, b"\0")


def read_capacity_16(allocation_length: int = 32) -> bytes:
    return Struct(">BB8xIxx").pack(
        OpCode.SERVICE_ACTION_IN_16, ServiceAction.READ_CAPACITY_16, allocation_length
    )


def get_lba_status(lba: int, allocation_length: int = 24) -> bytes:
    """24 bytes hold one descriptor."""
    return Struct(">BBQIxx").pack(
        OpCode.SERVICE_ACTION_IN_16, ServiceAction.GET_LBA_STATUS, lba, allocation_length
    )


def mode_sense_6(page: int, *, subpage: int = 0, allocation_length: int = 255) -> bytes:
    """MODE SENSE(6), current values, without block descriptors (DBD)."""
    return Struct(">BBBBBx10x").pack(OpCode.MODE_SENSE_6, 0x08, page, subpage, allocation_length)


def mode_sense_10(page: int, *, subpage: int = 0, allocation_length: int = 512) -> bytes:
    """MODE SENSE(10), current values, without block descriptors (DBD)."""
    return Struct(">BBBB3xHx6x").pack(OpCode.MODE_SENSE_10, 0x08, page, subpage, allocation_length)


@dataclass(frozen=True, slots=True)
class ModeSense:
    page: int
    subpage: int
    page_control: int
    """0 current, 1 changeable, 2 default, 3 saved values."""
    no_block_descriptors: bool
    long_lba_accepted: bool
    allocation_length: int
    long_header: bool
    """MODE SENSE(10): the 8-byte header."""


def parse_mode_sense(cdb: Buffer) -> ModeSense:
    """MODE SENSE(6) or (10)."""
    long_header = cdb[0] == OpCode.MODE_SENSE_10
    return ModeSense(
        page=cdb[2] & 0x3F,
        subpage=cdb[3],
        page_control=cdb[2] >> 6,
        no_block_descriptors=bool(cdb[1] & 0x08),
        long_lba_accepted=long_header and bool(cdb[1] & 0x10),
        allocation_length=field(cdb, 7, 2) if long_header else cdb[4],
        long_header=long_header,
    )


def request_sense(allocation_length: int = 252, *, descriptor_format: bool = False) -> bytes:
    return Struct(">BBxxBx10x").pack(OpCode.REQUEST_SENSE, descriptor_format, allocation_length)


def report_luns(allocation_length: int = 4096, *, select_report: int = 0) -> bytes:
    """REPORT LUNS; `select_report` 0 leaves out, 2 includes well known logical units."""
    return Struct(">BxB3xIxx4x").pack(OpCode.REPORT_LUNS, select_report, allocation_length)


def start_stop_unit(*, start: bool, immediate: bool = False) -> bytes:
    return Struct(">BBxxBx10x").pack(OpCode.START_STOP_UNIT, immediate, start)


def prevent_allow_medium_removal(*, prevent: bool) -> bytes:
    return Struct(">B3xBx10x").pack(OpCode.PREVENT_ALLOW_MEDIUM_REMOVAL, prevent)


def report_supported_operation_codes(
    opcode: int | None = None, service_action: int | None = None, allocation_length: int = 4096
) -> bytes:
    """All commands, or one by operation code and, where it has one, service action."""
    options = 0 if opcode is None else 1 if service_action is None else 2
    return Struct(">BBBBHIxx4x").pack(
        OpCode.MAINTENANCE_IN,
        ServiceAction.REPORT_SUPPORTED_OPERATION_CODES,
        options,
        opcode or 0,
        service_action or 0,
        allocation_length,
    )


@dataclass(frozen=True, slots=True)
class ReportSupportedOperationCodes:
    options: int
    """0 all, 1 one operation code, 2 one with its service action, 3 either (SPC-4 §6.35)."""
    return_timeouts: bool
    opcode: int
    service_action: int
    allocation_length: int


def parse_report_supported_operation_codes(cdb: Buffer) -> ReportSupportedOperationCodes:
    return ReportSupportedOperationCodes(
        options=cdb[2] & 7,
        return_timeouts=bool(cdb[2] & 0x80),
        opcode=cdb[3],
        service_action=field(cdb, 4, 2),
        allocation_length=field(cdb, 6, 4),
    )
