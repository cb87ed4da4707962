import itertools

from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.block.ranges import (
    Range,
    clip,
    coalesce,
    cover,
    overlap,
    split,
    subtract,
    within,
)

ranges = st.tuples(st.integers(0, 200), st.integers(0, 60)).map(lambda t: (t[0], t[0] + t[1]))
units = st.sampled_from([1, 2, 8, 64])


def points(*many: Range) -> set[int]:
    return {n for start, end in many for n in range(start, end)}


@given(ranges, ranges)
def test_clip_and_overlap(a: Range, b: Range) -> None:
    assert points(clip(a, b)) == points(a) & points(b)
    if points(a) and points(b):
        assert overlap(a, b) == bool(points(a) & points(b))


@given(ranges, units)
def test_cover_and_within(a: Range, unit: int) -> None:
    outer, inner = cover(a, unit), within(a, unit)
    assert not any(n % unit for n in (*outer, *inner)) or inner[0] == inner[1]
    assert points(inner) <= points(a) <= points(outer)
    assert len(points(outer) - points(a)) < 2 * unit
    assert len(points(a) - points(inner)) < 2 * unit


@given(ranges, st.integers(1, 50))
def test_split(a: Range, unit: int) -> None:
    pieces = list(split(a, unit))
    assert sorted(n for start, end in pieces for n in range(start, end)) == sorted(points(a))
    assert all(start // unit == (end - 1) // unit for start, end in pieces)


@given(st.lists(ranges))
def test_coalesce(many: list[Range]) -> None:
    merged = coalesce(many)
    assert points(*merged) == points(*many)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))


@given(ranges, st.lists(ranges))
def test_subtract(whole: Range, holes: list[Range]) -> None:
    left = subtract(whole, holes)
    assert points(*left) == points(whole) - points(*holes)
    assert left == coalesce(left)
