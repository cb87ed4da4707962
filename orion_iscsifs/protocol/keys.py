"""Every text key of RFC 7143 §§12-13, what two sides offer, and what they agree on.

`KEYS` is the one table that both roles read: how a key is negotiated, where and by whom it may be
sent, its range and its default. A key that is absent here is unknown and answered NotUnderstood.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.errors import UsageError

YES: Final = "Yes"
NO: Final = "No"
REJECT: Final = "Reject"
IRRELEVANT: Final = "Irrelevant"
NOT_UNDERSTOOD: Final = "NotUnderstood"
ANSWER_CONSTANTS: Final = frozenset({REJECT, IRRELEVANT, NOT_UNDERSTOOD})
"""Reserved: only ever an answer, never a proposal (RFC 7143 §6.2)."""

NONE: Final = "None"
CRC32C: Final = "CRC32C"
NORMAL: Final = "Normal"
DISCOVERY: Final = "Discovery"
RFC3720: Final = "RFC3720"
RESPONSE_FENCE: Final = "ResponseFence"
FAST_ABORT: Final = "FastAbort"
PROTOCOL_LEVEL_RFC7143: Final = 1
PROTOCOL_LEVEL_RFC7144: Final = 2
"""Adds QUERY TASK, QUERY TASK SET, I_T NEXUS RESET, QUERY ASYNC EVENT and status qualifiers."""

LENGTH_MAX: Final = (1 << 24) - 1
VALUE_BYTES_MAX: Final = 255
"""Of a simple value, unless its key says otherwise (RFC 7143 §6.1)."""
CHAP_BINARY_BYTES_MAX: Final = 1024
"""Of CHAP_C and CHAP_R, decoded (RFC 7143 §12.1.3)."""

Value = bool | int | tuple[str, ...]
"""A negotiated value: boolean, number, or list in the order of preference."""


class Kind(enum.Enum):
    """How the two values of a key become one (RFC 7143 §§6.2.1, 6.2.2, 13)."""

    AND = enum.auto()
    OR = enum.auto()
    MINIMUM = enum.auto()
    MAXIMUM = enum.auto()
    LIST = enum.auto()
    DECLARATIVE = enum.auto()
    REQUEST = enum.auto()
    """SendTargets: a question, not a parameter."""
    OBSOLETE = enum.auto()
    """Answered Reject, never NotUnderstood, never offered (RFC 7143 §13.25)."""


class Use(enum.Enum):
    """When a key may be sent (RFC 7143 §13)."""

    LEADING_ONLY = "LO"
    INITIALIZE_ONLY = "IO"
    ALL = "ALL"
    FULL_FEATURE_ONLY = "FFPO"


class Stages(enum.Enum):
    """In which stages of the Login Phase a key may be sent (RFC 7143 §12)."""

    SECURITY = enum.auto()
    OPERATIONAL = enum.auto()
    ANY = enum.auto()


class Role(enum.Enum):
    INITIATOR = enum.auto()
    TARGET = enum.auto()


_BOTH: Final = frozenset({Role.INITIATOR, Role.TARGET})
_INITIATOR: Final = frozenset({Role.INITIATOR})
_TARGET: Final = frozenset({Role.TARGET})


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of the table. `low` and `high` bound a number; both 0: the key is no number."""

    name: str
    section: str
    kind: Kind
    use: Use = Use.LEADING_ONLY
    stages: Stages = Stages.OPERATIONAL
    senders: frozenset[Role] = _BOTH
    session_wide: bool = True
    default: Value | str | None = None
    low: int = 0
    high: int = 0
    values: tuple[str, ...] = ()
    """What a list may hold, as far as this project implements it."""
    irrelevant_in_discovery: bool = False
    repeatable: bool = False
    later: bool = False
    """Newer than RFC 3720: a peer may answer NotUnderstood."""
    value_bytes_max: int = VALUE_BYTES_MAX


def _number(
    name: str, section: str, kind: Kind, low: int, high: int, default: int, *, later: bool = False
) -> Key:
    return Key(
        name=name,
        section=section,
        kind=kind,
        low=low,
        high=high,
        default=default,
        # Time2Wait, Time2Retain and ErrorRecoveryLevel say nothing about discovery in §13.
        irrelevant_in_discovery=name
        not in ("DefaultTime2Wait", "DefaultTime2Retain", "ErrorRecoveryLevel"),
        later=later,
    )


def _boolean(name: str, section: str, kind: Kind) -> Key:
    return Key(name=name, section=section, kind=kind, default=True, irrelevant_in_discovery=True)


def _digest(name: str) -> Key:
    return Key(
        name=name,
        section="13.1",
        kind=Kind.LIST,
        use=Use.INITIALIZE_ONLY,
        session_wide=False,
        default=(NONE,),
        values=(NONE, CRC32C),
    )


