"""Negotiation: both sides joined, and hostile proposals (RFC 7143 §§6.2, 13)."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import LoginError, ProtocolViolation
from orion_iscsifs.protocol.keys import KEYS, Key, Offer, Parameters, Role
from tests.protocol.test_negotiation import EVERYTHING, give, negotiator


def joined(left_offer: Offer, right_offer: Offer) -> tuple[Parameters, Parameters]:
    left, right = negotiator(Role.INITIATOR, left_offer), negotiator(Role.TARGET, right_offer)
    assert give(left, *give(right, *left.propose())) == []
    give(right, *give(left, *right.propose_needed()))
    assert right.unanswered == ()
    return left.conclude(), right.conclude()


def test_what_a_leading_connection_proposes() -> None:
    """Checklist 33: no obsolete key; 34: RFC3720 and ResponseFence, level 2."""
    assert dict(negotiator().propose()) == {
        "HeaderDigest": "CRC32C,None",
        "DataDigest": "None,CRC32C",
        "MaxRecvDataSegmentLength": "65536",
        "MaxConnections": "4",
        "InitialR2T": "No",
        "ImmediateData": "Yes",
        "MaxBurstLength": "1048576",
        "FirstBurstLength": "262144",
        "DefaultTime2Wait": "5",
        "DefaultTime2Retain": "60",
        "MaxOutstandingR2T": "8",
        "DataPDUInOrder": "No",
        "DataSequenceInOrder": "No",
        "ErrorRecoveryLevel": "2",
        "TaskReporting": "ResponseFence,RFC3720",
        "iSCSIProtocolLevel": "2",
    }


def test_nothing_is_proposed_twice() -> None:
    side = negotiator()
    assert side.propose()
    assert side.propose() == []


def test_outcome() -> None:
    left, right = joined(
        EVERYTHING,
        Offer(
            header_digest=("None", "CRC32C"),
            max_connections=2,
            initial_r2t=False,
            max_recv_data_segment_length=131072,
            max_burst_length=1 << 17,
            first_burst_length=1 << 16,
            default_time2wait=3,
            default_time2retain=90,
            max_outstanding_r2t=3,
        ),
    )
    assert left == Parameters(
        header_digest=True,  # The proposer's order decides (§6.2.1).
        data_digest=False,
        max_connections=2,
        initial_r2t=False,
        immediate_data=True,
        max_recv_data_segment_length=65536,
        max_send_data_segment_length=131072,
        max_burst_length=1 << 17,
        first_burst_length=1 << 16,
        default_time2wait=5,
        default_time2retain=60,
        max_outstanding_r2t=3,
        data_pdu_in_order=True,
        data_sequence_in_order=True,
        error_recovery_level=0,
    )
    assert right.max_recv_data_segment_length == 131072
    assert right.max_send_data_segment_length == 65536


@pytest.mark.parametrize(
    ("left", "right"), list(itertools.product(itertools.product([False, True], repeat=2), repeat=2))
)
def test_initial_r2t_and_immediate_data(left: tuple[bool, bool], right: tuple[bool, bool]) -> None:
    """Checklist 12: OR and AND, all combinations, both sides agree."""
    ours, theirs = joined(
        Offer(initial_r2t=left[0], immediate_data=left[1]),
        Offer(initial_r2t=right[0], immediate_data=right[1]),
    )
    assert ours.initial_r2t == theirs.initial_r2t == (left[0] or right[0])
    assert ours.immediate_data == theirs.immediate_data == (left[1] and right[1])


LENGTH = st.sampled_from([512, 513, 8192, 65536, 262144, (1 << 24) - 1])
OFFERS = st.builds(
    lambda lengths, **rest: Offer(
        max_burst_length=max(lengths), first_burst_length=min(lengths), **rest
    ),
    st.tuples(LENGTH, LENGTH),
    header_digest=st.sampled_from([("None",), ("CRC32C", "None"), ("None", "CRC32C")]),
    data_digest=st.sampled_from([("None",), ("CRC32C", "None"), ("None", "CRC32C")]),
    max_connections=st.integers(1, 8),
    initial_r2t=st.booleans(),
    immediate_data=st.booleans(),
    max_recv_data_segment_length=LENGTH,
    default_time2wait=st.integers(0, 3600),
    default_time2retain=st.integers(0, 3600),
    max_outstanding_r2t=st.integers(1, 65535),
    data_pdu_in_order=st.booleans(),
    data_sequence_in_order=st.booleans(),
    error_recovery_level=st.integers(0, 2),
    task_reporting=st.sampled_from(
        [
            (),
            ("RFC3720",),
            ("RFC3720", "ResponseFence"),
            ("FastAbort", "ResponseFence", "RFC3720"),
        ]
    ),
    iscsi_protocol_level=st.one_of(st.none(), st.integers(0, 31)),
)


@given(left_offer=OFFERS, right_offer=OFFERS)
def test_both_sides_come_to_the_same_outcome(left_offer: Offer, right_offer: Offer) -> None:
    """Checklist 12, 13, 14, 19."""
    left, right = joined(left_offer, right_offer)
    assert left.max_send_data_segment_length == right.max_recv_data_segment_length
    assert right.max_send_data_segment_length == left.max_recv_data_segment_length
    session_wide = set(Parameters.__dataclass_fields__) - {
        "max_send_data_segment_length",
        "max_recv_data_segment_length",
    }
    assert {name: getattr(left, name) for name in session_wide} == {
        name: getattr(right, name) for name in session_wide
    }
    assert left.first_burst_length <= left.max_burst_length
    assert left.max_burst_length <= min(left_offer.max_burst_length, right_offer.max_burst_length)
    if left.error_recovery_level and left.data_sequence_in_order:
        assert left.max_outstanding_r2t == 1
    # A side never comes to more than it has offered; what it has not said is left to its role.
    for offer, usual in ((left_offer, ("ResponseFence", "RFC3720")), (right_offer, ("RFC3720",))):
        assert left.task_reporting in (offer.task_reporting or usual)
    levels = [left_offer.iscsi_protocol_level, right_offer.iscsi_protocol_level]
    assert left.iscsi_protocol_level <= (2 if levels[0] is None else levels[0])
    assert left.iscsi_protocol_level <= (1 if levels[1] is None else levels[1])


NEGOTIATED = [
    KEYS[name] for name in (*EVERYTHING.values(), "TaskReporting", "iSCSIProtocolLevel", "OFMarker")
]
PROPOSALS = st.lists(
    st.tuples(
        st.sampled_from(NEGOTIATED),
        st.one_of(
            st.sampled_from(["Yes", "No", "None", "CRC32C", "Reject", "Irrelevant", "0", "1"]),
            st.integers(0, 1 << 25).map(str),
            st.text(max_size=20),
        ),
    ),
    max_size=12,
    unique_by=lambda pair: pair[0].name,
)


@given(proposals=PROPOSALS, role=st.sampled_from(list(Role)), proposing=st.booleans())
def test_hostile_proposals(proposals: list[tuple[Key, str]], role: Role, proposing: bool) -> None:
    """Arbitrary values end in an outcome within the ranges, or in this project's errors."""
    side = negotiator(role)
    if proposing:
        side.propose()
    try:
        side.receive(proposals)
        outcome = side.conclude()
    except (ProtocolViolation, LoginError):
        return
    assert 512 <= outcome.first_burst_length <= outcome.max_burst_length <= 1 << 20
    assert 1 <= outcome.max_connections <= 4
    assert 512 <= outcome.max_send_data_segment_length < 1 << 24
