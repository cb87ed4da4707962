"""The key table against RFC 7143 §§12-13, row by row, and the limits of an offer."""

import dataclasses

import pytest

from orion_iscsifs.errors import UsageError
from orion_iscsifs.protocol.keys import KEYS, Key, Kind, Offer, Parameters, Role, Stages, Use

BOTH = frozenset({Role.INITIATOR, Role.TARGET})
INITIATOR = frozenset({Role.INITIATOR})
TARGET = frozenset({Role.TARGET})
MAX24 = (1 << 24) - 1

# Name: kind, use, senders, session-wide, default, range, irrelevant in discovery (§13's headings).
NUMBERS = [
    ("MaxConnections", Kind.MINIMUM, 1, (1, 65535), True),
    ("MaxBurstLength", Kind.MINIMUM, 262144, (512, MAX24), True),
    ("FirstBurstLength", Kind.MINIMUM, 65536, (512, MAX24), True),
    ("DefaultTime2Wait", Kind.MAXIMUM, 2, (0, 3600), False),
    ("DefaultTime2Retain", Kind.MINIMUM, 20, (0, 3600), False),
    ("MaxOutstandingR2T", Kind.MINIMUM, 1, (1, 65535), True),
    ("ErrorRecoveryLevel", Kind.MINIMUM, 0, (0, 2), False),
    ("iSCSIProtocolLevel", Kind.MINIMUM, 1, (0, 31), True),
]
BOOLEANS = [
    ("InitialR2T", Kind.OR),
    ("ImmediateData", Kind.AND),
    ("DataPDUInOrder", Kind.OR),
    ("DataSequenceInOrder", Kind.OR),
]
DECLARED = [
    ("TargetName", Use.INITIALIZE_ONLY, INITIATOR),
    ("InitiatorName", Use.INITIALIZE_ONLY, INITIATOR),
    ("TargetAlias", Use.ALL, TARGET),
    ("InitiatorAlias", Use.ALL, INITIATOR),
    ("TargetAddress", Use.ALL, TARGET),
    ("TargetPortalGroupTag", Use.INITIALIZE_ONLY, TARGET),
    ("SessionType", Use.LEADING_ONLY, INITIATOR),
]


@pytest.mark.parametrize(("name", "kind", "default", "limits", "irrelevant"), NUMBERS)
def test_numbers(
    name: str, kind: Kind, default: int, limits: tuple[int, int], irrelevant: bool
) -> None:
    row = KEYS[name]
    assert (row.kind, row.default, (row.low, row.high)) == (kind, default, limits)
    assert row.irrelevant_in_discovery is irrelevant
    assert (row.use, row.senders, row.session_wide) == (Use.LEADING_ONLY, BOTH, True)
    assert row.stages is Stages.OPERATIONAL


@pytest.mark.parametrize(("name", "kind"), BOOLEANS)
def test_booleans(name: str, kind: Kind) -> None:
    row = KEYS[name]
    assert (row.kind, row.default, row.irrelevant_in_discovery) == (kind, True, True)
    assert (row.use, row.senders, row.session_wide) == (Use.LEADING_ONLY, BOTH, True)


@pytest.mark.parametrize("name", ["HeaderDigest", "DataDigest"])
def test_digests(name: str) -> None:
    row = KEYS[name]
    assert (row.kind, row.use, row.default) == (Kind.LIST, Use.INITIALIZE_ONLY, ("None",))
    assert (row.senders, row.session_wide) == (BOTH, False)
    assert not row.irrelevant_in_discovery


@pytest.mark.parametrize(("name", "use", "senders"), DECLARED)
def test_declarations(name: str, use: Use, senders: frozenset[Role]) -> None:
    row = KEYS[name]
    assert (row.kind, row.stages) == (Kind.DECLARATIVE, Stages.ANY)
    assert (row.use, row.senders) == (use, senders)
    assert row.repeatable is (name == "TargetAddress")


def test_max_recv_data_segment_length() -> None:
    """Checklist 14: declarative, each direction and each connection for itself."""
    row = KEYS["MaxRecvDataSegmentLength"]
    assert (row.kind, row.use, row.senders) == (Kind.DECLARATIVE, Use.ALL, BOTH)
    assert (row.default, row.low, row.high, row.session_wide) == (8192, 512, MAX24, False)


@pytest.mark.parametrize("name", ["AuthMethod", "CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R"])
def test_security_keys(name: str) -> None:
    assert KEYS[name].stages is Stages.SECURITY
    assert not KEYS[name].session_wide


