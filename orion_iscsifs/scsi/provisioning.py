"""The UNMAP parameter list and GET LBA STATUS data (SBC-3 §5.28, §5.5)."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from orion_iscsifs.scsi.malformed import Buffer, MalformedData, field

_DESCRIPTOR: Final = Struct(">QI4x")
HEADER_BYTES: Final = 8
DESCRIPTOR_BYTES: Final = 16


def encode_unmap(ranges: Sequence[tuple[int, int]]) -> bytes:
    """`ranges` are (first LBA, number of blocks)."""
    body = b"".join(_DESCRIPTOR.pack(lba, blocks) for lba, blocks in ranges)
    return (
        (len(body) + HEADER_BYTES - 2).to_bytes(2, "big")
        + len(body).to_bytes(2, "big")
        + bytes(4)
        + body
    )


def decode_unmap(data: Buffer) -> list[tuple[int, int]]:
    """The (first LBA, number of blocks) of a list; an incomplete last descriptor is dropped."""
    if len(data) < HEADER_BYTES:
        raise MalformedData("UNMAP", f"a parameter list of {len(data)} bytes has no header")
    end = min(len(data), HEADER_BYTES + field(data, 2, 2))
    return [
        (field(data, offset, 8), field(data, offset + 8, 4))
        for offset in range(HEADER_BYTES, end - DESCRIPTOR_BYTES + 1, DESCRIPTOR_BYTES)
    ]


# -- GET LBA STATUS --------------------------------------------------------------------------------


class ProvisioningStatus(enum.IntEnum):
    MAPPED = 0
    DEALLOCATED = 1
    ANCHORED = 2


@dataclass(frozen=True, slots=True)
class LbaStatus:
    """One descriptor: `blocks` from `lba` on share `status`."""

    lba: int
    blocks: int
    status: int


_LBA_STATUS: Final = Struct(">QIB3x")


def encode_lba_status(extents: Sequence[LbaStatus]) -> bytes:
    body = b"".join(_LBA_STATUS.pack(e.lba, e.blocks, e.status) for e in extents)
    return (len(body) + 4).to_bytes(4, "big") + bytes(4) + body


def decode_lba_status(data: Buffer) -> list[LbaStatus]:
    """Every complete descriptor."""
    end = min(len(data), 4 + field(data, 0, 4))
    return [
        LbaStatus(
            field(data, offset, 8), field(data, offset + 8, 4), field(data, offset + 12, 1) & 0x0F
        )
        for offset in range(HEADER_BYTES, end - DESCRIPTOR_BYTES + 1, DESCRIPTOR_BYTES)
    ]
