"""Hits: records off the disk, checked, and their pages laid where they are wanted.

A record is believed if its checksums are good, it is sealed as the store is, and it says of itself
that it is the one the index means: this store, this segment, this place, this frame, and at least
these pages. Anything else is a miss.

What is in the kernel's page cache is read at once, without a thread (RWF_NOWAIT); a thread is worth
its price only for what has to come from the disk, or for many records together.
"""

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import zstandard

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_SHIFT, PAGE_BYTES, PAGE_SHIFT, page_runs
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.errors import OrionError
from orion_iscsifs.tier import frames, record
from orion_iscsifs.tier.index import Row
from orion_iscsifs.tier.record import BadRecord, Header
from orion_iscsifs.tier.seals import SegmentSeals
from orion_iscsifs.tier.segments import SegmentFiles

RECENT_RECORDS: Final = 16
"""Whose content is kept in memory: what is read in small pieces is decompressed once."""
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


class RecordReader:
    """Of one store."""

    def __init__(self, files: SegmentFiles, store_id: int, seals: SegmentSeals) -> None:
        self._files = files
        self._store_id = store_id
        self._seals = seals
        self._local = threading.local()
        self._recent: OrderedDict[tuple[int, int], tuple[int, Buffer]] = OrderedDict()
        """By segment and place, which name a record for ever: valid pages, and content."""

    # -- at once, in the trio thread ---------------------------------------------------------

    def try_now(self, piece: Piece, span: Range, target: memoryview) -> bool:
        """Without waiting for the disk; False: that can't be. Raises OSError."""
        row = piece.row
        if not row.size_bytes:
            lay_zeroes(piece, span, target)
            return True
        key = row.number, row.place
        known = self._recent.get(key)
        if known is None:
            buffer = bytearray(row.size_bytes)
            try:
                got = os.preadv(
                    self._files.descriptor(row.number), [buffer], row.place, os.RWF_NOWAIT
                )
            except OSError as error:
                if error.errno in _NOT_NOW:
                    return False
                raise
            if got < row.size_bytes:
                return False
            try:
                header, content = self.check(piece.frame, row, buffer)
            except OrionError as error:
                piece.problem = error
                return True
            known = header.valid, content
            if len(self._recent) >= RECENT_RECORDS:
                self._recent.popitem(last=False)
            self._recent[key] = known
        lay(piece, *known, span, target)
        return True

    # -- in a thread ---------------------------------------------------------------------------

    def read_pieces(self, pieces: list[Piece], span: Range, target: memoryview) -> None:
        """Those that are not done yet. Blocks; raises OSError."""
        opened = self._open_pieces(pieces, span, target)
        stored = [(header.codec, payload, header.raw) for _, header, payload in opened]
        contents = frames.decompress_all(stored, self._decompressor())
        for (piece, header, _), content in zip(opened, contents, strict=True):
            if isinstance(content, BadRecord):
                piece.problem = content
            else:
                lay(piece, header.valid, content, span, target)

    def _open_pieces(
        self, pieces: list[Piece], span: Range, target: memoryview
    ) -> list[tuple[Piece, Header, Buffer]]:
        """Their records as they were stored, those of which that can be believed."""
        found = []
        with contextlib.ExitStack() as stack:
            # Descriptors of its own: those that are kept may be closed at any time.
            files: dict[int, int] = {}
            for piece in pieces:
                if piece.is_done:
                    continue
                if not piece.row.size_bytes:
                    lay_zeroes(piece, span, target)
                    continue
                number = piece.row.number
                try:
                    if number not in files:
                        files[number] = stack.enter_context(self._opened(number))
                    source = _pread(files[number], piece.row)
                    found.append((piece, *self.open(piece.frame, piece.row, source)))
                except (FileNotFoundError, OrionError) as error:
                    piece.problem = error
        return found

    def raw(self, row: Row) -> bytes:
        """The bytes of its record. Blocks; raises OSError, or BadRecord: there are too few."""
        with self._opened(row.number) as descriptor:
            return _pread(descriptor, row)

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[int]:
        descriptor = os.open(self._files.path(number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    # -- both ----------------------------------------------------------------------------------

    def check(self, frame: int, row: Row, source: Buffer) -> tuple[Header, Buffer]:
        """The record that `row` means, and its content. Raises BadRecord or BadSeal."""
        header, payload = self.open(frame, row, source)
        return header, frames.decompress(header.codec, payload, header.raw, self._decompressor())

    def open(self, frame: int, row: Row, source: Buffer) -> tuple[Header, Buffer]:
        """As `check`, but the content as it was stored."""
        header, payload = record.decode(source, self._seals.of(row.number))
        found = header.store_id, header.number, header.place, header.frame
        if found != (self._store_id, row.number, row.place, frame):
            raise BadRecord("another record than the one that should be here")
        if row.valid & ~header.valid or header.size_bytes != row.size_bytes:
            raise BadRecord("a record with other pages than it should have")
        return header, payload

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        """One for each thread."""
        found: zstandard.ZstdDecompressor | None = getattr(self._local, "decompressor", None)
        if found is None:
            found = self._local.decompressor = zstandard.ZstdDecompressor()
        return found


def _pread(descriptor: int, row: Row) -> bytes:
    found = os.pread(descriptor, row.size_bytes, row.place)
    if len(found) < row.size_bytes:
        raise BadRecord("the segment has been cut short")
    return found


def lay(piece: Piece, valid: int, content: Buffer, span: Range, target: memoryview) -> None:
    """The piece's pages, out of a record with the pages `valid`, to where they are wanted."""
    base, view = piece.frame << FRAME_SHIFT, memoryview(content)
    for first, last in page_runs(piece.pages):
        # The first and the last page may be wanted in part.
        start, end = max(base + first, span[0]), min(base + last, span[1])
        skipped = (valid & ((1 << (first >> PAGE_SHIFT)) - 1)).bit_count() * PAGE_BYTES
        at = skipped + start - base - first
        target[start - span[0] : end - span[0]] = view[at : at + end - start]
    piece.is_done = True


def lay_zeroes(piece: Piece, span: Range, target: memoryview) -> None:
    """The same for pages that are zeroes."""
    base = piece.frame << FRAME_SHIFT
    for first, last in page_runs(piece.pages):
        start, end = max(base + first, span[0]), min(base + last, span[1])
        target[start - span[0] : end - span[0]] = bytes(end - start)
    piece.is_done = True
