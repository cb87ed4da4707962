"""Status-Class and Status-Detail of a Login Response, in words (RFC 7143 §11.13.5)."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.errors import (
    AuthenticationFailed,
    LoginError,
    LoginRedirected,
    ProtocolViolation,
    TargetNotFound,
    TargetUnavailable,
)
from orion_iscsifs.protocol.pdu import LoginResponse
from orion_iscsifs.protocol.text import TextReader, printable


class LoginStatus(enum.IntEnum):
    """Status-Class in the high byte, Status-Detail in the low one."""

    SUCCESS = 0x0000
    MOVED_TEMPORARILY = 0x0101
    MOVED_PERMANENTLY = 0x0102
    INITIATOR_ERROR = 0x0200
    AUTHENTICATION_FAILURE = 0x0201
    AUTHORIZATION_FAILURE = 0x0202
    NOT_FOUND = 0x0203
    TARGET_REMOVED = 0x0204
    UNSUPPORTED_VERSION = 0x0205
    TOO_MANY_CONNECTIONS = 0x0206
    MISSING_PARAMETER = 0x0207
    CANT_INCLUDE_IN_SESSION = 0x0208
    SESSION_TYPE_NOT_SUPPORTED = 0x0209
    SESSION_DOES_NOT_EXIST = 0x020A
    INVALID_DURING_LOGIN = 0x020B
    TARGET_ERROR = 0x0300
    SERVICE_UNAVAILABLE = 0x0301
    OUT_OF_RESOURCES = 0x0302


@dataclass(frozen=True, slots=True)
class _Words:
    kind: type[LoginError]
    problem: str
    advice: str


_ASK_ADMIN: Final = "see the target's log; the login will not be retried"
_BUSY: Final = "the target may need time; it is tried again"

_WORDS: Final[Mapping[int, _Words]] = {
    LoginStatus.INITIATOR_ERROR: _Words(
        LoginError, "the target refused the login without a reason", _ASK_ADMIN
    ),
    LoginStatus.AUTHENTICATION_FAILURE: _Words(
        AuthenticationFailed,
        "authentication failed",
        "check chap_user and the secret, and whether the target wants authentication at all",
    ),
    LoginStatus.AUTHORIZATION_FAILURE: _Words(
        AuthenticationFailed,
        "this initiator is not allowed to use the target",
        "add the initiator name to the target's access list, or set initiator_name=",
    ),
    LoginStatus.NOT_FOUND: _Words(
        TargetNotFound,
        "no such target at this portal",
        "check the IQN; `orion-iscsifs discover` lists the targets",
    ),
    LoginStatus.TARGET_REMOVED: _Words(
        TargetNotFound,
        "the target has been removed",
        "`orion-iscsifs discover` lists the targets that are left",
    ),
    LoginStatus.UNSUPPORTED_VERSION: _Words(
        LoginError, "the target does not speak iSCSI version 0", "is it an iSCSI target at all?"
    ),
    LoginStatus.TOO_MANY_CONNECTIONS: _Words(
        LoginError,
        "the session has too many connections",
        "use fewer connections=, or raise the target's limit",
    ),
    LoginStatus.MISSING_PARAMETER: _Words(
        LoginError, "the target misses a parameter in the login", _ASK_ADMIN
    ),
    LoginStatus.CANT_INCLUDE_IN_SESSION: _Words(
        LoginError,
        "the target does not let a session span to this portal",
        "use portals of the same portal group",
    ),
    LoginStatus.SESSION_TYPE_NOT_SUPPORTED: _Words(
        LoginError,
        "the target does not support this type of session for this initiator",
        "for a discovery session: name the target's IQN in the URL instead",
    ),
    LoginStatus.SESSION_DOES_NOT_EXIST: _Words(
        LoginError, "the session to join does not exist", "a new session is needed"
    ),
    LoginStatus.INVALID_DURING_LOGIN: _Words(
        LoginError, "the target saw a request that is invalid during login", _ASK_ADMIN
    ),
    LoginStatus.TARGET_ERROR: _Words(
        # LIO answers an unknown IQN like this: the user must not look for broken hardware only.
        TargetUnavailable,
        "the target has a hardware or software error",
        "check that the IQN exists, and see the target's log",
    ),
    LoginStatus.SERVICE_UNAVAILABLE: _Words(
        TargetUnavailable, "the target is not operational now", _BUSY
    ),
    LoginStatus.OUT_OF_RESOURCES: _Words(
        TargetUnavailable, "the target is out of sessions, connections or memory", _BUSY
    ),
}

# A detail code that §11.13.5 does not list is read by its class, as that section asks for.
_CLASSES: Final[Mapping[int, _Words]] = {
    2: _Words(LoginError, "the target refused the login", _ASK_ADMIN),
    3: _Words(TargetUnavailable, "the target can't serve now", _BUSY),
}


def refusal(
    response: LoginResponse, target_name: str | None, *, auth_advice: str = ""
) -> LoginError:
    """The error that a Login Response with a Status-Class other than 0 stands for.

    `auth_advice` replaces the general advice about Status 0201: the caller knows what was tried.

    Raises ProtocolViolation for a class that does not exist and a redirection without address.
    """
    status_class, detail = response.status_class, response.status_detail
    who = target_name or "discovery"
    if status_class == 1:
        return _redirection(response, who)
    words = _WORDS.get(status_class << 8 | detail) or _CLASSES.get(status_class)
    if words is None:
        raise ProtocolViolation(
            response.name, f"Status-Class {status_class} does not exist", section="11.13.5"
        )
    failed_auth = status_class << 8 | detail == LoginStatus.AUTHENTICATION_FAILURE
    return words.kind(
        f"{who}: {words.problem} (login status {status_class:02x}{detail:02x})",
        advice=auth_advice if failed_auth and auth_advice else words.advice,
        status_class=status_class,
        status_detail=detail,
    )


def _redirection(response: LoginResponse, who: str) -> LoginRedirected:
    reader = TextReader(response.name)
    reader.feed(response.data)
    # The first of several addresses: the target lists them, it does not rank them.
    portal = next((value for key, value in reader.finish() if key == "TargetAddress"), "")
    portal = portal.partition(",")[0]  # A portal group tag must not be there, yet some send it.
    if not portal:
        problem = "redirection without TargetAddress"
        raise ProtocolViolation(response.name, problem, section="11.13.5")
    permanent = response.status_detail == LoginStatus.MOVED_PERMANENTLY & 0xFF
    return LoginRedirected(
        f"{who}: the target has moved {'permanently' if permanent else 'for now'} "
        f"to {printable(portal)}",
        portal=portal,
        permanent=permanent,
        status_detail=response.status_detail,
    )


def status_error(status: LoginStatus, message: str) -> LoginError:
    """How a target's own code refuses a login: raised, and sent as this status."""
    words = _WORDS[status]
    return words.kind(message, status_class=status >> 8, status_detail=status & 0xFF)
