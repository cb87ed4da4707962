"""Logical unit numbers: the 64-bit structure of SAM-5 §4.7 and REPORT LUNS data (SPC-4 §6.33)."""

from collections.abc import Sequence
from typing import Final

from orion_iscsifs.scsi.malformed import Buffer, field

LUN_MAX: Final = 0x3FFF
_FLAT: Final = 0x4000
_PERIPHERAL_MAX: Final = 255


def encode_lun(number: int) -> int:
    """The 8 bytes as one integer: peripheral addressing to 255, flat space (0x40) above."""
    assert 0 <= number <= LUN_MAX
    return (number if number <= _PERIPHERAL_MAX else _FLAT | number) << 48


def decode_lun(lun: int) -> int | None:
    """The number of a single-level LUN, or None for an address that we don't understand.

    Peripheral and flat addressing are both read, whatever the size of the number: targets use
    flat addressing for small numbers too.
    """
    if lun & 0xFFFF_FFFF_FFFF:
        return None
    first = lun >> 48
    method = first >> 14
    if method == 0 and first <= _PERIPHERAL_MAX:
        return first
    return first & LUN_MAX if method == 1 else None


def encode_report_luns(numbers: Sequence[int]) -> bytes:
    luns = b"".join(encode_lun(number).to_bytes(8, "big") for number in numbers)
    return len(luns).to_bytes(4, "big") + bytes(4) + luns


def decode_report_luns(data: Buffer) -> list[int]:
    """The 64-bit LUNs in the data, as many as are really there; see `decode_lun` for numbers."""
    end = min(len(data), 8 + field(data, 0, 4))
    return [field(data, offset, 8) for offset in range(8, end - 7, 8)]


def report_luns_length(data: Buffer) -> int:
    """The allocation length that fetches the whole list."""
    return 8 + field(data, 0, 4)
