"""Segments: the files that a log is made of, each with a header of one page. Pure.

A log has a fixed number of them and uses them in turn. The header tells which use of the file it
is (`number` only grows), and is durable before the first record of that use is written: from then
on what the file held before is dead.
"""

from dataclasses import dataclass
from struct import Struct
from typing import Final

import crc32c

from orion_iscsifs.block.device import Buffer

MAGIC: Final = b"OLSEG1\0\0"
START_BYTES: Final = 4096
"""Where the first record is."""
SEGMENT_MIN_BYTES: Final = 4 << 20
SEGMENT_MAX_BYTES: Final = 64 << 20
SEGMENTS_MIN: Final = 4
SALT_BYTES: Final = 16
TAG_BYTES: Final = 16
_HEADER: Final = Struct("<8sII16sQQQQ")
"""Magic, format version, life, store, number, destaged epoch, needed seq, durable seq."""
_SEAL: Final = Struct(f"<{SALT_BYTES}s{TAG_BYTES}s")
"""Salt and tag; since version 2."""
_CHECKSUM: Final = Struct("<I")
FIRST_VERSION: Final = 1
VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """One use of a file."""

    number: int
    destaged: int
    """Every epoch up to this one was durable on the target when the use began."""
    needed: int
    """No record with a smaller sequence number was needed any more when the use began."""
    durable: int
    """Every record with a smaller sequence number was durable when the use began."""
    life: int = 0
    """Of the store, in which the use began; 0: a version that did not count them."""
    salt: bytes = bytes(SALT_BYTES)
    """In a sealed store: of the key of this use."""
    tag: bytes = bytes(TAG_BYTES)
    """In a sealed store: over all of the above."""


def file_name(slot: int) -> str:
    """Of the file in this slot, counted from 0."""
    return f"wlog-{slot:08x}"


def layout(log_bytes: int) -> tuple[int, int]:
    """The size of a segment and how many there are, within `log_bytes`."""
    size = min(max(log_bytes // 16, SEGMENT_MIN_BYTES), SEGMENT_MAX_BYTES) & -START_BYTES
    return size, log_bytes // size


def bound(store: bytes, header: SegmentHeader) -> bytes:
    """What the tag is over."""
    uses = header.number, header.destaged, header.needed, header.durable
    return _HEADER.pack(MAGIC, VERSION, header.life, store, *uses) + header.salt


def encode(store: bytes, header: SegmentHeader) -> bytes:
    """A page."""
    head = bound(store, header) + header.tag
    return (head + _CHECKSUM.pack(crc32c.crc32c(head))).ljust(START_BYTES, b"\0")


def decode(store: bytes, page: Buffer) -> SegmentHeader | None:
    """None: the file is not in use by this store."""
    view = memoryview(page)
    if not _is_sound(view):
        return None
    _, version, life, owner, *uses = _HEADER.unpack_from(view)
    number, destaged, needed, durable = uses
    if owner != store:
        return None
    if version == FIRST_VERSION:
        return SegmentHeader(number, destaged, needed, durable)
    salt, tag = _SEAL.unpack_from(view, _HEADER.size)
    return SegmentHeader(number, destaged, needed, durable, life, salt, tag)


def is_damaged(page: Buffer) -> bool:
    """Whether it is neither a header, whoever's, nor blank: there was one, and it can't be read.

    A header lies within one sector, so that a loss of power leaves the old one or the new one.
    """
    view = memoryview(page)
    return len(view) < START_BYTES or (any(view) and not _is_sound(view))


def _is_sound(view: memoryview) -> bool:
    if len(view) < START_BYTES:
        return False
    magic, version, *_ = _HEADER.unpack_from(view)
    if magic != MAGIC or not FIRST_VERSION <= version <= VERSION:
        return False
    size = _HEADER.size if version == FIRST_VERSION else _HEADER.size + _SEAL.size
    (found,) = _CHECKSUM.unpack_from(view, size)
    sound: bool = found == crc32c.crc32c(view[:size])
    return sound
