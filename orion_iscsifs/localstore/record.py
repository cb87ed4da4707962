"""Records of the log: a header of 64 bytes, the payload, zeroes up to the next 512 bytes. Pure.

Every record repeats who owns it, a store in one of its lives, and carries the next sequence number,
so that bytes of an earlier use of the same place are never taken for a record. The header has its
own checksum: a reader may skip payloads. docs/log-format.md has the layout byte by byte.
"""

import enum
from dataclasses import dataclass
from struct import Struct
from typing import Final

import crc32c

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import OVERHEAD_BYTES

MAGIC: Final = b"OLR1"
HEADER_BYTES: Final = 64
ALIGN_BYTES: Final = 512
"""Records begin at multiples of this."""
PAYLOAD_MAX_BYTES: Final = 1 << 20
STORED_MAX_BYTES: Final = PAYLOAD_MAX_BYTES + OVERHEAD_BYTES
_BOUND: Final = Struct("<4sBBHQQQQQII")
"""Magic, kind, flags, reserved, owner, seq, durable seq, epoch, offset, length, stored bytes."""
_CHECKSUM: Final = Struct("<I")
"""Of what is stored, then of the header."""
assert _BOUND.size + 2 * _CHECKSUM.size == HEADER_BYTES


class Kind(enum.IntEnum):
    """What a record says."""

    DATA = 1
    """The range holds the payload."""
    ZERO = 2
    """The range reads as zeroes. No payload, but a tag in a sealed store."""
    DESTAGED = 3
    """Every epoch up to this one is durable on the target. No range, payload as of ZERO."""


class Flag(enum.IntFlag):
    """Of a record."""

    NONE = 0
    MAY_UNMAP = 1
    """ZERO: the space may be given back."""
    COMPRESSED = 2
    """The payload is a frame of zstd, of `length` bytes."""
    SEALED = 4
    """The payload is encrypted, and the header is what its tag is over, too."""


_KNOWN: Final = int(Flag.MAY_UNMAP | Flag.COMPRESSED | Flag.SEALED)


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
    """Bytes of payload, as it is on the disk."""
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


def owner(store: bytes, life: int) -> int:
    """What each record repeats: the end of the store's id, and in which of its lives it is."""
    return int.from_bytes(store[-8:], "little") ^ life


def bound(owner: int, header: Header) -> bytes:
    """The header but for its checksums: what sealing binds the payload to."""
    return _BOUND.pack(
        MAGIC,
        header.kind,
        header.flags,
        0,
        owner,
        header.seq,
        header.durable,
        header.epoch,
        header.offset,
        header.length,
        header.stored,
    )


def complete(head: bytes, stored: Buffer) -> bytes:
    """The 64 bytes. `head` is `bound`."""
    head += _CHECKSUM.pack(crc32c.crc32c(stored))
    return head + _CHECKSUM.pack(crc32c.crc32c(head))


def decode(owner: int, source: Buffer) -> Header:
    """The header at the start of `source`.

    Raises NoRecord if there is none of this owner, BrokenRecord if there is a damaged one, and
    UnknownRecord for a kind or a flag that this version does not know.
    """
    view = memoryview(source)[:HEADER_BYTES]
    if len(view) < HEADER_BYTES or bytes(view[:4]) != MAGIC:
        raise NoRecord("no record")
    fields = _BOUND.unpack_from(view)
    _, kind, flags, reserved, found, seq, durable, epoch, offset, length, stored = fields
    (payload_checksum,) = _CHECKSUM.unpack_from(view, _BOUND.size)
    own = HEADER_BYTES - _CHECKSUM.size
    if _CHECKSUM.unpack_from(view, own)[0] != crc32c.crc32c(view[:own]):
        raise BrokenRecord("a damaged header")
    if found != owner:
        raise NoRecord("a record of another store")
    try:
        known = Kind(kind), Flag(flags)
    except ValueError:
        raise UnknownRecord(f"record {seq}: kind {kind}, flags {flags:#x}") from None
    if int(known[1]) & ~_KNOWN or reserved or stored > STORED_MAX_BYTES:
        raise UnknownRecord(f"record {seq}: flags {flags:#x}, {stored} bytes of payload")
    return Header(known[0], seq, durable, epoch, offset, length, stored, payload_checksum, known[1])
