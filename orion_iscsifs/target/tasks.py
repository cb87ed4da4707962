"""One SCSI command at the target: how its Data-Out comes in (RFC 7143 §4.2.5, §11.7, §11.8).

Write data arrives in bursts. Immediate data and what follows it unsolicited are the first burst;
every R2T opens another. A burst ends with the Data-Out that has F set. Even a command that is
refused has to wait for the bursts that were promised or asked for before it is answered
(RFC 7143 §11.4.2), so a refusal only stops further R2Ts.

At ErrorRecoveryLevel 1 and above a Data-Out that was lost leaves a hole. Holes are asked for with
recovery R2Ts (§11.8) as soon as the burst that has them is over, which keeps MaxOutstandingR2T.

Decides and never waits: the session sends what `next_r2t` returns.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import NO_TAG, R2T, DataIn, DataOut, ScsiCommand
from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.sense import Status
from orion_iscsifs.target.faults import Fault
from orion_iscsifs.target.unit import LogicalUnit, Outcome, check_condition

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel

EMPTY: Final = memoryview(b"")
_RECOVERIES_MAX: Final = 64
"""Recovery R2Ts of one command; more are answered with a failure."""


@dataclass(slots=True)
class Burst:
    """Bytes `start` to `end` of the write, received up to `position`."""

    start: int
    end: int
    position: int
    data_sn: int = 0


@dataclass(slots=True)
class Recovery:
    """What a command at ErrorRecoveryLevel 1 or above remembers, to do parts of it again."""

    asks_again: bool
    """Holes are asked for again instead of failing the command."""
    missing: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of the write data that were lost and not asked for again yet."""
    r2ts: list[R2T] = field(default_factory=list)
    """Sent ones, by R2TSN."""
    sent: list[DataIn] = field(default_factory=list)
    """By DataSN."""
    acknowledged_data: int = 0
    """Data-In before this DataSN is with the initiator (DataACK, §11.16.2)."""
    outcome: Outcome | None = None
    """The answer, kept until it is acknowledged."""
    snack_tag: int = 0
    recoveries: int = 0
    unanswered_r2ts: int = 0
    """Open R2Ts at the last `suspend` that no data had come for."""
    freed: int = 0
    """How often the command has lost its connection."""


