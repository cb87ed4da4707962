"""How one side of a login sends and receives text: C bit, stages, and what each key is for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.keys import (
    ANSWER_CONSTANTS,
    KEYS,
    NOT_UNDERSTOOD,
    Key,
    Kind,
    Role,
    Stages,
    Use,
)
from orion_iscsifs.protocol.login_stages import (
    EXCHANGES_MAX,
    LOGIN_SEGMENT_BYTES_MAX,
    Stage,
)
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from orion_iscsifs.protocol.text import Pair, TextReader, encode_text, split_text

_DECLARED_BY_LOGIN: Final = frozenset(
    {"SessionType", "InitiatorName", "TargetName", "InitiatorAlias", "TargetAlias"}
    | {"TargetAddress", "TargetPortalGroupTag", "X#NodeArchitecture"}
)


class Ledger:
    """Keys that the peer has sent during this login: each may come once (RFC 7143 §6.3)."""

    def __init__(self, peer: Role, pdu: str) -> None:
        self._peer = peer
        self._pdu = pdu
        self._seen: set[str] = set()

    def has_seen(self, key: str) -> bool:
        return key in self._seen

    def admit(self, key: str, stage: Stage) -> Key | None:
        """The row of a key that may be sent here, None for an unknown key."""
        row = KEYS.get(key)
        if key in self._seen and not (row and row.repeatable):
            raise ProtocolViolation(self._pdu, f"{key} sent twice", section="6.3")
        self._seen.add(key)
        if row is None:
            return None
        wrong_stage = Stages.OPERATIONAL if stage is Stage.SECURITY else Stages.SECURITY
        if row.stages is wrong_stage or row.use is Use.FULL_FEATURE_ONLY:
            problem = f"{key} is not allowed in stage {stage.name}"
            raise ProtocolViolation(self._pdu, problem, section=row.section)
        if self._peer not in row.senders:
            problem = f"{key} is not for the {self._peer.name.lower()} to send"
            raise ProtocolViolation(self._pdu, problem, section=row.section)
        return row


@dataclass(slots=True)
class Received:
    """One logical text data segment, sorted by what deals with each key."""

    declared: dict[str, str] = field(default_factory=dict)
    """Names, aliases, portal group: the login itself."""
    security: dict[str, str] = field(default_factory=dict)
    """AuthMethod and CHAP."""
    operational: list[tuple[Key, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def not_understood(self) -> list[Pair]:
        return [(key, NOT_UNDERSTOOD) for key in self.unknown]


class TextChannel:
    """Text in both directions for one login. `peer` is who sends what `take` receives.

    `joining`: for a connection of a session that exists, whose session-wide keys are settled.
    """

    def __init__(self, peer: Role, *, joining: bool = False) -> None:
        self._joining = joining
        self._pdu = LoginRequest.name if peer is Role.INITIATOR else LoginResponse.name
        self._ledger = Ledger(peer, self._pdu)
        self._reader = TextReader(self._pdu)
        self._unsent: list[bytes] = []
        self._exchanges = 0

    @property
    def sending(self) -> bool:
        """Part of our own text has not left yet: the peer may only say "go on"."""
        return bool(self._unsent)

    def load(self, pairs: Sequence[Pair]) -> None:
        """Text to send: the PDUs that `next_segment` fills."""
        assert not self._unsent
        self._unsent = split_text(encode_text(pairs), LOGIN_SEGMENT_BYTES_MAX)

    def next_segment(self) -> tuple[bytes, bool]:
        """A data segment, and whether more follows (the C bit)."""
        segment = self._unsent.pop(0)
        return segment, bool(self._unsent)

    def check(self, pdu: LoginRequest | LoginResponse) -> None:
        """What holds for every login PDU of the peer before its text is looked at."""
        self._exchanges += 1
        if self._exchanges > EXCHANGES_MAX:
            raise self._violation(f"no end after {EXCHANGES_MAX} exchanges", "6.2")
        if len(pdu.data) > LOGIN_SEGMENT_BYTES_MAX:
            raise self._violation(f"{len(pdu.data)} bytes of data during login", "6.3")
        if pdu.continued and pdu.transit:
            raise self._violation("C and T are both 1", "6.2")
        if self._unsent and (pdu.data or pdu.continued or pdu.transit):
            raise self._violation("our text is not complete, yet this is no empty answer", "6.2")

    def take(self, pdu: LoginRequest | LoginResponse, stage: Stage) -> Received | None:
        """The peer's text once it is complete; None: answer with an empty PDU (§6.2)."""
        self._reader.feed(pdu.data)
        if pdu.continued:
            return None
        return self._sort(self._reader.finish(), stage)

    def _sort(self, pairs: Sequence[Pair], stage: Stage) -> Received:
        received = Received()
        for key, value in pairs:
            if self._answers_irrelevant(key, value):
                continue
            row = self._ledger.admit(key, stage)
            if row is None:
                self._check_unknown(key, value)
                received.unknown.append(key)
            elif row.stages is Stages.SECURITY:
                received.security[key] = value
            elif row.name in _DECLARED_BY_LOGIN:
                self._check_declared(row, value)
                received.declared[key] = value
            else:
                received.operational.append((row, value))
        return received

    def _answers_irrelevant(self, key: str, value: str) -> bool:
        """tgt proposes MaxConnections on a joining connection and rejects our Irrelevant."""
        if not self._joining or value not in ANSWER_CONSTANTS or not self._ledger.has_seen(key):
            return False
        row = KEYS.get(key)
        return row is not None and row.session_wide

    def _check_unknown(self, key: str, value: str) -> None:
        if value in ANSWER_CONSTANTS:
            # We never send a key that the table lacks: there is nothing to answer.
            raise self._violation(f"{key}={value} answers nothing that was sent", "6.2")

    def _check_declared(self, row: Key, value: str) -> None:
        assert row.kind is Kind.DECLARATIVE
        if value in ANSWER_CONSTANTS and not row.later:
            raise self._violation(f"{row.name}={value} declares nothing", "6.2")

    def _violation(self, problem: str, section: str) -> ProtocolViolation:
        return ProtocolViolation(self._pdu, problem, section=section)
