"""Where on disk which pages of which frame are: compact, for millions of them. Pure.

Theory of operation
-------------------
A hundred gigabytes hold millions of frames, and a Python object for each would take more memory
than the RAM cache. So a frame has one *row* in arrays of numbers, 16 bytes in all:

* `facts`: the frame's number, the mask of its valid pages, and three bits.
* `places`: where its record begins in the segment, and how many units of 512 bytes it takes.
* `nexts`: the next row in the same bucket of the hash table.

The rows of a segment lie together, in the order in which they were added, so that a segment is
forgotten without looking for what was in it, and costs no list of its own. A row's *id* is made of
the segment's number and its place in there. A frame has one row at most: a newer one replaces it.
A row whose frame has moved on, or has no valid page left, is *dead*: it is in no bucket and stays
until its segment goes.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from orion_iscsifs.block.pages import FRAME_BYTES, FRAME_MASK, FRAME_SHIFT, pages_touched
from orion_iscsifs.block.ranges import Range, split
from orion_iscsifs.tier.journal import SEGMENTS_MAX
from orion_iscsifs.tier.record import ALIGN_BYTES

ROW_BITS: Final = 12
ROWS_MAX: Final = (1 << ROW_BITS) - 1
_ROW_MASK: Final = (1 << ROW_BITS) - 1
_SLOT_MASK: Final = SEGMENTS_MAX - 1
_UNITS_BITS: Final = 8
_ALIGN_SHIFT: Final = ALIGN_BYTES.bit_length() - 1
_UNITS_MASK: Final = (1 << _UNITS_BITS) - 1
ZERO: Final = 1
"""The pages are zeroes: there is no record."""
VISITED: Final = 2
"""It was read since it was written: S3-FIFO's one bit."""
PROVEN: Final = 4
"""It is no newcomer."""
_VALID_SHIFT: Final = 8
_FRAME_SHIFT: Final = 24
_VALID_MASK: Final = 0xFFFF << _VALID_SHIFT
FRAME_NUMBER_MAX: Final = (1 << 40) - 1
ROWS_PER_BUCKET: Final = 2
_BUCKETS_MIN: Final = 1 << 10
_MIX: Final = 0x9E3779B97F4A7C15
_WORD: Final = (1 << 64) - 1


class Row(NamedTuple):
    """What is known of a frame."""

    id: int
    number: int
    """Of the segment."""
    place: int
    """Of the record in the segment, in bytes."""
    size_bytes: int
    """Of the whole record; 0: the pages are zeroes."""
    valid: int
    flags: int


class _Segment:
    __slots__ = ("facts", "live", "nexts", "number", "places")

    def __init__(self, number: int) -> None:
        self.number = number
        self.live = 0
        self.facts = array("Q")
        self.places = array("I")
        self.nexts = array("I")


