"""`Epochs`: the changes that are in the log and not on the device yet, in the order of fsync. Pure.

An epoch is what was written between two flushes. Inside one, changes may reach the device in any
order, so only the last content of each byte matters; an epoch that is *sealed* gets no more. With
`destage=ordered` the device has all of epoch n, durably, before it gets anything of n + 1: it is
always in a state that a disk with a volatile cache may be in after a loss of power. That is why an
epoch keeps its own content when a later one overwrites it.

`live` is the newest content of all epochs together: what a read has to see.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from orion_iscsifs.block.ranges import Range
from orion_iscsifs.cache.extents import ExtentMap
from orion_iscsifs.localstore.record import Flag, Header, Kind
from orion_iscsifs.localstore.scan import Found, Place


@dataclass(slots=True, eq=False)
class Change:
    """One record of the log."""

    epoch: int
    offset: int
    length: int
    view: memoryview | None = None
    """The content in memory; None: it is in the log only, or all zeroes."""
    place: Place | None = None
    """Where it is in the log; None: nowhere (the log has failed)."""
    checksum: int = 0
    zero: bool = False
    may_unmap: bool = False
    was_refused: bool = False
    """The device has refused it before, and it was said."""
    is_lost: bool = False
    """Its content can't be read from the log."""


@dataclass(slots=True, eq=False)
class Epoch:
    """One epoch's final content."""

    number: int
    first_seq: int
    """Of its first record in the log."""
    since: float
    """When its first change was made."""
    changes: ExtentMap[Change] = field(default_factory=ExtentMap)
    memory_end: int = 0
    """How much of the ring was given out when it got its last change."""
    sealed: bool = False
    flushed: bool = False
    """It was sealed by a flush: what is written later must not overtake it."""
    only_refused: bool = False
    """There is nothing in it but what the device has refused before."""
    has_refused: bool = False
    """There is something in it that the device has refused before."""


class Epochs:
    """See the module's docstring. `next_number` is that of an epoch to come."""

    def __init__(self) -> None:
        self.live: ExtentMap[Change] = ExtentMap()
        self.lost: ExtentMap[Change] = ExtentMap()
        """What can't be read from the log any more, until it is written again."""
        self.queue: deque[Epoch] = deque()
        """The oldest first. All but the last one are sealed."""
        self.next_number = 1

    @property
    def current_number(self) -> int:
        """The epoch that a change made now belongs to."""
        queue = self.queue
        return queue[-1].number if queue and not queue[-1].sealed else self.next_number

    def add(self, change: Change, *, seq: int, now: float, memory_end: int) -> None:
        """A change of the current epoch, which is record `seq` of the log."""
        queue = self.queue
        if queue and not queue[-1].sealed:
            epoch = queue[-1]
        else:
            epoch = Epoch(self.next_number, seq, now, only_refused=True)
            self.next_number += 1
            queue.append(epoch)
        span = change.offset, change.offset + change.length
        if self.lost:
            self.lost.remove(span)
        epoch.only_refused &= change.was_refused
        epoch.has_refused |= change.was_refused
        epoch.changes.put(span, change)
        epoch.memory_end = memory_end
        self.live.put(span, change)

    def seal(self, *, flushed: bool = False) -> None:
        """What comes from now on belongs to another epoch. `flushed`: somebody relies on that."""
        if self.queue:
            self.queue[-1].sealed = True
            self.queue[-1].flushed |= flushed

    def may_be_passed(self, span: Range) -> bool:
        """Whether a change of the span may reach the device before anything that is here."""
        if any(epoch.flushed for epoch in self.queue):
            return False
        return not self.live.find(span)

    def done(self, epochs: Iterable[Epoch]) -> None:
        """The oldest epochs are durable on the device."""
        for epoch in epochs:
            assert self.queue[0] is epoch
            self.queue.popleft()
            for start, end, _ in epoch.changes:
                for first, last, newest in self.live.find((start, end)):
                    if newest.epoch <= epoch.number:
                        self.live.remove((first, last))
                        if newest.is_lost:
                            self.lost.put((first, last), newest)

    def overwritten(self, span: Range) -> None:
        """The device has got newer content than any of these, past the log."""
        self.live.remove(span)
        self.lost.remove(span)
        for epoch in self.queue:
            epoch.changes.remove(span)

    # -- recovering --------------------------------------------------------------------------

    def replay(self, found: Found, *, now: float) -> None:
        """One more record of an earlier life. They come in the order of the log."""
        header = found.header
        if header.kind is Kind.DESTAGED:
            self.done([epoch for epoch in self.queue if epoch.number <= header.epoch])
            return
        queue = self.queue
        if not queue or queue[-1].number != header.epoch:
            self.seal(flushed=True)
            queue.append(Epoch(header.epoch, header.seq, now))
        change = _change(header, found.place)
        span = header.offset, header.offset + header.length
        queue[-1].changes.put(span, change)
        self.live.put(span, change)

    def end_replay(self, *, destaged: int, last: int) -> None:
        """`destaged`: epochs up to this one are on the device. `last`: the newest there was."""
        self.done([epoch for epoch in self.queue if epoch.number <= destaged])
        self.seal(flushed=True)
        self.next_number = last + 1

    def cut(self, size_bytes: int) -> int:
        """Forget what lies past the end of the device; how many bytes that was."""
        before = self.live.covered_bytes
        for changes in (self.live, *(epoch.changes for epoch in self.queue)):
            for start, end, _ in list(changes):
                if end > size_bytes:
                    changes.remove((max(start, size_bytes), end))
        return before - self.live.covered_bytes


def _change(header: Header, place: Place) -> Change:
    return Change(
        header.epoch,
        header.offset,
        header.length,
        place=place,
        checksum=header.payload_checksum,
        zero=header.kind is Kind.ZERO,
        may_unmap=bool(header.flags & Flag.MAY_UNMAP),
    )


@dataclass(slots=True)
class Request:
    """One request to the device, made of consecutive extents."""

    offset: int
    length: int
    pieces: list[tuple[int, int, Change]]

    @property
    def zero(self) -> bool:
        """All of it is zeroes."""
        return self.pieces[0][2].zero


def requests(batch: ExtentMap[Change], length_max: int) -> Iterator[Request]:
    """As few requests as bring all extents to the device, data and zeroes apart."""
    last: Request | None = None
    for start, end, change in batch:
        at = start
        while at < end:
            fits = (
                last is not None
                and last.offset + last.length == at
                and last.length < length_max
                and last.pieces[-1][2].zero == change.zero
                and (not change.zero or last.pieces[-1][2].may_unmap == change.may_unmap)
            )
            if last is None or not fits:
                if last is not None:
                    yield last
                last = Request(at, 0, [])
            stop = min(end, at + length_max - last.length) if not change.zero else end
            last.pieces.append((at, stop, change))
            last.length += stop - at
            at = stop
    if last is not None:
        yield last
