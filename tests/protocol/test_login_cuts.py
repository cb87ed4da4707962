"""Whole logins with text cut anywhere, keys in any order, partial PDUs (RFC 7143 §§6.2, 6.3)."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_iscsifs.protocol import login_text
from orion_iscsifs.protocol.login import InitiatorLogin, Offer, TargetAccess, TargetLogin
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from orion_iscsifs.protocol.text import Pair, encode_text
from tests.protocol.logins import (
    INCOMING,
    ISID,
    ITT,
    NAMES,
    OUTGOING,
    initiator,
    join,
    pairs,
    response,
    target,
)

MUTUAL = TargetAccess(incoming=INCOMING, outgoing=OUTGOING, alias="Plattenstapel Köln")


@pytest.mark.checklist(27, "6.1")
@pytest.mark.checklist(28, "6.2")
@pytest.mark.parametrize("segment_bytes", range(1, 120))
def test_every_size_of_segment(segment_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome does not depend on where text is cut, not even within a character."""
    monkeypatch.setattr(login_text, "LOGIN_SEGMENT_BYTES_MAX", segment_bytes)
    monkeypatch.setattr(login_text, "EXCHANGES_MAX", 5000)
    offer = Offer(alias="Rechner Ü", max_burst_length=1 << 17, header_digest=("CRC32C", "None"))
    left = initiator(
        offer=offer, credentials=INCOMING, target_credentials=OUTGOING, algorithms=(8, 5)
    )
    right = target(offer=offer, access=MUTUAL)
    trace = join(left, right)
    assert left.parameters.header_digest
    assert left.parameters.target_alias == "Plattenstapel Köln"
    assert right.parameters.initiator_alias == "Rechner Ü"
    assert left.parameters.max_burst_length == right.parameters.max_burst_length == 1 << 17
    pdus: list[LoginRequest | LoginResponse] = [*trace.requests, *trace.responses]
    for pdu in pdus:
        assert len(pdu.data) <= segment_bytes
        assert not (pdu.continued and pdu.transit)


# -- a target that answers in its own way --------------------------------------------------------

ANSWERS: list[Pair] = [
    ("HeaderDigest", "None"),
    ("DataDigest", "None"),
    ("MaxConnections", "1"),
    ("InitialR2T", "Yes"),
    ("ImmediateData", "No"),
    ("MaxBurstLength", "65536"),
    ("FirstBurstLength", "4096"),
    ("DefaultTime2Wait", "3"),
    ("DefaultTime2Retain", "10"),
    ("MaxOutstandingR2T", "1"),
    ("DataPDUInOrder", "Yes"),
    ("DataSequenceInOrder", "Yes"),
    ("ErrorRecoveryLevel", "0"),
    ("TaskReporting", "NotUnderstood"),
    ("iSCSIProtocolLevel", "NotUnderstood"),
    ("MaxRecvDataSegmentLength", "16384"),
    ("TargetAlias", "disk"),
    ("X-org.example.key", "whatever"),
]


def operational() -> InitiatorLogin:
    login = initiator()
    login.start()
    login.receive(response([("TargetPortalGroupTag", "1"), ("AuthMethod", "None")], nsg=1))
    return login


@settings(deadline=None)
@given(
    order=st.permutations(ANSWERS),
    cuts=st.lists(st.integers(8, 60), min_size=1, max_size=8),
    batches=st.lists(st.integers(0, 6), min_size=6, max_size=12),
)
@pytest.mark.checklist(31, "6.3.3")
def test_answers_in_any_order_over_any_number_of_partial_responses(
    order: list[Pair], cuts: list[int], batches: list[int]
) -> None:
    """T=0 responses, empty ones too; each is a text of its own, cut anywhere with the C bit."""
    login = operational()
    left = list(order)
    for number, count in enumerate(batches):
        texts, left = left[:count], left[count:]
        segments = cut(encode_text(texts), itertools.cycle(cuts))
        for position, segment in enumerate(segments):
            last = position == len(segments) - 1
            request = login.receive(part(segment, continued=not last))
            assert request is not None
            assert request.transit is last, number
            if not last:
                assert request.data == b""
    login.receive(part(encode_text(left), continued=False))
    assert login.receive(response(csg=1, nsg=3, tsih=7)) is None
    assert (login.parameters.max_burst_length, login.parameters.first_burst_length) == (65536, 4096)
    assert login.parameters.max_send_data_segment_length == 16384
    assert not login.parameters.immediate_data
    assert login.parameters.task_reporting == "RFC3720"


def cut(text: bytes, sizes: "itertools.cycle[int]") -> list[bytes]:
    segments = []
    while text:
        size = next(sizes)
        segments.append(text[:size])
        text = text[size:]
    return segments or [b""]


