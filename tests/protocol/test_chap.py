"""CHAP arithmetic and the exchange itself (RFC 7143 §§9.2.1, 12.1.3). Checklist 40 to 43."""

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import AuthenticationFailed, LoginError, ProtocolViolation
from orion_iscsifs.protocol.chap import (
    ChapAlgorithm,
    Credentials,
    chap_response,
    decode_binary,
    encode_binary,
    same,
)
from orion_iscsifs.protocol.login_chap import ChapInitiator, ChapTarget
from tests.protocol.logins import INCOMING, OUTGOING, counting_bytes

IDENTIFIER = 0x2A
SECRET = b"a sixteen byte s"
CHALLENGE = bytes(range(16))
TEXT = bytes([IDENTIFIER]) + SECRET + CHALLENGE


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (5, hashlib.md5(TEXT).digest()),
        (6, hashlib.sha1(TEXT).digest()),
        (7, hashlib.sha256(TEXT).digest()),
        (8, hashlib.sha3_256(TEXT).digest()),
    ],
)
def test_responses(number: int, expected: bytes) -> None:
    algorithm = ChapAlgorithm(number)
    assert chap_response(algorithm, IDENTIFIER, SECRET, CHALLENGE) == expected
    assert algorithm.response_bytes == len(expected)


def test_a_known_response() -> None:
    """One vector as plain numbers: printf '\\x00secret\\x01\\x02' | md5sum."""
    response = chap_response(ChapAlgorithm.MD5, 0, b"secret", b"\x01\x02")
    assert response.hex() == "4dd5fcece4221500e9b7ddc5ad7bbba1"


def test_a_host_without_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str, text: bytes) -> None:
        raise ValueError("disabled for FIPS")

    monkeypatch.setattr(hashlib, "new", forbidden)
    with pytest.raises(AuthenticationFailed, match="OpenSSL forbids md5") as caught:
        chap_response(ChapAlgorithm.MD5, 0, b"secret", b"1")
    assert "chap_algs" in caught.value.advice


def test_same() -> None:
    assert same(b"a", b"a")
    assert not same(b"a", b"b")
    assert not same(b"a", b"aa")


def test_credentials_keep_their_secret() -> None:
    """Checklist 42: short secrets can be told; no secret is ever shown."""
    assert "horse" not in repr(INCOMING)
    assert not INCOMING.is_weak
    assert Credentials(user="u", secret=b"elevenbytes").is_weak


# -- binary values -------------------------------------------------------------------------------


@given(value=st.binary(min_size=1, max_size=1024))
@pytest.mark.checklist(41, "6.1")
def test_binary_values(value: bytes) -> None:
    """Checklist 41: hex and base64, both cases of the prefix."""
    forms = [encode_binary(value), "0X" + value.hex().upper()]
    forms += [prefix + base64.b64encode(value).decode() for prefix in ("0b", "0B")]
    for text in forms:
        assert decode_binary(text, key="CHAP_C", pdu="Login Response") == value


def test_an_odd_number_of_hex_digits() -> None:
    """RFC 7143 §6.1: n digits stand for (n + 1) / 2 bytes."""
    assert decode_binary("0x123", key="CHAP_C", pdu="Login Response") == b"\x01\x23"


@pytest.mark.parametrize(
    "text", ["", "0x", "0b", "0xzz", "0x 1", "0b!!!!", "0bQQ", "0b\u00e9", "1234", "abc", "0o17"]
)
def test_bad_binary_values(text: str) -> None:
    with pytest.raises(ProtocolViolation, match=r"CHAP_C .*§12\.1\.3"):
        decode_binary(text, key="CHAP_C", pdu="Login Response")


@pytest.mark.checklist(41, "12.1.3")
def test_binary_values_are_bounded() -> None:
    """Checklist 41."""
    with pytest.raises(ProtocolViolation, match="holds 1025 bytes, 1 to 1024"):
        decode_binary("0x" + "00" * 1025, key="CHAP_C", pdu="Login Response")


# -- the exchange --------------------------------------------------------------------------------


def initiator(
    *, mutual: bool = True, algorithms: tuple[int, ...] = (5,), seed: int = 1
) -> ChapInitiator:
    return ChapInitiator(INCOMING, OUTGOING if mutual else None, algorithms, counting_bytes(seed))


def target(*, outgoing: Credentials | None = OUTGOING, seed: int = 2) -> ChapTarget:
    return ChapTarget(INCOMING, outgoing, tuple(ChapAlgorithm), counting_bytes(seed))


