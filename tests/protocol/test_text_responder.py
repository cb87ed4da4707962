"""The target's side of text exchanges (RFC 7143 §§6.4, 11.11, Appendix C)."""

from dataclasses import replace

import pytest

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.pdu import NO_TAG, TextRequest
from orion_iscsifs.protocol.text import Pair
from orion_iscsifs.protocol.text_negotiation import TextResponder
from tests.protocol.test_text_negotiation import (
    ALL,
    BASE,
    ITT,
    TARGETS,
    pairs,
    request,
    responder,
)


@pytest.mark.parametrize(("wanted", "answer"), [("", TARGETS[:3]), ("iqn.none", [])])
def test_what_the_directory_says_is_what_is_sent(wanted: str, answer: list[Pair]) -> None:
    assert pairs(responder().receive(request([("SendTargets", wanted)]))) == answer


def test_a_question_that_the_session_does_not_answer() -> None:
    """Appendix C: All MUST NOT be supported on an operational session."""
    right = TextResponder(lambda _: None, BASE)
    assert pairs(right.receive(request(ALL))) == [("SendTargets", "Reject")]


@pytest.mark.checklist(56, "11.11.1")
def test_final_only_answers_final() -> None:
    right = responder()
    first = right.receive(request([("InitiatorAlias", "new")], final=False))
    assert (first.final, first.continued) == (False, False)
    assert right.parameters == BASE
    last = right.receive(request(ttt=first.target_transfer_tag))
    assert (last.final, last.target_transfer_tag, last.data) == (True, NO_TAG, b"")
    assert right.parameters.initiator_alias == "new"


def test_a_stale_bookmark() -> None:
    right = responder()
    first = right.receive(request(final=False))
    right.receive(request(ttt=first.target_transfer_tag))
    with pytest.raises(ProtocolViolation, match="unknown Target Transfer Tag"):
        right.receive(request(ttt=first.target_transfer_tag))


@pytest.mark.parametrize(
    "bad",
    [
        request([("InitiatorAlias", "b")], ttt=1),
        request([("TargetAlias", "b")], ttt=1),
        request([("SessionType", "Normal")], ttt=1),
        request([("MaxRecvDataSegmentLength", "none")], ttt=1),
        request(ttt=1, itt=ITT + 1),
        request(ttt=1, immediate=True),
        request(ttt=1, continued=True),
        request([("TargetAlias", "Reject")], ttt=1),
        request([("TargetAlias", "NotUnderstood")], ttt=1),
    ],
    ids=["again", "sender", "login", "range", "tag", "I bit", "C and F", "reject", "ignorance"],
)
@pytest.mark.checklist(30, "6.4")
def test_a_violation_resets_the_negotiation(bad: TextRequest) -> None:
    """The caller answers with a Reject PDU; nothing of the negotiation takes effect (§6.4)."""
    right = responder()
    right.propose([("TargetAlias", "new")])
    first = right.receive(request([("InitiatorAlias", "a")], final=False))
    bad = replace(bad, target_transfer_tag=first.target_transfer_tag)
    with pytest.raises(ProtocolViolation) as caught:
        right.receive(bad)
    assert caught.value.pdu == "Text Request"
    with pytest.raises(ProtocolViolation, match="unknown Target Transfer Tag"):
        right.receive(request(ttt=first.target_transfer_tag))
    assert right.parameters == BASE
    # What the target wanted to say is not lost.
    assert pairs(right.receive(request())) == [("TargetAlias", "new")]


def test_a_request_without_a_task_tag() -> None:
    with pytest.raises(ProtocolViolation):
        responder().receive(request(itt=NO_TAG))


def test_an_initiator_that_talks_while_the_answer_is_incomplete() -> None:
    right = responder(replace(BASE, max_send_data_segment_length=30))
    first = right.receive(request(ALL))
    assert first.continued
    with pytest.raises(ProtocolViolation, match="our text is not complete"):
        right.receive(request(ALL, ttt=first.target_transfer_tag))


def test_an_initiator_that_never_ends() -> None:
    right = responder()
    ttt = right.receive(request(final=False)).target_transfer_tag
    for _ in range(127):
        right.receive(request(ttt=ttt, final=False))
    with pytest.raises(ProtocolViolation, match="no end after 128 exchanges"):
        right.receive(request(ttt=ttt, final=False))
