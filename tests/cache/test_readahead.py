import itertools
import random

import pytest

from orion_iscsifs.cache.readahead import CANDIDATES_MAX, STREAMS_MAX, Readahead

KIB = 1 << 10
MIB = 1 << 20
END = 1 << 40


def feed(readahead: Readahead, start: int, step: int, count: int) -> list[tuple[int, int]]:
    places = range(start, start + step * count, step)
    return [window for at in places for window in readahead.note(at, at + step, END)]


def test_the_second_read_in_a_row_starts_at_128_kib() -> None:
    readahead = Readahead(4 * MIB)
    assert readahead.note(0, 4 * KIB, END) == ()
    assert readahead.note(4 * KIB, 8 * KIB, END) == ((8 * KIB, 136 * KIB),)


def test_the_windows_join_and_double_up_to_the_maximum() -> None:
    asked = feed(Readahead(MIB), 0, 64 * KIB, 200)
    for (_, end), (start, _) in itertools.pairwise(asked):
        assert end == start
    lengths = [end - start for start, end in asked]
    assert lengths[0] == 128 * KIB
    assert max(lengths) <= MIB
    head = 200 * 64 * KIB
    assert head + MIB // 2 <= asked[-1][1] <= head + MIB


def test_a_window_is_at_least_twice_the_request() -> None:
    readahead = Readahead(8 * MIB)
    readahead.note(0, MIB, END)
    assert readahead.note(MIB, 2 * MIB, END) == ((2 * MIB, 4 * MIB),)


def test_requests_slightly_out_of_order() -> None:
    """Eight requests at once, each batch shuffled, still make one stream."""
    rng = random.Random(1)
    readahead = Readahead(4 * MIB)
    step = 128 * KIB
    windows: list[tuple[int, int]] = []
    for batch in range(16):
        order = list(range(8))
        rng.shuffle(order)
        for index in order:
            at = (batch * 8 + index) * step
            windows += readahead.note(at, at + step, END)
    assert windows[-1][1] >= 15 * 8 * step
    starts = [start for start, _ in windows]
    assert starts == sorted(starts), "nothing is asked for twice"


def test_random_reads_ask_for_nothing() -> None:
    rng = random.Random(2)
    readahead = Readahead(4 * MIB)
    for _ in range(2000):
        at = rng.randrange(1 << 26) * 4 * KIB
        assert readahead.note(at, at + 4 * KIB, END) == ()
    assert len(readahead._candidates) <= CANDIDATES_MAX


def test_a_seek_starts_over() -> None:
    readahead = Readahead(4 * MIB)
    feed(readahead, 0, 128 * KIB, 100)
    assert readahead.note(1 << 30, (1 << 30) + 4 * KIB, END) == ()
    window = readahead.note((1 << 30) + 4 * KIB, (1 << 30) + 8 * KIB, END)
    assert window == (((1 << 30) + 8 * KIB, (1 << 30) + 136 * KIB),)


def test_many_streams_at_once() -> None:
    readahead = Readahead(MIB)
    step = 64 * KIB
    bases = [number << 30 for number in range(STREAMS_MAX)]
    ahead = dict.fromkeys(bases, 0)
    for index in range(100):
        for base in bases:
            at = base + index * step
            for window in readahead.note(at, at + step, END):
                ahead[base] = window[1]
    assert all(end > base + 100 * step for base, end in ahead.items())


def test_more_streams_than_the_bound() -> None:
    readahead = Readahead(MIB)
    for number in range(5 * STREAMS_MAX):
        feed(readahead, number << 30, 64 * KIB, 2)
    assert len(readahead._streams) <= STREAMS_MAX


@pytest.mark.parametrize("limit", [0, 8 * KIB, 100 * KIB])
def test_never_beyond_the_end(limit: int) -> None:
    readahead = Readahead(MIB)
    readahead.note(0, 4 * KIB, limit)
    window = readahead.note(4 * KIB, 8 * KIB, limit)
    assert window == (((8 * KIB, limit),) if limit > 8 * KIB else ())


def test_off() -> None:
    assert not feed(Readahead(0), 0, 4 * KIB, 50)


def test_random_reads_that_hit_a_stream_by_chance_end_it() -> None:
    """Found on a real mount: random reads kept streams alive and fetched megabytes for nothing."""
    readahead = Readahead(4 * MIB)
    feed(readahead, 0, 4 * KIB, 3)
    rng = random.Random(1)
    asked = 0
    for _ in range(2000):
        at = rng.randrange(16 * MIB // (4 * KIB)) * 4 * KIB
        asked += sum(end - start for start, end in readahead.note(at, at + 4 * KIB, END))
    assert asked < 100 * 128 * KIB, "a chance neighbour costs one small window at most"


def test_streams_share_a_budget_and_what_is_idle_has_no_part_in_it() -> None:
    readahead = Readahead(4 * MIB, total_max_bytes=4 * MIB)
    step = 64 * KIB
    ahead: dict[int, int] = {}
    for index in range(200):
        for base in range(0, 4 << 30, 1 << 30):
            at = base + index * step
            for _, end in readahead.note(at, at + step, END):
                ahead[base] = end - at - step
    assert sum(ahead.values()) <= 4 * MIB
    feed(readahead, 200 * step, step, 2000)
    (stream,) = readahead._streams.values()
    assert stream.window_bytes == 4 * MIB, "it has the budget for itself"


def test_an_idle_stream_may_go_on() -> None:
    readahead = Readahead(MIB, total_max_bytes=MIB)
    feed(readahead, 1 << 30, 64 * KIB, 20)
    feed(readahead, 0, 64 * KIB, 2000)
    assert len(readahead._streams) == 1
    at = (1 << 30) + 20 * 64 * KIB
    assert readahead.note(at, at + 64 * KIB, END), "its next read is enough"


def test_the_maximum_may_grow_under_way() -> None:
    readahead = Readahead(MIB, total_max_bytes=32 * MIB)
    feed(readahead, 0, 128 * KIB, 100)
    readahead.window_max_bytes = 16 * MIB
    asked = feed(readahead, 100 * 128 * KIB, 128 * KIB, 400)
    assert asked[-1][1] >= 500 * 128 * KIB + 15 * MIB
    assert all(end - start <= 2 * MIB for start, end in asked), "little by little"
