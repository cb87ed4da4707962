"""Strided streams: reads of one length at one distance, ascending or descending. Pure.

A stride is found when four reads of one length lie at one distance: the newest, one of the last
three before it (so many readers may take turns), and two more where those two say they should be.
For a random read that is three failing look-ups. Three reads would do on a large device, but on a
small one they meet by chance.

From then on a read belongs to the stride if it has the length and lies on one of the places that
were asked for, the next one, or (a straggler) a few behind. The window counts reads. It starts at 2
and doubles whenever less than half of it is left, up to what `Readahead` grants. Only the places
themselves are asked for, never the holes between them.

A stride ends when it breaks: after a while of reads elsewhere, or when most of its places were
skipped. Nothing is asked for without a read on one of its places, so a broken one costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.block.ranges import Range, clip, coalesce, cover

STRIDES_MAX: Final = 8
READS_MAX: Final = 128
"""Asked for ahead, at most."""
BEHIND_MAX: Final = 8
ELSEWHERE_MAX: Final = 64
"""Reads elsewhere in a row that end a stride."""
_WINDOW_MIN: Final = 2
_PAGE_BYTES: Final = 4096
_FRAME_BYTES: Final = 64 << 10
"""What a read occupies in the cache, at least."""


def step_of(start: int, end: int, last: int, recent: Mapping[int, int]) -> int:
    """The distance of the stride that `[start, end)` continues after `last`; 0: none.

    `recent`: the last reads, as end → start. `last` is the end of one of them.
    """
    length, step = end - start, end - last
    ends = (last, last - step, last - 2 * step)
    return step if all(recent.get(each) == each - length for each in ends) else 0


@dataclass(slots=True)
class Stride:
    head: int
    """Where the farthest read began."""
    step: int
    """To the next one; negative: descending."""
    length: int
    ahead: int = 0
    """Reads that were asked for beyond `head`."""
    window: int = _WINDOW_MIN
    passed: int = 1
    """Places that the reader has passed, and how many of them it read."""
    read: int = 1
    elsewhere: int = 0
    fresh: bool = True
    """Used since the last `drop_idle`."""


class Strides:
    """All strided streams of a device."""

    def __init__(self) -> None:
        self._streams: list[Stride] = []

    def __len__(self) -> int:
        return len(self._streams)

    def open(
        self, start: int, end: int, step: int, limit: int, window_bytes: int
    ) -> Sequence[Range]:
        """A read continues a stride that `step_of` found: what to fetch now."""
        if len(self._streams) >= STRIDES_MAX:
            self._streams.remove(max(self._streams, key=lambda stride: stride.elsewhere))
        stride = Stride(start, step, end - start)
        self._streams.append(stride)
        return _ask(stride, limit, window_bytes)

    def note(self, start: int, end: int, limit: int, window_bytes: int) -> Sequence[Range] | None:
        """What to fetch because of this read; None: it belongs to no stride."""
        found: Sequence[Range] | None = None
        for stride in self._streams:
            places, off = divmod(start - stride.head, stride.step)
            if off or end - start != stride.length or not -BEHIND_MAX <= places <= stride.ahead + 1:
                stride.elsewhere += 1
                continue
            stride.elsewhere, stride.fresh = 0, True
            found = _advance(stride, places, limit, window_bytes)
            break
        self._drop_broken()
        return found

    def drop_idle(self) -> None:
        """Forget strides that nobody has followed since the last call."""
        self._streams = [stride for stride in self._streams if stride.fresh]
        for stride in self._streams:
            stride.fresh = False

    def _drop_broken(self) -> None:
        for stride in self._streams:
            if stride.elsewhere > ELSEWHERE_MAX or 2 * stride.read < stride.passed:
                self._streams.remove(stride)
                return


def _advance(stride: Stride, places: int, limit: int, window_bytes: int) -> Sequence[Range]:
    stride.read += 1
    if places <= 0:
        return ()
    stride.passed += places
    stride.head += places * stride.step
    stride.ahead = max(stride.ahead - places, 0)
    if stride.ahead >= stride.window // 2:
        return ()
    stride.window *= 2
    return _ask(stride, limit, window_bytes)


def _ask(stride: Stride, limit: int, window_bytes: int) -> Sequence[Range]:
    most = min(window_bytes // max(stride.length, _FRAME_BYTES), READS_MAX)
    stride.window = max(min(stride.window, most), 1)
    places = range(stride.ahead + 1, stride.window + 1)
    stride.ahead = max(stride.ahead, stride.window)
    starts = (stride.head + place * stride.step for place in places)
    inside = (clip((at, at + stride.length), (0, limit)) for at in starts if 0 <= at < limit)
    return coalesce(cover(place, _PAGE_BYTES) for place in inside)
