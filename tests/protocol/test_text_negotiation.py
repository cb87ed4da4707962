"""Text exchanges in the full feature phase (RFC 7143 §§6.4, 11.10, 11.11, Appendix C)."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from orion_iscsifs.errors import NegotiationFailed, ProtocolViolation
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import NO_TAG, TextRequest, TextResponse
from orion_iscsifs.protocol.text import Pair, TextReader, encode_text
from orion_iscsifs.protocol.text_negotiation import TextExchange, TextResponder

ITT, TTT, LUN = 0x77, 0x1234, 5 << 48
BASE = Parameters(
    max_recv_data_segment_length=65536,
    max_send_data_segment_length=65536,
    target_alias="old",
    initiator_alias="me",
)
TARGETS: list[Pair] = [
    ("TargetName", "iqn.2026-11.example:a"),
    ("TargetAddress", "10.0.0.1:3260,1"),
    ("TargetAddress", "[fe80::1]:3260,2"),
    ("TargetName", "iqn.2026-11.example:b"),
    ("TargetAddress", "10.0.0.1:3260,1"),
]
ALL: list[Pair] = [("SendTargets", "All")]


def exchange(
    base: Parameters = BASE, *, immediate: bool = False, text_bytes_max: int = 65536
) -> TextExchange:
    return TextExchange(
        initiator_task_tag=ITT, parameters=base, immediate=immediate, text_bytes_max=text_bytes_max
    )


def directory(wanted: str) -> Sequence[Pair] | None:
    if wanted == "All":
        return TARGETS
    return TARGETS[:3] if wanted in ("", TARGETS[0][1]) else []


def responder(base: Parameters = BASE) -> TextResponder:
    return TextResponder(directory, base)


def response(
    text: Sequence[Pair] = (),
    *,
    final: bool = False,
    continued: bool = False,
    ttt: int | None = None,
    itt: int = ITT,
    data: bytes | None = None,
) -> TextResponse:
    """A Text Response by hand."""
    return TextResponse(
        initiator_task_tag=itt,
        final=final,
        continued=continued,
        lun=LUN,
        target_transfer_tag=(NO_TAG if final else TTT) if ttt is None else ttt,
        data=encode_text(text) if data is None else data,
    )


def request(
    text: Sequence[Pair] = (),
    *,
    ttt: int = NO_TAG,
    final: bool = True,
    continued: bool = False,
    itt: int = ITT,
    immediate: bool = False,
) -> TextRequest:
    """A Text Request by hand."""
    return TextRequest(
        initiator_task_tag=itt,
        final=final,
        continued=continued,
        target_transfer_tag=ttt,
        immediate=immediate,
        data=encode_text(text),
    )


def pairs(pdu: TextRequest | TextResponse) -> list[Pair]:
    reader = TextReader(pdu.name)
    reader.feed(pdu.data)
    return reader.finish()


def join(
    left: TextExchange, right: TextResponder, text: Sequence[Pair]
) -> tuple[list[TextRequest], list[TextResponse]]:
    """Runs an exchange to its end; headers cross as bytes."""
    requests, responses = [], []
    asked: TextRequest | None = left.start(text)
    while asked is not None:
        arrived = TextRequest.unpack(asked.pack(0, len(asked.data)))
        arrived.data = asked.data
        requests.append(arrived)
        answer = right.receive(arrived)
        answered = TextResponse.unpack(answer.pack(0, len(answer.data)))
        answered.data = answer.data
        responses.append(answered)
        asked = left.receive(answered)
    return requests, responses


# -- both sides ----------------------------------------------------------------------------------


def test_send_targets_in_one_pdu() -> None:
    left = exchange()
    requests, responses = join(left, responder(), ALL)
    assert left.pairs == TARGETS
    assert left.done
    assert left.failure is None
    assert [(pdu.final, pdu.target_transfer_tag) for pdu in requests] == [(True, NO_TAG)]
    assert [(pdu.final, pdu.target_transfer_tag) for pdu in responses] == [(True, NO_TAG)]


@pytest.mark.checklist(28, "6.2")
@pytest.mark.checklist(56, "11.11.4")
@pytest.mark.parametrize("segment_bytes", range(1, 60))
def test_both_directions_in_pieces_of_every_size(segment_bytes: int) -> None:
    """The C bit both ways, TTT and LUN copied, one ITT and I bit, pieces are answered empty."""
    base = replace(BASE, max_send_data_segment_length=segment_bytes)
    left, right = exchange(base, immediate=True), responder(base)
    requests, responses = join(left, right, ALL)
    assert left.pairs == TARGETS
    assert {pdu.initiator_task_tag for pdu in requests} == {ITT}
    assert {pdu.immediate for pdu in requests} == {True}
    assert all(len(pdu.data) <= segment_bytes for pdu in requests)
    assert all(len(pdu.data) <= segment_bytes for pdu in responses)
    for asked, answered, following in zip(requests, responses, requests[1:], strict=False):
        assert not (asked.continued and asked.final)
        assert not answered.final
        assert following.target_transfer_tag == answered.target_transfer_tag != NO_TAG
        assert following.lun == answered.lun
        if asked.continued:
            assert answered.data == b""
        if answered.continued:
            assert following.data == b""
    assert responses[-1].final
    assert not responses[-1].continued


@pytest.mark.checklist(14, "13.12")
def test_a_negotiation_takes_effect_at_both_sides_when_it_is_over() -> None:
    left, right = exchange(), responder()
    right.propose([("MaxRecvDataSegmentLength", "4096"), ("TargetAlias", "new")])
    asked = left.start([("MaxRecvDataSegmentLength", "131072"), ("InitiatorAlias", "myself")])
    answer = right.receive(asked)
    assert left.parameters == BASE
    assert right.parameters == Parameters(
        max_recv_data_segment_length=4096,
        max_send_data_segment_length=131072,
        target_alias="new",
        initiator_alias="myself",
    )
    assert left.receive(answer) is None
    assert left.parameters == Parameters(
        max_recv_data_segment_length=131072,
        max_send_data_segment_length=4096,
        target_alias="new",
        initiator_alias="myself",
    )


@pytest.mark.checklist(50, "11.9.1")
def test_an_empty_request_lets_the_target_speak() -> None:
    """Async event 4: the target wants to negotiate; our part may be empty."""
    left, right = exchange(), responder()
    right.propose([("TargetAddress", "10.0.0.9,1"), ("TargetAddress", "10.0.0.8,1")])
    requests, _ = join(left, right, [])
    assert requests[0].data == b""
    assert left.pairs == [("TargetAddress", "10.0.0.9,1"), ("TargetAddress", "10.0.0.8,1")]
    assert left.failure is None
    # It is said once.
    join(left, right, [])
    assert left.pairs == []


def test_what_the_target_wants_to_say_waits_for_send_targets() -> None:
    """Appendix C: no other key in an answer to SendTargets."""
    left, right = exchange(), responder()
    right.propose([("TargetAlias", "new")])
    join(left, right, ALL)
    assert left.pairs == TARGETS
    join(left, right, [])
    assert left.parameters.target_alias == "new"


def test_one_exchange_object_can_be_used_again() -> None:
    left, right = exchange(), responder()
    for _ in range(3):
        join(left, right, [("SendTargets", TARGETS[0][1])])
        assert left.pairs == TARGETS[:3]


@pytest.mark.checklist(29, "6.2")
def test_a_target_answers_unknown_and_vendor_keys() -> None:
    answer = responder().receive(request([("X-org.example.key", "1"), ("Newer", "a,b")]))
    assert pairs(answer) == [("X-org.example.key", "NotUnderstood"), ("Newer", "NotUnderstood")]


def test_answers_come_in_the_order_of_the_questions() -> None:
    text = [("X-a", "1"), ("SendTargets", ""), ("MaxBurstLength", "512")]
    answer = pairs(responder().receive(request(text)))
    assert answer == [("X-a", "NotUnderstood"), *TARGETS[:3], ("MaxBurstLength", "Reject")]


@pytest.mark.checklist(33, "13.25")
@pytest.mark.parametrize("key", ["OFMarker", "IFMarkInt", "MaxBurstLength", "HeaderDigest"])
def test_keys_of_the_login_phase_are_rejected(key: str) -> None:
    """§13: a key of use LO or IO can't be changed any more; obsolete keys were never ours."""
    right = responder()
    assert pairs(right.receive(request([(key, "1")]))) == [(key, "Reject")]
    assert right.parameters == BASE
    left = exchange()
    left.start([])
    following = left.receive(response([(key, "1")]))
    assert following is not None
    assert pairs(following) == [(key, "Reject")]