def _declared(
    name: str,
    section: str,
    use: Use,
    senders: frozenset[Role],
    *,
    default: str | None = None,
    repeatable: bool = False,
) -> Key:
    return Key(
        name=name,
        section=section,
        kind=Kind.DECLARATIVE,
        use=use,
        stages=Stages.ANY,
        senders=senders,
        default=default,
        repeatable=repeatable,
    )


def _security(
    name: str, section: str, kind: Kind, *, value_bytes_max: int = VALUE_BYTES_MAX
) -> Key:
    return Key(
        name=name,
        section=section,
        kind=kind,
        use=Use.INITIALIZE_ONLY,
        stages=Stages.SECURITY,
        session_wide=False,
        value_bytes_max=value_bytes_max,
    )


def _obsolete(name: str) -> Key:
    return Key(name=name, section="13.25", kind=Kind.OBSOLETE)


# "0x" and two digits a byte is the longest of the encodings that §6.1 allows.
_CHAP_TEXT_MAX: Final = 2 + 2 * CHAP_BINARY_BYTES_MAX

_ROWS: Final = (
    _security("AuthMethod", "12.1", Kind.LIST),
    _security("CHAP_A", "12.1.3", Kind.LIST),
    _security("CHAP_I", "12.1.3", Kind.DECLARATIVE),
    _security("CHAP_C", "12.1.3", Kind.DECLARATIVE, value_bytes_max=_CHAP_TEXT_MAX),
    _security("CHAP_N", "12.1.3", Kind.DECLARATIVE),
    _security("CHAP_R", "12.1.3", Kind.DECLARATIVE, value_bytes_max=_CHAP_TEXT_MAX),
    _digest("HeaderDigest"),
    _digest("DataDigest"),
    _number("MaxConnections", "13.2", Kind.MINIMUM, 1, 65535, 1),
    Key(
        name="SendTargets",
        section="13.3",
        kind=Kind.REQUEST,
        use=Use.FULL_FEATURE_ONLY,
        senders=_INITIATOR,
    ),
    # A target names itself only in answers to SendTargets: in login only the initiator may.
    _declared("TargetName", "13.4", Use.INITIALIZE_ONLY, _INITIATOR),
    _declared("InitiatorName", "13.5", Use.INITIALIZE_ONLY, _INITIATOR),
    _declared("TargetAlias", "13.6", Use.ALL, _TARGET),
    _declared("InitiatorAlias", "13.7", Use.ALL, _INITIATOR),
    _declared("TargetAddress", "13.8", Use.ALL, _TARGET, repeatable=True),
    _declared("TargetPortalGroupTag", "13.9", Use.INITIALIZE_ONLY, _TARGET),
    _boolean("InitialR2T", "13.10", Kind.OR),
    _boolean("ImmediateData", "13.11", Kind.AND),
    Key(
        name="MaxRecvDataSegmentLength",
        section="13.12",
        kind=Kind.DECLARATIVE,
        use=Use.ALL,
        session_wide=False,
        default=8192,
        low=512,
        high=LENGTH_MAX,
    ),
    _number("MaxBurstLength", "13.13", Kind.MINIMUM, 512, LENGTH_MAX, 262144),
    _number("FirstBurstLength", "13.14", Kind.MINIMUM, 512, LENGTH_MAX, 65536),
    _number("DefaultTime2Wait", "13.15", Kind.MAXIMUM, 0, 3600, 2),
    _number("DefaultTime2Retain", "13.16", Kind.MINIMUM, 0, 3600, 20),
    _number("MaxOutstandingR2T", "13.17", Kind.MINIMUM, 1, 65535, 1),
    _boolean("DataPDUInOrder", "13.18", Kind.OR),
    _boolean("DataSequenceInOrder", "13.19", Kind.OR),
    _number("ErrorRecoveryLevel", "13.20", Kind.MINIMUM, 0, 2, 0),
    _declared("SessionType", "13.21", Use.LEADING_ONLY, _INITIATOR, default=NORMAL),
    Key(
        name="TaskReporting",
        section="13.23",
        kind=Kind.LIST,
        default=(RFC3720,),
        values=(FAST_ABORT, RESPONSE_FENCE, RFC3720),
        irrelevant_in_discovery=True,
        later=True,
    ),
    # RFC 7144 §6.1 gives the range and the function; 1 is what RFC 7143 §13.24 demands.
    _number("iSCSIProtocolLevel", "13.24", Kind.MINIMUM, 0, 31, 1, later=True),
    _obsolete("IFMarker"),
    _obsolete("OFMarker"),
    _obsolete("IFMarkInt"),
    _obsolete("OFMarkInt"),
    Key(
        name="X#NodeArchitecture",
        section="13.26",
        kind=Kind.DECLARATIVE,
        # §13.26 says LO and no more; it is harmless anywhere, and open-source initiators differ.
        stages=Stages.ANY,
        later=True,
    ),
)

