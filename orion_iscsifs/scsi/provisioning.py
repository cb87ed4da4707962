"""The UNMAP parameter list (SBC-3 §5.28)."""

from collections.abc import Sequence
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
