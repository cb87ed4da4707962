"""The state machines of connections and sessions, for both roles (RFC 7143 §8).

Three tables: a connection until it is lost (§8.1), the cleanup after that (§8.2), the session
(§8.3). Events are named for what happened; the RFC's number of each transition (T, M, N) stands
at its row. One event can be several of the RFC's transitions: a lost connection is T2, T6, T7,
T15, T16 or T17, depending on the state that it finds. A row that holds for one role only names
that role; nearly all hold for both.

An absent row is illegal, and asking for it is a bug of the caller: `IllegalTransition`. What a
peer sends is judged before (`may` says whether a row exists) and is its `ProtocolViolation`.
"""

import enum
from collections.abc import Mapping
from typing import Final, TypeVar

from orion_iscsifs.protocol.keys import Role


class ConnectionState(enum.Enum):
    """S1 to S8 of RFC 7143 §8.1.1."""

    FREE = "S1"
    XPT_WAIT = "S2"
    """Initiator: connecting. Illegal for a target."""
    XPT_UP = "S3"
    """Target: connected, no Login Request yet. Illegal for an initiator."""
    IN_LOGIN = "S4"
    LOGGED_IN = "S5"
    IN_LOGOUT = "S6"
    LOGOUT_REQUESTED = "S7"
    CLEANUP_WAIT = "S8"
    """Tasks may be unfinished: go on with CLEANUP_NEXT."""


class ConnectionEvent(enum.Enum):
    """What moves a connection (RFC 7143 §8.1.2)."""

    CONNECT_SENT = enum.auto()
    """Initiator: the transport connection was asked for."""
    CONNECT_RECEIVED = enum.auto()
    """Target: the transport connection was accepted."""
    LOGIN_STARTED = enum.auto()
    """Initiator: the transport connection stands. Target: the first Login Request is here."""
    LOGIN_SUCCEEDED = enum.auto()
    LOGIN_FAILED = enum.auto()
    """Refused or timed out; at a target also: no Login Request came in time."""
    LOGOUT_ASKED_FOR = enum.auto()
    """Async Message "request logout" received (initiator) or sent (target)."""
    LOGOUT_STARTED = enum.auto()
    """Logout Request sent (initiator) or received (target)."""
    LOGOUT_SUCCEEDED = enum.auto()
    LOGOUT_FAILED = enum.auto()
    """A Logout Response other than success, or none in time."""
    SESSION_CLOSED = enum.auto()
    """By a logout on another connection; at a target also by a successful reinstatement."""
    LOST = enum.auto()
    """Disconnect, reset, transport time-out, Async Message "drop"; at a target also a failed
    reinstatement."""


class CleanupState(enum.Enum):
    """R1 to R3 of RFC 7143 §8.2.1."""

    CLEANUP_WAIT = "R1"
    IN_CLEANUP = "R2"
    FREE = "R3"


class CleanupEvent(enum.Enum):
    """What moves a connection in cleanup (RFC 7143 §8.2.2)."""

    TIMED_OUT = enum.auto()
    """The connection's state was kept for its Time2Retain."""
    SESSION_CLOSED = enum.auto()
    """By a logout on another connection."""
    STARTED = enum.auto()
    """A logout for its CID elsewhere, or its reinstatement by a login, has begun."""
    FAILED = enum.auto()
    SUCCEEDED = enum.auto()


class SessionState(enum.Enum):
    """Q1 to Q5 of RFC 7143 §8.3.3."""

    FREE = "Q1"
    ACTIVE = "Q2"
    """Target: the leading connection logs in. Illegal for an initiator."""
    LOGGED_IN = "Q3"
    FAILED = "Q4"
    IN_CONTINUE = "Q5"
    """Target: a connection logs in to carry the session on. Illegal for an initiator."""


class SessionEvent(enum.Enum):
    """What moves a session (RFC 7143 §8.3.4)."""

    LOGIN_STARTED = enum.auto()
    """Target: the leading connection is IN_LOGIN."""
    LOGIN_FAILED = enum.auto()
    """Target: the leading connection's login."""
    LOGIN_SUCCEEDED = enum.auto()
    """The leading connection is LOGGED_IN."""
    CLOSED = enum.auto()
    """Gracefully, by a logout that closes the session."""
    FAILED = enum.auto()
    """The last connection went to CLEANUP_WAIT (§6.3.6)."""
    TIMED_OUT = enum.auto()
    """The session's state was kept for its Time2Retain."""
    REINSTATED = enum.auto()
    """Another login with the same ISID and TSIH 0 took this session's place (§6.3.5)."""
    CONTINUATION_STARTED = enum.auto()
    """Target: a login for a connection of the failed session is here."""
    CONTINUATION_FAILED = enum.auto()
    CONTINUATION_SUCCEEDED = enum.auto()


