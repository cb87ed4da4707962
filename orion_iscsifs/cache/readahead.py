"""Which bytes to fetch ahead of a sequential reader. Pure.

The kernel cuts a sequential read into requests of 128 KiB or more and sends several at once, so
they arrive slightly out of order. Two stages keep random readers cheap:

1. *Candidates*: where each of the last reads ended. A read that begins at such a place makes a
   stream. Reads at equal distances make a strided one (`strides`). A random read costs a few
   look-ups, an insert and a removal.
2. *Streams*, found by the 8 MiB zone of their head. A read belongs to its zone's stream if it lies
   between a little behind the head and the end of what was asked for ahead of it. Order inside
   that span does not matter; a seek leaves the span and thereby the stream. A random read may hit
   the span by chance, so a stream must also be dense: once less than half of what lies behind its
   head has been read, it was none.

A stream's window starts at 128 KiB (or twice the reader's request) and grows by two bytes for each
that is read, up to the maximum: never far beyond what is being used. It is filled up when half of
it, or `STEP_BYTES`, has been used: were it always half of a large window, the link would rest. The
maximum is what the link needs (`bandwidth`), or what was configured. All streams together have a
budget; a stream that has not asked for long, while others did, has no part in it any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.block.ranges import Range
from orion_iscsifs.cache.strides import Strides, step_of

WINDOW_MIN_BYTES: Final = 128 << 10
STEP_BYTES: Final = 512 << 10
IDLE_ASKS: Final = 64
"""A stream is idle when the others have asked so often since it did."""
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
    """Watches reads and says what to fetch.

    `window_max_bytes` is one stream's, and may be changed at any time; 0 from the beginning turns
    it all off. `total_max_bytes` is for all streams together, but each has `WINDOW_MIN_BYTES`.
    """

    def __init__(self, window_max_bytes: int, total_max_bytes: int | None = None) -> None:
        self.window_max_bytes = window_max_bytes
        self._total_max = (
            STREAMS_MAX * window_max_bytes if total_max_bytes is None else total_max_bytes
        )
        self._candidates: dict[int, int] = {}
        """The last reads that belong to no stream: end → start, oldest first."""
        self._last = (-1, -1, -1)
        """The ends of the youngest of them."""
        self._streams: dict[int, Stream] = {}
        self._strides = Strides()
        self._asks = 0

    def note(self, start: int, end: int, limit: int) -> Sequence[Range]:
        """A read of `[start, end)`: what to fetch now, at most up to `limit`."""
        if not self.window_max_bytes:
            return ()
        zone = start >> _ZONE_SHIFT
        for key in (zone, zone - 1, zone + 1):
            stream = self._streams.get(key)
            if stream is not None and stream.head - BEHIND_MAX_BYTES <= start <= stream.ahead:
                stream.read_bytes += end - start
                return self._advance(key, stream, end, limit)
        if self._strides:
            wanted = self._strides.note(start, end, limit, self._share())
            if wanted is not None:
                return wanted
        candidates = self._candidates
        if start in candidates:
            del candidates[start]
            return self._open(start, end, limit)
        for last in self._last:
            if 2 * last - end in candidates and (step := step_of(start, end, last, candidates)):
                return self._strides.open(start, end, step, limit, self._share())
        self._remember(start, end)
        return ()

    def _remember(self, start: int, end: int) -> None:
        candidates = self._candidates
        candidates[end] = start
        self._last = (end, self._last[0], self._last[1])
        if len(candidates) > CANDIDATES_MAX:
            del candidates[next(iter(candidates))]

    def _share(self) -> int:
        """How far ahead one stream may be."""
        streams = len(self._streams) + len(self._strides)
        if streams <= 1:
            return min(self.window_max_bytes, self._total_max)
        share = max(self._total_max // streams, WINDOW_MIN_BYTES)
        return min(self.window_max_bytes, share)

    def _drop_idle(self, room: int) -> None:
        """Forget streams that are idle, and the oldest until there is room for so many."""
        by_age = sorted(self._streams, key=lambda key: self._streams[key].last_use)
        excess = len(by_age) + room - STREAMS_MAX
        for index, key in enumerate(by_age):
            stream = self._streams[key]
            if index >= excess and stream.last_use >= self._asks - IDLE_ASKS:
                return
            del self._streams[key]
            self._remember(stream.head, stream.head)  # it may go on one day

    def _open(self, start: int, end: int, limit: int) -> Sequence[Range]:
        """A read went on where an earlier one ended: a new stream."""
        self._drop_idle(room=1)
        window = max(WINDOW_MIN_BYTES, 2 * (end - start))
        stream = Stream(start, end - start, head=end, ahead=end, window_bytes=window, last_use=0)
        key = end >> _ZONE_SHIFT
        self._streams[key] = stream
        return self._ask(stream, limit)

    def _advance(self, key: int, stream: Stream, end: int, limit: int) -> Sequence[Range]:
        if end <= stream.head:
            return ()
        stream.head = end
        if 2 * stream.read_bytes < end - stream.origin:
            del self._streams[key]
            return ()
        stream.ahead = max(stream.ahead, end)
        if end >> _ZONE_SHIFT != key:
            del self._streams[key]
            self._streams[end >> _ZONE_SHIFT] = stream
        used = stream.window_bytes - (stream.ahead - stream.head)
        if used < min(stream.window_bytes // 2, STEP_BYTES):
            return ()
        stream.window_bytes += 2 * used
        return self._ask(stream, limit)

    def _ask(self, stream: Stream, limit: int) -> Sequence[Range]:
        self._asks += 1
        stream.last_use = self._asks
        if not self._asks % IDLE_ASKS:
            self._drop_idle(room=0)
            self._strides.drop_idle()
        stream.window_bytes = min(stream.window_bytes, self._share())
        end = stream.head + stream.window_bytes
        if stream.window_bytes >= 2 * STEP_BYTES:
            end -= end % STEP_BYTES  # whole requests
        start, stream.ahead = stream.ahead, max(end, stream.ahead)
        end = min(stream.ahead, limit)
        return ((start, end),) if start < end else ()
