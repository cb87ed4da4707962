"""CHAP challenges reflected from one connection to another (RFC 7143 §9.2.1). Checklist 42."""

import pytest

from orion_iscsifs.errors import AuthenticationFailed
from orion_iscsifs.protocol.chap import ChallengeRegister
from orion_iscsifs.protocol.login import Credentials, InitiatorLogin, LoginStatus, TargetAccess
from orion_iscsifs.protocol.pdu import LoginRequest
from tests.protocol.logins import (
    INCOMING,
    OUTGOING,
    counting_bytes,
    initiator,
    join,
    pairs,
    request,
    response,
    target,
)

GUARDED = TargetAccess(incoming=INCOMING, outgoing=OUTGOING)


def test_a_register_knows_what_was_sent() -> None:
    register = ChallengeRegister()
    assert b"one" not in register
    register.add(b"one")
    assert b"one" in register
    assert b"on" not in register


def test_a_register_is_bounded() -> None:
    register = ChallengeRegister(challenges_max=2)
    for challenge in (b"1", b"2", b"2", b"3"):
        register.add(challenge)
    assert [challenge in register for challenge in (b"1", b"2", b"3")] == [False, True, True]


def challenged(login: InitiatorLogin, challenge: str) -> dict[str, str]:
    """Alice's answer to the challenge of a rogue target."""
    login.start()
    login.receive(response([("TargetPortalGroupTag", "1"), ("AuthMethod", "CHAP")]))
    answer = login.receive(
        response([("CHAP_A", "5"), ("CHAP_I", "9"), ("CHAP_C", challenge)], stat_sn=1)
    )
    assert isinstance(answer, LoginRequest)
    return dict(pairs(answer))


@pytest.mark.checklist(42, "9.2.1")
def test_alice_does_not_answer_her_own_challenge_on_another_connection() -> None:
    """The RFC's example: Rogue reflects connection 1's challenge on connection 2."""
    register = ChallengeRegister()
    logins = [
        initiator(
            credentials=INCOMING,
            target_credentials=OUTGOING,
            random_bytes=counting_bytes(seed),
            challenges=register,
        )
        for seed in (1, 2)
    ]
    answer = challenged(logins[0], "0x" + "ab" * 16)
    with pytest.raises(AuthenticationFailed, match="reflects a CHAP challenge of ours"):
        challenged(logins[1], answer["CHAP_C"])


@pytest.mark.checklist(42, "9.2.1")
def test_the_challenge_is_compared_as_bytes_not_as_text() -> None:
    register = ChallengeRegister()
    first = initiator(
        credentials=INCOMING,
        target_credentials=OUTGOING,
        random_bytes=counting_bytes(1),
        challenges=register,
    )
    answer = challenged(first, "0x" + "ab" * 16)
    second = initiator(
        credentials=INCOMING,
        target_credentials=OUTGOING,
        random_bytes=counting_bytes(2),
        challenges=register,
    )
    with pytest.raises(AuthenticationFailed, match="reflects"):
        challenged(second, "0X" + answer["CHAP_C"][2:].upper())


@pytest.mark.checklist(42, "9.2.1")
def test_a_target_does_not_answer_its_own_challenge_on_another_connection() -> None:
    register = ChallengeRegister()
    first = target(access=GUARDED, random_bytes=counting_bytes(1), challenges=register)
    second = target(access=GUARDED, random_bytes=counting_bytes(2), challenges=register)
    rogue = initiator(credentials=INCOMING, target_credentials=OUTGOING)
    names = pairs(rogue.start())
    challenges = []
    for connection in (first, second):
        connection.receive(request(names))
        challenges.append(dict(pairs(connection.receive(request([("CHAP_A", "5")])))))
    answer = rogue.receive(response([("TargetPortalGroupTag", "1"), ("AuthMethod", "CHAP")]))
    assert answer is not None
    answer = rogue.receive(response(list(challenges[1].items()), stat_sn=1))
    assert answer is not None
    keys = dict(pairs(answer)) | {"CHAP_C": challenges[0]["CHAP_C"]}
    refused = second.receive(request(list(keys.items()), nsg=1))
    assert (refused.status_class << 8 | refused.status_detail) == (
        LoginStatus.AUTHENTICATION_FAILURE
    )
    assert "reflects" in str(second.failure)


def test_honest_connections_share_a_register() -> None:
    ours, theirs = ChallengeRegister(), ChallengeRegister()
    for seed in range(1, 5):
        left = initiator(
            credentials=INCOMING,
            target_credentials=OUTGOING,
            random_bytes=counting_bytes(seed),
            challenges=ours,
        )
        right = target(access=GUARDED, random_bytes=counting_bytes(10 + seed), challenges=theirs)
        join(left, right)
        assert left.done


def test_without_mutual_chap_there_is_nothing_to_reflect() -> None:
    """Only challenges of our own count: two targets may have sent the same one."""
    register = ChallengeRegister()
    for _ in range(2):
        answer = challenged(
            initiator(credentials=Credentials(user="a", secret=b"b"), challenges=register),
            "0x" + "ab" * 16,
        )
        assert "CHAP_C" not in answer
