"""Records of the log: a header of 64 bytes, the payload, zeroes up to the next 512 bytes. Pure.

Every record repeats the store's id and carries the next sequence number, so that bytes of an
earlier use of the same place are never taken for a record. The header has its own checksum: a
reader may skip payloads. docs/log-format.md has the layout byte by byte.
"""

import enum
from dataclasses import dataclass
from struct import Struct
from typing import Final

import crc32c

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.errors import OrionError

MAGIC: Final = b"OLR1"
HEADER_BYTES: Final = 64
ALIGN_BYTES: Final = 512
"""Records begin at multiples of this."""
PAYLOAD_MAX_BYTES: Final = 1 << 20
_HEADER: Final = Struct("<4sBBHQQQQQIII")
"""Magic, kind, flags, reserved, store id, seq, durable seq, epoch, offset, length, stored bytes,
checksum of the payload. The header's own checksum follows."""
_CHECKSUM: Final = Struct("<I")
assert _HEADER.size + _CHECKSUM.size == HEADER_BYTES


class Kind(enum.IntEnum):
    """What a record says."""

    DATA = 1
    """The range holds the payload."""
    ZERO = 2
    """The range reads as zeroes. No payload."""
    DESTAGED = 3
    """Every epoch up to this one is durable on the target. No range, no payload."""


class Flag(enum.IntFlag):
    """Of a record."""

    NONE = 0
    MAY_UNMAP = 1
    """ZERO: the space may be given back."""


@dataclass(frozen=True, slots=True)
class Header:
    """One record without its payload."""

    kind: Kind
    seq: int
    durable: int
    """Every record with a sequence number below this was durable when this one was written."""
    epoch: int
    offset: int = 0
    """On the device, in bytes."""
    length: int = 0
    """On the device, in bytes."""
    stored: int = 0
    """Bytes of payload."""
    payload_checksum: int = 0
    flags: Flag = Flag.NONE

    @property
    def size_bytes(self) -> int:
        """Of the whole record, padding included."""
        return record_bytes(self.stored)


class NoRecord(OrionError):
    """There is no record of this store here: what the bytes are is not known."""


class BrokenRecord(NoRecord):
    """There was one, and it is damaged. `header`: what it says of itself, if that is sound."""

    header: Header | None = None


class UnknownRecord(OrionError):
    """A whole record that only a newer version understands."""


def record_bytes(stored: int) -> int:
    """The size of a record with `stored` bytes of payload."""
    return (HEADER_BYTES + stored + ALIGN_BYTES - 1) & -ALIGN_BYTES


def checksum(payload: Buffer) -> int:
    """CRC32C, as iSCSI has it (RFC 7143 §13.1)."""
    return crc32c.crc32c(payload)


def encode(store_id: int, header: Header) -> bytes:
    """The 64 bytes."""
    head = _HEADER.pack(
        MAGIC,
        header.kind,
        header.flags,
        0,
        store_id,
        header.seq,
        header.durable,
        header.epoch,
        header.offset,
        header.length,
        header.stored,
        header.payload_checksum,
    )
    return head + _CHECKSUM.pack(crc32c.crc32c(head))


def decode(store_id: int, source: Buffer) -> Header:
    """The header at the start of `source`.

    Raises NoRecord if there is none of this store, BrokenRecord if there is a damaged one, and
    UnknownRecord for a kind or a flag that this version does not know.
    """
    view = memoryview(source)[:HEADER_BYTES]
    if len(view) < HEADER_BYTES or bytes(view[:4]) != MAGIC:
        raise NoRecord("no record")
    fields = _HEADER.unpack_from(view)
    _, kind, flags, _, owner, seq, durable, epoch, offset, length, stored, payload_checksum = fields
    if _CHECKSUM.unpack_from(view, _HEADER.size)[0] != crc32c.crc32c(view[: _HEADER.size]):
        raise BrokenRecord("a damaged header")
    if owner != store_id:
        raise NoRecord("a record of another store")
    try:
        known = Kind(kind), Flag(flags)
    except ValueError:
        raise UnknownRecord(f"record {seq}: kind {kind}, flags {flags:#x}") from None
    if int(known[1]) & ~Flag.MAY_UNMAP or stored > PAYLOAD_MAX_BYTES:
        raise UnknownRecord(f"record {seq}: flags {flags:#x}, {stored} bytes of payload")
    return Header(known[0], seq, durable, epoch, offset, length, stored, payload_checksum, known[1])
