"""Initiator and target joined in memory: whole logins (RFC 7143 §6.3)."""

import dataclasses
import hashlib
import itertools

import pytest

from orion_iscsifs.errors import (
    AuthenticationFailed,
    LoginError,
    LoginRedirected,
    ProtocolViolation,
    TargetNotFound,
    TargetUnavailable,
)
from orion_iscsifs.protocol.login import (
    ChapAlgorithm,
    Credentials,
    LoginStatus,
    Offer,
    TargetAccess,
    TargetLogin,
    status_error,
)
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from tests.protocol.logins import (
    INCOMING,
    INITIATOR,
    IQN,
    ISID,
    NAMES,
    OUTGOING,
    counting_bytes,
    initiator,
    join,
    request,
    target,
)

NONE_FIRST, CRC_FIRST = ("None", "CRC32C"), ("CRC32C", "None")


@pytest.mark.parametrize("digests", [NONE_FIRST, CRC_FIRST], ids=["none", "crc32c"])
@pytest.mark.parametrize("algorithm", list(ChapAlgorithm))
@pytest.mark.parametrize("auth", ["none", "chap", "mutual"])
@pytest.mark.parametrize(
    ("initial_r2t", "immediate_data"), list(itertools.product([False, True], repeat=2))
)
@pytest.mark.checklist(12, "13.10")
@pytest.mark.checklist(32, "13.9")
@pytest.mark.checklist(40, "12.1.3")
def test_every_combination(
    auth: str,
    algorithm: ChapAlgorithm,
    digests: tuple[str, ...],
    initial_r2t: bool,
    immediate_data: bool,
) -> None:
    """Checklist 12, 32, 40."""
    left = initiator(
        offer=Offer(
            header_digest=digests,
            data_digest=digests,
            initial_r2t=initial_r2t,
            immediate_data=immediate_data,
            max_recv_data_segment_length=65536,
        ),
        credentials=None if auth == "none" else INCOMING,
        target_credentials=OUTGOING if auth == "mutual" else None,
        algorithms=(algorithm,),
    )
    right = target(
        offer=Offer(header_digest=CRC_FIRST, data_digest=NONE_FIRST, initial_r2t=False),
        access=TargetAccess(
            incoming=None if auth == "none" else INCOMING, outgoing=OUTGOING, alias="A disk"
        ),
        assign_tsih=lambda login: 0x4242,
    )
    join(left, right)
    assert left.done
    assert right.done
    assert not right.failed
    assert left.tsih == right.tsih == 0x4242
    parameters = left.parameters
    assert parameters.header_digest is parameters.data_digest is (digests == CRC_FIRST)
    assert parameters.initial_r2t is initial_r2t
    assert parameters.immediate_data is immediate_data
    assert parameters.target_portal_group_tag == 1
    assert parameters.target_alias == "A disk"
    assert right.parameters == dataclasses.replace(
        parameters, max_recv_data_segment_length=8192, max_send_data_segment_length=65536
    )
    assert parameters.max_recv_data_segment_length == 65536


@pytest.mark.checklist(32, "6.3")
@pytest.mark.checklist(40, "12.1.3")
def test_what_goes_over_the_wire() -> None:
    """Checklist 32: group tag first; 40: CHAP_A alone; names are declared once."""
    left = initiator(credentials=INCOMING, target_credentials=OUTGOING, algorithms=(7, 5))
    right = target(access=TargetAccess(incoming=INCOMING, outgoing=OUTGOING))
    trace = join(left, right)
    assert [sorted(text) for text in trace.sent][:3] == [
        ["AuthMethod", "InitiatorName", "SessionType", "TargetName"],
        ["CHAP_A"],
        ["CHAP_C", "CHAP_I", "CHAP_N", "CHAP_R"],
    ]
    assert trace.sent[0] == {
        "InitiatorName": INITIATOR,
        "SessionType": "Normal",
        "TargetName": IQN,
        "AuthMethod": "CHAP",
    }
    assert trace.sent[1] == {"CHAP_A": "7,5"}
    assert trace.received[0] == {"TargetPortalGroupTag": "1", "AuthMethod": "CHAP"}
    assert sorted(trace.received[1]) == ["CHAP_A", "CHAP_C", "CHAP_I"]
    assert sorted(trace.received[2]) == ["CHAP_N", "CHAP_R"]
    keys = [key for text in trace.sent for key in text]
    # Only the challenge and its answer share names with what was sent before, in one PDU.
    assert len(keys) == len(set(keys))
    assert [(pdu.csg, pdu.transit, pdu.nsg) for pdu in trace.requests] == [
        (0, False, 0),
        (0, False, 0),
        (0, True, 1),
        (1, True, 3),
    ]
    assert [(pdu.csg, pdu.transit, pdu.nsg) for pdu in trace.responses] == [
        (0, False, 0),
        (0, False, 0),
        (0, True, 1),
        (1, True, 3),
    ]


