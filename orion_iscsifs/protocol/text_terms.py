"""What the keys of a text exchange in the full feature phase mean, for both roles (RFC 7143 §6.4).

Only keys of use ALL can be set there, and each of them is a declaration: nothing of §13 is
proposed or chosen any more. What a peer proposes all the same is answered Reject, an unknown key
NotUnderstood, and what breaks a rule is a ProtocolViolation, after which the exchange is void.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.keys import (
    ANSWER_CONSTANTS,
    KEYS,
    NOT_UNDERSTOOD,
    REJECT,
    Key,
    Kind,
    Parameters,
    Role,
    Use,
)
from orion_iscsifs.protocol.text import Pair, parse_number, printable, shown

SEND_TARGETS: Final = "SendTargets"
_RECORD: Final = frozenset({"TargetName", "TargetAddress"})
"""The keys of a target record, which come as often as there are targets (Appendix C)."""
_MAX_RECV: Final = "MaxRecvDataSegmentLength"


class TextTerms:
    """The keys of one exchange, seen from `role`. `pdu` names the peer's PDU in errors."""

    def __init__(self, role: Role, pdu: str) -> None:
        self._role = role
        self._peer = Role.TARGET if role is Role.INITIATOR else Role.INITIATOR
        self._pdu = pdu
        self._asked = False
        self._ours: dict[str, str] = {}
        self._theirs: dict[str, str] = {}
        self._seen: set[str] = set()

    def declare(self, pairs: Sequence[Pair]) -> None:
        """This side's own pairs, which the caller sends. They are the caller's responsibility."""
        for key, value in pairs:
            row = KEYS[key]
            assert self._role in row.senders
            if key == SEND_TARGETS:
                self._asked = True
            else:
                assert row.use is Use.ALL
                assert row.repeatable or key not in self._ours
                assert _is_admissible(row, value)
                self._ours[key] = value

    def take(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The peer's pairs; the answers that it is due. SendTargets is for the caller."""
        return [answer for key, value in pairs for answer in self._take(key, value)]

    def _take(self, key: str, value: str) -> list[Pair]:
        row = KEYS.get(key)
        if self._asked and (key in _RECORD or key == SEND_TARGETS):
            return []
        if key in self._seen and not (row is not None and row.repeatable):
            raise self._violation(f"{key} sent twice in one negotiation", "6.4")
        self._seen.add(key)
        if row is None:
            return self._take_unknown(key, value)
        if value in ANSWER_CONSTANTS:
            raise self._refused(row, value)
        if row.kind not in (Kind.DECLARATIVE, Kind.REQUEST):
            return [(key, REJECT)]
        self._declaration(row, value)
        return []

    def _take_unknown(self, key: str, value: str) -> list[Pair]:
        if value in ANSWER_CONSTANTS:
            raise self._violation(f"{key}={value} answers nothing that was sent", "6.2")
        return [(key, NOT_UNDERSTOOD)]

    def _refused(self, row: Key, value: str) -> ProtocolViolation:
        if row.name not in self._ours:
            return self._violation(f"{row.name}={value} answers nothing that was sent", "6.2")
        # NotUnderstood breaks §6.2; Reject makes the negotiation fail, which is the same to us.
        return self._violation(f"{row.name}={value} refuses what was declared", "7.12")

    def _declaration(self, row: Key, value: str) -> None:
        if self._peer not in row.senders:
            problem = f"{row.name} is not for the {self._peer.name.lower()} to send"
            raise self._violation(problem, row.section)
        if row.use not in (Use.ALL, Use.FULL_FEATURE_ONLY):
            raise self._violation(f"{row.name} can be set during login only", row.section)
        if not _is_admissible(row, value):
            raise self._violation(f"{row.name}={shown(value)} is out of range", row.section)
        self._theirs[row.name] = value

    def conclude(self, base: Parameters) -> Parameters:
        """`base` with everything that both sides have declared."""
        initiator, target = self._ours, self._theirs
        if self._role is Role.TARGET:
            initiator, target = target, initiator
        receive = self._ours.get(_MAX_RECV)
        send = self._theirs.get(_MAX_RECV)
        return replace(
            base,
            max_recv_data_segment_length=_number(receive, base.max_recv_data_segment_length),
            max_send_data_segment_length=_number(send, base.max_send_data_segment_length),
            initiator_alias=printable(initiator.get("InitiatorAlias", base.initiator_alias)),
            target_alias=printable(target.get("TargetAlias", base.target_alias)),
        )

    def _violation(self, problem: str, section: str) -> ProtocolViolation:
        return ProtocolViolation(self._pdu, problem, section=section)


def _is_admissible(row: Key, value: str) -> bool:
    if not row.high:
        return True
    number = parse_number(value)
    return number is not None and row.low <= number <= row.high


def _number(text: str | None, otherwise: int) -> int:
    number = None if text is None else parse_number(text)
    return otherwise if number is None else number
