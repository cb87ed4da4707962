"""How often a worker is replaced, and after which pauses."""

import pytest

from orion_iscsifs.cli.restarts import LIMIT, PAUSE_MAX_S, WINDOW_S, Restarts


def test_the_first_at_once_then_slower_then_not_any_more() -> None:
    restarts = Restarts()
    pauses = [restarts.next_pause_s(float(second)) for second in range(LIMIT)]
    assert pauses[0] == 0
    assert all(pauses[index] < pauses[index + 1] for index in range(LIMIT - 1))  # type: ignore[operator]
    assert pauses[-1] <= PAUSE_MAX_S  # type: ignore[operator]
    assert restarts.next_pause_s(LIMIT + 1.0) is None


def test_a_minute_later_all_is_forgotten() -> None:
    restarts = Restarts()
    for second in range(LIMIT):
        restarts.next_pause_s(float(second))
    assert restarts.next_pause_s(WINDOW_S - 0.1) is None
    assert restarts.next_pause_s(WINDOW_S) == pytest.approx(2.0)
    assert restarts.next_pause_s(3 * WINDOW_S) == 0
