"""Operational negotiation, for both roles (RFC 7143 §§6.2, 13).

A `Negotiator` lives as long as one login. `propose` gives this side's keys, `receive` takes the
peer's and gives the answers, `conclude` the outcome. Nothing takes effect before `conclude`:
a negotiation is atomic. The rules by kind of key are two small tables, one for each direction:
`_select` picks an answer to a proposal, `_check_selection` judges an answer to ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from orion_iscsifs.errors import LoginError, ProtocolViolation
from orion_iscsifs.protocol.keys import (
    ANSWER_CONSTANTS,
    CRC32C,
    IRRELEVANT,
    KEYS,
    NO,
    NONE,
    NOT_UNDERSTOOD,
    PROTOCOL_LEVEL_RFC7143,
    PROTOCOL_LEVEL_RFC7144,
    REJECT,
    RESPONSE_FENCE,
    RFC3720,
    YES,
    Key,
    Kind,
    Offer,
    Parameters,
    Role,
    Value,
)
from orion_iscsifs.protocol.text import Pair, parse_number, shown

_MAX_RECV: Final = "MaxRecvDataSegmentLength"
_MAX_RECV_DEFAULT: Final = 8192
_DISCOVERY_KEYS: Final = ("HeaderDigest", "DataDigest", _MAX_RECV)
"""What a discovery session proposes: the rest is irrelevant there or fixed (§13.21)."""

_BY_ROLE: Final[Mapping[Role, Mapping[str, Value]]] = {
    Role.INITIATOR: {
        "TaskReporting": (RESPONSE_FENCE, RFC3720),
        "iSCSIProtocolLevel": PROTOCOL_LEVEL_RFC7144,
    },
    Role.TARGET: {
        "TaskReporting": (RFC3720,),
        "iSCSIProtocolLevel": PROTOCOL_LEVEL_RFC7143,
    },
}
"""What an offer leaves to the role: see `Offer`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One key=value to send back. `required`: the negotiation hangs without it (§6.2.2)."""

    key: str
    value: str
    required: bool


class Negotiator:
    """One login's operational keys, seen from `role`.

    `leading` is False for a connection that joins a session: it only negotiates its own keys, and
    `base` holds what the session agreed on. `pdu` names the peer's PDU in errors.
    """

    def __init__(
        self,
        role: Role,
        offer: Offer,
        *,
        pdu: str,
        discovery: bool = False,
        leading: bool = True,
        base: Parameters | None = None,
    ) -> None:
        self._role = role
        self._offer = offer
        self._pdu = pdu
        self._discovery = discovery
        self._leading = leading
        self._base = Parameters() if base is None else base
        self._own: dict[str, Value] = offer.values()
        for name, value in _BY_ROLE[role].items():
            self._own.setdefault(name, value)
        if discovery:
            self._own |= {"MaxConnections": 1, "ErrorRecoveryLevel": 0}
        self._proposed: dict[str, Value] = {}
        self._settled: dict[str, Value] = {}
        self._chosen: set[str] = set()
        """Settled by an explicit answer of either side, not by a default."""
        # Both are the connection's own: what another connection declared says nothing here.
        self._max_send = _MAX_RECV_DEFAULT
        self._max_recv = _MAX_RECV_DEFAULT

    # -- our keys ----------------------------------------------------------------------------

    def propose(self) -> list[Pair]:
        """Everything that this side wants to negotiate, once."""
        names = _DISCOVERY_KEYS if self._discovery else tuple(self._own)
        return self._send(name for name in names if self._is_proposable(name))

    def _is_proposable(self, name: str) -> bool:
        row, own = KEYS[name], self._own[name]
        if row.session_wide and not self._leading:
            return False
        if isinstance(own, tuple):
            # Who asks for TaskReporting has to offer ResponseFence (§13.23).
            return name != "TaskReporting" or RESPONSE_FENCE in own
        # A peer may not know a later key: it is not bothered with a default.
        return not row.later or own != row.default

    def needs(self) -> list[str]:
        """What a responder can't leave at its default; it follows the peer in the rest."""
        return [name for name in self._own if self._is_needed(name)]

    def propose_needed(self) -> list[Pair]:
        """`needs()` as proposals, once."""
        return self._send(self.needs())

    def _is_needed(self, name: str) -> bool:
        row, own = KEYS[name], self._own[name]
        assert row.default is not None
        if name in self._settled or name in self._proposed or self._is_irrelevant(row):
            return False
        match row.kind:
            case Kind.LIST:
                return isinstance(own, tuple) and not {NONE, RFC3720} & set(own)
            case Kind.MINIMUM:
                return _number(own) < _number(row.default)
            case Kind.MAXIMUM:
                return _number(own) > _number(row.default)
            case Kind.DECLARATIVE:
                return own != self._max_recv
            case _:
                # The default of every boolean is Yes: AND needs a word for No; OR can't leave Yes.
                return row.kind is Kind.AND and not own

    def _is_irrelevant(self, row: Key) -> bool:
        if self._discovery and row.irrelevant_in_discovery:
            return True
        return not self._leading and row.session_wide

    def _send(self, names: Iterable[str]) -> list[Pair]:
        pairs = []
        for name in names:
            if name in self._settled or name in self._proposed:
                continue
            own = self._own[name]
            if name == _MAX_RECV:
                self._max_recv = _number(own)
                self._settled[name] = own
            else:
                self._proposed[name] = own
            pairs.append((name, _text(own)))
        return pairs

    # -- the peer's keys ---------------------------------------------------------------------

    def receive(self, pairs: Sequence[tuple[Key, str]]) -> list[Answer]:
        """Takes the peer's operational keys in; the answers to its proposals."""
        answers = []
        # FirstBurstLength is chosen within MaxBurstLength: the latter has to be known first.
        for row, value in sorted(pairs, key=lambda pair: pair[0].name == "FirstBurstLength"):
            if row.kind is Kind.OBSOLETE:
                answers.append(Answer(row.name, REJECT, required=False))
            elif row.kind is Kind.DECLARATIVE:
                self._take_declaration(row, value)
            elif row.name in self._proposed:
                self._take_answer(row, value)
            else:
                answers.append(self._answer(row, value))
        return answers

    def _take_declaration(self, row: Key, value: str) -> None:
        if value == NOT_UNDERSTOOD and not row.later:
            raise self._violation(row, f"{row.name}=NotUnderstood")
        if row.name == _MAX_RECV and value not in ANSWER_CONSTANTS:
            self._max_send = self._admissible(row, value)

    def _take_answer(self, row: Key, value: str) -> None:
        own = self._proposed.pop(row.name)
        if value == NOT_UNDERSTOOD and not row.later:
            raise self._violation(row, f"{row.name}=NotUnderstood")
        if value in ANSWER_CONSTANTS:
            self._settled[row.name] = self._default(row)
            return
        selected = self._parse(row, value)
        if selected is None or not _check_selection(row.kind, own, selected):
            problem = f"{row.name}={shown(value)} is no possible answer to {_text(own)}"
            raise self._violation(row, problem)
        self._settled[row.name] = selected
        self._chosen.add(row.name)

    def _answer(self, row: Key, value: str) -> Answer:
        if value in ANSWER_CONSTANTS:
            raise self._violation(row, f"{row.name}={value} is an answer, but nothing was proposed")
        if self._is_irrelevant(row):
            return Answer(row.name, IRRELEVANT, required=False)
        proposed = self._parse(row, value)
        selected = None if proposed is None else self._select(row, proposed)
        if selected is None:
            self._settled[row.name] = self._default(row)
            return Answer(row.name, REJECT, required=True)
        self._settled[row.name] = selected
        self._chosen.add(row.name)
        assert proposed is not None
        return Answer(row.name, _text(selected), required=not _decides(row.name, proposed))

    def _select(self, row: Key, proposed: Value) -> Value | None:
        own = self._own[row.name]
        match row.kind:
            case Kind.AND:
                return bool(own and proposed)
            case Kind.OR:
                return bool(own or proposed)
            case Kind.MAXIMUM:
                return max(_number(own), _number(proposed))
            case Kind.MINIMUM:
                return min(_number(own), _number(proposed), self._ceiling(row))
            case _:
                assert isinstance(own, tuple)
                assert isinstance(proposed, tuple)
                first = next((item for item in proposed if item in own), None)
                return None if first is None else (first,)

    def _ceiling(self, row: Key) -> int:
        if row.name != "FirstBurstLength":
            return row.high
        return _number(self._settled.get("MaxBurstLength", self._base.max_burst_length))

    def _parse(self, row: Key, value: str) -> Value | None:
        """The value if it is of the key's type and within its range."""
        if row.kind is Kind.LIST:
            return tuple(value.split(","))
        if row.high:
            number = parse_number(value)
            return number if number is not None and row.low <= number <= row.high else None
        return {YES: True, NO: False}.get(value)

    def _admissible(self, row: Key, value: str) -> int:
        number = self._parse(row, value)
        if number is None:
            raise self._violation(row, f"{row.name}={shown(value)} is out of range")
        return _number(number)

    def _default(self, row: Key) -> Value:
        assert row.default is not None
        assert not isinstance(row.default, str)
        return row.default

    def _violation(self, row: Key, problem: str) -> ProtocolViolation:
        return ProtocolViolation(self._pdu, problem, section=row.section)

    # -- the outcome -------------------------------------------------------------------------

    @property
    def unanswered(self) -> tuple[str, ...]:
        """Keys that this side proposed and the peer has not answered yet."""
        return tuple(name for name, own in self._proposed.items() if not _decides(name, own))

    def conclude(self) -> Parameters:
        """What both sides obey from now on; raises LoginError or ProtocolViolation.

        A proposal without an answer was not negotiated: its default holds (a connection that joins
        a LIO session sees that). A boolean that decides by itself needs no answer (§6.2.2).
        """
        for name, own in self._proposed.items():
            if _decides(name, own):
                self._settled[name] = own
        max_burst, first_burst = self._bursts()
        erl = self._int("ErrorRecoveryLevel", self._base.error_recovery_level)
        in_order = self._bool("DataSequenceInOrder", self._base.data_sequence_in_order)
        r2ts = self._int("MaxOutstandingR2T", self._base.max_outstanding_r2t)
        return replace(
            self._base,
            header_digest=self._digest("HeaderDigest"),
            data_digest=self._digest("DataDigest"),
            max_connections=self._int("MaxConnections", self._base.max_connections),
            initial_r2t=self._bool("InitialR2T", self._base.initial_r2t),
            immediate_data=self._bool("ImmediateData", self._base.immediate_data),
            max_recv_data_segment_length=self._max_recv,
            max_send_data_segment_length=self._max_send,
            max_burst_length=max_burst,
            first_burst_length=first_burst,
            default_time2wait=self._int("DefaultTime2Wait", self._base.default_time2wait),
            default_time2retain=self._int("DefaultTime2Retain", self._base.default_time2retain),
            # With recovery, only the last R2T may be sent again (§13.19).
            max_outstanding_r2t=1 if erl > 0 and in_order else r2ts,
            data_pdu_in_order=self._bool("DataPDUInOrder", self._base.data_pdu_in_order),
            data_sequence_in_order=in_order,
            error_recovery_level=erl,
            task_reporting=self._task_reporting(),
            iscsi_protocol_level=self._int("iSCSIProtocolLevel", self._base.iscsi_protocol_level),
        )

    def _task_reporting(self) -> str:
        settled = self._settled.get("TaskReporting", (self._base.task_reporting,))
        assert isinstance(settled, tuple)
        return settled[0]

    def _bursts(self) -> tuple[int, int]:
        max_burst = self._int("MaxBurstLength", self._base.max_burst_length)
        first_burst = self._int("FirstBurstLength", self._base.first_burst_length)
        chosen = "FirstBurstLength" in self._chosen
        if first_burst > max_burst and chosen and self._role is Role.TARGET:
            # Agreed on in an earlier exchange than MaxBurstLength: the target must check (§6.2).
            problem = f"FirstBurstLength {first_burst} exceeds MaxBurstLength {max_burst}"
            raise self._violation(KEYS["FirstBurstLength"], problem)
        # An initiator that sends less than it might is right whatever the target thinks.
        return max_burst, min(first_burst, max_burst)

    def _digest(self, name: str) -> bool:
        settled = self._settled.get(name, (NONE,))
        own = self._own[name]
        assert isinstance(own, tuple)
        assert isinstance(settled, tuple)
        if settled[0] not in own:
            raise LoginError(
                f"login: {name} {own[0]} is required and the peer does not use it",
                advice="prefer digests instead of demanding them, or enable them at the other side",
            )
        return settled[0] == CRC32C

    def _int(self, name: str, otherwise: int) -> int:
        return _number(self._settled.get(name, otherwise))

    def _bool(self, name: str, otherwise: bool) -> bool:
        return bool(self._settled.get(name, otherwise))


def _decides(name: str, proposed: Value) -> bool:
    """Whether this proposal is the outcome whatever the acceptor says (RFC 7143 §6.2.2)."""
    kind = KEYS[name].kind
    return (kind is Kind.AND and proposed is False) or (kind is Kind.OR and proposed is True)


def _check_selection(kind: Kind, own: Value, selected: Value) -> bool:
    """Whether the peer may answer `own` with `selected` (RFC 7143 §13, result functions)."""
    match kind:
        case Kind.AND:
            return bool(own) or not selected
        case Kind.OR:
            return bool(selected) or not own
        case Kind.MINIMUM:
            return _number(selected) <= _number(own)
        case Kind.MAXIMUM:
            return _number(selected) >= _number(own)
        case _:
            assert isinstance(own, tuple)
            assert isinstance(selected, tuple)
            return len(selected) == 1 and selected[0] in own


def _number(value: Value | str) -> int:
    assert isinstance(value, int)
    return value


def _text(value: Value) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return YES if value else NO
    return str(value)
