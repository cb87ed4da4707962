"""Hits: records off the disk, checked, and their pages laid where they are wanted.

A record is believed if its checksums are good, it is sealed as the store is, and it says of itself
that it is the one the index means: this store, this segment, this place, this frame, and at least
these pages. Anything else is a miss.

What is in the kernel's page cache is read at once, without a thread (RWF_NOWAIT); if it is not, the
kernel takes the question as a reason to begin with it. What has to come from the disk is for a
thread, `fetching` has it; a hand-over costs much more than a record, so it takes what many requests
want, and `gathering` brings those together.
"""

import errno
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import zstandard

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_SHIFT, PAGE_BYTES, PAGE_SHIFT, page_runs
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.errors import OrionError
from orion_iscsifs.tier import record
from orion_iscsifs.tier.index import Row
from orion_iscsifs.tier.packed import Packed, unpack, unpack_all
from orion_iscsifs.tier.record import BadRecord, Header
from orion_iscsifs.tier.seals import SegmentSeals
from orion_iscsifs.tier.segments import SegmentFiles

RECENT_RECORDS: Final = 16
"""Which are kept in memory: what is read in small pieces is checked and unpacked once."""
_NOT_NOW: Final = (errno.EAGAIN, errno.EOPNOTSUPP)


@dataclass(slots=True, eq=False)
class Piece:
    """Pages of one frame that a row of the index has."""

    frame: int
    row: Row
    pages: int
    is_done: bool = False
    problem: OrionError | FileNotFoundError | None = None
    """Why the record can't be believed, or that its segment has gone."""


@dataclass(slots=True, eq=False)
class Found:
    """A record that can be believed."""

    valid: int
    packed: Packed


class RecordReader:
    """Of one store."""

    def __init__(self, files: SegmentFiles, store_id: int, seals: SegmentSeals) -> None:
        self._files = files
        self._store_id = store_id
        self._seals = seals
        self._local = threading.local()
        self._recent: OrderedDict[tuple[int, int], Found] = OrderedDict()
        """By segment and place, which name a record for ever. For the trio thread only."""

    # -- at once, in the trio thread ---------------------------------------------------------

    def try_now(self, piece: Piece, span: Range, target: memoryview) -> bool:
        """Without waiting for the disk; False: that can't be. Raises OSError."""
        row = piece.row
        if not row.size_bytes:
            lay_zeroes(piece, span, target)
            return True
        key = row.number, row.place
        found = self._recent.get(key)
        try:
            if found is None:
                source = self._read_now(row)
                if source is None:
                    return False
                found = self.find(piece.frame, row, source)
                if len(self._recent) >= RECENT_RECORDS:
                    self._recent.popitem(last=False)
                self._recent[key] = found
            copies = copies_of(piece, found.valid, span)
            lacking = [(found.packed, number) for number in lacking_for(found.packed, copies)]
            if unpack_all(lacking, self.decompressor()):
                raise BadRecord("a payload that can't be decompressed")
        except OrionError as error:
            piece.problem = error
            return True
        lay(piece, found.packed, copies, target)
        return True

    def _read_now(self, row: Row) -> bytearray | None:
        buffer = bytearray(row.size_bytes)
        try:
            descriptor = self._files.descriptor(row.number)
            got = os.preadv(descriptor, [buffer], row.place, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in _NOT_NOW:
                return None
            raise
        return buffer if got == row.size_bytes else None

    # -- anywhere ------------------------------------------------------------------------------

    def check(self, frame: int, row: Row, source: Buffer) -> tuple[Header, bytes]:
        """The record that `row` means, and its content. Raises BadRecord or BadSeal."""
        header, payload = self.open(frame, row, source)
        packed = Packed(header.codec, payload, header.raw)
        return header, unpack(packed, self.decompressor())

    def find(self, frame: int, row: Row, source: Buffer) -> Found:
        """As `check`, but nothing is unpacked yet."""
        header, payload = self.open(frame, row, source)
        return Found(header.valid, Packed(header.codec, payload, header.raw))

    def open(self, frame: int, row: Row, source: Buffer) -> tuple[Header, Buffer]:
        """As `check`, but the content as it was stored."""
        header, payload = record.decode(source, self._seals.of(row.number))
        found = header.store_id, header.number, header.place, header.frame
        if found != (self._store_id, row.number, row.place, frame):
            raise BadRecord("another record than the one that should be here")
        if row.valid & ~header.valid or header.size_bytes != row.size_bytes:
            raise BadRecord("a record with other pages than it should have")
        return header, payload

    def raw(self, row: Row) -> bytes:
        """The bytes of its record. Blocks; raises OSError, or BadRecord: there are too few."""
        # Not one of the descriptors that are kept: this is for any thread.
        descriptor = os.open(self._files.path(row.number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.pread(descriptor, row.size_bytes, row.place)
        finally:
            os.close(descriptor)
        if len(found) < row.size_bytes:
            raise BadRecord("the segment has been cut short")
        return found

    def decompressor(self) -> zstandard.ZstdDecompressor:
        """The one of this thread."""
        found: zstandard.ZstdDecompressor | None = getattr(self._local, "decompressor", None)
        if found is None:
            found = self._local.decompressor = zstandard.ZstdDecompressor()
        return found


# -- where the pages go --------------------------------------------------------------------------

Copy = tuple[int, int, int]
"""Begin and end in a record's content, and where that goes in the target."""


def copies_of(piece: Piece, valid: int, span: Range) -> list[Copy]:
    """To lay a piece's pages, out of a record with the pages `valid`, over what `span` asks for."""
    base, copies = piece.frame << FRAME_SHIFT, list[Copy]()
    for first, last in page_runs(piece.pages):
        # The first and the last page may be wanted in part.
        start, end = max(base + first, span[0]), min(base + last, span[1])
        skipped = (valid & ((1 << (first >> PAGE_SHIFT)) - 1)).bit_count() * PAGE_BYTES
        at = skipped + start - base - first
        copies.append((at, at + end - start, start - span[0]))
    return copies


def lacking_for(packed: Packed, copies: list[Copy]) -> set[int]:
    """The parts that have to be unpacked first."""
    if len(copies) == 1:
        return set(packed.lacking(copies[0][0], copies[0][1]))
    return {number for start, end, _ in copies for number in packed.lacking(start, end)}


def lay(piece: Piece, packed: Packed, copies: list[Copy], target: memoryview) -> None:
    """The piece's pages, to where they are wanted."""
    for start, end, to in copies:
        packed.copy(start, end, target[to : to + end - start])
    piece.is_done = True


def lay_zeroes(piece: Piece, span: Range, target: memoryview) -> None:
    """The same for pages that are zeroes."""
    base = piece.frame << FRAME_SHIFT
    for first, last in page_runs(piece.pages):
        start, end = max(base + first, span[0]), min(base + last, span[1])
        target[start - span[0] : end - span[0]] = bytes(end - start)
    piece.is_done = True