@pytest.mark.parametrize("algorithm", list(ChapAlgorithm))
@pytest.mark.parametrize("mutual", [False, True])
def test_exchange(algorithm: ChapAlgorithm, mutual: bool) -> None:
    left, right = initiator(mutual=mutual, algorithms=(algorithm,)), target()
    challenge = right.challenge(dict(left.propose()))
    answer = left.answer(dict(challenge))
    assert [key for key, _ in answer] == ["CHAP_N", "CHAP_R"] + ["CHAP_I", "CHAP_C"] * mutual
    left.verify(dict(right.verify(dict(answer))))


@pytest.mark.checklist(40, "12.1.3")
def test_algorithms_are_offered_in_the_order_of_preference() -> None:
    """Checklist 40; the target takes the first that it knows."""
    left = initiator(algorithms=(8, 7, 6, 5))
    assert left.propose() == [("CHAP_A", "8,7,6,5")]
    assert dict(target().challenge(dict(left.propose())))["CHAP_A"] == "8"
    assert dict(target().challenge({"CHAP_A": "99,junk,6"}))["CHAP_A"] == "6"


@pytest.mark.parametrize("chosen", ["6", "", "x", "5,6", "05", "1" * 80])
@pytest.mark.checklist(40, "12.1.3")
def test_an_algorithm_that_was_not_offered(chosen: str) -> None:
    """Checklist 40."""
    with pytest.raises(ProtocolViolation, match="was not offered"):
        initiator().answer({"CHAP_A": chosen, "CHAP_I": "1", "CHAP_C": "0x01"})


@pytest.mark.parametrize("key", ["CHAP_A", "CHAP_I", "CHAP_C"])
def test_an_incomplete_challenge(key: str) -> None:
    keys = {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "0x01"}
    del keys[key]
    with pytest.raises(ProtocolViolation, match=f"{key} is missing"):
        initiator().answer(keys)


@pytest.mark.parametrize("identifier", ["256", "-1", "x", ""])
@pytest.mark.checklist(41, "12.1.3")
def test_an_identifier_beyond_a_byte(identifier: str) -> None:
    with pytest.raises(ProtocolViolation, match="CHAP_I is not a byte"):
        initiator().answer({"CHAP_A": "5", "CHAP_I": identifier, "CHAP_C": "0x01"})


def test_keys_out_of_step() -> None:
    keys = {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "0x01", "CHAP_N": "storage"}
    with pytest.raises(ProtocolViolation, match="CHAP_N does not belong"):
        initiator().answer(keys)
    with pytest.raises(ProtocolViolation, match="CHAP_R does not belong"):
        initiator(mutual=False).verify({"CHAP_R": "0x00"})