@pytest.mark.checklist(1, "4.2.2.1")
@pytest.mark.checklist(7, "11.13.4")
def test_sequence_numbers() -> None:
    """Checklist 7: StatSN of the responses seeds ExpStatSN, across the wrap too."""
    left, right = initiator(credentials=INCOMING), target(access=TargetAccess(incoming=INCOMING))
    trace = join(left, right)
    assert [pdu.exp_stat_sn for pdu in trace.requests] == [0, 0xFFFF_FFFF, 0, 1]
    assert left.exp_stat_sn == 2
    assert (left.exp_cmd_sn, left.max_cmd_sn) == (77, 108)
    assert {pdu.cmd_sn for pdu in trace.requests} == {77}
    assert {pdu.initiator_task_tag for pdu in trace.requests} == {0x1234}
    assert right.cmd_sn == 77


def test_what_the_target_learns() -> None:
    left = initiator(offer=Offer(alias="host 7"))
    right = target()
    join(left, right)
    assert (right.initiator_name, right.target_name) == (INITIATOR, IQN)
    assert (right.session_type, right.isid, right.cid) == ("Normal", ISID, 3)
    assert (right.requested_tsih, right.tsih) == (0, 1)
    assert right.parameters.initiator_alias == "host 7"


def test_tsih_only_in_the_final_response() -> None:
    """§11.13.3."""
    trace = join(initiator(), target(assign_tsih=lambda login: 9))
    assert [pdu.tsih for pdu in trace.responses] == [0, 9]


@pytest.mark.checklist(35, "4.3")
def test_discovery() -> None:
    """Checklist 35: no target name, no digest even if wanted, only keys that matter."""
    left = initiator(
        session_type="Discovery", target_name=None, offer=Offer(header_digest=CRC_FIRST)
    )
    right = target(offer=Offer(header_digest=CRC_FIRST, alias="not said in discovery"))
    trace = join(left, right)
    assert not left.parameters.header_digest
    assert right.session_type == "Discovery"
    assert right.target_name is None
    assert trace.sent[0]["SessionType"] == "Discovery"
    assert sorted(trace.sent[1]) == ["DataDigest", "HeaderDigest", "MaxRecvDataSegmentLength"]
    assert "TargetAlias" not in trace.received[0]


def test_discovery_with_chap() -> None:
    guarded = TargetAccess(incoming=INCOMING)
    left = initiator(session_type="Discovery", target_name=None, credentials=INCOMING)
    join(left, target(discovery_access=guarded))
    assert left.done
    stranger = initiator(session_type="Discovery", target_name=None)
    with pytest.raises(AuthenticationFailed):
        join(stranger, target(discovery_access=guarded))


def test_a_connection_that_joins_a_session() -> None:
    """§13: keys of the session are not negotiated again."""
    first = initiator(offer=Offer(max_burst_length=1 << 17, header_digest=CRC_FIRST))
    join(first, target(offer=Offer(header_digest=CRC_FIRST)))
    second = initiator(tsih=first.tsih, session=first.parameters)
    right = target()
    trace = join(second, right)
    assert sorted(trace.sent[1]) == ["DataDigest", "HeaderDigest", "MaxRecvDataSegmentLength"]
    assert second.parameters.max_burst_length == 1 << 17
    assert not second.parameters.header_digest
    assert right.requested_tsih == second.tsih == first.tsih