def part(data: bytes, *, continued: bool) -> LoginResponse:
    return LoginResponse(
        isid=ISID, initiator_task_tag=ITT, csg=1, continued=continued, data=data, tsih=0
    )


# -- an initiator that asks in its own way -------------------------------------------------------

PROPOSALS: list[Pair] = [
    ("HeaderDigest", "CRC32C,None"),
    ("DataDigest", "None"),
    ("MaxConnections", "8"),
    ("InitialR2T", "No"),
    ("ImmediateData", "Yes"),
    ("FirstBurstLength", "262144"),
    ("MaxBurstLength", "65536"),
    ("DefaultTime2Wait", "3"),
    ("DefaultTime2Retain", "0"),
    ("MaxOutstandingR2T", "16"),
    ("ErrorRecoveryLevel", "2"),
    ("TaskReporting", "ResponseFence,RFC3720"),
    ("iSCSIProtocolLevel", "2"),
    ("MaxRecvDataSegmentLength", "0x4000"),
    ("OFMarker", "No"),
    ("X-org.example.key", "whatever"),
]


@settings(deadline=None)
@given(order=st.permutations(PROPOSALS), batches=st.lists(st.integers(0, 4), max_size=8))
@pytest.mark.checklist(31, "6.3.3")
def test_proposals_in_any_order_over_any_number_of_requests(
    order: list[Pair], batches: list[int]
) -> None:
    """The order within one text does not matter; MaxBurstLength may come after FirstBurstLength."""
    login = target(offer=Offer(header_digest=("None", "CRC32C"), initial_r2t=False))
    ask = asker(login)
    ask(NAMES, 1)
    left = [pair for pair in order if pair[0] not in ("FirstBurstLength", "MaxBurstLength")]
    answers: dict[str, str] = {}
    for count in batches:
        texts, left = left[:count], left[count:]
        answers |= ask(texts, None)
    bursts = [pair for pair in order if pair[0] in ("FirstBurstLength", "MaxBurstLength")]
    answers |= ask([*bursts, *left], 3)
    assert login.done
    assert (answers["FirstBurstLength"], answers["MaxBurstLength"]) == ("65536", "65536")
    assert (answers["OFMarker"], answers["X-org.example.key"]) == ("Reject", "NotUnderstood")
    assert (answers["TaskReporting"], answers["iSCSIProtocolLevel"]) == ("RFC3720", "1")
    assert login.parameters.header_digest
    assert not login.parameters.initial_r2t
    assert login.parameters.max_send_data_segment_length == 16384


def asker(login: TargetLogin) -> Callable[[Sequence[Pair], int | None], dict[str, str]]:
    """Sends a Login Request by hand; the answers. The first is of the security stage."""
    stages = itertools.chain([0], itertools.repeat(1))

    def ask(text: Sequence[Pair], nsg: int | None) -> dict[str, str]:
        request = LoginRequest(
            isid=ISID,
            initiator_task_tag=ITT,
            transit=nsg is not None,
            csg=next(stages),
            nsg=nsg or 0,
            data=encode_text(text),
        )
        answer = login.receive(request)
        assert answer.status_class == 0, login.failure
        assert answer.transit == request.transit
        return dict(pairs(answer))

    return ask


# -- vendor keys ---------------------------------------------------------------------------------


@pytest.mark.checklist(29, "6.2")
@pytest.mark.parametrize(
    "key", ["X-org.example.a", "X#old", "Y-org.example.b", "Y#c", "Z-d", "Z#e"]
)
def test_extension_keys_are_not_understood_and_tolerated(key: str) -> None:
    """§§12.1, 13.1, 13.22: support for private and public extensions is OPTIONAL."""
    login = operational()
    request = login.receive(response([(key, "1")], csg=1))
    assert request is not None
    assert pairs(request) == [(key, "NotUnderstood")]
    assert login.receive(response(csg=1, nsg=3, tsih=1)) is None
    ask = asker(target())
    assert ask([*NAMES, (key, "1")], 1)[key] == "NotUnderstood"


@pytest.mark.checklist(29, "6.2")
@pytest.mark.parametrize("key", ["X#NodeArchitecture"])
def test_the_node_architecture_is_discarded_in_silence(key: str) -> None:
    """§13.26.2: a node that does not send the key may discard it without an answer."""
    assert key not in asker(target())([*NAMES, (key, "ExampleOS/1,CPU/2")], 1)
    login = operational()
    request = login.receive(response([(key, "ExampleOS/1")], csg=1))
    assert request is not None
    assert request.data == b""