# -- the initiator's side ------------------------------------------------------------------------


@pytest.mark.checklist(29, "6.2")
def test_an_unknown_key_of_the_target_is_not_understood() -> None:
    left = exchange()
    left.start([])
    following = left.receive(response([("X-org.example.key", "1")]))
    assert following is not None
    assert pairs(following) == [("X-org.example.key", "NotUnderstood")]
    assert (following.target_transfer_tag, following.lun, following.final) == (TTT, LUN, True)
    assert left.receive(response(final=True)) is None
    assert left.failure is None


def test_an_unknown_key_in_the_last_response_is_let_pass() -> None:
    left = exchange()
    left.start([])
    assert left.receive(response([("X-org.example.key", "1")], final=True)) is None
    assert left.failure is None


def test_a_proposal_in_the_last_response_fails_the_negotiation() -> None:
    left = exchange()
    left.start([])
    text = [("TargetAlias", "new"), ("MaxBurstLength", "512")]
    assert left.receive(response(text, final=True)) is None
    assert "MaxBurstLength needs an answer" in str(left.failure)
    assert left.parameters == BASE


@pytest.mark.checklist(31, "6.2")
def test_many_partial_responses() -> None:
    """Every response without F is answered, even when there is nothing to say."""
    left = exchange()
    left.start([])
    for number in range(20):
        following = left.receive(response([("TargetAddress", f"10.0.0.{number},1")]))
        assert following is not None
        assert (following.data, following.final) == (b"", True)
    assert left.receive(response(final=True)) is None
    assert len(left.pairs) == 20


