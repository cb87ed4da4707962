"""`ExtentMap`: which record holds which bytes of the device. Pure.

Disjoint extents, in a list for each 64 KiB of the device: a put or a look-up touches only the lists
of its own range, which are short, however much there is elsewhere.
"""

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from orion_iscsifs.block.ranges import Range, split

Value = TypeVar("Value")

_BUCKET_SHIFT: Final = 16
_BUCKET_BYTES: Final = 1 << _BUCKET_SHIFT


class ExtentMap(Generic[Value]):
    """See the module's docstring. `covered_bytes` is the sum of all extents."""

    __slots__ = ("_buckets", "covered_bytes")

    def __init__(self) -> None:
        self._buckets: dict[int, list[tuple[int, int, Value]]] = {}
        self.covered_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._buckets)

    def put(self, span: Range, value: Value) -> None:
        """The span is `value`'s now, whatever was there."""
        for start, end in split(span, _BUCKET_BYTES):
            number = start >> _BUCKET_SHIFT
            bucket = self._buckets.get(number)
            if bucket is None:
                self._buckets[number] = [(start, end, value)]
                self.covered_bytes += end - start
            else:
                self._cut(bucket, start, end)
                bucket.append((start, end, value))
                bucket.sort(key=_start)
                self.covered_bytes += end - start

    def remove(self, span: Range) -> None:
        """Nobody's any more."""
        for start, end in split(span, _BUCKET_BYTES):
            number = start >> _BUCKET_SHIFT
            bucket = self._buckets.get(number)
            if bucket is not None:
                self._cut(bucket, start, end)
                if not bucket:
                    del self._buckets[number]

    def _cut(self, bucket: list[tuple[int, int, Value]], start: int, end: int) -> None:
        kept: list[tuple[int, int, Value]] = []
        for first, last, value in bucket:
            if last <= start or end <= first:
                kept.append((first, last, value))
                continue
            self.covered_bytes -= min(last, end) - max(first, start)
            if first < start:
                kept.append((first, start, value))
            if end < last:
                kept.append((end, last, value))
        bucket[:] = kept

    def find(self, span: Range) -> list[tuple[int, int, Value]]:
        """The extents in the span, cut to it, in the order of offset."""
        if not self._buckets:
            return []
        found: list[tuple[int, int, Value]] = []
        for start, end in split(span, _BUCKET_BYTES):
            for first, last, value in self._buckets.get(start >> _BUCKET_SHIFT, ()):
                if first < end and start < last:
                    found.append((max(first, start), min(last, end), value))
        return found

    def __iter__(self) -> Iterator[tuple[int, int, Value]]:
        """All extents in the order of offset."""
        for number in sorted(self._buckets):
            yield from self._buckets[number]


def _start(extent: tuple[int, int, object]) -> int:
    return extent[0]