class Index:
    """See the module's docstring. `rows_max`: how many rows there may be, dead ones included."""

    def __init__(self, rows_max: int) -> None:
        buckets = 1 << (max(rows_max // ROWS_PER_BUCKET, _BUCKETS_MIN).bit_length() - 1)
        self._shift = 64 - buckets.bit_length() + 1
        self._heads = array("I", bytes(4 * buckets))
        self._segments: dict[int, _Segment] = {}
        self.frames = 0
        """How many have a valid page."""

    # -- looking -----------------------------------------------------------------------------

    def find(self, frame: int) -> Row | None:
        """The frame's row, if any of its pages is valid."""
        at = self._heads[(frame * _MIX & _WORD) >> self._shift]
        while at:
            segment = self._segments[at - 1 >> ROW_BITS]
            row = at - 1 & _ROW_MASK
            facts = segment.facts[row]
            if facts >> _FRAME_SHIFT == frame:
                place = segment.places[row]
                return Row(
                    at,
                    segment.number,
                    (place >> _UNITS_BITS) * ALIGN_BYTES,
                    (place & _UNITS_MASK) * ALIGN_BYTES,
                    facts >> _VALID_SHIFT & 0xFFFF,
                    facts & 0xFF,
                )
            at = segment.nexts[row]
        return None

    def visit(self, row: Row) -> None:
        """It was used. The row is as `find` has just returned it."""
        if not row.flags & VISITED:
            self._segments[row.id - 1 >> ROW_BITS].facts[row.id - 1 & _ROW_MASK] |= VISITED

    def is_current(self, frame: int, row: Row) -> bool:
        """Whether the frame's row still is this one, and not one that came later."""
        found = self.find(frame)
        return found is not None and (found.id, found.number) == (row.id, row.number)

    def rows(self, number: int) -> Iterator[tuple[int, Row]]:
        """The frames of a segment that are alive, with their rows, in the order of their places."""
        segment = self._segments.get(number & _SLOT_MASK)
        for row in range(len(segment.facts) if segment is not None else 0):
            assert segment is not None
            facts = segment.facts[row]
            if facts & _VALID_MASK:
                place = segment.places[row]
                yield (
                    facts >> _FRAME_SHIFT,
                    Row(
                        ((number & _SLOT_MASK) << ROW_BITS | row) + 1,
                        segment.number,
                        (place >> _UNITS_BITS) * ALIGN_BYTES,
                        (place & _UNITS_MASK) * ALIGN_BYTES,
                        facts >> _VALID_SHIFT & 0xFFFF,
                        facts & 0xFF,
                    ),
                )

    def count(self, number: int) -> int:
        """How many rows the segment has, dead ones included."""
        segment = self._segments.get(number & _SLOT_MASK)
        return 0 if segment is None else len(segment.facts)

    @property
    def memory_bytes(self) -> int:
        """What the arrays take."""
        rows = sum(
            array_bytes(segment.facts) + array_bytes(segment.places) + array_bytes(segment.nexts)
            for segment in self._segments.values()
        )
        return rows + array_bytes(self._heads)

    # -- changing ----------------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """A new segment, with a number one higher than the last."""
        assert number & _SLOT_MASK not in self._segments
        self._segments[number & _SLOT_MASK] = _Segment(number)

    def end(self, number: int) -> None:
        """Nothing is added to the segment any more: give back what its arrays have too much."""
        segment = self._segments[number & _SLOT_MASK]
        segment.facts = array("Q", segment.facts)
        segment.places = array("I", segment.places)
        segment.nexts = array("I", segment.nexts)

    def put(
        self, number: int, frame: int, place: int, size_bytes: int, valid: int, flags: int = 0
    ) -> None:
        """The frame is there now and nowhere else. `valid` may be 0: then it is nowhere."""
        self.put_all(number, ((frame, place, size_bytes, valid, flags),))

    def put_all(self, number: int, rows: Iterable[tuple[int, int, int, int, int]]) -> None:
        """`put` for each of them, in order. What makes `rows` may call the other methods.

        Opening a large tier is this loop: hence no call in it, and no attribute.
        """
        slot = number & _SLOT_MASK
        segments, heads, shift = self._segments, self._heads, self._shift
        segment = segments[slot]
        facts, places, nexts = segment.facts, segment.places, segment.nexts
        row, first_id, added = len(facts), (slot << ROW_BITS) + 1, 0
        try:
            for frame, place, size_bytes, valid, flags in rows:
                bucket = (frame * _MIX & _WORD) >> shift
                at = heads[bucket]
                while at:
                    other, before = segments[at - 1 >> ROW_BITS], at - 1 & _ROW_MASK
                    if other.facts[before] >> _FRAME_SHIFT == frame:
                        self.remove(frame)
                        break
                    at = other.nexts[before]
                facts.append(frame << _FRAME_SHIFT | valid << _VALID_SHIFT | flags)
                places.append(place >> _ALIGN_SHIFT << _UNITS_BITS | size_bytes >> _ALIGN_SHIFT)
                if valid:
                    nexts.append(heads[bucket])
                    heads[bucket] = first_id + row
                    added += 1
                else:
                    nexts.append(0)
                row += 1
        finally:
            segment.live += added
            self.frames += added

    def remove(self, frame: int, pages: int = 0xFFFF) -> int:
        """These pages of the frame are not valid any more; those of them that were."""
        bucket = (frame * _MIX & _WORD) >> self._shift
        before: _Segment | None = None
        before_row = 0
        at = self._heads[bucket]
        while at:
            segment = self._segments[at - 1 >> ROW_BITS]
            row = at - 1 & _ROW_MASK
            facts = segment.facts[row]
            if facts >> _FRAME_SHIFT == frame:
                lost = facts >> _VALID_SHIFT & pages
                segment.facts[row] = facts = facts & ~(pages << _VALID_SHIFT)
                if not facts & _VALID_MASK:
                    if before is None:
                        self._heads[bucket] = segment.nexts[row]
                    else:
                        before.nexts[before_row] = segment.nexts[row]
                    segment.live -= 1
                    self.frames -= 1
                return lost
            before, before_row = segment, row
            at = segment.nexts[row]
        return 0

    def forget_rows(self, number: int, first: int, last: int) -> list[int]:
        """These rows of the segment are dead from now on; the newcomers among their frames."""
        segment = self._segments[number & _SLOT_MASK]
        newcomers = []
        for facts in segment.facts[first:last]:
            if facts & _VALID_MASK:
                self.remove(facts >> _FRAME_SHIFT)
                if not facts & PROVEN:
                    newcomers.append(facts >> _FRAME_SHIFT)
        return newcomers

    def forget(self, number: int) -> None:
        """The segment goes, with all that is in it: the oldest one, or the newest."""
        self.forget_rows(number, 0, self.count(number))
        del self._segments[number & _SLOT_MASK]

    def live(self, number: int) -> int:
        """How many of the segment's rows are not dead."""
        return self._segments[number & _SLOT_MASK].live

    # -- ranges ------------------------------------------------------------------------------

    def remove_range(self, span: Range) -> bool:
        """Every page with a byte of the range is not valid any more; whether one was."""
        found = 0
        for frame, pages in frames_of(span):
            found |= self.remove(frame, pages)
        return bool(found)

    def is_few(self, span: Range) -> bool:
        """Whether looking at each frame of the range is less work than looking at each segment."""
        return (span[1] - span[0] >> FRAME_SHIFT) <= max(FEW_FRAMES, len(self._segments))

    @property
    def numbers(self) -> list[int]:
        """Of all segments, the oldest first."""
        return sorted(segment.number for segment in self._segments.values())

    def has_range_in(self, number: int, span: Range) -> bool:
        """Whether `remove_range_in` would find something."""
        first, last = span[0] >> FRAME_SHIFT, span[1] - 1 >> FRAME_SHIFT
        segment = self._segments.get(number & _SLOT_MASK)
        return any(
            facts & _VALID_MASK
            and first <= facts >> _FRAME_SHIFT <= last
            and facts >> _VALID_SHIFT & pages_in(facts >> _FRAME_SHIFT, span)
            for facts in (() if segment is None else segment.facts)
        )

    def remove_range_in(self, number: int, span: Range) -> bool:
        """As `remove_range`, but only what is in this segment."""
        first, last = span[0] >> FRAME_SHIFT, span[1] - 1 >> FRAME_SHIFT
        segment = self._segments.get(number & _SLOT_MASK)
        found = 0
        for facts in () if segment is None else segment.facts:
            frame = facts >> _FRAME_SHIFT
            if facts & _VALID_MASK and first <= frame <= last:
                found |= self.remove(frame, pages_in(frame, span))
        return bool(found)


FEW_FRAMES: Final = 256


def frames_of(span: Range) -> Iterable[tuple[int, int]]:
    """The frames with a byte of the range, each with the mask of the pages that have one."""
    first, end = span[0] >> FRAME_SHIFT, span[1] - (span[0] & ~FRAME_MASK)
    if 0 < end <= FRAME_BYTES and span[0] < span[1]:
        # Most requests are small: no generator for them.
        return ((first, pages_touched(span[0] & FRAME_MASK, end)),)
    return _several_frames(span)


def _several_frames(span: Range) -> Iterator[tuple[int, int]]:
    for start, end in split(span, FRAME_BYTES):
        base = start & ~FRAME_MASK
        yield start >> FRAME_SHIFT, pages_touched(start - base, end - base)


def pages_in(frame: int, span: Range) -> int:
    """The mask of the frame's pages that have a byte of the range."""
    base = frame << FRAME_SHIFT
    start, end = max(span[0] - base, 0), min(span[1] - base, FRAME_MASK + 1)
    return pages_touched(start, end) if start < end else 0


def array_bytes(of: "array[int]") -> int:
    """What it takes in memory."""
    return of.__sizeof__()
