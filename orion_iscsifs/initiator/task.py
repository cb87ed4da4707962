"""One SCSI command and what is known of it, from the caller's request to its status."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.errors import OrionError, ProtocolViolation
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import DataIn, ScsiCommand, ScsiResponse, ServiceResponse
from orion_iscsifs.protocol.recovery import RecoveringRead, RecoveringWrite
from orion_iscsifs.protocol.transfer import ReadTransfer, WriteTransfer
from orion_iscsifs.scsi.sense import Status

if TYPE_CHECKING:
    from orion_iscsifs.initiator.connection import Connection

_SUCCESSES: Final = frozenset({Status.GOOD, Status.CONDITION_MET, 0x10, 0x14})
"""The last two are INTERMEDIATE and INTERMEDIATE-CONDITION MET, which SAM has retired."""

Buffer = bytes | bytearray | memoryview


@dataclass(slots=True, eq=False)
class Task:
    """A SCSI command: at most one of `read_into` and `write_from` is set.

    The outcome is `status` with `sense` and `residual_bytes` (negative: overflow). A task outlives
    a lost connection: it is issued again, with a new Initiator Task Tag, at the next login.
    """

    lun: int
    """The 64-bit LUN field (RFC 7143 §11.2.1.7)."""
    cdb: bytes
    read_into: memoryview | None = None
    write_from: memoryview | None = None

    patience: float = 1.0
    """How many times `command_timeout` it may take."""
    urgent: bool = False
    """Part of the checks after a login (`Session.checks`): sent before what is held."""

    status: int = -1
    sense: bytes = b""
    residual_bytes: int = 0
    error: OrionError | None = None

    initiator_task_tag: int = 0
    cmd_sn: int = 0
    connection: "Connection | None" = field(default=None, repr=False)
    """Where it is in flight (its connection allegiance, RFC 7143 §4.2.2); None: nowhere."""
    climbing: bool = False
    """Task management is at work on it (`management.TaskManager`)."""
    started_at: float = 0.0
    """When it was last sent (trio time)."""
    timeouts: int = 0
    """How often it got no answer in its time."""
    retries: int = 0
    """How often it was sent again with the same CmdSN because nothing acknowledged it."""
    violations: int = 0
    """How often the target has broken the protocol in what it sent for this command."""
    waiter: trio.lowlevel.Task | None = None
    """Who waits for it; None: nobody any more (a cancelled read)."""
    raise_cancel: trio.lowlevel.RaiseCancelT | None = field(default=None, repr=False)
    """Set: the caller was cancelled and waits only until its buffer is free (a write)."""
    read: ReadTransfer | None = field(default=None, repr=False)
    write: WriteTransfer | None = field(default=None, repr=False)

    @property
    def expected_bytes(self) -> int:
        """ExpectedDataTransferLength."""
        buffer = self.read_into if self.write_from is None else self.write_from
        return 0 if buffer is None else len(buffer)

    def again(self) -> "Task":
        """A fresh task for the same request, after a status that asks for a retry."""
        return Task(self.lun, self.cdb, self.read_into, self.write_from, self.patience, self.urgent)

    def begin(self, tag: int, cmd_sn: int, parameters: Parameters, now: float) -> ScsiCommand:
        """Start (again) from the beginning; the command to send.

        The tag is a new one, and so is the CmdSN; a retry (RFC 7143 §7.2.1) has the old ones.
        """
        self.initiator_task_tag = tag
        self.cmd_sn = cmd_sn
        self.started_at = now
        self.climbing = False
        recovers = parameters.error_recovery_level > 0
        if (target := self.read_into) is not None:
            self.read = (RecoveringRead if recovers else ReadTransfer)(len(target))
            return ScsiCommand(self.lun, tag, self.cdb, len(target), read=True, cmd_sn=cmd_sn)
        source = self.write_from
        if source is None:
            return ScsiCommand(self.lun, tag, self.cdb, cmd_sn=cmd_sn)
        self.write = write = (RecoveringWrite if recovers else WriteTransfer)(source, parameters)
        immediate = write.immediate_bytes
        return ScsiCommand(
            self.lun,
            tag,
            self.cdb,
            len(source),
            write=True,
            # F=0 promises unsolicited Data-Out PDUs (RFC 7143 §11.3.1).
            final=write.first_burst_bytes == immediate,
            cmd_sn=cmd_sn,
            data=source[:immediate],
        )

    def finish_with_data(self, pdu: DataIn) -> None:
        """Take the status that the last Data-In carries (the S bit); raises ProtocolViolation.

        Only a status of success may come this way: any other needs sense data (RFC 7143 §11.7.3).
        """
        if pdu.status and pdu.status not in _SUCCESSES:
            raise ProtocolViolation(
                pdu.name, f"status {pdu.status:#04x}, which needs a SCSI Response", section="11.7.3"
            )
        self._residual(pdu.overflow, pdu.underflow, pdu.residual_count)
        self.status = pdu.status

    def finish(self, pdu: ScsiResponse) -> None:
        """Take a SCSI Response; raises ProtocolViolation."""
        if pdu.response != ServiceResponse.COMMAND_COMPLETED_AT_TARGET:
            # Status, flags and residual are not valid then (RFC 7143 §11.4.3).
            self.error = ProtocolViolation(
                pdu.name, f"target failure, response {pdu.response:#04x}", section="11.4.3"
            )
            return
        if (
            self.read is not None
            and pdu.status == 0
            and pdu.exp_data_sn
            not in (
                0,
                self.read.data_sn,
            )
        ):
            raise ProtocolViolation(
                pdu.name,
                f"ExpDataSN {pdu.exp_data_sn} after {self.read.data_sn} Data-In PDUs",
                section="11.4.8",
            )
        self._residual(pdu.overflow, pdu.underflow, pdu.residual_count)
        self.sense = _sense(pdu.data)
        self.status = pdu.status

    def _residual(self, overflow: bool, underflow: bool, count: int) -> None:
        if underflow:
            self.residual_bytes = count
        elif overflow:
            self.residual_bytes = -count


def _sense(segment: Buffer) -> bytes:
    """Sense data of a response's data segment: SenseLength and then so many bytes (§11.4.7).

    A length that reaches past the segment is cut, a segment too short for one is no sense.
    """
    if len(segment) < 2:
        return b""
    length = segment[0] << 8 | segment[1]
    return bytes(segment[2 : 2 + length])
