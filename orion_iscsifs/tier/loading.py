"""The index of a tier, made again from the journals of its segments. Blocks: run it in a thread.

The journals are read in the order of the segments' numbers, and each entry does to the index what
it did when it was written. That comes to the same index, because

* segments go the oldest first, so the oldest that is left had only older ones before it: what they
  had in the index went with them, and an INVALIDATE that went with them had nothing to act on but
  what is gone as well;
* an entry is in the journal before the index has what it says, and an INVALIDATE before the device
  may have changed: there is no state of the device that the journal does not know of.

Hence the other way round: where a part of the journal is missing or damaged, *nothing that is older
may be believed*, for what is missing may have been the INVALIDATE for it. What is newer may. And if
the end is not where it should be, nothing is left.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.tier import index as rows
from orion_iscsifs.tier import journal, record
from orion_iscsifs.tier.index import FRAME_NUMBER_MAX, Index
from orion_iscsifs.tier.journal import DamagedJournal, Entry, Fields, Kind, Scribe
from orion_iscsifs.tier.seals import SegmentSeals
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.superblock import TierSuperblock

_FRAME_EXTRA: Final = record.HEADER_BYTES + record.ALIGN_BYTES - 1


@dataclass
class Loaded:
    """What was found."""

    index: Index
    numbers: list[int] = field(default_factory=list)
    """Of the segments that count, ascending, without a gap."""
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each: how many entries its journal has, and where its next record goes."""
    dropped: str = ""
    """Why something in it does not count; empty: everything does."""

    def trim(self, segments_max: int) -> None:
        """Leave out what was made ahead and not used, and what is too much."""
        while self.numbers and not self.ends[self.numbers[-1]][0]:
            self.index.forget(self.numbers.pop())
        while len(self.numbers) > segments_max:
            self.index.forget(self.numbers.pop(0))


class Loader:
    """Reads one tier."""

    def __init__(self, files: SegmentFiles, block: TierSuperblock, seals: SegmentSeals) -> None:
        self._files = files
        self._block = block
        self._seals = seals
        self._found = self._nothing("")

    def load(self) -> Loaded:
        """All that may be believed. Raises OSError."""
        block = self._block
        newest = block.newest
        for number in self._files.numbers():
            if number > newest:
                if self._is_unused(number):
                    continue  # made ahead
                newest = number  # the superblock that counts should be a later one
            numbers = self._found.numbers
            if numbers and number != numbers[-1] + 1:
                self._found = self._nothing(f"segment {numbers[-1] + 1} is missing")
            try:
                self._read(number)
            except DamagedJournal as error:
                self._found = self._nothing(f"segment {number}: {error}")
        found = self._found
        if newest >= 0 and (not found.numbers or found.numbers[-1] != newest):
            return self._nothing(found.dropped or f"segment {newest} is missing")
        if (
            block.clean
            and found.numbers
            and (newest != block.newest or found.ends[newest][0] != block.entries)
        ):
            return self._nothing(f"the journal of segment {newest} is not as it was left")
        return found

    def _is_unused(self, number: int) -> bool:
        """Whether nothing was ever entered into the segment's journal."""
        with self._files.path(number).open("rb") as file:
            head = file.read(journal.records_start(self._block.segment_bytes))
        return not head[journal.PAGE_BYTES :].strip(b"\0")

    def _nothing(self, why: str) -> Loaded:
        block = self._block
        return Loaded(Index(block.segments * journal.records_max(block.segment_bytes)), dropped=why)

    def _read(self, number: int) -> None:
        block, found = self._block, self._found
        descriptor = os.open(self._files.path(number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            start = journal.records_start(block.segment_bytes)
            head = os.pread(descriptor, start, 0)
        finally:
            os.close(descriptor)
        header = journal.decode_header(block.store, head[: journal.PAGE_BYTES])
        expected = number, journal.entries_max(block.segment_bytes)
        if header is None or (header.number, header.entries_max) != expected:
            raise DamagedJournal("its header is damaged, or another store's")
        if size != block.segment_bytes or len(head) != start:
            raise DamagedJournal("it is not of the right size")
        found.index.begin(number)
        found.numbers.append(number)
        reading = _Reading(found.index, number, block.segment_bytes)
        scribe = Scribe(block.store, number)
        area = head[journal.PAGE_BYTES :]
        entries: Iterable[Fields] = scribe.entries(area)
        self._seals.note(number, header.salt)
        seal = self._seals.of(number)
        if seal is not None:
            entries = _tags_checked(seal, scribe, area, entries)
        found.index.put_all(number, reading.rows(entries))
        found.ends[number] = reading.entries, reading.position
        found.index.end(number)


class _Reading:
    """One journal on its way into the index."""

    def __init__(self, index: Index, number: int, segment_bytes: int) -> None:
        self.entries = 0
        self.position = journal.records_start(segment_bytes)
        """Where the last record ends."""
        self._index = index
        self._number = number
        self._segment_bytes = segment_bytes

    def rows(self, entries: Iterable[Fields]) -> Iterator[tuple[int, int, int, int, int]]:
        """What to put into the index, in order; what to take out of it is taken out meanwhile."""
        position, end, count, left = self.position, self._segment_bytes, 0, rows.ROWS_MAX
        frame_kind = int(Kind.FRAME)
        for kind, valid, stored, where, place, _ in entries:
            count += 1
            if kind == frame_kind:
                size = stored + _FRAME_EXTRA & -record.ALIGN_BYTES
                left -= 1
                if (
                    place < position
                    or place + size > end
                    or stored > record.STORED_MAX_BYTES
                    or place & record.ALIGN_BYTES - 1
                    or where > FRAME_NUMBER_MAX
                    or left < 0
                ):
                    raise DamagedJournal("an entry has numbers that can't be")
                position = place + size
                yield where, place, size, valid, 0
            elif kind == Kind.ZERO:
                left -= 1
                if where > FRAME_NUMBER_MAX or left < 0:
                    raise DamagedJournal("an entry has numbers that can't be")
                yield where, 0, 0, valid, rows.ZERO
            elif kind == Kind.INVALIDATE:
                apply_range(self._index, where, place)
            else:
                raise DamagedJournal("an entry is of an unknown kind")
        self.entries, self.position = count, position


def _tags_checked(
    seal: Seal, scribe: Scribe, area: bytes, entries: Iterable[Fields]
) -> Iterator[Fields]:
    """Of a sealed store. A FRAME has none: its record has."""
    for ordinal, fields in enumerate(entries):
        if fields[0] != Kind.FRAME:
            _check_tag(seal, scribe, ordinal, journal.entry_at(area, ordinal))
        yield fields


def _check_tag(seal: Seal, scribe: Scribe, ordinal: int, entry: Entry) -> None:
    try:
        seal.decrypt(entry.life, entry.seq, scribe.tagged(ordinal, entry), entry.tag)
    except OrionError:
        raise DamagedJournal("an entry is not what was sealed") from None


def apply_range(index: Index, offset: int, length: int) -> None:
    """An INVALIDATE, all at once."""
    span = offset, offset + length
    if not length:
        return
    if index.is_few(span):
        index.remove_range(span)
    else:
        for number in index.numbers:
            index.remove_range_in(number, span)
