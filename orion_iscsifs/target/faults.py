"""Misbehaviour on demand: what a test scripts so that an initiator meets it.

A `Fault` waits until it has seen `after` matching occasions, then acts on the next `times` of
them. An occasion is what its act is about: a SCSI command unless `OCCASIONS` says otherwise.
An empty `Faults` costs the hot path one truth test.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.scsi.sense import SenseData


class Act(enum.Enum):
    # -- the whole command ------------------------------------------------------------------------
    DROP = enum.auto()
    """Close the connection, the command unanswered and not carried out."""
    DROP_AFTER = enum.auto()
    """Carry the command out, then close the connection instead of answering."""
    DROP_SESSION = enum.auto()
    """Close every connection of the session, the command unanswered and not carried out."""
    DROP_OTHERS = enum.auto()
    """Close every other connection of the session, then go on."""
    DELAY = enum.auto()
    """Wait `delay_s` before the command is carried out."""
    ANSWER = enum.auto()
    """`status` and `sense` instead of carrying the command out."""
    SILENCE = enum.auto()
    """Never answer, but stay connected."""
    TARGET_FAILURE = enum.auto()
    """Answer with Response 01h (RFC 7143 §11.4.3)."""
    ANSWER_AFTER_ABORT = enum.auto()
    """Silence until the command is aborted; then, after that, a status."""
    REJECT = enum.auto()
    """Reject the command with reason `code`, before its CmdSN counts as received."""
    LOSE_COMMAND = enum.auto()
    """As if the command had been discarded for a digest error, without a word."""

    # -- something else first, then the command as usual ------------------------------------------
    PING = enum.auto()
    """Send a NOP-In that wants an answer."""
    NOP_FLOOD = enum.auto()
    """Send `number` NOP-Ins that want no answer."""
    ASYNC_MESSAGE = enum.auto()
    """Send an Async Message (`async_event`, `parameters`) and do what it announces."""
    ASYNC_EVENT = enum.auto()
    """As ASYNC_MESSAGE, but nothing that it announces happens."""
    CLOSE_WINDOW = enum.auto()
    """Advance MaxCmdSN no further until `delay_s` passed, or `Session.thaw_window`."""
    UNKNOWN_TAG = enum.auto()
    """Send a status for a command that never was."""
    STRAY_REJECT = enum.auto()
    """Send a Reject with reason `code` that shows the command, then carry it out all the same."""

    # -- the answer -------------------------------------------------------------------------------
    CORRUPT_HEADER_DIGEST = enum.auto()
    CORRUPT_DATA_DIGEST = enum.auto()
    """Spoil one bit of the digest of the PDUs that answer the command."""
    CORRUPT_DATA_IN = enum.auto()
    """The same, of the Data-In with DataSN `number` only."""
    LOSE_DATA_IN = enum.auto()
    """Leave out the Data-In with DataSN `number`."""
    DUPLICATE_DATA_IN = enum.auto()
    """Send the Data-In with DataSN `number` twice."""
    DATA_SN_GAP = enum.auto()
    """Number Data-In from DataSN `number` on one too high."""
    WRONG_BUFFER_OFFSET = enum.auto()
    """Move the Data-In with DataSN `number` by its own length."""
    DATA_IN_BEYOND_END = enum.auto()
    """After the data, one more Data-In behind the end of the transfer."""
    ASK_DATA_ACK = enum.auto()
    """Set the A bit on the last Data-In (ErrorRecoveryLevel 1)."""
    SEPARATE_STATUS = enum.auto()
    """A SCSI Response even where the last Data-In could carry the status."""
    LOSE_STATUS = enum.auto()
    """Leave out the SCSI Response; its StatSN is used up."""
    DUPLICATE_STATUS = enum.auto()
    """Send the SCSI Response twice, with the same StatSN."""
    CORRUPT_STATUS = enum.auto()
    """Spoil the data digest of the SCSI Response, which only a response with data has."""
    WRONG_EXP_DATA_SN = enum.auto()
    """ExpDataSN in the SCSI Response is one too high."""
    STAT_SN_JUMP = enum.auto()
    """Skip `number` StatSNs before the status."""
    STALE_MAX_CMD_SN = enum.auto()
    """MaxCmdSN of the answer is `number` lower than it was."""
    INVALID_MAX_CMD_SN = enum.auto()
    """MaxCmdSN of the answer is ExpCmdSN - 2."""

    # -- R2Ts of the command ----------------------------------------------------------------------
    LOSE_R2T = enum.auto()
    """Leave out the R2T with R2TSN `number`."""
    DUPLICATE_R2T = enum.auto()
    """Send the R2T with R2TSN `number` twice."""
    R2T_EMPTY = enum.auto()
    """An R2T for 0 bytes."""
    R2T_TOO_LONG = enum.auto()
    """An R2T for more than MaxBurstLength."""
    R2T_BEYOND_END = enum.auto()
    """An R2T for what lies behind the end of the transfer."""
    R2T_RESERVED_TAG = enum.auto()
    """An R2T with Target Transfer Tag ffffffff."""
    R2T_SN_GAP = enum.auto()
    """An R2T whose R2TSN is one too high."""

    # -- other requests ---------------------------------------------------------------------------
    SNACK_REFUSED = enum.auto()
    """Reject a SNACK with reason `code` (default: SNACK Reject)."""
    SNACK_IGNORED = enum.auto()
    TMF_SILENCE = enum.auto()
    """Ignore a task management function: neither carried out nor answered."""
    TMF_DELAY = enum.auto()
    """Wait `delay_s` before it is carried out."""
    TMF_ANSWER = enum.auto()
    """Response `code` instead of carrying it out."""
    PONG_CHANGED = enum.auto()
    """Echo other data than the ping brought."""
    PONG_LOST = enum.auto()
    """Do not answer a ping."""


class Occasion(enum.Enum):
    """What a fault waits for."""

    ARRIVAL = enum.auto()
    """A SCSI command arrives; its turn in CmdSN order has not come."""
    COMMAND = enum.auto()
    """A SCSI command's turn."""
    SNACK = enum.auto()
    TASK_MANAGEMENT = enum.auto()
    PING = enum.auto()


