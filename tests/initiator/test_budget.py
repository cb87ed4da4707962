"""Retry budgets: every Status of RFC 7143 §11.13.5, and every other way for a login to fail."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import (
    CertificateRefused,
    ConnectFailed,
    ConnectionLost,
    DigestError,
    LoginError,
    NotIscsi,
    OrionError,
    ProtocolViolation,
    TlsError,
)
from orion_iscsifs.initiator.budget import SLOW_RETRY_S, Decision, LoginPolicy
from orion_iscsifs.protocol.login import LoginStatus
from orion_iscsifs.protocol.login_status import refusal
from orion_iscsifs.protocol.pdu import LoginResponse

CREDENTIALS = {LoginStatus.AUTHENTICATION_FAILURE, LoginStatus.AUTHORIZATION_FAILURE}
CLASS_2 = [status for status in LoginStatus if status >> 8 == 2]
CLASS_3 = [status for status in LoginStatus if status >> 8 == 3]
UNLISTED_2, UNLISTED_3 = 0x02FE, 0x03FE


def refused(status: int) -> LoginError:
    """The error that a Login Response with this status stands for."""
    response = LoginResponse(bytes(6), 0)
    response.status_class, response.status_detail = status >> 8, status & 0xFF
    response.data = b"TargetAddress=192.0.2.1\0" if status >> 8 == 1 else b""
    return refusal(response, "iqn.2024-01.org.example:t")


def decisions(error: OrionError, count: int = 40) -> list[Decision]:
    """What follows when every login fails with `error` as soon as it is tried."""
    policy, now, made = LoginPolicy(), 1000.0, []
    for _ in range(count):
        made.append(policy.after(error, now))
        now += made[-1].wait_s
    return made


def check_never_given_up(error: OrionError, first_s: float) -> None:
    made = decisions(error)
    assert not any(decision.give_up for decision in made)
    waits = [decision.wait_s for decision in made]
    assert waits[0] == first_s
    assert all(later == min(2 * earlier, 5.0) for earlier, later in pairwise(waits))


@pytest.mark.checklist(39, "11.13.5")
@pytest.mark.parametrize("status", [*CLASS_3, UNLISTED_3], ids=hex)
def test_class_3_is_tried_again_with_growing_pauses(status: int) -> None:
    check_never_given_up(refused(status), first_s=0.5)


@pytest.mark.checklist(38, "11.13.5")
@pytest.mark.parametrize("status", [0x0101, 0x0102, 0x0103], ids=hex)
def test_redirections_that_lead_nowhere_may_end_some_day(status: int) -> None:
    check_never_given_up(refused(status), first_s=0.5)
    check_never_given_up(LoginError("in a circle", status_class=1), first_s=0.5)


@pytest.mark.parametrize("kind", [ConnectFailed, ConnectionLost, NotIscsi, TlsError])
def test_a_broken_path_is_tried_again_soon(kind: type[OrionError]) -> None:
    check_never_given_up(kind("gone"), first_s=0.1)


@pytest.mark.parametrize("kind", [ProtocolViolation, DigestError])
def test_a_peer_that_breaks_the_protocol_is_tried_again(kind: type[ProtocolViolation]) -> None:
    check_never_given_up(kind("Login Response", "nonsense", section="6.3"), first_s=0.5)


@pytest.mark.checklist(39, "11.13.5")
@pytest.mark.parametrize(
    "error",
    [
        *(refused(status) for status in [*CLASS_2, UNLISTED_2] if status not in CREDENTIALS),
        LoginError("a digest that was demanded is not used"),
        CertificateRefused("expired"),
    ],
    ids=str,
)
def test_class_2_has_a_short_grace_for_a_target_that_was_restarted(error: OrionError) -> None:
    made = decisions(error)
    tries = [decision for decision in made if not decision.give_up]
    assert [decision.wait_s for decision in tries[:4]] == [0.5, 1.0, 2.0, 4.0]
    assert 4 < len(tries) < 12
    assert sum(decision.wait_s for decision in tries) <= 30
    assert set(made[len(tries) :]) == {Decision(SLOW_RETRY_S, give_up=True)}


@pytest.mark.checklist(39, "11.13.5")
@pytest.mark.parametrize("status", sorted(CREDENTIALS), ids=hex)
def test_credentials_are_tried_once_more(status: int) -> None:
    once, *rest = decisions(refused(status))
    assert once == Decision(5.0, give_up=False)
    assert set(rest) == {Decision(SLOW_RETRY_S, give_up=True)}


def test_every_status_of_the_rfc_was_looked_at() -> None:
    assert {status >> 8 for status in LoginStatus} == {0, 1, 2, 3}
    assert len(CLASS_2) == 12
    assert len(CLASS_3) == 3


def test_the_verdict_names_the_reason_and_stands_until_a_login_succeeds() -> None:
    policy, wrong = LoginPolicy(), refused(LoginStatus.AUTHENTICATION_FAILURE)
    policy.after(wrong, 0.0)
    assert policy.verdict is None
    policy.after(wrong, 5.1)
    assert policy.verdict is wrong
    # The target is restarted for the repair: short pauses until it answers, and I/O still fails.
    assert policy.after(ConnectFailed("refused"), 65.0) == Decision(0.1, give_up=True)
    assert policy.after(ConnectFailed("refused"), 65.1) == Decision(0.2, give_up=True)
    assert policy.after(refused(LoginStatus.NOT_FOUND), 66) == Decision(SLOW_RETRY_S, give_up=True)
    assert policy.after(wrong, 130) == Decision(SLOW_RETRY_S, give_up=True)
    assert policy.verdict is wrong
    policy.reset()
    assert policy.verdict is None
    assert policy.after(wrong, 200) == Decision(5.0, give_up=False)


def test_a_target_that_went_away_in_between_gets_its_grace_again() -> None:
    policy, unknown = LoginPolicy(), refused(LoginStatus.NOT_FOUND)
    assert not policy.after(unknown, 0.0).give_up
    assert not policy.after(unknown, 25.0).give_up
    assert policy.after(ConnectFailed("refused"), 26.0) == Decision(0.1, give_up=False)
    assert policy.after(unknown, 90.0) == Decision(0.5, give_up=False)
    assert policy.after(unknown, 121.0) == Decision(SLOW_RETRY_S, give_up=True)


def test_slow_logins_use_up_the_grace_too() -> None:
    policy, missing = LoginPolicy(), refused(LoginStatus.MISSING_PARAMETER)
    assert policy.after(missing, 0.0) == Decision(0.5, give_up=False)
    assert policy.after(missing, 40.0) == Decision(SLOW_RETRY_S, give_up=True)


ERRORS = [ConnectFailed("x"), *(refused(status) for status in LoginStatus if status)]


@given(st.lists(st.tuples(st.sampled_from(ERRORS), st.floats(0, 100)), max_size=60))
def test_any_history(history: list[tuple[OrionError, float]]) -> None:
    """Pauses stay within bounds, and what is given up stays so."""
    policy, now, given_up = LoginPolicy(), 0.0, False
    for error, passed in history:
        now += passed
        decision = policy.after(error, now)
        assert 0.1 <= decision.wait_s <= SLOW_RETRY_S
        assert decision.give_up or not given_up
        assert decision.give_up is (policy.verdict is not None)
        given_up = decision.give_up
