"""Which bytes to fetch ahead of a sequential reader. Pure.

The kernel cuts a sequential read into requests of 128 KiB or more and sends several at once, so
they arrive slightly out of order. Two stages keep random readers cheap:

1. *Candidates*: where each of the last reads ended. A read that begins at such a place makes a
   stream. A random read costs two look-ups, an insert and a removal.
2. *Streams*, found by the 8 MiB zone of their head. A read belongs to its zone's stream if it lies
   between a little behind the head and the end of what was asked for ahead of it. Order inside
   that span does not matter; a seek leaves the span and thereby the stream. A random read may hit
   the span by chance, so a stream must also be dense: once less than half of what lies behind its
   head has been read, it was none.

A stream's window starts at 128 KiB (or twice the reader's request) and doubles whenever less than
half of it is left ahead of the reader, up to the configured maximum: never far beyond what is
being used.
"""

from dataclasses import dataclass
from typing import Final

from orion_iscsifs.block.ranges import Range

WINDOW_MIN_BYTES: Final = 128 << 10
WINDOW_AUTO_MAX_BYTES: Final = 4 << 20
STREAMS_MAX: Final = 16
CANDIDATES_MAX: Final = 64
BEHIND_MAX_BYTES: Final = 2 << 20
"""How far behind the head a straggler still belongs to the stream."""
_ZONE_SHIFT: Final = 23


@dataclass(slots=True)
class Stream:
    origin: int
    """Where it began."""
    read_bytes: int
    """What has been read of it."""
    head: int
    """Where the reader's farthest request ended."""
    ahead: int
    """The end of what has been asked for on its behalf; never less than `head`."""
    window_bytes: int
    last_use: int


class Readahead:
    """Watches reads and says what to fetch. `window_max_bytes` 0 turns it off."""

    def __init__(self, window_max_bytes: int) -> None:
        self._window_max = window_max_bytes
        self._candidates: dict[int, None] = {}
        self._streams: dict[int, Stream] = {}
        self._uses = 0

    def note(self, start: int, end: int, limit: int) -> Range | None:
        """A read of `[start, end)`: the range to fetch now, at most up to `limit`, or None."""
        if not self._window_max:
            return None
        zone = start >> _ZONE_SHIFT
        for key in (zone, zone - 1, zone + 1):
            stream = self._streams.get(key)
            if stream is not None and stream.head - BEHIND_MAX_BYTES <= start <= stream.ahead:
                stream.read_bytes += end - start
                return self._advance(key, stream, end, limit)
        if start not in self._candidates:
            self._remember(end)
            return None
        del self._candidates[start]
        return self._open(start, end, limit)

    def _remember(self, end: int) -> None:
        candidates = self._candidates
        candidates[end] = None
        if len(candidates) > CANDIDATES_MAX:
            del candidates[next(iter(candidates))]

    def _open(self, start: int, end: int, limit: int) -> Range | None:
        """A read went on where an earlier one ended: a new stream."""
        if len(self._streams) >= STREAMS_MAX:
            oldest = min(self._streams, key=lambda key: self._streams[key].last_use)
            del self._streams[oldest]
        window = min(max(WINDOW_MIN_BYTES, 2 * (end - start)), self._window_max)
        stream = Stream(start, end - start, head=end, ahead=end, window_bytes=window, last_use=0)
        key = end >> _ZONE_SHIFT
        self._streams[key] = stream
        return self._ask(stream, limit)

    def _advance(self, key: int, stream: Stream, end: int, limit: int) -> Range | None:
        if end <= stream.head:
            return None
        stream.head = end
        if 2 * stream.read_bytes < end - stream.origin:
            del self._streams[key]
            return None
        stream.ahead = max(stream.ahead, end)
        if end >> _ZONE_SHIFT != key:
            del self._streams[key]
            self._streams[end >> _ZONE_SHIFT] = stream
        if stream.ahead - stream.head >= stream.window_bytes // 2:
            return None
        stream.window_bytes = min(2 * stream.window_bytes, self._window_max)
        return self._ask(stream, limit)

    def _ask(self, stream: Stream, limit: int) -> Range | None:
        self._uses += 1
        stream.last_use = self._uses
        start, stream.ahead = stream.ahead, max(stream.head + stream.window_bytes, stream.ahead)
        end = min(stream.ahead, limit)
        return (start, end) if start < end else None