@pytest.mark.checklist(42, "12.1.3")
def test_a_target_with_our_challenge() -> None:
    """Checklist 42, §9.2.1: a challenge that equals ours is refused."""
    ours = counting_bytes(1)
    ours(1)
    keys = {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": encode_binary(ours(16))}
    with pytest.raises(AuthenticationFailed, match="challenge equals ours"):
        initiator().answer(keys)


def answered(left: ChapInitiator) -> dict[str, str]:
    return dict(left.answer({"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "0x" + "ab" * 16}))


def response_to(keys: dict[str, str], secret: bytes) -> str:
    challenge = decode_binary(keys["CHAP_C"], key="CHAP_C", pdu="test")
    return encode_binary(hashlib.md5(bytes([int(keys["CHAP_I"])]) + secret + challenge).digest())


def test_mutual_accepts_the_right_target() -> None:
    left = initiator()
    left.verify({"CHAP_N": "storage", "CHAP_R": response_to(answered(left), OUTGOING.secret)})


@pytest.mark.parametrize(("name", "secret"), [("storage", b"wrong"), ("rogue", OUTGOING.secret)])
def test_mutual_refuses_another_target(name: str, secret: bytes) -> None:
    left = initiator()
    keys = {"CHAP_N": name, "CHAP_R": response_to(answered(left), secret)}
    with pytest.raises(AuthenticationFailed, match="failed to prove its identity"):
        left.verify(keys)


@pytest.mark.checklist(42, "9.2.1")
def test_mutual_refuses_our_own_secret() -> None:
    """Checklist 42, §9.2.1: a response that we would have given ourselves."""
    left = initiator()
    keys = {"CHAP_N": "storage", "CHAP_R": response_to(answered(left), INCOMING.secret)}
    with pytest.raises(AuthenticationFailed, match="our own secret"):
        left.verify(keys)


def test_mutual_refuses_silence() -> None:
    left = initiator()
    answered(left)
    with pytest.raises(AuthenticationFailed, match="did not prove its identity"):
        left.verify({})


def test_mutual_needs_a_name() -> None:
    left = initiator()
    response = response_to(answered(left), OUTGOING.secret)
    with pytest.raises(ProtocolViolation, match="CHAP_N is missing"):
        left.verify({"CHAP_R": response})


@pytest.mark.checklist(41, "12.1.3")
def test_a_response_of_the_wrong_length() -> None:
    """Checklist 41."""
    left = initiator()
    answered(left)
    with pytest.raises(ProtocolViolation, match="CHAP_R holds 20 bytes, MD5 gives 16"):
        left.verify({"CHAP_N": "storage", "CHAP_R": "0x" + "00" * 20})


# -- the target's side ---------------------------------------------------------------------------


def status(error: LoginError) -> tuple[int | None, int | None]:
    return error.status_class, error.status_detail


def challenged(right: ChapTarget) -> dict[str, str]:
    return dict(right.challenge({"CHAP_A": "5"}))


@pytest.mark.parametrize("offered", ["9", "", "x", "99,100"])
def test_target_without_a_common_algorithm(offered: str) -> None:
    with pytest.raises(AuthenticationFailed, match="no CHAP algorithm in common") as caught:
        target().challenge({"CHAP_A": offered})
    assert status(caught.value) == (2, 1)


@pytest.mark.parametrize(("name", "secret"), [("alice", b"wrong"), ("mallory", INCOMING.secret)])
def test_target_refuses_a_wrong_response(name: str, secret: bytes) -> None:
    right = target()
    keys = {"CHAP_N": name, "CHAP_R": response_to(challenged(right), secret)}
    with pytest.raises(AuthenticationFailed, match="wrong CHAP name or secret") as caught:
        right.verify(keys)
    assert status(caught.value) == (2, 1)


def test_target_refuses_its_own_secret() -> None:
    """Checklist 42, §9.2.1."""
    right = target()
    keys = {"CHAP_N": "alice", "CHAP_R": response_to(challenged(right), OUTGOING.secret)}
    with pytest.raises(AuthenticationFailed, match="the target's own secret"):
        right.verify(keys)


@pytest.mark.parametrize("key", ["CHAP_N", "CHAP_R"])
def test_target_refuses_an_incomplete_response(key: str) -> None:
    """RFC 7143 §9.2: a missing CHAP_R is status "Missing parameter", or reflection works."""
    right = target()
    keys = {"CHAP_N": "alice", "CHAP_R": response_to(challenged(right), INCOMING.secret)}
    del keys[key]
    with pytest.raises(LoginError, match=f"{key} is missing") as caught:
        right.verify(keys)
    assert status(caught.value) == (2, 7)


def test_target_refuses_its_reflected_challenge() -> None:
    """Checklist 42, §9.2.1."""
    right = target()
    keys = challenged(right)
    answer = {"CHAP_N": "alice", "CHAP_R": response_to(keys, INCOMING.secret)}
    with pytest.raises(AuthenticationFailed, match="reflects"):
        right.verify(answer | {"CHAP_I": "9", "CHAP_C": keys["CHAP_C"]})


@pytest.mark.parametrize("key", ["CHAP_I", "CHAP_C"])
def test_half_a_challenge(key: str) -> None:
    right = target()
    answer = {"CHAP_N": "alice", "CHAP_R": response_to(challenged(right), INCOMING.secret)}
    with pytest.raises(LoginError, match="is missing") as caught:
        right.verify(answer | {key: "1" if key == "CHAP_I" else "0x01"})
    assert status(caught.value) == (2, 7)


def test_target_without_an_outgoing_secret() -> None:
    right = target(outgoing=None)
    answer = {"CHAP_N": "alice", "CHAP_R": response_to(challenged(right), INCOMING.secret)}
    with pytest.raises(AuthenticationFailed, match="not configured") as caught:
        right.verify(answer | {"CHAP_I": "9", "CHAP_C": "0x01"})
    assert status(caught.value) == (2, 1)


KEYS = st.dictionaries(
    st.sampled_from(["CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R"]),
    st.one_of(
        st.text(max_size=20), st.sampled_from(["5", "1", "0x01", "0x" + "00" * 16, "0bAA=="])
    ),
)


@given(first=KEYS, second=KEYS)
def test_hostile_keys(first: dict[str, str], second: dict[str, str]) -> None:
    """Whatever comes, nobody gets in, and only this project's errors come out."""
    left, right = initiator(), target()

    def left_lets_in() -> None:
        left.answer(first)
        left.verify(second)

    def right_lets_in() -> None:
        right.challenge(first)
        right.verify(second)

    for lets_in in (left_lets_in, right_lets_in):
        with pytest.raises((ProtocolViolation, LoginError)):
            lets_in()