def test_a_target_that_cuts_without_the_c_bit() -> None:
    left = exchange()
    left.start(ALL)
    text = encode_text(TARGETS)
    assert left.receive(response(data=text[:30])) is not None
    assert left.receive(response(data=text[30:70])) is not None
    assert left.receive(response(data=text[70:], final=True)) is None
    assert left.pairs == TARGETS


@pytest.mark.checklist(56, "11.11.1")
@pytest.mark.parametrize(
    ("bad", "section"),
    [
        (response(final=True, itt=ITT + 1), "11.11.3"),
        (response(final=True, continued=True), "11.11.2"),
        (response(ttt=NO_TAG), "11.11.4"),
        (response(data=b"TargetAlias=a", final=True), "6.1"),
        (response(data=b"\xff=1\0", final=True), "6.1"),
    ],
    ids=["tag", "C and F", "no TTT", "cut", "no text"],
)
def test_broken_sequences_are_violations(bad: TextResponse, section: str) -> None:
    left = exchange()
    left.start([])
    with pytest.raises(ProtocolViolation) as caught:
        left.receive(bad)
    assert (caught.value.pdu, caught.value.section) == ("Text Response", section)


@pytest.mark.checklist(28, "6.2")
@pytest.mark.parametrize(
    "bad",
    [response(TARGETS), response(continued=True), response(final=True)],
    ids=["text", "continued", "final"],
)
def test_an_interruption_of_our_text(bad: TextResponse) -> None:
    left = exchange(replace(BASE, max_send_data_segment_length=5))
    asked = left.start(ALL)
    assert (asked.continued, asked.final) == (True, False)
    with pytest.raises(ProtocolViolation):
        left.receive(bad)


def test_a_tag_in_the_last_response_is_ignored() -> None:
    """§11.10.4: the initiator MUST ignore it."""
    left = exchange()
    left.start([])
    assert left.receive(response(final=True, ttt=TTT)) is None
    assert left.failure is None


