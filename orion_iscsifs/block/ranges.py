"""Half-open intervals of bytes, as pure functions.

A `Range` is `(start, end)` with `start <= end`; it never holds `end` itself.
"""

from collections.abc import Iterable, Iterator

Range = tuple[int, int]


def overlap(a: Range, b: Range) -> bool:
    """Whether the two share at least one byte."""
    return a[0] < b[1] and b[0] < a[1]


def clip(inner: Range, outer: Range) -> Range:
    """The part of `inner` inside `outer`; empty (start == end) when they are apart."""
    start = max(inner[0], outer[0])
    return start, max(start, min(inner[1], outer[1]))


def cover(inner: Range, unit: int) -> Range:
    """The smallest range of whole units around `inner`. `unit` is a power of two."""
    return inner[0] & -unit, (inner[1] + unit - 1) & -unit


def within(outer: Range, unit: int) -> Range:
    """The largest range of whole units inside `outer`, empty if it holds none."""
    start = (outer[0] + unit - 1) & -unit
    return start, max(start, outer[1] & -unit)


def split(whole: Range, unit: int) -> Iterator[Range]:
    """Cut at every multiple of `unit`; the first and the last piece may be shorter."""
    start, end = whole
    while start < end:
        stop = min((start // unit + 1) * unit, end)
        yield start, stop
        start = stop


def coalesce(pieces: Iterable[Range]) -> list[Range]:
    """The same bytes in the fewest ranges, in ascending order."""
    merged: list[Range] = []
    for start, end in sorted(pieces):
        if start == end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def subtract(whole: Range, holes: Iterable[Range]) -> list[Range]:
    """What is left of `whole` without `holes`, in ascending order."""
    left: list[Range] = []
    start, end = whole
    for hole_start, hole_end in coalesce(clip(hole, whole) for hole in holes):
        if start < hole_start:
            left.append((start, hole_start))
        start = hole_end
    if start < end:
        left.append((start, end))
    return left