@pytest.mark.parametrize("name", ["IFMarker", "OFMarker", "IFMarkInt", "OFMarkInt"])
def test_obsolete_keys_are_known(name: str) -> None:
    """Checklist 33."""
    assert KEYS[name].kind is Kind.OBSOLETE


def test_only_later_keys_may_be_not_understood() -> None:
    """Checklist 29: TaskReporting and iSCSIProtocolLevel came with RFC 7144."""
    later = {name for name, row in KEYS.items() if row.later}
    assert later == {"TaskReporting", "iSCSIProtocolLevel", "X#NodeArchitecture"}


def test_task_reporting() -> None:
    row = KEYS["TaskReporting"]
    assert (row.default, row.use, row.session_wide) == (("RFC3720",), Use.LEADING_ONLY, True)
    assert set(row.values) == {"RFC3720", "ResponseFence", "FastAbort"}
    assert Parameters().task_reporting == "RFC3720"


def test_send_targets_is_for_the_full_feature_phase() -> None:
    assert KEYS["SendTargets"].use is Use.FULL_FEATURE_ONLY
    assert KEYS["SendTargets"].senders == INITIATOR


def test_every_row_is_checked_here() -> None:
    checked = {row[0] for row in NUMBERS} | {row[0] for row in BOOLEANS}
    checked |= {row[0] for row in DECLARED} | {"HeaderDigest", "DataDigest", "SendTargets"}
    checked |= {"MaxRecvDataSegmentLength", "TaskReporting", "X#NodeArchitecture", "AuthMethod"}
    checked |= {f"CHAP_{letter}" for letter in "AICNR"}
    checked |= {"IFMarker", "OFMarker", "IFMarkInt", "OFMarkInt"}
    assert checked == set(KEYS)
    assert all(isinstance(row, Key) and row.name == name for name, row in KEYS.items())


def test_parameters_start_with_the_defaults_of_the_table() -> None:
    names = {
        "max_connections": "MaxConnections",
        "initial_r2t": "InitialR2T",
        "immediate_data": "ImmediateData",
        "max_recv_data_segment_length": "MaxRecvDataSegmentLength",
        "max_send_data_segment_length": "MaxRecvDataSegmentLength",
        "max_burst_length": "MaxBurstLength",
        "first_burst_length": "FirstBurstLength",
        "default_time2wait": "DefaultTime2Wait",
        "default_time2retain": "DefaultTime2Retain",
        "max_outstanding_r2t": "MaxOutstandingR2T",
        "data_pdu_in_order": "DataPDUInOrder",
        "data_sequence_in_order": "DataSequenceInOrder",
        "error_recovery_level": "ErrorRecoveryLevel",
        "iscsi_protocol_level": "iSCSIProtocolLevel",
    }
    defaults = dataclasses.asdict(Parameters())
    for attribute, name in names.items():
        assert defaults[attribute] == KEYS[name].default
    assert not Parameters().header_digest
    assert Parameters().target_portal_group_tag is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_connections": 0}, "MaxConnections=0: not between 1 and 65535"),
        ({"error_recovery_level": 3}, "ErrorRecoveryLevel=3"),
        ({"default_time2wait": 3601}, "DefaultTime2Wait=3601"),
        ({"max_recv_data_segment_length": 511}, "MaxRecvDataSegmentLength=511"),
        ({"max_burst_length": 1 << 24}, "MaxBurstLength=16777216"),
    ],
)
def test_an_offer_is_within_the_ranges(changes: dict[str, int], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Offer(**changes)  # type: ignore[arg-type]


def test_an_offer_names_known_digests() -> None:
    with pytest.raises(UsageError, match="HeaderDigest=CRC16"):
        Offer(header_digest=("CRC16",))
    with pytest.raises(UsageError, match="DataDigest="):
        Offer(data_digest=())


def test_an_offer_names_known_task_reporting() -> None:
    """Checklist 34: RFC3720 is always among them."""
    Offer(task_reporting=("FastAbort", "ResponseFence", "RFC3720"))
    with pytest.raises(UsageError, match="TaskReporting without RFC3720"):
        Offer(task_reporting=("ResponseFence",))
    with pytest.raises(UsageError, match="TaskReporting=RFC3720,Fast"):
        Offer(task_reporting=("RFC3720", "Fast"))
    with pytest.raises(UsageError, match="iSCSIProtocolLevel=32"):
        Offer(iscsi_protocol_level=32)


def test_an_offer_keeps_first_burst_within_max_burst() -> None:
    """Checklist 13."""
    with pytest.raises(UsageError, match="FirstBurstLength exceeds MaxBurstLength"):
        Offer(max_burst_length=4096)