State = TypeVar("State", bound=enum.Enum)
Event = TypeVar("Event", bound=enum.Enum)
Rows = Mapping[tuple[State, Event], State]
Table = Mapping[Role, Rows[State, Event]]


class IllegalTransition(AssertionError):
    """A row that RFC 7143 §8 does not have was asked for: this project's bug, not the peer's."""

    def __init__(self, role: Role, state: enum.Enum, event: enum.Enum) -> None:
        super().__init__(f"{role.name}: no transition from {state} on {event} (RFC 7143 §8)")
        self.role = role
        self.state = state
        self.event = event


_S = ConnectionState
_E = ConnectionEvent

_CONNECTION_BOTH: Final[Rows[ConnectionState, ConnectionEvent]] = {
    (_S.IN_LOGIN, _E.LOGIN_SUCCEEDED): _S.LOGGED_IN,  # T5
    (_S.IN_LOGIN, _E.LOGIN_FAILED): _S.FREE,  # T7
    # Nothing has run on this connection yet, so nothing is left to clean up.
    (_S.IN_LOGIN, _E.LOST): _S.FREE,  # T7
    (_S.IN_LOGIN, _E.SESSION_CLOSED): _S.FREE,  # T7
    (_S.LOGGED_IN, _E.SESSION_CLOSED): _S.FREE,  # T8
    (_S.LOGGED_IN, _E.LOGOUT_STARTED): _S.IN_LOGOUT,  # T9
    (_S.LOGGED_IN, _E.LOGOUT_ASKED_FOR): _S.LOGOUT_REQUESTED,  # T11
    (_S.LOGGED_IN, _E.LOST): _S.CLEANUP_WAIT,  # T15
    (_S.LOGOUT_REQUESTED, _E.LOGOUT_STARTED): _S.IN_LOGOUT,  # T10
    (_S.LOGOUT_REQUESTED, _E.LOGOUT_ASKED_FOR): _S.LOGOUT_REQUESTED,  # T12: again
    (_S.LOGOUT_REQUESTED, _E.LOST): _S.CLEANUP_WAIT,  # T16
    (_S.LOGOUT_REQUESTED, _E.SESSION_CLOSED): _S.FREE,  # T18
    (_S.IN_LOGOUT, _E.LOGOUT_SUCCEEDED): _S.FREE,  # T13
    (_S.IN_LOGOUT, _E.SESSION_CLOSED): _S.FREE,  # T13
    # A logout that fails is no way back to LOGGED_IN.
    (_S.IN_LOGOUT, _E.LOGOUT_FAILED): _S.CLEANUP_WAIT,  # T17
    (_S.IN_LOGOUT, _E.LOST): _S.CLEANUP_WAIT,  # T17
    # CLEANUP_WAIT ends in §8.2's table.
}

CONNECTION_NEXT: Final[Table[ConnectionState, ConnectionEvent]] = {
    Role.INITIATOR: {
        **_CONNECTION_BOTH,
        (_S.FREE, _E.CONNECT_SENT): _S.XPT_WAIT,  # T1
        (_S.XPT_WAIT, _E.LOST): _S.FREE,  # T2
        (_S.XPT_WAIT, _E.SESSION_CLOSED): _S.FREE,  # T2
        (_S.XPT_WAIT, _E.LOGIN_STARTED): _S.IN_LOGIN,  # T4
        # The target asked before it saw our Logout Request; a target in IN_LOGOUT does not ask.
        (_S.IN_LOGOUT, _E.LOGOUT_ASKED_FOR): _S.IN_LOGOUT,  # T14
    },
    Role.TARGET: {
        **_CONNECTION_BOTH,
        (_S.FREE, _E.CONNECT_RECEIVED): _S.XPT_UP,  # T3
        (_S.XPT_UP, _E.LOGIN_STARTED): _S.IN_LOGIN,  # T4
        (_S.XPT_UP, _E.LOGIN_FAILED): _S.FREE,  # T6
        (_S.XPT_UP, _E.LOST): _S.FREE,  # T6
    },
}
"""The standard connection state tables (RFC 7143 §§8.1.3, 8.1.4)."""