FAILURES = [
    ([("TargetAlias", "a"), ("TargetAlias", "b")], "sent twice"),
    ([("InitiatorAlias", "a")], "not for the target to send"),
    ([("SendTargets", "All")], "not for the target to send"),
    ([("TargetPortalGroupTag", "1")], "during login only"),
    ([("MaxRecvDataSegmentLength", "511")], "out of range"),
    ([("MaxRecvDataSegmentLength", "Reject")], "answers nothing"),
    ([("InitiatorAlias", "NotUnderstood")], "refuses what was declared"),
    ([("InitiatorAlias", "Reject")], "refuses what was declared"),
    ([("X-a", "Irrelevant")], "answers nothing"),
]


@pytest.mark.checklist(30, "6.4")
@pytest.mark.parametrize(("text", "problem"), FAILURES)
def test_a_failed_negotiation_changes_nothing_and_is_reset(text: list[Pair], problem: str) -> None:
    """§7.12: nothing takes effect; §6.4: the initiator resets with TTT ffffffff."""
    left = exchange()
    left.start([("InitiatorAlias", "new")])
    following = left.receive(response([("TargetAddress", "10.0.0.1,1"), *text]))
    assert following is not None
    assert (following.target_transfer_tag, following.lun) == (NO_TAG, 0)
    assert (following.initiator_task_tag, following.data, following.final) == (ITT, b"", True)
    assert left.receive(response([("TargetAlias", "x")], final=True)) is None
    assert left.done
    assert isinstance(left.failure, ProtocolViolation)
    assert problem in str(left.failure)
    assert left.parameters == BASE


@pytest.mark.parametrize(("text", "problem"), FAILURES)
def test_a_failure_in_the_last_response_needs_no_reset(text: list[Pair], problem: str) -> None:
    left = exchange()
    left.start([("InitiatorAlias", "new")])
    assert left.receive(response(text, final=True)) is None
    assert problem in str(left.failure)
    assert left.parameters == BASE


def test_renegotiation_over_two_responses() -> None:
    left = exchange()
    left.start([])
    left.receive(response([("TargetAlias", "a")]))
    left.receive(response([("TargetAlias", "b")]))
    assert "TargetAlias sent twice" in str(left.failure)


def test_a_reset_that_the_target_does_not_accept() -> None:
    left = exchange()
    left.start([])
    left.receive(response([("InitiatorAlias", "a")]))
    with pytest.raises(ProtocolViolation, match="no end after a reset"):
        left.receive(response())


def test_a_reject_pdu_ends_the_exchange() -> None:
    left = exchange()
    left.start([("InitiatorAlias", "new")])
    left.rejected(0x04)
    assert left.done
    assert isinstance(left.failure, NegotiationFailed)
    assert left.parameters == BASE


def test_an_exchange_can_be_abandoned() -> None:
    left, right = exchange(), responder(replace(BASE, max_send_data_segment_length=30))
    answer = right.receive(left.start(ALL))
    assert answer.continued
    abandoned = left.receive(answer)
    assert abandoned is not None
    join(left, right, [("InitiatorAlias", "new")])
    assert left.pairs == []
    assert right.parameters.initiator_alias == "new"
    with pytest.raises(ProtocolViolation, match="unknown Target Transfer Tag"):
        right.receive(abandoned)


def test_text_and_exchanges_are_bounded() -> None:
    left = exchange(text_bytes_max=100)
    left.start(ALL)
    left.receive(response(TARGETS[:1]))
    with pytest.raises(ProtocolViolation, match="more than 100 bytes"):
        left.receive(response(TARGETS))
    left.start(ALL)
    for _ in range(128):
        left.receive(response())
    with pytest.raises(ProtocolViolation, match="no end after 128 exchanges"):
        left.receive(response())


def test_a_long_list_needs_a_larger_bound() -> None:
    many = [("TargetName", f"iqn.2026-11.example:{number}") for number in range(5000)]
    left = exchange(text_bytes_max=1 << 20)
    base = replace(BASE, max_send_data_segment_length=512)
    join(left, TextResponder(lambda _: many, base), ALL)
    assert left.pairs == many


def test_an_alias_can_not_move_the_cursor() -> None:
    left = exchange()
    left.start([])
    left.receive(response([("TargetAlias", "disk\x1b[2J")], final=True))
    assert left.parameters.target_alias == "disk[2J"