@dataclass(slots=True, eq=False)
class Task:
    pdu: ScsiCommand
    unit: LogicalUnit | None
    channel: "Channel | None" = None
    """Connection allegiance (RFC 7143 §4.2.2.1); None: waits for a reassignment (§7.2.2)."""
    wanted_bytes: int = 0
    """Data-Out that the CDB asks for; what the initiator has (EDTL) may be less or more."""
    failure: Outcome | None = None
    """Decided before execution: the answer once all bursts are in."""
    data: memoryview = EMPTY
    """Where the Data-Out belongs; `min(wanted_bytes, EDTL)` long."""
    buffer_bytes: int = 0
    """Memory that was taken for `data`."""
    solicited_to: int = 0
    """Everything before this offset has arrived or was asked for."""
    bursts: dict[int, Burst] = field(default_factory=dict)
    """Open ones by Target Transfer Tag; NO_TAG is the unsolicited one."""
    r2t_sn: int = 0
    delivered: bool = False
    """Its turn in CmdSN order has come."""
    started: bool = False
    aborted: bool = False
    released: bool = False
    """Its place in the command window is free again."""
    fault: Fault | None = None
    scope: trio.CancelScope | None = None
    finished: trio.Event | None = None
    """Both only while the command runs in a task of its own."""
    doomed: trio.Event | None = None
    """Set when the last open burst has ended: a task management function waits for it."""

    memory: "Recovery | None" = None
    """Only at ErrorRecoveryLevel 1 and above."""

    @property
    def recovery(self) -> "Recovery":
        """What only ErrorRecoveryLevel 1 and above has."""
        assert self.memory is not None
        return self.memory

    # -- the first burst --------------------------------------------------------------------------

    def begin_write(self, limits: Parameters, room_bytes: int) -> None:
        """Take the immediate data and expect what the F bit promises.

        A buffer larger than `room_bytes` is not taken: the command ends with TASK SET FULL.
        """
        pdu = self.pdu
        immediate = len(pdu.data)
        total = pdu.expected_data_transfer_length
        length = min(self.wanted_bytes, total) if self.failure is None else 0
        first_burst = min(total, limits.first_burst_length)
        if immediate > first_burst or (immediate and not limits.immediate_data):
            self._fail(sense.UNEXPECTED_UNSOLICITED_DATA)
            length = 0
        if immediate == length:
            self.data = memoryview(pdu.data)
        elif length > room_bytes:
            self.failure = Outcome(Status.TASK_SET_FULL)
        elif length:
            self.data, self.buffer_bytes = memoryview(bytearray(length)), length
            self._store(0, pdu.data)
        self.solicited_to = immediate
        if not pdu.final:
            if limits.initial_r2t:
                self._fail(sense.UNEXPECTED_UNSOLICITED_DATA)
            self.bursts[NO_TAG] = Burst(immediate, first_burst, immediate)
            self.solicited_to = first_burst

    # -- Data-Out ---------------------------------------------------------------------------------

    def place(self, pdu: DataOut, length: int) -> memoryview | None:
        """Where this data segment can go directly; None when it must be looked at first."""
        offset = pdu.buffer_offset
        burst = self.bursts.get(pdu.target_transfer_tag)
        if burst is None or offset != burst.position or offset + length > burst.end:
            return None
        return self.data[offset : offset + length] if offset + length <= len(self.data) else None

    def receive(self, pdu: DataOut, *, placed: bool) -> bool:
        """Take one Data-Out; False if it belongs to no open burst (late, after an abort).

        `placed`: the framer put it where `place` said. A wrong order or amount fails the command
        and not the connection (RFC 7143 §11.4.7.2).
        """
        burst = self.bursts.get(pdu.target_transfer_tag)
        if burst is None:
            return False
        offset, length = pdu.buffer_offset, len(pdu.data)
        if pdu.data_sn != burst.data_sn and not self._mind_the_gap(burst, pdu):
            return True
        burst.data_sn += 1
        if offset != burst.position or offset + length > burst.end:
            self._fail(sense.NOT_ENOUGH_UNSOLICITED_DATA)
        elif not placed:
            self._store(offset, pdu.data)
        burst.position = min(offset + length, burst.end)
        if pdu.final:
            del self.bursts[pdu.target_transfer_tag]
            if burst.position != burst.end and burst.position < len(self.data):
                self._fail(sense.NOT_ENOUGH_UNSOLICITED_DATA)
        return True

    def _mind_the_gap(self, burst: Burst, pdu: DataOut) -> bool:
        """A DataSN that was not due means a lost PDU, or a duplicate (False: drop it; §7.9)."""
        if not self._asks_again:
            self._fail(sense.PROTOCOL_SERVICE_CRC_ERROR)
            return True
        if serial.less(pdu.data_sn, burst.data_sn) or pdu.buffer_offset < burst.position:
            return False
        end = min(pdu.buffer_offset, burst.end)
        self._miss(burst.position, end)
        burst.position, burst.data_sn = end, pdu.data_sn
        return True

    def lose(self, pdu: DataOut) -> bool:
        """This Data-Out came damaged; False if it belongs to no open burst (§7.8)."""
        burst = self.bursts.get(pdu.target_transfer_tag)
        if burst is None:
            return False
        end = min(pdu.buffer_offset + len(pdu.data), burst.end)
        if end > burst.position:
            self._miss(burst.position, end)
            burst.position = end
        burst.data_sn = serial.add(pdu.data_sn, 1)
        if not self._asks_again:
            self._fail(sense.PROTOCOL_SERVICE_CRC_ERROR)
        if pdu.final:
            del self.bursts[pdu.target_transfer_tag]
        return True

    def suspend(self, tag: int | None = None) -> None:
        """What open bursts (or the one of `tag`) have not brought is missing; they are over."""
        recovery = self.recovery
        recovery.unanswered_r2ts = 0
        for open_tag in [tag] if tag is not None else list(self.bursts):
            burst = self.bursts.pop(open_tag)
            recovery.unanswered_r2ts += open_tag != NO_TAG and burst.data_sn == 0
            self._miss(burst.position, burst.end)

    def _miss(self, start: int, end: int) -> None:
        end = min(end, len(self.data))
        if start < end:
            self.recovery.missing.append((start, end))
            self.recovery.recoveries += 1
            if self.recovery.recoveries > _RECOVERIES_MAX:
                self._fail(sense.PROTOCOL_SERVICE_CRC_ERROR)

    def next_r2t(self, target_transfer_tag: int, limits: Parameters) -> R2T | None:
        """The next R2T to send, if data is still wanted and another may be outstanding.

        Data sequences are in order (DataSequenceInOrder=Yes), so an unsolicited burst that is
        still open comes first. Holes come before what was never asked for.
        """
        start, end = self.solicited_to, len(self.data)
        if self.failure is not None or NO_TAG in self.bursts:
            return None
        missing = self.memory.missing if self.memory is not None else None
        if (start >= end and not missing) or len(self.bursts) >= limits.max_outstanding_r2t:
            return None
        if missing:
            start, end = missing.pop(0)
            if end - start > limits.max_burst_length:
                missing.insert(0, (start + limits.max_burst_length, end))
        length = min(end - start, limits.max_burst_length)
        self.bursts[target_transfer_tag] = Burst(start, start + length, start)
        self.solicited_to = max(self.solicited_to, start + length)
        r2t = R2T(
            lun=self.pdu.lun,
            initiator_task_tag=self.pdu.initiator_task_tag,
            target_transfer_tag=target_transfer_tag,
            r2t_sn=self.r2t_sn,
            buffer_offset=start,
            desired_data_transfer_length=length,
        )
        self.r2t_sn += 1
        return r2t

    @property
    def complete(self) -> bool:
        """Every byte that is wanted, or that was promised, has arrived."""
        if self.bursts:
            return False
        if self.failure is not None:
            return True
        if self.solicited_to < len(self.data):
            return False
        return self.memory is None or not self.memory.missing

    @property
    def _asks_again(self) -> bool:
        return self.memory is not None and self.memory.asks_again

    def _store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Keep what the command wants of `data`; surplus is dropped."""
        length = min(len(data), max(0, len(self.data) - offset))
        if length:  # immediate data that is complete has no place of its own: it is read-only
            self.data[offset : offset + length] = data[:length]

    def _fail(self, reason: sense.SenseData) -> None:
        if self.failure is None:
            self.failure = check_condition(reason)
