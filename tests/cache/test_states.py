"""The table, and that `Frame` moves masks as the table says."""

from itertools import product

import pytest

from orion_iscsifs.cache.frames import Frame
from orion_iscsifs.cache.states import NEXT, Cause, State, broken_invariants

TRANSITIONS = {
    Cause.FETCHED: Frame.fetched,
    Cause.WRITE: Frame.write,
    Cause.WRITEBACK: Frame.writeback,
    Cause.DONE: Frame.done,
    Cause.FAILED: Frame.failed,
    Cause.DROP: Frame.drop,
    Cause.SUPERSEDE: Frame.supersede,
}
PAGE = 1 << 5
OTHERS = 1 << 4 | 1 << 6


def frame_in(state: State) -> Frame:
    """Page 5 in that state; its neighbours are valid, dirty and in flight, which must not leak."""
    frame = Frame(memoryview(bytearray(1)))
    valid, dirty, writing = state.value
    frame.valid = OTHERS | PAGE * valid
    frame.dirty = OTHERS | PAGE * dirty
    frame.writing = OTHERS | PAGE * writing
    return frame


def state_of(frame: Frame) -> State:
    return State((bool(frame.valid & PAGE), bool(frame.dirty & PAGE), bool(frame.writing & PAGE)))


@pytest.mark.parametrize(("state", "cause"), list(product(State, Cause)))
def test_every_pair(state: State, cause: Cause) -> None:
    frame = frame_in(state)
    if (state, cause) in NEXT:
        TRANSITIONS[cause](frame, PAGE)
        assert state_of(frame) is NEXT[state, cause]
    else:
        with pytest.raises(AssertionError):
            TRANSITIONS[cause](frame, PAGE)
    assert frame.valid & frame.dirty & frame.writing & OTHERS == OTHERS, "a neighbour has changed"


def test_dirty_data_leaves_only_by_being_written_or_superseded() -> None:
    ways_out = {
        cause
        for (state, cause), after in NEXT.items()
        if state in (State.DIRTY, State.REWRITTEN) and after in (State.CLEAN, State.ABSENT)
    }
    assert ways_out == {Cause.SUPERSEDE}


def test_every_state_is_reached() -> None:
    assert set(NEXT.values()) == set(State)


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ((0b1, 0b11, 0), "dirty page has no content"),
        ((0b1, 0, 0b10), "in flight has no content"),
    ],
)
def test_broken_invariants(masks: tuple[int, int, int], problem: str) -> None:
    valid, dirty, writing = masks
    (wrong,) = broken_invariants(valid=valid, dirty=dirty, writing=writing)
    assert problem in wrong


def test_sound_masks() -> None:
    assert not broken_invariants(valid=0b111, dirty=0b110, writing=0b011)
