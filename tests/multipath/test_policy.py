"""Which path takes a request, and the table of states."""

from collections import Counter

import pytest

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.config import PathPolicy
from orion_iscsifs.multipath.path import Access
from orion_iscsifs.multipath.paths import (
    LOSS_WINDOW_S,
    LOSSES_MAX,
    NEXT,
    PathEvent,
    PathRecord,
    PathState,
)
from orion_iscsifs.multipath.policy import Chooser
from orion_iscsifs.scsi.alua import AccessState
from orion_iscsifs.testing.memory import MemoryDevice
from tests.multipath.fakes import FakePath


def record(
    order: int, state: PathState = PathState.ACTIVE, access: Access | None = None
) -> PathRecord:
    disk = MemoryDevice(geometry=Geometry(size_bytes=4096))
    made = PathRecord(FakePath(f"path{order}", disk), order)
    made.state = state
    made.access = access or Access()
    return made


def picks(chooser: Chooser, count: int, now: float = 100.0) -> Counter[int]:
    found: Counter[int] = Counter()
    for _ in range(count):
        chosen = chooser.choose(now)
        assert chosen is not None
        found[chosen.order] += 1
    return found


def test_nothing_is_chosen_without_a_usable_path() -> None:
    chooser = Chooser(PathPolicy.ROUND_ROBIN, 0.0)
    assert chooser.choose(0.0) is None
    others = [state for state in PathState if state not in (PathState.ACTIVE, PathState.MARGINAL)]
    chooser.review([record(n, state) for n, state in enumerate(others)], 0.0)
    assert chooser.choose(0.0) is None


def test_round_robin_takes_turns() -> None:
    chooser = Chooser(PathPolicy.ROUND_ROBIN, 0.0)
    chooser.review([record(0), record(1), record(2)], 0.0)
    assert picks(chooser, 9) == {0: 3, 1: 3, 2: 3}


def test_queue_length_takes_the_shortest() -> None:
    chooser = Chooser(PathPolicy.QUEUE_LENGTH, 0.0)
    busy, idle = record(0), record(1)
    busy.begin(4096)
    chooser.review([busy, idle], 0.0)
    assert picks(chooser, 3) == {1: 3}
    for _ in range(2):
        idle.begin(1 << 20)
    assert picks(chooser, 3) == {0: 3}


def test_service_time_shares_by_speed() -> None:
    """A path three times as fast gets about three times as much."""
    chooser = Chooser(PathPolicy.SERVICE_TIME, 0.0)
    speeds = {0: 3e8, 1: 1e8}
    records = [record(0), record(1)]
    chooser.review(records, 0.0)
    sent: Counter[int] = Counter()
    now = 100.0
    free_at = {0: now, 1: now}
    done: list[tuple[float, PathRecord, int, float]] = []
    for _ in range(2000):
        while len(done) >= 16:
            done.sort(key=lambda item: item[0])
            end, finished, load, begun = done.pop(0)
            now = max(now, end)
            finished.end(1 << 20)
            finished.measure(load, end - begun, now)
        chosen = chooser.choose(now)
        assert chosen is not None
        sent[chosen.order] += 1
        load = chosen.begin(1 << 20)
        free_at[chosen.order] = max(free_at[chosen.order], now) + (1 << 20) / speeds[chosen.order]
        done.append((free_at[chosen.order], chosen, load, now))
    assert 2.0 < sent[0] / sent[1] < 4.0


def test_a_path_that_was_slow_long_ago_is_tried_again() -> None:
    chooser = Chooser(PathPolicy.SERVICE_TIME, 0.0)
    slow, fast = record(0), record(1)
    slow.measure(1 << 20, 10.0, now=0.0)
    fast.measure(1 << 20, 0.01, now=0.0)
    chooser.review([slow, fast], 0.0)
    assert picks(chooser, 3, now=1.0) == {1: 3}
    fast.measure(1 << 20, 0.01, now=99.0)
    fast.begin(4096)
    assert picks(chooser, 1, now=100.0) == {0: 1}


def test_failover_uses_one_path_in_the_order_given() -> None:
    chooser = Chooser(PathPolicy.FAILOVER, 0.0)
    first, second = record(0), record(1)
    chooser.review([first, second], 0.0)
    assert picks(chooser, 5) == {0: 5}
    first.state = PathState.LOST
    chooser.review([first, second], 1.0)
    assert picks(chooser, 5) == {1: 5}


