"""Every (role, state, event) of RFC 7143 §8 against the RFC's own tables, typed off again here."""

from collections.abc import Iterator, Mapping
from itertools import product

import pytest

from orion_iscsifs.protocol.keys import Role
from orion_iscsifs.protocol.states import (
    CLEANUP_NEXT,
    CONNECTION_NEXT,
    SESSION_NEXT,
    CleanupEvent,
    CleanupState,
    ConnectionEvent,
    ConnectionState,
    Event,
    IllegalTransition,
    SessionEvent,
    SessionState,
    State,
    Table,
    cleanup_next,
    connection_next,
    may,
    session_next,
)

# The tables of §§8.1.3, 8.1.4, 8.2, 8.3.1 and 8.3.2: a row is where a transition starts, a column
# where it ends.
INITIATOR_CONNECTION = """
      S1   S2  S4  S5  S6   S7   S8
  S1  -    T1  -   -   -    -    -
  S2  T2   -   T4  -   -    -    -
  S4  T7   -   -   T5  -    -    -
  S5  T8   -   -   -   T9   T11  T15
  S6  T13  -   -   -   T14  -    T17
  S7  T18  -   -   -   T10  T12  T16
  S8  -    -   -   -   -    -    -
"""
TARGET_CONNECTION = """
      S1   S3  S4  S5  S6   S7   S8
  S1  -    T3  -   -   -    -    -
  S3  T6   -   T4  -   -    -    -
  S4  T7   -   -   T5  -    -    -
  S5  T8   -   -   -   T9   T11  T15
  S6  T13  -   -   -   -    -    T17
  S7  T18  -   -   -   T10  T12  T16
  S8  -    -   -   -   -    -    -
"""
CLEANUP = """
      R1  R2  R3
  R1  -   M2  M1
  R2  M3  -   M4
  R3  -   -   -
"""
INITIATOR_SESSION = """
      Q1  Q3  Q4
  Q1  -   N1  -
  Q3  N3  -   N5
  Q4  N6  N4  -
"""
TARGET_SESSION = """
      Q1   Q2  Q3   Q4  Q5
  Q1  -    N1  -    -   -
  Q2  N9   -   N2   -   -
  Q3  N3   -   -    N5  -
  Q4  N6   -   -    -   N7
  Q5  N11  -   N10  N8  -
"""

# What each number stands for, from the prose of §§8.1.2, 8.2.2 and 8.3.4.
E = ConnectionEvent
CONNECTION_EVENTS: Mapping[Role, Mapping[str, set[ConnectionEvent]]] = {
    Role.INITIATOR: {
        "T1": {E.CONNECT_SENT},
        "T2": {E.LOST, E.SESSION_CLOSED},
        "T4": {E.LOGIN_STARTED},
        "T5": {E.LOGIN_SUCCEEDED},
        "T7": {E.LOGIN_FAILED, E.LOST, E.SESSION_CLOSED},
        "T8": {E.SESSION_CLOSED},
        "T9": {E.LOGOUT_STARTED},
        "T10": {E.LOGOUT_STARTED},
        "T11": {E.LOGOUT_ASKED_FOR},
        "T12": {E.LOGOUT_ASKED_FOR},
        "T13": {E.LOGOUT_SUCCEEDED, E.SESSION_CLOSED},
        "T14": {E.LOGOUT_ASKED_FOR},
        "T15": {E.LOST},
        "T16": {E.LOST},
        "T17": {E.LOGOUT_FAILED, E.LOST},
        "T18": {E.SESSION_CLOSED},
    },
    Role.TARGET: {
        "T3": {E.CONNECT_RECEIVED},
        "T4": {E.LOGIN_STARTED},
        "T5": {E.LOGIN_SUCCEEDED},
        "T6": {E.LOGIN_FAILED, E.LOST},
        "T7": {E.LOGIN_FAILED, E.LOST, E.SESSION_CLOSED},
        "T8": {E.SESSION_CLOSED},
        "T9": {E.LOGOUT_STARTED},
        "T10": {E.LOGOUT_STARTED},
        "T11": {E.LOGOUT_ASKED_FOR},
        "T12": {E.LOGOUT_ASKED_FOR},
        "T13": {E.LOGOUT_SUCCEEDED, E.SESSION_CLOSED},
        "T15": {E.LOST},
        "T16": {E.LOST},
        "T17": {E.LOGOUT_FAILED, E.LOST},
        "T18": {E.SESSION_CLOSED},
    },
}
M = CleanupEvent
CLEANUP_EVENTS: Mapping[str, set[CleanupEvent]] = {
    "M1": {M.TIMED_OUT, M.SESSION_CLOSED},
    "M2": {M.STARTED},
    "M3": {M.FAILED},
    "M4": {M.SUCCEEDED, M.SESSION_CLOSED},
}
N = SessionEvent
SESSION_EVENTS: Mapping[Role, Mapping[str, set[SessionEvent]]] = {
    Role.INITIATOR: {
        "N1": {N.LOGIN_SUCCEEDED},
        "N3": {N.CLOSED},
        "N4": {N.CONTINUATION_SUCCEEDED},
        "N5": {N.FAILED},
        "N6": {N.TIMED_OUT, N.REINSTATED},
    },
    Role.TARGET: {
        "N1": {N.LOGIN_STARTED},
        "N2": {N.LOGIN_SUCCEEDED},
        "N3": {N.CLOSED, N.REINSTATED},
        "N5": {N.FAILED},
        "N6": {N.TIMED_OUT, N.REINSTATED},
        "N7": {N.CONTINUATION_STARTED},
        "N8": {N.CONTINUATION_FAILED},
        "N9": {N.LOGIN_FAILED},
        "N10": {N.CONTINUATION_SUCCEEDED},
        "N11": {N.REINSTATED},
    },
}


