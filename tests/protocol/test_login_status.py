"""Status-Class and Status-Detail in words (RFC 7143 §11.13.5). Checklist 38 and 39."""

import pytest

from orion_iscsifs.errors import (
    AuthenticationFailed,
    LoginError,
    LoginRedirected,
    OrionError,
    ProtocolViolation,
    TargetNotFound,
    TargetUnavailable,
)
from orion_iscsifs.protocol.login_status import LoginStatus, refusal, status_error
from tests.protocol.logins import IQN, response

KINDS = {
    0x0200: (LoginError, "without a reason"),
    0x0201: (AuthenticationFailed, "authentication failed"),
    0x0202: (AuthenticationFailed, "not allowed"),
    0x0203: (TargetNotFound, "no such target"),
    0x0204: (TargetNotFound, "removed"),
    0x0205: (LoginError, "version"),
    0x0206: (LoginError, "too many connections"),
    0x0207: (LoginError, "misses a parameter"),
    0x0208: (LoginError, "span"),
    0x0209: (LoginError, "type of session"),
    0x020A: (LoginError, "does not exist"),
    0x020B: (LoginError, "invalid during login"),
    0x0300: (TargetUnavailable, "hardware or software"),
    0x0301: (TargetUnavailable, "not operational"),
    0x0302: (TargetUnavailable, "out of sessions"),
    0x02FF: (LoginError, "refused the login"),
    0x03FF: (TargetUnavailable, "can't serve now"),
}


@pytest.mark.parametrize("status", sorted(KINDS))
@pytest.mark.checklist(39, "11.13.5")
def test_every_code_in_words(status: int) -> None:
    """Checklist 39: class 2 is not retried, class 3 is."""
    kind, words = KINDS[status]
    error = refusal(response(status=status), IQN)
    assert type(error) is kind
    assert words in str(error)
    assert str(error).startswith(f"{IQN}: ")
    assert f"{status:04x}" in str(error)
    assert error.advice
    assert "\n" not in error.line
    assert (error.status_class, error.status_detail) == (status >> 8, status & 0xFF)
    assert error.retry_may_help is (status >> 8 == 3)


def test_every_listed_code_is_tested() -> None:
    unlisted = {0x02FF, 0x03FF}
    assert set(KINDS) - unlisted == {int(code) for code in LoginStatus if code > 0x0102}


def test_discovery_has_no_target_to_name() -> None:
    assert str(refusal(response(status=0x0301), None)).startswith("discovery: ")


def test_the_callers_advice_about_authentication() -> None:
    said = refusal(response(status=0x0201), IQN, auth_advice="do this")
    assert said.advice == "do this"
    assert refusal(response(status=0x0203), IQN, auth_advice="do this").advice != "do this"


@pytest.mark.parametrize("status_class", [4, 9, 255])
def test_a_class_that_does_not_exist(status_class: int) -> None:
    with pytest.raises(ProtocolViolation, match=rf"Status-Class {status_class}.*§11\.13\.5"):
        refusal(response(status=status_class << 8), IQN)


@pytest.mark.parametrize(
    ("status", "address", "permanent"),
    [
        (0x0101, "10.0.0.1:3260", False),
        (0x0102, "[2001:db8::1]:3260", True),
        (0x0101, "storage.example,1", False),
        (0x01FE, "10.0.0.1", False),
    ],
)
@pytest.mark.checklist(38, "11.13.5")
def test_redirections(status: int, address: str, permanent: bool) -> None:
    """Checklist 38: with and without a portal group tag."""
    moved = response([("TargetAddress", address), ("TargetAddress", "10.9.9.9")], status=status)
    error = refusal(moved, IQN)
    assert isinstance(error, LoginRedirected)
    assert error.portal == address.partition(",")[0]
    assert error.permanent is permanent
    assert (error.status_class, error.status_detail) == (1, status & 0xFF)


def test_a_hostile_address_moves_no_cursor() -> None:
    moved = response([("TargetAddress", "\x1b[2J\n10.0.0.1")], status=0x0101)
    assert str(refusal(moved, IQN)).endswith("has moved for now to [2J10.0.0.1")


@pytest.mark.parametrize("text", [[], [("TargetAddress", "")], [("TargetAddress", ",1")]])
def test_a_redirection_to_nowhere(text: list[tuple[str, str]]) -> None:
    with pytest.raises(ProtocolViolation, match="redirection without TargetAddress"):
        refusal(response(text, status=0x0101), IQN)


def test_status_error_carries_its_code() -> None:
    error = status_error(LoginStatus.TOO_MANY_CONNECTIONS, "enough")
    assert isinstance(error, OrionError)
    assert (error.status_class, error.status_detail, str(error)) == (2, 6, "enough")
