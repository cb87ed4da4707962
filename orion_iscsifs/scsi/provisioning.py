"""Logical block provisioning (SBC-3 §4.7): UNMAP lists, GET LBA STATUS data, whole granules."""

import enum
from collections.abc import Iterator, Sequence
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


# -- what can be unmapped --------------------------------------------------------------------------


class Form(enum.Enum):
    """A command that unmaps or zeroes."""

    UNMAP = "UNMAP"
    WRITE_SAME_16_UNMAP = "WRITE SAME(16) with UNMAP"
    WRITE_SAME_10_UNMAP = "WRITE SAME(10) with UNMAP"
    WRITE_SAME_16 = "WRITE SAME(16)"
    WRITE_SAME_10 = "WRITE SAME(10)"


@dataclass(frozen=True, slots=True)
class Granules:
    """OPTIMAL UNMAP GRANULARITY and UNMAP GRANULARITY ALIGNMENT (SBC-3 §6.6.3), in blocks.

    A granule begins at every LBA of the form n x `blocks` + `alignment`. Devices may ignore a
    request for less than a whole one.
    """

    blocks: int = 1
    alignment: int = 0

    @classmethod
    def of(cls, granularity: int, alignment: int | None) -> "Granules":
        """From what the device says; zeroes and alignments beyond a granule are made harmless."""
        blocks = max(granularity, 1)
        return cls(blocks, (alignment or 0) % blocks)

    def inside(self, start: int, end: int) -> tuple[int, int]:
        """The whole granules of the LBAs `start` to `end` (exclusive); empty: start == end."""
        first = -(-(start - self.alignment) // self.blocks) * self.blocks + self.alignment
        last = (end - self.alignment) // self.blocks * self.blocks + self.alignment
        return (first, last) if first < last else (start, start)

    def cut(self, start: int, end: int, blocks_max: int) -> Iterator[tuple[int, int]]:
        """(LBA, number of blocks) of commands of at most `blocks_max`, cut between granules.

        A limit below one granule is kept to all the same: the device has asked for it.
        """
        while start < end:
            stop = min(start + blocks_max, end)
            if stop < end:
                aligned = stop - (stop - self.alignment) % self.blocks
                stop = aligned if aligned > start else stop
            yield start, stop - start
            start = stop