@pytest.mark.checklist(31, "6.3.3")
def test_a_target_that_needs_more_than_it_was_offered() -> None:
    """Checklist 31: T=0 although the initiator wants to go on; the initiator answers."""
    left = initiator(session_type="Discovery", target_name=None, offer=Offer(default_time2wait=1))
    right = target(offer=Offer(default_time2wait=7))
    trace = join(left, right)
    assert [pdu.transit for pdu in trace.responses] == [True, False, True]
    assert trace.received[1]["DefaultTime2Wait"] == "7"
    assert trace.sent[2] == {"DefaultTime2Wait": "7"}
    assert left.parameters.default_time2wait == right.parameters.default_time2wait == 7


# -- refusals ------------------------------------------------------------------------------------


def test_an_unknown_target() -> None:
    with pytest.raises(TargetNotFound, match=r"iqn\.2026-11\.example:other: no such target"):
        join(initiator(target_name="iqn.2026-11.example:other"), target())


@pytest.mark.parametrize(
    "credentials",
    [
        None,
        Credentials(user="alice", secret=b"wrong secret"),
        Credentials(user="bob", secret=INCOMING.secret),
    ],
    ids=["none", "secret", "user"],
)
def test_wrong_credentials(credentials: Credentials | None) -> None:
    right = target(access=TargetAccess(incoming=INCOMING))
    with pytest.raises(AuthenticationFailed, match="0201") as caught:
        join(initiator(credentials=credentials), right)
    assert right.failed
    assert not right.done
    assert ("set chap_user=" in caught.value.advice) is (credentials is None)
    assert INCOMING.secret.decode() not in str(right.failure)


@pytest.mark.checklist(43, "9.2")
def test_credentials_for_a_target_that_asks_for_none() -> None:
    """Checklist 43: fail closed."""
    with pytest.raises(AuthenticationFailed) as caught:
        join(initiator(credentials=INCOMING), target())
    assert "does not want CHAP" in caught.value.advice


@pytest.mark.checklist(43, "9.2")
def test_mutual_chap_with_a_target_that_can_not() -> None:
    """Checklist 42 and 43."""
    right = target(access=TargetAccess(incoming=INCOMING))
    with pytest.raises(AuthenticationFailed) as caught:
        join(initiator(credentials=INCOMING, target_credentials=OUTGOING), right)
    assert "outgoing secret" in caught.value.advice


def test_mutual_chap_with_another_target() -> None:
    rogue = Credentials(user="storage", secret=b"not the real secret")
    right = target(access=TargetAccess(incoming=INCOMING, outgoing=rogue))
    with pytest.raises(AuthenticationFailed, match="failed to prove its identity"):
        join(initiator(credentials=INCOMING, target_credentials=OUTGOING), right)


@pytest.mark.checklist(42, "9.2.1")
def test_a_target_with_one_secret_for_both_directions() -> None:
    """Checklist 42, §9.2.1."""
    same = Credentials(user="storage", secret=INCOMING.secret)
    right = target(access=TargetAccess(incoming=INCOMING, outgoing=same))
    with pytest.raises(AuthenticationFailed):
        join(initiator(credentials=INCOMING, target_credentials=OUTGOING), right)
    assert "own secret" in str(right.failure)


@pytest.mark.checklist(42, "12.1.3")
def test_both_sides_with_the_same_randomness() -> None:
    """Checklist 42: equal challenges are refused."""
    left = initiator(
        credentials=INCOMING, target_credentials=OUTGOING, random_bytes=counting_bytes(1)
    )
    right = target(
        access=TargetAccess(incoming=INCOMING, outgoing=OUTGOING), random_bytes=counting_bytes(1)
    )
    with pytest.raises(AuthenticationFailed, match="challenge equals ours"):
        join(left, right)


@pytest.mark.checklist(40, "12.1.3")
def test_no_algorithm_in_common() -> None:
    right = target(access=TargetAccess(incoming=INCOMING, algorithms=(7, 8)))
    with pytest.raises(AuthenticationFailed) as caught:
        join(initiator(credentials=INCOMING), right)
    assert "chap_algs" in caught.value.advice


