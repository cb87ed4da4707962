"""Segments of a tier: a header, a journal of entries, and room for records. Pure.

    page 0        the header: whose segment it is, and its number (numbers only grow)
    journal       entries of 64 bytes, in the order in which things happened
    records       payloads, each behind a header of its own (`record`)

The journal is what the index is made of again: an entry says that a frame's pages are in a record,
that they are zeroes, or that what was known of a range is not true any more. Entries follow each
other without a gap and end with zeroes. An entry's checksum covers the store, the segment's number
and the entry's place, so that an entry of another store, time or place is never taken for one.
docs/tier-format.md has the layout byte by byte.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from struct import Struct
from typing import Final, NamedTuple

import crc32c

from orion_iscsifs.block.device import Buffer

MAGIC: Final = b"OTSEG1\0\0"
VERSION: Final = 1
PAGE_BYTES: Final = 4096
ENTRY_BYTES: Final = 64
TAG_BYTES: Final = 16
SEGMENT_MIN_BYTES: Final = 256 << 10
SEGMENT_MAX_BYTES: Final = 64 << 20
SEGMENT_USUAL_MIN_BYTES: Final = 1 << 20
SEGMENTS_MIN: Final = 4
SEGMENTS_MAX: Final = 1 << 19
NUMBER_MAX: Final = (1 << 63) - 1
RECORD_MEAN_BYTES: Final = 32 << 10
"""A segment takes one record for so many of its bytes. It bounds the memory of the index: 100 GiB
have at most 3.3 million records, whatever is in them."""
RECORDS_MIN: Final = 16
_ENTRIES_PER_PAGE: Final = PAGE_BYTES // ENTRY_BYTES
_HEADER: Final = Struct("<8sII16sQI16s4x")
"""Magic, version, entries the journal has room for, store, number, life in which it was begun, salt
of its key."""
_CHECKSUM: Final = Struct("<I")
_ENTRY: Final = Struct("<BxHIQQQI8x16s")
"""Kind, valid pages, bytes of payload, frame or offset, place of the record or length, seq, life,
reserved, tag. The checksum follows."""
_SHORT: Final = Struct("<BxHIQQ36xI")
"""Of the same, what the index is made of, and the checksum."""
_BODY: Final = Struct("<60s4x")
_PLACE: Final = Struct("<16sQI")
_BODY_BYTES: Final = _ENTRY.size
_TAGGED_BYTES: Final = _BODY_BYTES - TAG_BYTES
assert _BODY_BYTES + _CHECKSUM.size == ENTRY_BYTES


class Kind(enum.IntEnum):
    """What an entry says."""

    FRAME = 1
    """These pages of the frame are in the record at this place."""
    ZERO = 2
    """These pages of the frame are zeroes; there is no record."""
    INVALIDATE = 3
    """Nothing that was known of this range is true any more."""


class Entry(NamedTuple):
    """One line of the journal. `where` and `place`: of INVALIDATE, offset and length in bytes."""

    kind: int
    valid: int
    stored: int
    """Bytes of payload in the record."""
    where: int
    """The frame's number."""
    place: int
    """Where the record begins in the file."""
    seq: int
    life: int
    tag: bytes = bytes(TAG_BYTES)


Fields = tuple[int, int, int, int, int, int]
"""The first five of an Entry, and its checksum: to make more of them would take longer than all
the rest of reading a journal."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Of one segment."""

    number: int
    life: int
    entries_max: int
    salt: bytes
    """Of the key of its records and tags; zeroes in a store that is not sealed."""