OCCASIONS: Final[Mapping[Act, Occasion]] = {
    Act.REJECT: Occasion.ARRIVAL,
    Act.LOSE_COMMAND: Occasion.ARRIVAL,
    Act.SNACK_REFUSED: Occasion.SNACK,
    Act.SNACK_IGNORED: Occasion.SNACK,
    Act.TMF_SILENCE: Occasion.TASK_MANAGEMENT,
    Act.TMF_DELAY: Occasion.TASK_MANAGEMENT,
    Act.TMF_ANSWER: Occasion.TASK_MANAGEMENT,
    Act.PONG_CHANGED: Occasion.PING,
    Act.PONG_LOST: Occasion.PING,
}


@dataclass(slots=True, kw_only=True)
class Fault:
    act: Act
    opcode: int | None = None
    """Only SCSI commands of this operation code, SNACKs of this type, or task management
    functions of this code; None: every one."""
    cid: int | None = None
    """Only what comes on this connection; None: on any."""
    after: int = 0
    times: int | None = 1
    """None: for ever."""
    delay_s: float = 0.0
    status: int = 0
    sense: SenseData | None = None
    async_event: int = 0
    parameters: tuple[int, int, int] = (0, 0, 0)
    number: int = 0
    """Which PDU of the command, or how many; see the act."""
    code: int = 0
    """The reason or response code that the act sends."""

    @property
    def occasion(self) -> Occasion:
        return OCCASIONS.get(self.act, Occasion.COMMAND)

    def matches(self, opcode: int, cid: int = 0) -> bool:
        """Count this occasion; True when the fault acts on it."""
        if self.opcode is not None and self.opcode != opcode:
            return False
        if self.cid is not None and self.cid != cid:
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

    def take(
        self, opcode: int, cid: int = 0, occasion: Occasion = Occasion.COMMAND
    ) -> Fault | None:
        """The first fault that acts on this occasion; spent faults are forgotten."""
        for fault in self.pending:
            if fault.occasion is occasion and fault.matches(opcode, cid):
                self.hits += 1
                if fault.times == 0:
                    self.pending.remove(fault)
                return fault
        return None
