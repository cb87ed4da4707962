"""What a thread does for many requests at once: records come from the disk, and to their readers.

* The records of all requests are read in the order in which they lie on the disk, each once, and
  neighbours together (`runs_of`).
* The kernel is told of all of them before the first is waited for, so that the disk has many
  requests at a time.
* What is wanted of the records is decompressed in one call. Each call that gives up the
  interpreter's lock may wait milliseconds to have it back while the trio thread is busy, so there
  are as few of them as can be.

It writes into the requests' buffers, so nobody may take these away before it has ended.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.block.ranges import Range
from orion_iscsifs.errors import OrionError
from orion_iscsifs.tier.packed import Packed, unpack_all
from orion_iscsifs.tier.reading import (
    Copy,
    Piece,
    RecordReader,
    copies_of,
    lacking_for,
    lay,
    lay_zeroes,
)
from orion_iscsifs.tier.record import BadRecord
from orion_iscsifs.workers import threads_to_share

RUN_MAX_BYTES: Final = 1 << 20
"""Of neighbours that are read together."""
ARENA_BYTES: Final = 3 << 20
"""Each thread's, to read into."""


@dataclass(slots=True, eq=False)
class Request:
    """Pieces of one read, and where they go."""

    pieces: list[Piece]
    span: Range
    target: memoryview


@dataclass(slots=True, eq=False)
class Run:
    """Records of one segment that lie next to each other. A record may be wanted several times."""

    number: int
    start: int
    """In the file, as `end`, in bytes."""
    end: int
    wanted: list[tuple[Piece, Request]] = field(default_factory=list)


_Ready = tuple[Piece, Request, Packed, list[Copy]]


def runs_of(requests: Iterable[Request]) -> list[Run]:
    """The records to read. Pieces that need none are laid at once; those that are done, or have a
    problem already, are left out.
    """
    wanted: list[tuple[int, int, Piece, Request]] = []
    for request in requests:
        for piece in request.pieces:
            if piece.is_done or piece.problem is not None:
                continue
            if piece.row.size_bytes:
                wanted.append((piece.row.number, piece.row.place, piece, request))
            else:
                lay_zeroes(piece, request.span, request.target)
    wanted.sort(key=lambda one: one[:2])
    runs: list[Run] = []
    for number, place, piece, request in wanted:
        end = place + piece.row.size_bytes
        run = runs[-1] if runs else None
        if run is None or run.number != number or not _is_next(run, place, end):
            run = Run(number, place, end)
            runs.append(run)
        run.end = max(run.end, end)
        run.wanted.append((piece, request))
    return runs


def _is_next(run: Run, place: int, end: int) -> bool:
    return place <= run.end and end - run.start <= RUN_MAX_BYTES


class Fetcher:
    """Reads for any number of threads."""

    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader
        self._threads = threads_to_share()
        self._local = threading.local()

    def fetch(self, requests: Iterable[Request], descriptors: Mapping[int, int]) -> None:
        """Do all pieces that are not done yet, or set their `problem`. Blocks; raises OSError.

        `descriptors`: of the segments in question, by number.
        """
        for runs in _loads(runs_of(requests)):
            ready: list[_Ready] = []
            for run, source in self._read(runs, descriptors):
                self._find(run, source, ready)
            self._unpack(ready)
            for piece, request, packed, copies in ready:
                if piece.problem is None:
                    lay(piece, packed, copies, request.target)

    def _read(
        self, runs: list[Run], descriptors: Mapping[int, int]
    ) -> Iterator[tuple[Run, memoryview]]:
        """What the disk has of each run, in this thread's arena."""
        for run in runs if len(runs) > 1 else ():
            length = run.end - run.start
            os.posix_fadvise(descriptors[run.number], run.start, length, os.POSIX_FADV_WILLNEED)
        arena, at = self._arena(), 0
        for run in runs:
            place = arena[at : at + run.end - run.start]
            got = os.preadv(descriptors[run.number], [place], run.start)
            at += run.end - run.start
            yield run, place[:got]

    def _find(self, run: Run, source: memoryview, ready: list[_Ready]) -> None:
        """The records in it, those of which that can be believed."""
        before: tuple[int, int] | None = None
        for piece, request in run.wanted:
            row = piece.row
            try:
                if (row.place, piece.frame) != before:
                    at = row.place - run.start
                    if len(source) < at + row.size_bytes:
                        raise BadRecord("the segment has been cut short")
                    found = self._reader.find(piece.frame, row, source[at : at + row.size_bytes])
                    before = row.place, piece.frame
                if piece.pages & ~found.valid:
                    raise BadRecord("a record with other pages than it should have")
            except OrionError as error:
                piece.problem = error
                continue
            copies = copies_of(piece, found.valid, request.span)
            ready.append((piece, request, found.packed, copies))

    def _unpack(self, ready: list[_Ready]) -> None:
        """Unpack what is wanted, in one call; what can't be is a problem of its pieces."""
        wanted = {
            (packed, number)
            for _, _, packed, copies in ready
            for number in lacking_for(packed, copies)
        }
        bad = unpack_all(wanted, self._reader.decompressor(), threads=self._threads)
        for piece, _, packed, _ in ready:
            if packed in bad:
                piece.problem = BadRecord("a payload that can't be decompressed")

    def _arena(self) -> memoryview:
        found: memoryview | None = getattr(self._local, "arena", None)
        if found is None:
            found = self._local.arena = memoryview(bytearray(ARENA_BYTES))
        return found


def _loads(runs: list[Run]) -> Iterator[list[Run]]:
    """As many at a time as have room in an arena."""
    load, size = list[Run](), 0
    for run in runs:
        if size + run.end - run.start > ARENA_BYTES:
            yield load
            load, size = [], 0
        load.append(run)
        size += run.end - run.start
    if load:
        yield load