def cells(table: str) -> Iterator[tuple[str, str, str]]:
    """(start, number, end) of every cell that is not "-"."""
    head, *rows = (line.split() for line in table.strip("\n").splitlines())
    for start, *numbers in rows:
        for end, number in zip(head, numbers, strict=True):
            if number != "-":
                yield start, number, end


def transcribed(table: str, events: Mapping[str, set[Event]]) -> dict[tuple[str, Event], str]:
    rows: dict[tuple[str, Event], str] = {}
    for start, number, end in cells(table):
        for event in events[number]:
            assert (start, event) not in rows, "an event with two outcomes"
            rows[start, event] = end
    return rows


CONNECTION = {
    Role.INITIATOR: transcribed(INITIATOR_CONNECTION, CONNECTION_EVENTS[Role.INITIATOR]),
    Role.TARGET: transcribed(TARGET_CONNECTION, CONNECTION_EVENTS[Role.TARGET]),
}
SESSION = {
    Role.INITIATOR: transcribed(INITIATOR_SESSION, SESSION_EVENTS[Role.INITIATOR]),
    Role.TARGET: transcribed(TARGET_SESSION, SESSION_EVENTS[Role.TARGET]),
}


@pytest.mark.parametrize(
    ("role", "state", "event"), list(product(Role, ConnectionState, ConnectionEvent))
)
def test_connection(role: Role, state: ConnectionState, event: ConnectionEvent) -> None:
    end = CONNECTION[role].get((state.value, event))
    assert may(CONNECTION_NEXT, role, state, event) is (end is not None)
    if end is None:
        with pytest.raises(IllegalTransition, match=role.name) as caught:
            connection_next(role, state, event)
        assert (caught.value.state, caught.value.event) == (state, event)
    else:
        assert connection_next(role, state, event).value == end


@pytest.mark.parametrize(
    ("role", "state", "event"), list(product(Role, CleanupState, CleanupEvent))
)
def test_cleanup(role: Role, state: CleanupState, event: CleanupEvent) -> None:
    end = transcribed(CLEANUP, CLEANUP_EVENTS).get((state.value, event))
    assert may(CLEANUP_NEXT, role, state, event) is (end is not None)
    if end is None:
        with pytest.raises(IllegalTransition):
            cleanup_next(role, state, event)
    else:
        assert cleanup_next(role, state, event).value == end


@pytest.mark.parametrize(
    ("role", "state", "event"), list(product(Role, SessionState, SessionEvent))
)
def test_session(role: Role, state: SessionState, event: SessionEvent) -> None:
    end = SESSION[role].get((state.value, event))
    assert may(SESSION_NEXT, role, state, event) is (end is not None)
    if end is None:
        with pytest.raises(IllegalTransition):
            session_next(role, state, event)
    else:
        assert session_next(role, state, event).value == end


@pytest.mark.parametrize("table", [CONNECTION_NEXT, CLEANUP_NEXT, SESSION_NEXT])
def test_every_state_of_a_role_is_reached(table: Table[State, Event]) -> None:
    for rows in table.values():
        starts, ends = {state for state, _ in rows}, set(rows.values())
        # The first state of each machine is where it begins: nothing has to lead there.
        assert {state for state in starts if state not in ends} <= {CleanupState.CLEANUP_WAIT}


def test_an_illegal_transition_is_our_bug() -> None:
    assert issubclass(IllegalTransition, AssertionError)
