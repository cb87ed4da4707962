"""Records of a tier: a header of 64 bytes, a payload, padding up to the next 512 bytes. Pure.

A header says which store, segment and place it was written for, so that a record is believed only
where the index expects it: one that was moved, exchanged for another, or left by an earlier use of
the place is a miss. The payload is what the pages in `valid` hold, one after the other: as it is,
or compressed, and then perhaps sealed. Its checksum is that of what is stored.

A sealed store binds the header to the payload: all of it but the two checksums, which are not known
before, is the associated data of the encryption.
"""

from dataclasses import dataclass
from struct import Struct
from typing import Final

import crc32c

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_BYTES, PAGE_BYTES
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import OVERHEAD_BYTES, Seal

MAGIC: Final = b"OTR1"
HEADER_BYTES: Final = 64
ALIGN_BYTES: Final = 512
"""Records begin at multiples of this."""
STORED_MAX_BYTES: Final = FRAME_BYTES + OVERHEAD_BYTES
RECORD_MAX_BYTES: Final = (HEADER_BYTES + STORED_MAX_BYTES + ALIGN_BYTES - 1) & -ALIGN_BYTES
RAW: Final = 0
ZSTD: Final = 1
FRAME: Final = 1
"""The only kind: zeroes and invalidations need no record (`journal`)."""
_BOUND: Final = Struct("<4sBBHQQQQIIII")
"""Magic, kind, codec, valid pages, store id, seq, frame, segment's number, place (in units of
`ALIGN_BYTES`), life, bytes before compression, bytes of payload."""
_CHECKSUM: Final = Struct("<I")
assert _BOUND.size + 2 * _CHECKSUM.size == HEADER_BYTES


class BadRecord(OrionError):
    """What is at this place is not the record that should be there, or it is damaged."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself."""

    store_id: int
    number: int
    place: int
    """Where it begins in the file of the segment, in bytes."""
    frame: int
    valid: int
    codec: int
    raw: int
    stored: int
    """Bytes of payload, seal included."""
    life: int
    seq: int

    @property
    def size_bytes(self) -> int:
        """Of the whole record, padding included."""
        return record_bytes(self.stored)


def store_id(store: bytes) -> int:
    """What each record repeats of the store's 16 bytes."""
    return int.from_bytes(store[-8:], "little")


def record_bytes(stored: int) -> int:
    """The size of a record with `stored` bytes of payload."""
    return (HEADER_BYTES + stored + ALIGN_BYTES - 1) & -ALIGN_BYTES


def encode(header: Header, content: Buffer, seal: Seal | None) -> tuple[bytes, Buffer]:
    """Header and payload as they are stored. `content` has `stored` bytes, less the seal's."""
    bound = _bound(header)
    payload = content
    if seal is not None:
        payload = seal.encrypt(header.life, header.seq, bound, content)
    assert len(payload) == header.stored
    head = bound + _CHECKSUM.pack(_checksum(payload))
    return head + _CHECKSUM.pack(_checksum(head)), payload


def decode(source: Buffer, seal: Seal | None) -> tuple[Header, Buffer]:
    """The record that begins `source`, and its payload without the seal, still compressed.

    Raises BadRecord, or BadSeal.
    """
    view = memoryview(source)
    head = view[: HEADER_BYTES - _CHECKSUM.size]
    if len(view) < HEADER_BYTES:
        raise BadRecord("no record")
    if _CHECKSUM.unpack_from(view, len(head))[0] != _checksum(head):
        raise BadRecord("a damaged header")
    magic, kind, codec, valid, owner, seq, frame, number, place, life, raw, stored = (
        _BOUND.unpack_from(view)
    )
    if magic != MAGIC or kind != FRAME or codec not in (RAW, ZSTD):
        raise BadRecord("no record that is known")
    if raw != valid.bit_count() * PAGE_BYTES or stored > STORED_MAX_BYTES:
        raise BadRecord("a record with lengths that can't be")
    payload: Buffer = view[HEADER_BYTES : HEADER_BYTES + stored]
    if len(payload) < stored or _checksum(payload) != _payload_checksum(view):
        raise BadRecord("a damaged payload")
    if seal is not None:
        payload = seal.decrypt(life, seq, bytes(view[: _BOUND.size]), payload)
    found = Header(owner, number, place * ALIGN_BYTES, frame, valid, codec, raw, stored, life, seq)
    return found, payload


def _bound(header: Header) -> bytes:
    return _BOUND.pack(
        MAGIC,
        FRAME,
        header.codec,
        header.valid,
        header.store_id,
        header.seq,
        header.frame,
        header.number,
        header.place // ALIGN_BYTES,
        header.life,
        header.raw,
        header.stored,
    )


def _checksum(of: Buffer) -> int:
    # 64 KiB take 5 µs. To get the interpreter's lock back, had it been given up, may take 1000.
    return crc32c.crc32c(of, gil_release_mode=0)


def _payload_checksum(view: memoryview) -> int:
    found: int = _CHECKSUM.unpack_from(view, _BOUND.size)[0]
    return found