KEYS: Final[Mapping[str, Key]] = {row.name: row for row in _ROWS}
"""By name; names are case sensitive (RFC 7143 §6.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The outcome of a negotiation: RFC 7143 §13's names in snake_case, the RFC's defaults.

    Lengths in bytes, times in seconds.
    """

    header_digest: bool = False
    """CRC32C is in use from the first PDU after the Login Phase."""
    data_digest: bool = False
    max_connections: int = 1
    initial_r2t: bool = True
    immediate_data: bool = True
    max_recv_data_segment_length: int = 8192
    """What we declared: the peer obeys."""
    max_send_data_segment_length: int = 8192
    """What the peer declared: we obey."""
    max_burst_length: int = 262144
    first_burst_length: int = 65536
    default_time2wait: int = 2
    default_time2retain: int = 20
    max_outstanding_r2t: int = 1
    data_pdu_in_order: bool = True
    data_sequence_in_order: bool = True
    error_recovery_level: int = 0
    task_reporting: str = "RFC3720"
    iscsi_protocol_level: int = 1
    target_portal_group_tag: int | None = None
    target_alias: str = ""
    initiator_alias: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one side proposes for each key, and how far it follows the other side.

    The digests are lists in the order of preference; without "None" in it, a peer that can't is
    refused. Lengths in bytes, times in seconds.
    """

    header_digest: tuple[str, ...] = (NONE,)
    data_digest: tuple[str, ...] = (NONE,)
    max_connections: int = 1
    initial_r2t: bool = True
    immediate_data: bool = True
    max_recv_data_segment_length: int = 8192
    max_burst_length: int = 262144
    first_burst_length: int = 65536
    default_time2wait: int = 2
    default_time2retain: int = 20
    max_outstanding_r2t: int = 1
    data_pdu_in_order: bool = True
    data_sequence_in_order: bool = True
    error_recovery_level: int = 0
    task_reporting: tuple[str, ...] = ()
    """In the order of preference, RFC3720 among them; empty: what the role can do.

    ResponseFence asks nothing of an initiator, so it offers that (§13.23). A target has to hold
    responses back for it (§4.2.2.3.3), and FastAbort asks for work at both sides (§4.2.3.4)."""
    iscsi_protocol_level: int | None = None
    """The highest level that this side speaks; None: 2 for an initiator, 1 for a target."""
    alias: str = ""
    """Sent as InitiatorAlias or TargetAlias unless empty."""

    def __post_init__(self) -> None:
        for name, value in self.values().items():
            row = KEYS[name]
            if isinstance(value, tuple):
                if not value or not set(value) <= set(row.values):
                    raise UsageError(f"{name}={','.join(value)}: not among {row.values}")
            elif row.high and not row.low <= value <= row.high:
                raise UsageError(f"{name}={value}: not between {row.low} and {row.high}")
        if self.task_reporting and RFC3720 not in self.task_reporting:
            raise UsageError(f"TaskReporting without {RFC3720} (RFC 7143 §13.23)")
        if self.first_burst_length > self.max_burst_length:
            raise UsageError("FirstBurstLength exceeds MaxBurstLength (RFC 7143 §13.14)")

    def values(self) -> dict[str, Value]:
        """By key name, in the order in which they are proposed; what is left to the role is not
        among them."""
        later: dict[str, Value] = {}
        if self.task_reporting:
            later["TaskReporting"] = self.task_reporting
        if self.iscsi_protocol_level is not None:
            later["iSCSIProtocolLevel"] = self.iscsi_protocol_level
        return {
            "HeaderDigest": self.header_digest,
            "DataDigest": self.data_digest,
            "MaxRecvDataSegmentLength": self.max_recv_data_segment_length,
            "MaxConnections": self.max_connections,
            "InitialR2T": self.initial_r2t,
            "ImmediateData": self.immediate_data,
            "MaxBurstLength": self.max_burst_length,
            "FirstBurstLength": self.first_burst_length,
            "DefaultTime2Wait": self.default_time2wait,
            "DefaultTime2Retain": self.default_time2retain,
            "MaxOutstandingR2T": self.max_outstanding_r2t,
            "DataPDUInOrder": self.data_pdu_in_order,
            "DataSequenceInOrder": self.data_sequence_in_order,
            "ErrorRecoveryLevel": self.error_recovery_level,
            **later,
        }
