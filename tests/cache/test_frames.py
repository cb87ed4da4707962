import itertools

from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.block.pages import (
    FRAME_BYTES,
    PAGE_BYTES,
    page_runs,
    pages_covered,
    pages_touched,
)
from orion_iscsifs.cache.claims import bridged, claim, first_absent_run, give_up
from orion_iscsifs.cache.frames import FrameTable
from orion_iscsifs.cache.statistics import CacheStatistics


def bits(mask: int) -> set[int]:
    return {n for n in range(16) if mask >> n & 1}


@given(st.integers(0, FRAME_BYTES), st.integers(0, FRAME_BYTES))
def test_masks_of_ranges(a: int, b: int) -> None:
    start, end = sorted((a, b))
    pages = {n: (n * PAGE_BYTES, (n + 1) * PAGE_BYTES) for n in range(16)}
    if start < end:
        touched = {n for n, (first, last) in pages.items() if first < end and start < last}
        assert bits(pages_touched(start, end)) == touched
    covered = {n for n, (first, last) in pages.items() if start <= first and last <= end}
    assert bits(pages_covered(start, end)) == covered


@given(st.integers(0, 0xFFFF))
def test_runs_are_the_mask(mask: int) -> None:
    runs = list(page_runs(mask))
    assert sum(pages_touched(*run) for run in runs) == mask
    for (_, end), (start, _) in itertools.pairwise(runs):
        assert end < start, "runs are as long as can be"


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_bridges_join_absent_pages_over_clean_ones(absent: int, clean: int) -> None:
    clean &= ~absent
    joined = bridged(absent, clean)
    assert joined & absent == absent
    assert joined & ~(absent | clean) == 0
    ends = [n for run in page_runs(joined) for n in (run[0] // 4096, run[1] // 4096 - 1)]
    assert all(absent >> n & 1 for n in ends), "no bridge leads nowhere"
    assert len(list(page_runs(joined))) <= len(list(page_runs(absent)))


def table(frames: int = 2) -> FrameTable:
    made = FrameTable(frames, CacheStatistics())
    made.limit = 1 << 30
    return made


def test_a_full_table_evicts_the_idle_and_keeps_the_busy() -> None:
    frames = table()
    first, second = frames.obtain(1), frames.obtain(2)
    assert first is not None
    assert second is not None
    first.fetching = 1
    assert frames.obtain(1) is first
    assert frames.obtain(3) is second, "its memory serves again"
    second.write(1)
    assert frames.obtain(4) is None
    assert set(frames.frames) == {1, 3}
    first.fetching = 0
    frames.release(first)
    assert frames.obtain(4) is first
    frames.check()


def test_a_claim_keeps_others_away_until_it_is_given_up() -> None:
    frames = table(4)
    wanted = 3 * PAGE_BYTES, 20 * PAGE_BYTES
    assert first_absent_run(frames, wanted) == wanted
    fetch = claim(frames, (4 * PAGE_BYTES, 18 * PAGE_BYTES))
    assert first_absent_run(frames, wanted) == (3 * PAGE_BYTES, 4 * PAGE_BYTES)
    assert claim(frames, (4 * PAGE_BYTES, 18 * PAGE_BYTES)).claims == []
    give_up(frames, fetch)
    assert first_absent_run(frames, wanted) == wanted
    frames.check()


def test_in_range_of_a_huge_device() -> None:
    frames = table(4)
    for number in (1, 5, 1 << 20):
        frames.obtain(number)
    assert {f.number for f in frames.in_range((FRAME_BYTES + 1, 1 << 35))} == {1, 5}
    assert {f.number for f in frames.in_range((2 * FRAME_BYTES, 6 * FRAME_BYTES))} == {5}
