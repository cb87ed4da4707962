"""The window that a link needs, learned from reads. Times in seconds."""

import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.cache.bandwidth import (
    SOLITARY_SAMPLE,
    Extreme,
    Flight,
    Link,
)

KIB = 1 << 10
MIB = 1 << 20
REQUEST = 512 * KIB


def simulate(link: Link, *, round_trip_s: float, bytes_per_s: float, requests: int) -> float:
    """Keep `window_bytes` in flight on a link of this kind; when the last one arrived."""
    now = busy_until = 0.0
    arrivals: list[tuple[float, int, Flight]] = []
    for number in range(requests):
        while len(arrivals) * REQUEST >= link.window_bytes:
            now, _, flight = heapq.heappop(arrivals)
            link.arrive(flight, REQUEST, now)
        busy_until = max(now, busy_until) + REQUEST / bytes_per_s
        flight = link.depart(REQUEST, now)
        heapq.heappush(arrivals, (busy_until + round_trip_s, number, flight))
    for at, _, flight in sorted(arrivals, key=lambda arrival: arrival[:2]):
        now = at
        link.arrive(flight, REQUEST, now)
    assert link.in_flight == 0
    return now


@pytest.mark.parametrize(
    ("round_trip_s", "bytes_per_s", "window_mib"),
    [
        (0.0001, 1e9, (4, 4)),
        (0.001, 1e9, (4, 4)),
        (0.005, 1e9, (9, 14)),
        (0.020, 1e8, (4, 6)),
        (0.020, 4e8, (14, 18)),
        (0.020, 1e9, (32, 32)),
        (0.100, 1e6, (4, 4)),
    ],
)
def test_twice_the_product_within_the_bounds(
    round_trip_s: float, bytes_per_s: float, window_mib: tuple[int, int]
) -> None:
    link = Link(4 * MIB, 32 * MIB)
    simulate(link, round_trip_s=round_trip_s, bytes_per_s=bytes_per_s, requests=800)
    least, most = window_mib
    assert least * MIB <= link.window_bytes <= most * MIB


def test_it_opens_within_a_few_round_trips() -> None:
    link = Link(4 * MIB, 32 * MIB)
    took = simulate(link, round_trip_s=0.020, bytes_per_s=1e9, requests=400)
    assert took < 0.5, "200 MiB; with 4 MiB in flight they take a second"


def test_a_queue_is_not_distance() -> None:
    """What waits behind others takes longer the larger the window is: no reason to enlarge it."""
    link = Link(4 * MIB, 1024 * MIB)
    simulate(link, round_trip_s=0.005, bytes_per_s=1e9, requests=4000)
    assert link.window_bytes < 14 * MIB
    assert link.round_trip_s == pytest.approx(0.005 + REQUEST / 1e9)


def test_a_read_in_company_that_is_quicker_counts() -> None:
    link = Link(4 * MIB, 32 * MIB)
    link.arrive(link.depart(4 * KIB, 0.0), 4 * KIB, 0.014)
    flights = [link.depart(REQUEST, 1.0), link.depart(REQUEST, 1.0)]
    for flight in flights:
        link.arrive(flight, REQUEST, 1.005)
    assert link.round_trip_s == pytest.approx(0.005)


def test_the_bytes_of_a_large_read_are_not_distance() -> None:
    link = Link(MIB, 32 * MIB)
    link.arrive(link.depart(MIB, 0.0), MIB, 0.001 + MIB / 1e9)
    link.arrive(link.depart(4 * MIB, 1.0), 4 * MIB, 1.001 + 4 * MIB / 1e9)
    assert link.window_bytes <= 2 * MIB
    link.arrive(link.depart(4 * KIB, 2.0), 4 * KIB, 2.001)
    assert link.window_bytes <= 2 * MIB


def test_a_slow_reader_gets_what_it_uses() -> None:
    link = Link(MIB, 32 * MIB)
    for number in range(200):
        now = number * 0.05
        link.arrive(link.depart(REQUEST, now), REQUEST, now + 0.02)
    assert link.bandwidth_bytes_per_s == pytest.approx(REQUEST / 0.05, rel=0.5)
    assert link.window_bytes == MIB


def test_what_was_measured_long_ago_is_replaced() -> None:
    link = Link(4 * MIB, 32 * MIB)
    simulate(link, round_trip_s=0.020, bytes_per_s=1e9, requests=400)
    assert link.window_bytes == 32 * MIB
    for number in range(300):
        now = 4 + number / 20
        link.arrive(link.depart(REQUEST, now), REQUEST, now + 0.02)
    assert link.window_bytes == 4 * MIB


def test_reads_that_fail_tell_nothing() -> None:
    link = Link(MIB, 32 * MIB)
    link.depart(REQUEST, 1.0)
    link.depart(4 * KIB, 1.0)
    link.lose(REQUEST)
    link.lose(4 * KIB)
    assert link.in_flight == 0
    assert link.round_trip_s is link.bandwidth_bytes_per_s is None
    assert link.window_bytes == MIB


def test_few_small_reads_are_timed_but_the_first_is() -> None:
    link = Link(MIB, 32 * MIB)
    timed = [link.samples_small() for _ in range(2 * SOLITARY_SAMPLE)]
    assert timed[0]
    assert timed.count(True) == 2


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(1, 100)), min_size=1))
def test_extremes_are_of_late(samples: list[tuple[float, float]]) -> None:
    extreme: Extreme[float] = Extreme(max, 5.0)
    now = 0.0
    seen: list[tuple[float, float]] = []
    for pause, value in samples:
        now += pause
        extreme.add(value, now)
        seen.append((now, value))
        assert extreme.value is not None
        assert extreme.value >= max(value for at, value in seen if at > now - 5.0)
        assert extreme.value in {value for _, value in seen}


@given(st.data(), st.integers(1, 64), st.integers(1, 64))
def test_whatever_happens_the_window_keeps_its_bounds(
    data: st.DataObject, first: int, second: int
) -> None:
    least, most = sorted((first * MIB, second * MIB))
    link = Link(least, most)
    now = 0.0
    flights: list[tuple[Flight, int]] = []
    for _ in itertools.repeat(None, data.draw(st.integers(0, 30))):
        now += data.draw(st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e6]))
        ends = data.draw(st.booleans())
        if flights and ends:
            flight, length = flights.pop(data.draw(st.integers(0, len(flights) - 1)))
            if data.draw(st.booleans()):
                link.arrive(flight, length, now)
            else:
                link.lose(length)
        else:
            length = data.draw(st.sampled_from([512, 64 * KIB, REQUEST, 4 * MIB]))
            flights.append((link.depart(length, now), length))
        assert least <= link.window_bytes <= most
        assert link.in_flight == len(flights)
