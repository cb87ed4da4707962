"""Reading a log back: which of its records count, and whether what ends it is damage.

The segments are read in the order of their numbers, the records in the order of their sequence
numbers, without a gap. Where the next record is not found the log ends, for one of these reasons:

* *Nothing was written after it.* What is there is zeroes, or older than the end.
* *Torn.* Something was, and not all of it reached the disk: a loss of power. Nothing that was
  promised to be durable is missing, since no durable point lies beyond the end.
* *Damaged.* The record that is missing was durable once: a later record, or the header of a
  segment, says so (`durable`). It may be the first one that is needed (`needed`). Or it is whole
  and not what was sealed: somebody has changed it.

Blocking; run it in a thread.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from orion_iscsifs.localstore import record, segment
from orion_iscsifs.localstore.codec import Codec
from orion_iscsifs.localstore.record import BrokenRecord, Header, Kind, NoRecord
from orion_iscsifs.localstore.seal import BadSeal

_WINDOW_BYTES: Final = 4 << 20


class Place(NamedTuple):
    """Where the payload of a record is."""

    slot: int
    position: int


class Found(NamedTuple):
    """A record that counts."""

    header: Header
    place: Place


@dataclass(frozen=True, slots=True)
class Source:
    """A segment to read."""

    slot: int
    descriptor: int
    size_bytes: int
    codec: Codec

    @property
    def header(self) -> segment.SegmentHeader:
        return self.codec.header


class Scan:
    """One reading. Iterate over `records` to the end, then look at the other attributes."""

    def __init__(self, sources: list[Source], *, is_locked: bool = False, damage: str = "") -> None:
        """`is_locked`: it is sealed, and there is no key to look whether all is as it was.

        `damage`: of segments that are not among the sources.
        """
        self.damage = damage
        """What is wrong, in words; empty when nothing is."""
        self._is_locked = is_locked
        if not is_locked:
            sources = [source for source in sources if self._has_true_header(source)]
        self._sources = sorted(sources, key=lambda source: source.header.number)
        self.durable = max((source.header.durable for source in sources), default=0)
        """Everything below was durable."""
        self.destaged = max((source.header.destaged for source in sources), default=0)
        """The newest epoch known to be durable on the target."""
        self.needed = max((source.header.needed for source in sources), default=0)
        self.next_seq = self.needed
        """Of the record after the last one."""
        self.last_epoch = self.destaged
        self.torn_bytes = 0
        """Bytes of segments beyond the end in which there are records that can't be used."""
        self.slots: dict[int, int] = {}
        """Which have a record that counts, each with the newest epoch that has a change in it."""

    @property
    def records(self) -> Iterator[Found]:
        """Those that may be needed, in order."""
        end: tuple[int, int] | None = None
        for index, source in enumerate(self._sources):
            for found, stored in self._segment(source):
                header = found.header
                if header.seq < self.next_seq:
                    continue  # Not needed any more, and what is next to it may be gone.
                if header.seq > self.next_seq:
                    break
                if not self._is_sound(source, header, stored):
                    break
                self.next_seq += 1
                end = index, found.place.position + header.size_bytes - record.HEADER_BYTES
                self._use(source.slot, header)
                self._note(header)
                yield found
        self._judge_the_rest(end)

    def _has_true_header(self, source: Source) -> bool:
        try:
            source.codec.check_header()
        except BadSeal:
            self.damage = f"the header of {segment.file_name(source.slot)} is not what was sealed"
            return False
        return True

    def _is_sound(self, source: Source, header: Header, stored: memoryview) -> bool:
        """Whether it is what was sealed. Its checksums are right, so no accident explains it."""
        try:
            if not self._is_locked:
                source.codec.opened(header, stored)
        except BadSeal as error:
            self.damage = self.damage or str(error)
            return False
        return True

    def _segment(self, source: Source) -> Iterator[tuple[Found, memoryview]]:
        """The records of one segment, as far as they follow each other, and what they hold."""
        window = _Window(source)
        position = segment.START_BYTES
        expected: int | None = None
        while True:
            try:
                header, stored = window.record(source.codec.owner, position)
            except NoRecord:
                return
            if expected is not None and header.seq != expected:
                return
            yield Found(header, Place(source.slot, position + record.HEADER_BYTES)), stored
            expected = header.seq + 1
            position += header.size_bytes

    def _use(self, slot: int, header: Header) -> None:
        known = self.slots.setdefault(slot, 0)
        if header.kind is not Kind.DESTAGED:
            self.slots[slot] = max(known, header.epoch)

    def _note(self, header: Header) -> None:
        self.durable = max(self.durable, header.durable)
        self.last_epoch = max(self.last_epoch, header.epoch)
        if header.kind is Kind.DESTAGED:
            self.destaged = max(self.destaged, header.epoch)
            self.needed = max(self.needed, header.offset)

    def _judge_the_rest(self, end: tuple[int, int] | None) -> None:
        """Look for records beyond the end: they tell what was lost there."""
        start_index, start = end or (0, segment.START_BYTES)
        for index, source in enumerate(self._sources[start_index:]):
            window = _Window(source)
            position = start if index == 0 else segment.START_BYTES
            while (position := window.find(position)) >= 0:
                header, step = None, record.ALIGN_BYTES
                try:
                    header, _ = window.record(source.codec.owner, position)
                    step = header.size_bytes
                except BrokenRecord as error:
                    header = error.header  # what it says of its size may be wrong
                    if (index, position) == (0, start):
                        self.torn_bytes += record.ALIGN_BYTES
                except NoRecord:
                    pass
                if header is not None and header.seq >= self.next_seq:
                    self.durable = max(self.durable, header.durable)
                    self.torn_bytes += header.size_bytes
                position += step
        if self.durable > self.next_seq and not self.damage:
            lost = self.durable - self.next_seq
            self.damage = f"{lost} records from number {self.next_seq} on are damaged or missing"


class _Window:
    """A segment, a few megabytes at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._start = 0
        self._bytes = b""

    def _at(self, position: int, length: int) -> memoryview:
        """Fewer bytes at the end of the segment."""
        if not self._start <= position <= position + length <= self._start + len(self._bytes):
            size = min(max(_WINDOW_BYTES, length), max(self._source.size_bytes - position, 0))
            self._start, self._bytes = position, os.pread(self._source.descriptor, size, position)
        return memoryview(self._bytes)[position - self._start :][:length]

    def record(self, owner: int, position: int) -> tuple[Header, memoryview]:
        """The record there, its payload checked; raises as `record.decode` does."""
        header = record.decode(owner, self._at(position, record.HEADER_BYTES))
        payload = self._at(position, record.HEADER_BYTES + header.stored)[record.HEADER_BYTES :]
        if len(payload) < header.stored or record.checksum(payload) != header.payload_checksum:
            error = BrokenRecord(f"record {header.seq} is damaged")
            error.header = header
            raise error
        return header, payload

    def find(self, position: int) -> int:
        """Where the next bytes are that look like a record, at `position` or later; or -1."""
        while position < self._source.size_bytes:
            view = self._at(position, record.HEADER_BYTES)
            if not view:
                return -1
            found = self._bytes.find(record.MAGIC, position - self._start)
            if found < 0:
                position = (self._start + len(self._bytes)) & -record.ALIGN_BYTES
                if self._start + len(self._bytes) >= self._source.size_bytes:
                    return -1
                continue
            position = self._start + found
            if position % record.ALIGN_BYTES == 0:
                return position
            position += record.ALIGN_BYTES - position % record.ALIGN_BYTES
        return -1
