"""What is worth a place in the tier: S3-FIFO's newcomers and ghosts, and floods. Pure.

While there is room that was never used, everything is: what has been read once is local from then
on. A full tier has to throw something out for each newcomer, so it asks (see `store` for the
segments, which are S3-FIFO's `main`):

* *Ghosts.* A frame that the tier refused, or threw out unused, leaves its name. Whoever is asked
  for again while its name is there goes straight in.
* *Newcomers* without a name get one, and one of `NEWCOMER_SHARE` of their bytes goes in all the
  same. That is what S3-FIFO's `small` queue is good for: it shows whether a newcomer is asked for
  again. Here the RAM cache above and the names do most of that, and cost no space on the disk.
* *Floods.* A sequential stream that is longer than `flood_bytes` passes by and leaves no names: a
  backup of the whole disk, tonight and tomorrow, must not throw out what people work with.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.block.ranges import Range

NEWCOMER_SHARE: Final = 10
FLOOD_SHARE: Final = 8
FLOOD_MIN_BYTES: Final = 8 << 20
FLOOD_MAX_BYTES: Final = 1 << 30
STREAMS_MAX: Final = 64
STREAM_SLACK_BYTES: Final = 4 << 20
"""Requests of one stream come in any order within so much: readahead sends many at once."""
GHOSTS_MIN: Final = 1 << 10
GHOSTS_MAX: Final = 1 << 20
_MIX: Final = 0x9E3779B97F4A7C15


class Ghosts:
    """Names of frames, about `count_max` of them; a new one may push out any other.

    A name is 4 bytes in a table, so that there can be a million. What comes from its being short is
    a frame that is let in although it was not known: one in billions.
    """

    def __init__(self, count_max: int) -> None:
        bits = (min(max(count_max, GHOSTS_MIN), GHOSTS_MAX) - 1).bit_length()
        self._names = array("I", bytes(4 << bits))
        self._shift = 64 - bits

    def __contains__(self, frame: int) -> bool:
        at, name = self._place(frame)
        return self._names[at] == name

    def add(self, frame: int) -> None:
        at, name = self._place(frame)
        self._names[at] = name

    def discard(self, frame: int) -> None:
        at, name = self._place(frame)
        if self._names[at] == name:
            self._names[at] = 0

    @property
    def memory_bytes(self) -> int:
        return self._names.__sizeof__()

    def _place(self, frame: int) -> tuple[int, int]:
        mixed = (frame + 1) * _MIX % (1 << 64)
        return mixed >> self._shift, mixed & 0xFFFF_FFFF | 1


@dataclass(slots=True, eq=False)
class _Stream:
    start: int
    position: int
    """How far it has come."""
    requested: int
    """Bytes, some of them perhaps twice."""


class Streams:
    """Finds long sequential streams among many requests."""

    def __init__(self, flood_bytes: int) -> None:
        self._flood_bytes = flood_bytes
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        """By where they are, in units of `STREAM_SLACK_BYTES`; the one used last comes last."""

    def is_flood(self, span: Range) -> bool:
        """Note a request, and whether it belongs to a stream that has become too long."""
        streams, place = self._streams, span[0] // STREAM_SLACK_BYTES
        for near in (place, place - 1, place + 1):
            stream = streams.get(near)
            if stream is not None and abs(span[0] - stream.position) <= STREAM_SLACK_BYTES:
                del streams[near]
                break
        else:
            stream = _Stream(span[0], span[0], 0)
            if len(streams) >= STREAMS_MAX:
                streams.popitem(last=False)
        stream.position = max(stream.position, span[1])
        stream.requested += span[1] - span[0]
        place = stream.position // STREAM_SLACK_BYTES
        streams[place] = stream
        streams.move_to_end(place)
        length = stream.position - stream.start
        # Random requests that happen to be near each other leave most of the way out.
        return length > self._flood_bytes and 2 * stream.requested > length


class Admission:
    """See the module's docstring."""

    def __init__(self, tier_bytes: int, ghosts_max: int) -> None:
        self.ghosts = Ghosts(ghosts_max)
        self.is_full = False
        """There is no room left that was never used."""
        flood_bytes = max(tier_bytes // FLOOD_SHARE, FLOOD_MIN_BYTES)
        self._streams = Streams(min(flood_bytes, FLOOD_MAX_BYTES))
        self._credit = 0

    def passes_by(self, span: Range) -> bool:
        """Note a request; whether what it brings is part of a flood past a full tier."""
        return self._streams.is_flood(span) and self.is_full

    def admits(self, frame: int, length: int, *, is_known: bool) -> bool:
        """Whether so many bytes of the frame are worth a place. `is_known`: it has one already."""
        if not self.is_full or is_known or frame in self.ghosts:
            return True
        self._credit += length
        if self._credit >= NEWCOMER_SHARE * length:
            self._credit -= NEWCOMER_SHARE * length
            return True
        self.ghosts.add(frame)
        return False

    def is_proven(self, frame: int) -> bool:
        """Whether it is more than a newcomer, now that it gets its place; its name goes."""
        proven = frame in self.ghosts
        self.ghosts.discard(frame)
        return proven