def layout(tier_bytes: int) -> tuple[int, int]:
    """The size of a segment and how many there may be, within `tier_bytes`."""
    room = tier_bytes - 2 * PAGE_BYTES  # the superblocks
    size = min(max(tier_bytes // 32, SEGMENT_USUAL_MIN_BYTES), SEGMENT_MAX_BYTES) & -PAGE_BYTES
    return size, min(max(room, 0) // size, SEGMENTS_MAX)


def entries_max(segment_bytes: int) -> int:
    """How many entries a journal has room for: two for each record, in whole pages."""
    return -(-2 * records_max(segment_bytes) // _ENTRIES_PER_PAGE) * _ENTRIES_PER_PAGE


def records_max(segment_bytes: int) -> int:
    """How many records and zero frames a segment may have."""
    return max(segment_bytes // RECORD_MEAN_BYTES, RECORDS_MIN)


def records_start(segment_bytes: int) -> int:
    """Where the first record is."""
    return PAGE_BYTES + entries_max(segment_bytes) * ENTRY_BYTES


def file_name(number: int) -> str:
    """Of a segment."""
    return f"rseg-{number:016x}"


def encode_header(store: bytes, header: SegmentHeader) -> bytes:
    """A page."""
    about = header.number, header.life, header.salt
    head = _HEADER.pack(MAGIC, VERSION, header.entries_max, store, *about)
    return (head + _CHECKSUM.pack(crc32c.crc32c(head))).ljust(PAGE_BYTES, b"\0")


def decode_header(store: bytes, page: Buffer) -> SegmentHeader | None:
    """None: damaged, of another version, or not a segment of this store."""
    view = memoryview(page)
    if len(view) < PAGE_BYTES:
        return None
    magic, version, entries, owner, number, life, salt = _HEADER.unpack_from(view)
    if (magic, version, owner) != (MAGIC, VERSION, store):
        return None
    if _CHECKSUM.unpack_from(view, _HEADER.size)[0] != crc32c.crc32c(view[: _HEADER.size]):
        return None
    return SegmentHeader(number, life, entries, salt)


class Scribe:
    """Encodes and decodes the entries of one segment."""

    def __init__(self, store: bytes, number: int) -> None:
        self._place = store, number
        self._seed = crc32c.crc32c(_PLACE.pack(store, number, 0))

    def tagged(self, ordinal: int, entry: Entry) -> bytes:
        """What the tag of this entry of a sealed store vouches for."""
        return _PLACE.pack(*self._place, ordinal) + _ENTRY.pack(*entry)[:_TAGGED_BYTES]

    def encode(self, ordinal: int, entry: Entry) -> bytes:
        """The 64 bytes of the entry that comes after `ordinal` others."""
        body = _ENTRY.pack(*entry)
        return body + _CHECKSUM.pack(crc32c.crc32c(body, (self._seed + ordinal) & 0xFFFF_FFFF))

    def entries(self, area: bytes) -> list[Fields]:
        """The fields of those of a journal, in order.

        Whatever lies before the zeroes at its end has to be an entry that is good in its place:
        raises DamagedJournal otherwise. Opening a large tier is this, so it is done by functions
        that loop by themselves.
        """
        count = -(-len(area.rstrip(b"\0")) // ENTRY_BYTES)
        used = area[: count * ENTRY_BYTES]
        found: list[Fields] = list(_SHORT.iter_unpack(used))
        bodies = map(itemgetter(0), _BODY.iter_unpack(used))
        sums = list(map(crc32c.crc32c, bodies, _seeds(self._seed, count)))
        if sums != [fields[5] for fields in found]:
            bad = next(at for at, fields in enumerate(found) if fields[5] != sums[at])
            raise DamagedJournal(f"entry {bad} of its journal is damaged")
        return found


def _seeds(first: int, count: int) -> Iterable[int]:
    """Of checksums, one for each entry."""
    if first + count <= 1 << 32:
        return range(first, first + count)
    return (first + ordinal & 0xFFFF_FFFF for ordinal in range(count))


def entry_at(area: bytes, ordinal: int) -> Entry:
    """All of one entry, whose checksum has been found good."""
    return Entry._make(_ENTRY.unpack_from(area, ordinal * ENTRY_BYTES))


class DamagedJournal(Exception):
    """What else this segment said is not known."""
