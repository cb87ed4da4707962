"""Reads at equal distances: found, fetched ahead on their places only, and let go."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.cache.readahead import Readahead
from orion_iscsifs.cache.strides import ELSEWHERE_MAX, READS_MAX, STRIDES_MAX

KIB = 1 << 10
MIB = 1 << 20
END = 1 << 40
MIDDLE = 1 << 39


def walk(
    readahead: Readahead, start: int, step: int, length: int, count: int
) -> list[tuple[int, int]]:
    places = [start + number * step for number in range(count)]
    return [run for at in places for run in readahead.note(at, at + length, END)]


@pytest.mark.parametrize("step", [64 * KIB, 3 * MIB, 8 * KIB, -64 * KIB, -3 * MIB])
def test_the_places_are_asked_for_and_never_the_holes(step: int) -> None:
    asked = walk(Readahead(4 * MIB), MIDDLE, step, 4 * KIB, 200)
    places = {MIDDLE + number * step for number in range(200 + READS_MAX)}
    assert {start for start, _ in asked} <= places
    assert all(end - start == 4 * KIB for start, end in asked)
    assert len(asked) == len(set(asked)), "nothing is asked for twice"
    missed = {MIDDLE + number * step for number in range(200)} - {start for start, _ in asked}
    assert missed == {MIDDLE + number * step for number in range(4)}


def test_the_fourth_read_makes_a_stride_and_the_window_doubles() -> None:
    readahead = Readahead(4 * MIB)
    step = MIB
    asked = [readahead.note(at, at + 4 * KIB, END) for at in range(0, 12 * step, step)]
    assert [len(runs) for runs in asked[:4]] == [0, 0, 0, 2]
    assert asked[3] == [(4 * step, 4 * step + 4 * KIB), (5 * step, 5 * step + 4 * KIB)]
    window = 0
    for number, runs in enumerate(asked):
        window = max([window, *(start // step - number for start, _ in runs)])
    assert window == 8


def test_backwards_without_holes_is_asked_for_in_one_piece() -> None:
    asked = walk(Readahead(4 * MIB), MIDDLE, -64 * KIB, 64 * KIB, 40)
    assert max(end - start for start, end in asked) >= MIB


def test_several_readers_take_turns() -> None:
    readahead = Readahead(4 * MIB)
    asked: dict[int, int] = dict.fromkeys(range(3), 0)
    for number in range(50):
        for reader in range(3):
            at = (reader << 36) + number * (reader + 1) * 100 * KIB
            asked[reader] += len(readahead.note(at, at + 4 * KIB, END))
    assert all(count >= 50 for count in asked.values())


def test_slightly_out_of_order() -> None:
    readahead = Readahead(4 * MIB)
    walk(readahead, 0, 100 * KIB, 4 * KIB, 20)
    asked: list[tuple[int, int]] = []
    for pair in range(10, 30):
        for number in (2 * pair + 1, 2 * pair):
            at = number * 100 * KIB
            asked += readahead.note(at, at + 4 * KIB, END)
    assert max(asked)[0] > 60 * 100 * KIB
    assert len(asked) == len(set(asked))


def test_a_broken_stride_asks_for_nothing_and_is_dropped() -> None:
    readahead = Readahead(4 * MIB)
    walk(readahead, 0, 100 * KIB, 4 * KIB, 20)
    assert len(readahead._strides) == 1
    rng = random.Random(1)
    for _ in range(ELSEWHERE_MAX + 1):
        at = MIDDLE + rng.randrange(1 << 30) * 4 * KIB
        assert not readahead.note(at, at + 4 * KIB, END)
    assert not len(readahead._strides)
    assert [len(readahead.note(at, at + 4 * KIB, END)) for at in range(0, 4 << 20, 1 << 20)] == [
        *(0, 0, 0, 2)
    ], "it starts over"


def test_a_stride_whose_places_are_skipped_is_none() -> None:
    readahead = Readahead(4 * MIB)
    walk(readahead, 0, 100 * KIB, 4 * KIB, 40)
    for number in range(40, 400, 8):
        at = number * 100 * KIB
        readahead.note(at, at + 4 * KIB, END)
    strides = readahead._strides._streams
    assert [stride.step for stride in strides] == [800 * KIB], "the one that it has become"


def test_reads_of_different_lengths_are_no_stride() -> None:
    readahead = Readahead(4 * MIB)
    for number in range(40):
        at = number * MIB
        assert not readahead.note(at, at + (4 + 4 * number) * KIB, END)


def test_the_same_place_again_and_again_is_no_stride() -> None:
    assert not walk(Readahead(4 * MIB), 8 * KIB, 0, 4 * KIB, 50)


@pytest.mark.parametrize("span_bytes", [16 * MIB, 1 << 40])
def test_random_reads_ask_for_next_to_nothing(span_bytes: int) -> None:
    rng = random.Random(2)
    readahead = Readahead(4 * MIB)
    asked = 0
    for _ in range(5000):
        at = rng.randrange(span_bytes // (4 * KIB)) * 4 * KIB
        runs = readahead.note(at, at + 4 * KIB, END)
        asked += sum(end - start == 4 * KIB for start, end in runs)  # larger ones are a stream's
    assert asked < 5000 // 50


@pytest.mark.parametrize(("step", "start"), [(MIB, END - 10 * MIB), (-MIB, 9 * MIB)])
def test_never_beyond_the_ends(step: int, start: int) -> None:
    asked = walk(Readahead(4 * MIB), start, step, 4 * KIB, 10)
    assert len(asked) == 6
    assert all(0 <= first < last <= END for first, last in asked)


def test_more_strides_than_the_bound() -> None:
    readahead = Readahead(4 * MIB)
    for number in range(3 * STRIDES_MAX):
        walk(readahead, number**2 << 30, MIB, 4 * KIB, 5)
    assert 1 < len(readahead._strides) <= STRIDES_MAX


@given(
    st.integers(-64, 64).filter(lambda blocks: abs(blocks) > 8),
    st.integers(1, 8),
    st.integers(0, 1 << 20),
    st.sampled_from([0, 128 * KIB, MIB, 4 * MIB]),
)
def test_only_pages_of_the_stride_are_asked_for(
    step_blocks: int, length_blocks: int, first_block: int, window: int
) -> None:
    step, length = step_blocks * 512, length_blocks * 512
    start = MIDDLE + first_block * 512
    asked = walk(Readahead(window), start, step, length, 50)
    places = [start + number * step for number in range(50 + READS_MAX)]
    pages = {page for at in places for page in range(at >> 12, (at + length + 4095) >> 12)}
    assert {page for first, last in asked for page in range(first >> 12, last >> 12)} <= pages
    assert bool(asked) == bool(window)