def test_a_target_whose_host_forbids_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """FIPS: the target's own failure is status 0201 for the initiator, and says why in its log."""
    right = target(access=TargetAccess(incoming=INCOMING))
    right.receive(request([*NAMES, ("AuthMethod", "CHAP")]))
    right.receive(request([("CHAP_A", "5")]))

    def forbidden(name: str, text: bytes) -> None:
        raise ValueError("disabled for FIPS")

    monkeypatch.setattr(hashlib, "new", forbidden)
    answer = [("CHAP_N", "alice"), ("CHAP_R", "0x" + "00" * 16)]
    refused = right.receive(request(answer, nsg=1))
    assert (refused.status_class, refused.status_detail) == (2, 1)
    assert "OpenSSL forbids md5" in str(right.failure)


def test_a_digest_that_only_one_side_wants() -> None:
    required = Offer(header_digest=("CRC32C",))
    with pytest.raises(LoginError, match="HeaderDigest CRC32C is required"):
        join(initiator(offer=required), target(offer=Offer()))
    with pytest.raises(LoginError, match="0200"):
        join(initiator(offer=Offer()), target(offer=required))


def test_the_session_layer_can_refuse() -> None:
    """§6.3.1: TSIH and CID are judged where the sessions are known."""

    def refuse(login: TargetLogin) -> int:
        raise status_error(LoginStatus.SESSION_DOES_NOT_EXIST, f"no session {login.requested_tsih}")

    right = target(assign_tsih=refuse)
    with pytest.raises(LoginError, match=r"does not exist \(login status 020a\)"):
        join(initiator(tsih=5), right)
    assert not right.done
    assert str(right.failure) == "no session 5"


def test_a_redirection() -> None:
    """Checklist 38."""

    def moved(name: str) -> TargetAccess | None:
        raise LoginRedirected(name, portal="192.0.2.7:3260", permanent=False, status_detail=1)

    right = TargetLogin(
        offer=Offer(), lookup=moved, portal_group_tag=1, random_bytes=counting_bytes()
    )
    with pytest.raises(LoginRedirected) as caught:
        join(initiator(), right)
    assert (caught.value.portal, caught.value.permanent) == ("192.0.2.7:3260", False)


def test_a_target_that_is_busy() -> None:
    def busy(login: TargetLogin) -> int:
        raise status_error(LoginStatus.OUT_OF_RESOURCES, "too many sessions")

    with pytest.raises(TargetUnavailable) as caught:
        join(initiator(), target(assign_tsih=busy))
    assert caught.value.retry_may_help


# -- long texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("segment_bytes", [1, 7, 64, 200])
@pytest.mark.checklist(27, "6.1")
@pytest.mark.checklist(28, "6.2")
def test_text_in_pieces(segment_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checklist 27 and 28: the C bit in both directions, empty answers in between."""
    monkeypatch.setattr("orion_iscsifs.protocol.login_text.LOGIN_SEGMENT_BYTES_MAX", segment_bytes)
    monkeypatch.setattr("orion_iscsifs.protocol.login_text.EXCHANGES_MAX", 5000)
    left = initiator(credentials=INCOMING, target_credentials=OUTGOING, algorithms=(8,))
    right = target(access=TargetAccess(incoming=INCOMING, outgoing=OUTGOING))
    trace = join(left, right)
    assert left.done
    assert right.parameters.max_burst_length == left.parameters.max_burst_length
    exchanges = list(zip(trace.requests, trace.responses, strict=True))
    assert any(pdu.continued for pdu in trace.requests)
    assert any(pdu.continued for pdu in trace.responses)
    pdus: list[LoginRequest | LoginResponse] = [*trace.requests, *trace.responses]
    for pdu in pdus:
        assert not (pdu.continued and pdu.transit)
        assert len(pdu.data) <= segment_bytes
    for sent, received in exchanges:
        if sent.continued:
            assert received.data == b""
    for (_, received), (sent, _) in itertools.pairwise(exchanges):
        if received.continued:
            assert sent.data == b""


def test_exchanges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """§6.2: a login that does not end is ended."""
    monkeypatch.setattr("orion_iscsifs.protocol.login_text.LOGIN_SEGMENT_BYTES_MAX", 1)
    right = target()
    with pytest.raises((LoginError, ProtocolViolation)):
        join(initiator(), right)
    assert "no end after 128 exchanges" in str(right.failure)
