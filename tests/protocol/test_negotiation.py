"""Operational negotiation, both directions of every kind of key (RFC 7143 §§6.2, 13)."""

import pytest

from orion_iscsifs.errors import LoginError, ProtocolViolation
from orion_iscsifs.protocol.keys import KEYS, Offer, Parameters, Role
from orion_iscsifs.protocol.negotiation import Negotiator
from orion_iscsifs.protocol.text import Pair

EVERYTHING = Offer(
    header_digest=("CRC32C", "None"),
    data_digest=("None", "CRC32C"),
    max_connections=4,
    initial_r2t=False,
    immediate_data=True,
    max_recv_data_segment_length=65536,
    max_burst_length=1 << 20,
    first_burst_length=1 << 18,
    default_time2wait=5,
    default_time2retain=60,
    max_outstanding_r2t=8,
    data_pdu_in_order=False,
    data_sequence_in_order=False,
    error_recovery_level=2,
)
YES_NO = ["Yes", "No"]


def negotiator(
    role: Role = Role.INITIATOR,
    offer: Offer = EVERYTHING,
    *,
    discovery: bool = False,
    leading: bool = True,
    base: Parameters | None = None,
) -> Negotiator:
    return Negotiator(role, offer, pdu="Login PDU", discovery=discovery, leading=leading, base=base)


def give(side: Negotiator, *pairs: Pair) -> list[Pair]:
    answers = side.receive([(KEYS[key], value) for key, value in pairs])
    return [(answer.key, answer.value) for answer in answers]


# -- answers to our proposals --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MaxConnections", "5"),
        ("MaxConnections", "0"),
        ("MaxConnections", "65536"),
        ("MaxConnections", "two"),
        ("MaxConnections", "1~4"),
        ("MaxBurstLength", "1048577"),
        ("MaxBurstLength", "511"),
        ("FirstBurstLength", "262145"),
        ("DefaultTime2Wait", "4"),
        ("DefaultTime2Wait", "3601"),
        ("DefaultTime2Retain", "61"),
        ("MaxOutstandingR2T", "9"),
        ("MaxOutstandingR2T", ""),
        ("ErrorRecoveryLevel", "3"),
        ("InitialR2T", "yes"),
        ("InitialR2T", "True"),
        ("HeaderDigest", "CRC16"),
        ("HeaderDigest", "CRC32C,None"),
        ("HeaderDigest", ""),
        ("DataDigest", "crc32c"),
    ],
)
@pytest.mark.checklist(30, "6.2")
def test_impossible_selections(key: str, value: str) -> None:
    """Checklist 30: a selection must be possible under the key's rule, or the login ends."""
    side = negotiator()
    side.propose()
    with pytest.raises(ProtocolViolation, match=rf"{key}=.* is no possible answer.*§13\."):
        give(side, (key, value))


@pytest.mark.parametrize(("key", "attribute"), [("InitialR2T", "initial_r2t")])
def test_or_accepts_both_answers_to_no(key: str, attribute: str) -> None:
    for value in YES_NO:
        side = negotiator()
        side.propose()
        give(side, (key, value))
        assert getattr(side.conclude(), attribute) is (value == "Yes")


def test_booleans_that_decide_by_themselves() -> None:
    """§6.2.2: an answer to ImmediateData=No or InitialR2T=Yes may be missing, never contrary."""
    side = negotiator(offer=Offer(immediate_data=False, initial_r2t=True))
    side.propose()
    assert not {"ImmediateData", "InitialR2T"} & set(side.unanswered)
    assert not side.conclude().immediate_data
    for key, value in (("ImmediateData", "Yes"), ("InitialR2T", "No")):
        side = negotiator(offer=Offer(immediate_data=False, initial_r2t=True))
        side.propose()
        with pytest.raises(ProtocolViolation):
            give(side, (key, value))


@pytest.mark.parametrize("constant", ["Reject", "Irrelevant"])
@pytest.mark.checklist(30, "6.2")
def test_reject_and_irrelevant_keep_the_default(constant: str) -> None:
    """Checklist 30."""
    side = negotiator()
    names = [key for key, _ in side.propose() if key != "MaxRecvDataSegmentLength"]
    give(side, *[(name, constant) for name in names])
    assert side.unanswered == ()
    expected = Parameters(max_recv_data_segment_length=65536)
    assert side.conclude() == expected


def test_no_answer_keeps_the_default() -> None:
    side = negotiator()
    side.propose()
    assert "MaxBurstLength" in side.unanswered
    assert side.conclude() == Parameters(max_recv_data_segment_length=65536)