@pytest.mark.parametrize(
    ("failback_s", "at_once", "later"), [(0.0, 0, 0), (10.0, 1, 0), (None, 1, 1)]
)
def test_failback(failback_s: float | None, at_once: int, later: int) -> None:
    chooser = Chooser(PathPolicy.FAILOVER, failback_s)
    first, second = record(0, PathState.FAILED), record(1)
    chooser.review([first, second], 0.0)
    first.state = PathState.ACTIVE
    due = chooser.review([first, second], 5.0)
    assert due == (15.0 if failback_s == 10.0 else None)
    assert picks(chooser, 2) == {at_once: 2}
    chooser.review([first, second], 15.0)
    assert picks(chooser, 2) == {later: 2}


def test_a_better_path_that_goes_again_starts_its_wait_anew() -> None:
    chooser = Chooser(PathPolicy.FAILOVER, 10.0)
    first, second = record(0, PathState.FAILED), record(1)
    for now, state in ((0.0, PathState.FAILED), (5.0, PathState.ACTIVE), (9.0, PathState.LOST)):
        first.state = state
        chooser.review([first, second], now)
    first.state = PathState.ACTIVE
    assert chooser.review([first, second], 14.0) == 24.0
    assert picks(chooser, 1) == {1: 1}


def test_marginal_paths_come_after_non_optimized_ones() -> None:
    chooser = Chooser(PathPolicy.ROUND_ROBIN, 0.0)
    slow = record(0, access=Access(AccessState.ACTIVE_NON_OPTIMIZED))
    flaky = record(1, PathState.MARGINAL)
    chooser.review([slow, flaky], 0.0)
    assert picks(chooser, 2) == {0: 2}
    chooser.review([flaky], 0.0)
    assert picks(chooser, 2) == {1: 2}


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(PathState))
@pytest.mark.parametrize("event", list(PathEvent))
def test_lost_writes_are_forgotten_with_proof_only(state: PathState, event: PathEvent) -> None:
    one = record(0, state)
    one.lost_writes = [(0, 512)]
    one.apply(event, 1.0)
    proof = event in (PathEvent.NEXUS_ENDED, PathEvent.RETURNED)
    assert one.holds_back((0, 1)) == (state is not PathState.LOST or not proof)
    if state in (PathState.LOST, PathState.FAILED):
        assert one.state in (state, PathState.FAILED, PathState.CHECKING), "never straight to use"


def test_every_state_can_be_left_and_reached() -> None:
    assert {state for state, _ in NEXT} == set(PathState)
    assert set(NEXT.values()) == set(PathState)


def test_the_epoch_of_a_loss_is_kept() -> None:
    one = record(0)
    assert one.apply(PathEvent.LOST, 7.0)
    assert (one.lost_at, one.lost_epoch) == (7.0, 1)
    assert not one.apply(PathEvent.LOST, 8.0)
    assert one.lost_at == 7.0


def test_many_losses_set_a_path_aside_until_it_has_held() -> None:
    one = record(0)
    for now in range(LOSSES_MAX):
        assert one.verdict(Access(), now) is PathEvent.SERVES
        one.apply(PathEvent.LOST, float(now))
        one.apply(PathEvent.RETURNED, float(now))
    assert one.verdict(Access(), LOSSES_MAX) is PathEvent.SET_ASIDE
    one.apply(PathEvent.SET_ASIDE, LOSSES_MAX)
    last = LOSSES_MAX - 1
    assert one.verdict(Access(), last + LOSS_WINDOW_S - 1) is PathEvent.SET_ASIDE
    assert one.verdict(Access(), last + LOSS_WINDOW_S) is PathEvent.SERVES


@pytest.mark.parametrize("state", list(AccessState))
def test_only_active_states_serve(state: AccessState) -> None:
    serves = record(0).verdict(Access(state), 0.0) is PathEvent.SERVES
    assert serves == (
        state
        in (
            AccessState.ACTIVE_OPTIMIZED,
            AccessState.ACTIVE_NON_OPTIMIZED,
            AccessState.LBA_DEPENDENT,
        )
    )


def test_checks_back_off_and_are_bounded() -> None:
    one = record(0, PathState.STANDBY)
    pauses = []
    for failed in range(40):
        one.failed_checks = failed
        pauses.append(one.check_pause_s())
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.5, 30.0)
    one.state = PathState.LOST
    assert one.check_pause_s() == float("inf")
