"""Misbehaviour on demand: what a test scripts so that an initiator meets it.

A `Fault` waits until it has seen `after` matching commands, then acts on the next `times` of them.
An empty `Faults` costs the hot path one truth test.
"""

import enum
from dataclasses import dataclass, field

from orion_iscsifs.scsi.sense import SenseData


class Act(enum.Enum):
    DROP = enum.auto()
    """Close the connection, the command unanswered and not carried out."""
    DROP_AFTER = enum.auto()
    """Carry the command out, then close the connection instead of answering."""
    DELAY = enum.auto()
    """Wait `delay_s` before the command is carried out."""
    ANSWER = enum.auto()
    """`status` and `sense` instead of carrying the command out."""
    SILENCE = enum.auto()
    """Never answer, but stay connected."""
    PING = enum.auto()
    """Send a NOP-In that wants an answer, then go on."""
    ASYNC_MESSAGE = enum.auto()
    """Send an Async Message (`async_event`, `parameters`), then go on."""
    CORRUPT_HEADER_DIGEST = enum.auto()
    CORRUPT_DATA_DIGEST = enum.auto()
    """Spoil one bit of the digest of the PDUs that answer the command."""
    CLOSE_WINDOW = enum.auto()
    """Advance MaxCmdSN no further until `delay_s` passed, or `Session.thaw_window`."""
    TARGET_FAILURE = enum.auto()
    """Answer with Response 01h (RFC 7143 §11.4.3)."""


@dataclass(slots=True, kw_only=True)
class Fault:
    act: Act
    opcode: int | None = None
    """Only SCSI commands of this operation code; None: every command."""
    after: int = 0
    times: int | None = 1
    """None: for ever."""
    delay_s: float = 0.0
    status: int = 0
    sense: SenseData | None = None
    async_event: int = 0
    parameters: tuple[int, int, int] = (0, 0, 0)

    def matches(self, opcode: int) -> bool:
        """Count this command; True when the fault acts on it."""
        if self.opcode is not None and self.opcode != opcode:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            if self.times == 0:
                return False
            self.times -= 1
        return True


@dataclass(slots=True)
class Faults:
    """The script of one target. `hits` counts the faults that acted."""

    pending: list[Fault] = field(default_factory=list)
    hits: int = 0

    def __bool__(self) -> bool:
        return bool(self.pending)

    def add(self, fault: Fault) -> Fault:
        self.pending.append(fault)
        return fault

    def clear(self) -> None:
        self.pending.clear()

    def take(self, opcode: int) -> Fault | None:
        """The first fault that acts on this command; spent faults are forgotten."""
        for fault in self.pending:
            if fault.matches(opcode):
                self.hits += 1
                if fault.times == 0:
                    self.pending.remove(fault)
                return fault
        return None