@pytest.mark.parametrize("key", ["MaxBurstLength", "HeaderDigest", "MaxRecvDataSegmentLength"])
@pytest.mark.checklist(29, "6.2")
def test_not_understood_for_a_key_of_the_rfc(key: str) -> None:
    """Checklist 29."""
    side = negotiator()
    side.propose()
    with pytest.raises(ProtocolViolation, match=f"{key}=NotUnderstood"):
        give(side, (key, "NotUnderstood"))


def test_a_declaration_takes_a_constant_as_no_declaration() -> None:
    side = negotiator()
    side.propose()
    give(side, ("MaxRecvDataSegmentLength", "Irrelevant"))
    assert side.conclude().max_send_data_segment_length == 8192


@pytest.mark.parametrize("value", ["511", "16777216", "0", "x", "-1", "", "512~1024"])
@pytest.mark.checklist(14, "13.12")
def test_a_declaration_out_of_range(value: str) -> None:
    """Checklist 14."""
    with pytest.raises(ProtocolViolation, match=r"MaxRecvDataSegmentLength=.*§13\.12"):
        give(negotiator(), ("MaxRecvDataSegmentLength", value))


@pytest.mark.parametrize("value", ["512", "0x200", "16777215"])
@pytest.mark.checklist(14, "13.12")
def test_a_declaration_within_range(value: str) -> None:
    side = negotiator()
    give(side, ("MaxRecvDataSegmentLength", value))
    assert side.conclude().max_send_data_segment_length == int(value, 0)


# -- answers to the peer's proposals -------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "proposed", "answer"),
    [
        ("MaxConnections", "9", "4"),
        ("MaxConnections", "2", "2"),
        ("MaxConnections", "0", "Reject"),
        ("MaxConnections", "1~4", "Reject"),
        ("MaxBurstLength", "0x10000", "65536"),
        ("DefaultTime2Wait", "0", "5"),
        ("DefaultTime2Wait", "9", "9"),
        ("DefaultTime2Wait", "9999", "Reject"),
        ("DefaultTime2Retain", "3600", "60"),
        ("ErrorRecoveryLevel", "1", "1"),
        ("InitialR2T", "No", "No"),
        ("InitialR2T", "Yes", "Yes"),
        ("InitialR2T", "Perhaps", "Reject"),
        ("ImmediateData", "No", "No"),
        ("ImmediateData", "Yes", "Yes"),
        ("HeaderDigest", "None,CRC32C", "None"),
        ("HeaderDigest", "Y-org.example.sum,CRC32C", "CRC32C"),
        ("HeaderDigest", "Y-org.example.sum", "Reject"),
        ("IFMarker", "No", "Reject"),
        ("OFMarker", "Yes", "Reject"),
        ("IFMarkInt", "2048~8192", "Reject"),
        ("OFMarkInt", "2048~8192", "Reject"),
        ("TaskReporting", "RFC3720,ResponseFence,FastAbort", "RFC3720"),
        ("TaskReporting", "FastAbort", "Reject"),
        ("iSCSIProtocolLevel", "0", "0"),
        ("iSCSIProtocolLevel", "32", "Reject"),
    ],
)
@pytest.mark.checklist(30, "6.2")
@pytest.mark.checklist(33, "13.25")
@pytest.mark.checklist(34, "13.24")
def test_answers(key: str, proposed: str, answer: str) -> None:
    """Checklist 30, 33 (obsolete keys: Reject, never NotUnderstood) and 34."""
    for role in Role:
        side = negotiator(role)
        assert give(side, (key, proposed)) == [(key, answer)]
        # What was settled is not open again.
        assert key not in dict(side.propose_needed())
        side.conclude()


LATER = [
    # role, what the offer says, the peer's proposal, our answer
    (Role.INITIATOR, Offer(), "FastAbort,ResponseFence,RFC3720", "ResponseFence"),
    (Role.INITIATOR, Offer(), "RFC3720,ResponseFence", "RFC3720"),
    (Role.TARGET, Offer(), "FastAbort,ResponseFence,RFC3720", "RFC3720"),
    (
        Role.TARGET,
        Offer(task_reporting=("ResponseFence", "RFC3720")),
        "FastAbort,ResponseFence,RFC3720",
        "ResponseFence",
    ),
    (
        Role.TARGET,
        Offer(task_reporting=("FastAbort", "ResponseFence", "RFC3720")),
        "ResponseFence,FastAbort,RFC3720",
        "ResponseFence",
    ),
]


@pytest.mark.checklist(34, "13.23")
@pytest.mark.parametrize(("role", "offer", "proposed", "answer"), LATER)
def test_task_reporting_is_chosen_in_the_order_of_the_proposer(
    role: Role, offer: Offer, proposed: str, answer: str
) -> None:
    side = negotiator(role, offer)
    assert give(side, ("TaskReporting", proposed)) == [("TaskReporting", answer)]
    assert side.conclude().task_reporting == answer


