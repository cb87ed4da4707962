"""Status bytes and sense data (SAM-5 §5.3, SPC-4 §4.5), both formats, both roles."""

import enum
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.scsi.additional_sense import words
from orion_iscsifs.scsi.malformed import Buffer, field


class Status(enum.IntEnum):
    """SAM status codes."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    ACA_ACTIVE = 0x30
    TASK_ABORTED = 0x40


class SenseKey(enum.IntEnum):
    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    BLANK_CHECK = 0x8
    VENDOR_SPECIFIC = 0x9
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    VOLUME_OVERFLOW = 0xD
    MISCOMPARE = 0xE
    COMPLETED = 0xF


@dataclass(frozen=True, slots=True)
class SenseData:
    """Decoded sense. `information` is mostly the LBA that failed, None if not valid."""

    key: int = SenseKey.NO_SENSE
    asc: int = 0
    ascq: int = 0
    information: int | None = None
    deferred: bool = False
    """The error belongs to an earlier command (write-back cache)."""
    cdb_field: int | None = None
    """Which byte of the CDB is invalid (SPC-4 §4.5.2.4.2). Only ever sent: it helps nobody here."""

    def describe(self) -> str:
        """In words, with the three numbers that every vendor's manual lists."""
        code = f"{self.key:X}/{self.asc:02X}/{self.ascq:02X}"
        return f"{key_name(self.key)}, {words(self.asc, self.ascq)} ({code})"


def key_name(key: int) -> str:
    """`illegal request` for 5."""
    try:
        return SenseKey(key).name.replace("_", " ").lower()
    except ValueError:
        return f"sense key {key:X}"


def status_name(status: int) -> str:
    """`TASK SET FULL` for 28h."""
    try:
        return Status(status).name.replace("_", " ")
    except ValueError:
        return f"status {status:02X}h"


_INFORMATION_DESCRIPTOR: Final = 0x00
_SENSE_KEY_SPECIFIC_DESCRIPTOR: Final = 0x02
_FIELD_IN_CDB: Final = 0xC0
"""SKSV and C/D: the field pointer is valid, and points into the CDB."""
_FIXED_HEADER_BYTES: Final = 8


def decode_sense(data: Buffer) -> SenseData:
    """Fixed (70h, 71h) or descriptor format (72h, 73h); what is missing counts as zero."""
    code = field(data, 0, 1) & 0x7F
    if code in {0x72, 0x73}:
        return SenseData(
            key=field(data, 1, 1) & 0x0F,
            asc=field(data, 2, 1),
            ascq=field(data, 3, 1),
            information=_information(data),
            deferred=code == 0x73,
        )
    if code in {0x70, 0x71}:
        valid = bool(data[0] & 0x80) and len(data) >= 7
        # ADDITIONAL SENSE LENGTH says where the sense ends; what follows is not part of it.
        data = data[: _FIXED_HEADER_BYTES + field(data, 7, 1)]
        return SenseData(
            key=field(data, 2, 1) & 0x0F,
            asc=field(data, 12, 1),
            ascq=field(data, 13, 1),
            information=field(data, 3, 4) if valid else None,
            deferred=code == 0x71,
        )
    return SenseData()


def _information(data: Buffer) -> int | None:
    """The information descriptor (SPC-4 §4.5.2.2), if it is there and complete."""
    end = min(len(data), 8 + field(data, 7, 1))
    offset = 8
    while offset + 12 <= end:
        if data[offset] == _INFORMATION_DESCRIPTOR and data[offset + 1] >= 10:
            return field(data, offset + 4, 8) if data[offset + 2] & 0x80 else None
        offset += 2 + data[offset + 1]
    return None


def encode_sense(sense: SenseData, *, descriptor_format: bool = False) -> bytes:
    """18 bytes of fixed format, which leaves out an LBA beyond 32 bits, or descriptor format."""
    information = sense.information
    if descriptor_format:
        tail = b""
        if information is not None:
            tail = bytes((_INFORMATION_DESCRIPTOR, 10, 0x80, 0)) + information.to_bytes(8, "big")
        if sense.cdb_field is not None:
            tail += bytes((_SENSE_KEY_SPECIFIC_DESCRIPTOR, 6, 0, 0, _FIELD_IN_CDB))
            tail += sense.cdb_field.to_bytes(2, "big") + bytes(1)
        head = bytes((0x72 + sense.deferred, sense.key, sense.asc, sense.ascq, 0, 0, 0, len(tail)))
        return head + tail
    data = bytearray(18)
    data[0] = 0x70 + sense.deferred
    data[2] = sense.key
    data[7] = 10
    data[12], data[13] = sense.asc, sense.ascq
    if information is not None and information <= 0xFFFF_FFFF:
        data[0] |= 0x80
        data[3:7] = information.to_bytes(4, "big")
    if sense.cdb_field is not None:
        data[15] = _FIELD_IN_CDB
        data[16:18] = sense.cdb_field.to_bytes(2, "big")
    return bytes(data)


# -- inside a SCSI Response ------------------------------------------------------------------------


def sense_of_response(segment: Buffer) -> SenseData:
    """The sense in a SCSI Response's data segment: SenseLength first (RFC 7143 §11.4.7).

    A SenseLength beyond the segment is cut to it; an empty segment is NO SENSE.
    """
    return decode_sense(segment[2 : 2 + field(segment, 0, 2)])


def response_segment(sense: SenseData) -> bytes:
    """The data segment that carries `sense`."""
    data = encode_sense(sense)
    return len(data).to_bytes(2, "big") + data


# -- what a disk says most often -------------------------------------------------------------------

INVALID_OPCODE: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x20, 0x00)
LBA_OUT_OF_RANGE: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x21, 0x00)
INVALID_FIELD_IN_CDB: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x24, 0x00)
LUN_NOT_SUPPORTED: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x25, 0x00)
PARAMETER_LIST_LENGTH_ERROR: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x1A, 0x00)
INVALID_FIELD_IN_PARAMETER_LIST: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x26, 0x00)
WRITE_PROTECTED: Final = SenseData(SenseKey.DATA_PROTECT, 0x27, 0x00)
SPACE_ALLOCATION_FAILED: Final = SenseData(SenseKey.DATA_PROTECT, 0x27, 0x07)
POWER_ON: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x29, 0x00)
LUN_RESET: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x29, 0x03)
CAPACITY_CHANGED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)
REPORTED_LUNS_CHANGED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x3F, 0x0E)
UNRECOVERED_READ_ERROR: Final = SenseData(SenseKey.MEDIUM_ERROR, 0x11, 0x00)
WRITE_ERROR: Final = SenseData(SenseKey.MEDIUM_ERROR, 0x0C, 0x00)
MISCOMPARE: Final = SenseData(SenseKey.MISCOMPARE, 0x1D, 0x00)
UNEXPECTED_UNSOLICITED_DATA: Final = SenseData(SenseKey.ABORTED_COMMAND, 0x0C, 0x0C)
NOT_ENOUGH_UNSOLICITED_DATA: Final = SenseData(SenseKey.ABORTED_COMMAND, 0x0C, 0x0D)
PROTOCOL_SERVICE_CRC_ERROR: Final = SenseData(SenseKey.ABORTED_COMMAND, 0x47, 0x05)
NOT_READY_STOPPED: Final = SenseData(SenseKey.NOT_READY, 0x04, 0x02)
INTERNAL_TARGET_FAILURE: Final = SenseData(SenseKey.HARDWARE_ERROR, 0x44, 0x00)
MEDIUM_REMOVAL_PREVENTED: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x53, 0x02)