_CLEANUP_BOTH: Final[Rows[CleanupState, CleanupEvent]] = {
    (CleanupState.CLEANUP_WAIT, CleanupEvent.TIMED_OUT): CleanupState.FREE,  # M1
    (CleanupState.CLEANUP_WAIT, CleanupEvent.SESSION_CLOSED): CleanupState.FREE,  # M1
    (CleanupState.CLEANUP_WAIT, CleanupEvent.STARTED): CleanupState.IN_CLEANUP,  # M2
    # Another try is possible: back, not on.
    (CleanupState.IN_CLEANUP, CleanupEvent.FAILED): CleanupState.CLEANUP_WAIT,  # M3
    (CleanupState.IN_CLEANUP, CleanupEvent.SUCCEEDED): CleanupState.FREE,  # M4
    (CleanupState.IN_CLEANUP, CleanupEvent.SESSION_CLOSED): CleanupState.FREE,  # M4
}

CLEANUP_NEXT: Final[Table[CleanupState, CleanupEvent]] = {
    Role.INITIATOR: _CLEANUP_BOTH,
    Role.TARGET: _CLEANUP_BOTH,
}
"""The connection cleanup state table (RFC 7143 §8.2), the same for both roles."""

_Q = SessionState
_N = SessionEvent

_SESSION_BOTH: Final[Rows[SessionState, SessionEvent]] = {
    (_Q.LOGGED_IN, _N.CLOSED): _Q.FREE,  # N3
    (_Q.LOGGED_IN, _N.FAILED): _Q.FAILED,  # N5
    (_Q.FAILED, _N.TIMED_OUT): _Q.FREE,  # N6
    (_Q.FAILED, _N.REINSTATED): _Q.FREE,  # N6
}

SESSION_NEXT: Final[Table[SessionState, SessionEvent]] = {
    Role.INITIATOR: {
        **_SESSION_BOTH,
        # An initiator has no ACTIVE and no IN_CONTINUE: a login is nothing until it succeeds.
        (_Q.FREE, _N.LOGIN_SUCCEEDED): _Q.LOGGED_IN,  # N1
        (_Q.FAILED, _N.CONTINUATION_SUCCEEDED): _Q.LOGGED_IN,  # N4
    },
    Role.TARGET: {
        **_SESSION_BOTH,
        (_Q.FREE, _N.LOGIN_STARTED): _Q.ACTIVE,  # N1
        (_Q.ACTIVE, _N.LOGIN_SUCCEEDED): _Q.LOGGED_IN,  # N2
        (_Q.ACTIVE, _N.LOGIN_FAILED): _Q.FREE,  # N9
        # The initiator may know of a failure that the target has not seen yet.
        (_Q.LOGGED_IN, _N.REINSTATED): _Q.FREE,  # N3
        (_Q.FAILED, _N.CONTINUATION_STARTED): _Q.IN_CONTINUE,  # N7
        (_Q.IN_CONTINUE, _N.CONTINUATION_FAILED): _Q.FAILED,  # N8
        (_Q.IN_CONTINUE, _N.CONTINUATION_SUCCEEDED): _Q.LOGGED_IN,  # N10
        (_Q.IN_CONTINUE, _N.REINSTATED): _Q.FREE,  # N11
    },
}
"""The session state tables (RFC 7143 §§8.3.1, 8.3.2)."""


def connection_next(role: Role, state: ConnectionState, event: ConnectionEvent) -> ConnectionState:
    """The state after `event`; raises IllegalTransition."""
    return _next(CONNECTION_NEXT, role, state, event)


def cleanup_next(role: Role, state: CleanupState, event: CleanupEvent) -> CleanupState:
    """The state after `event`; raises IllegalTransition."""
    return _next(CLEANUP_NEXT, role, state, event)


def session_next(role: Role, state: SessionState, event: SessionEvent) -> SessionState:
    """The state after `event`; raises IllegalTransition."""
    return _next(SESSION_NEXT, role, state, event)


def may(table: Table[State, Event], role: Role, state: State, event: Event) -> bool:
    """Whether the row exists: for what a peer or a race may bring at any moment."""
    return (state, event) in table[role]


def _next(table: Table[State, Event], role: Role, state: State, event: Event) -> State:
    following = table[role].get((state, event))
    if following is None:
        raise IllegalTransition(role, state, event)
    return following