@pytest.mark.checklist(34, "13.24")
@pytest.mark.parametrize(
    ("role", "own", "proposed", "level"),
    [
        (Role.INITIATOR, None, 1, 1),
        (Role.INITIATOR, None, 2, 2),
        (Role.INITIATOR, 1, 2, 1),
        (Role.TARGET, None, 2, 1),
        (Role.TARGET, 2, 2, 2),
        (Role.TARGET, 2, 31, 2),
    ],
)
def test_the_protocol_level_is_the_lower_one(
    role: Role, own: int | None, proposed: int, level: int
) -> None:
    side = negotiator(role, Offer(iscsi_protocol_level=own))
    key = "iSCSIProtocolLevel"
    assert give(side, (key, str(proposed))) == [(key, str(level))]
    assert side.conclude().iscsi_protocol_level == level


@pytest.mark.checklist(29, "6.2")
@pytest.mark.checklist(34, "13.23")
@pytest.mark.parametrize("answer", ["NotUnderstood", "Reject", "Irrelevant", None])
def test_a_target_that_does_not_know_the_later_keys(answer: str | None) -> None:
    side = negotiator()
    assert {"TaskReporting", "iSCSIProtocolLevel"} <= dict(side.propose()).keys()
    if answer is not None:
        give(side, ("TaskReporting", answer), ("iSCSIProtocolLevel", answer))
    assert side.conclude().task_reporting == "RFC3720"
    assert side.conclude().iscsi_protocol_level == 1


@pytest.mark.checklist(34, "13.23")
def test_what_is_worth_no_proposal_is_not_proposed() -> None:
    """An originator has to offer ResponseFence too; level 1 is the default."""
    left = negotiator(offer=Offer(task_reporting=("RFC3720",), iscsi_protocol_level=1))
    assert not {"TaskReporting", "iSCSIProtocolLevel"} & dict(left.propose()).keys()
    # A target never needs more than the defaults.
    for offer in (Offer(), Offer(iscsi_protocol_level=2, task_reporting=("RFC3720",))):
        assert negotiator(Role.TARGET, offer).needs() == []


@pytest.mark.checklist(34, "13.23")
@pytest.mark.parametrize("answer", ["FastAbort", "ResponseFence,RFC3720", "Yes", ""])
def test_an_answer_that_was_not_offered(answer: str) -> None:
    side = negotiator()
    side.propose()
    with pytest.raises(ProtocolViolation, match=r"§13\.23"):
        give(side, ("TaskReporting", answer))


@pytest.mark.parametrize(
    ("key", "proposed", "required"),
    [
        ("ImmediateData", "No", False),
        ("ImmediateData", "Yes", True),
        ("InitialR2T", "Yes", False),
        ("InitialR2T", "No", True),
        ("MaxConnections", "1", True),
        ("HeaderDigest", "None", True),
        ("OFMarker", "No", False),
    ],
)
def test_which_answers_are_required(key: str, proposed: str, required: bool) -> None:
    """§6.2.2."""
    (answer,) = negotiator().receive([(KEYS[key], proposed)])
    assert answer.required is required


@pytest.mark.parametrize("constant", ["Reject", "Irrelevant", "NotUnderstood"])
@pytest.mark.checklist(30, "6.2")
def test_constants_are_no_proposals(constant: str) -> None:
    """§6.2: reserved for answers."""
    with pytest.raises(ProtocolViolation, match="nothing was proposed"):
        give(negotiator(), ("MaxBurstLength", constant))


@pytest.mark.checklist(13, "13.14")
def test_first_burst_is_answered_within_max_burst() -> None:
    """Checklist 13: whatever the order of the keys in one text."""
    side = negotiator(Role.TARGET)
    answers = give(side, ("FirstBurstLength", "262144"), ("MaxBurstLength", "65536"))
    assert dict(answers) == {"MaxBurstLength": "65536", "FirstBurstLength": "65536"}
    side = negotiator(Role.TARGET)
    # No word about MaxBurstLength: its default counts.
    assert give(side, ("FirstBurstLength", "16777215")) == [("FirstBurstLength", "262144")]


@pytest.mark.checklist(13, "13.14")
def test_a_target_refuses_bursts_that_contradict() -> None:
    """Checklist 13: MaxBurstLength comes after FirstBurstLength was agreed on."""
    side = negotiator(Role.TARGET)
    give(side, ("FirstBurstLength", "65536"))
    give(side, ("MaxBurstLength", "512"))
    with pytest.raises(ProtocolViolation, match=r"FirstBurstLength 65536 exceeds .* 512.*§13\.14"):
        side.conclude()


@pytest.mark.checklist(13, "13.14")
def test_a_default_first_burst_shrinks_with_max_burst() -> None:
    """Checklist 13."""
    side = negotiator(Role.TARGET)
    give(side, ("MaxBurstLength", "512"))
    assert side.conclude().first_burst_length == 512


@pytest.mark.checklist(13, "13.14")
def test_an_initiator_sends_less_when_bursts_contradict() -> None:
    """Checklist 13."""
    side = negotiator()
    side.propose()
    give(side, ("MaxBurstLength", "1024"), ("FirstBurstLength", "65536"))
    assert side.conclude().first_burst_length == 1024


@pytest.mark.checklist(19, "13.19")
def test_recovery_allows_one_r2t() -> None:
    """Checklist 19."""
    side = negotiator(Role.TARGET, Offer(error_recovery_level=1, max_outstanding_r2t=8))
    give(side, ("ErrorRecoveryLevel", "1"), ("MaxOutstandingR2T", "8"))
    assert side.conclude().max_outstanding_r2t == 1


# -- what a responder needs ----------------------------------------------------------------------


def test_a_responder_proposes_what_it_can_not_leave() -> None:
    offer = Offer(
        header_digest=("CRC32C",),
        immediate_data=False,
        initial_r2t=False,
        max_recv_data_segment_length=4096,
        max_burst_length=65536,
        default_time2wait=9,
    )
    side = negotiator(Role.TARGET, offer)
    give(side, ("MaxBurstLength", "1048576"))
    assert dict(side.propose_needed()) == {
        "HeaderDigest": "CRC32C",
        "MaxRecvDataSegmentLength": "4096",
        "ImmediateData": "No",
        "DefaultTime2Wait": "9",
    }
    # A No decides without an answer; the others wait for one.
    assert side.unanswered == ("HeaderDigest", "DefaultTime2Wait")
    assert side.propose_needed() == []


def test_a_responder_with_the_defaults_needs_nothing() -> None:
    assert negotiator(Role.TARGET, Offer()).needs() == []


@pytest.mark.parametrize("answer", ["Reject", "None", None])
def test_digests_that_are_required(answer: str | None) -> None:
    """A digest list without None: a peer that can't is refused."""
    side = negotiator(offer=Offer(data_digest=("CRC32C",)))
    side.propose()
    if answer == "None":
        with pytest.raises(ProtocolViolation):
            give(side, ("DataDigest", answer))
        return
    if answer:
        give(side, ("DataDigest", answer))
    with pytest.raises(LoginError, match="DataDigest CRC32C is required"):
        side.conclude()


def test_a_rejected_proposal_leaves_nothing_to_propose() -> None:
    side = negotiator(Role.TARGET, Offer(header_digest=("CRC32C",)))
    assert give(side, ("HeaderDigest", "None")) == [("HeaderDigest", "Reject")]
    assert side.needs() == []
    with pytest.raises(LoginError, match="HeaderDigest CRC32C is required"):
        side.conclude()


# -- discovery and further connections -----------------------------------------------------------


@pytest.mark.checklist(35, "13.21")
def test_discovery_proposes_only_what_matters_there() -> None:
    """Checklist 35."""
    side = negotiator(discovery=True)
    assert [key for key, _ in side.propose()] == [
        "HeaderDigest",
        "DataDigest",
        "MaxRecvDataSegmentLength",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "MaxConnections",
        "InitialR2T",
        "ImmediateData",
        "MaxBurstLength",
        "FirstBurstLength",
        "MaxOutstandingR2T",
        "DataPDUInOrder",
        "DataSequenceInOrder",
        "TaskReporting",
    ],
)
@pytest.mark.checklist(35, "13.21")
def test_keys_that_are_irrelevant_in_discovery(key: str) -> None:
    """Checklist 35; §13: "Irrelevant when: SessionType=Discovery"."""
    side = negotiator(Role.TARGET, discovery=True)
    assert give(side, (key, "1")) == [(key, "Irrelevant")]
    assert side.conclude().max_connections == 1


@pytest.mark.checklist(35, "7.4")
def test_discovery_has_no_recovery() -> None:
    """Checklist 35."""
    side = negotiator(Role.TARGET, discovery=True)
    assert give(side, ("ErrorRecoveryLevel", "2")) == [("ErrorRecoveryLevel", "0")]


def test_a_joining_connection_negotiates_its_own_keys_only() -> None:
    """§13: "use: LO" is for the leading connection; LIO does not even answer the others."""
    session = Parameters(max_burst_length=4096, first_burst_length=512, header_digest=True)
    side = negotiator(leading=False, base=session)
    assert [key for key, _ in side.propose()] == [
        "HeaderDigest",
        "DataDigest",
        "MaxRecvDataSegmentLength",
    ]
    assert give(side, ("MaxBurstLength", "1048576")) == [("MaxBurstLength", "Irrelevant")]
    outcome = side.conclude()
    assert (outcome.max_burst_length, outcome.first_burst_length) == (4096, 512)
    assert not outcome.header_digest  # Its own, and not negotiated here.
