"""One SCSI command at the target: how its Data-Out comes in (RFC 7143 §4.2.5, §11.7, §11.8).

Write data arrives in bursts. Immediate data and what follows it unsolicited are the first burst;
every R2T opens another. A burst ends with the Data-Out that has F set. Even a command that is
refused has to wait for the bursts that were promised or asked for before it is answered
(RFC 7143 §11.4.2), so a refusal only stops further R2Ts.

Decides and never waits: the session sends what `next_r2t` returns.
"""

from dataclasses import dataclass, field
from typing import Final

import trio

from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import NO_TAG, R2T, DataOut, ScsiCommand
from orion_iscsifs.scsi import sense
from orion_iscsifs.target.faults import Fault
from orion_iscsifs.target.unit import LogicalUnit, Outcome, check_condition

_EMPTY: Final = memoryview(b"")


@dataclass(slots=True)
class Burst:
    """Bytes `start` to `end` of the write, received up to `position`."""

    start: int
    end: int
    position: int
    data_sn: int = 0


@dataclass(slots=True, eq=False)
class Task:
    pdu: ScsiCommand
    unit: LogicalUnit | None
    wanted_bytes: int = 0
    """Data-Out that the CDB asks for; what the initiator has (EDTL) may be less or more."""
    failure: Outcome | None = None
    """Decided before execution: the answer once all bursts are in."""
    data: memoryview = _EMPTY
    """Where the Data-Out belongs; `min(wanted_bytes, EDTL)` long."""
    solicited_to: int = 0
    """Everything before this offset has arrived or was asked for."""
    bursts: dict[int, Burst] = field(default_factory=dict)
    """Open ones by Target Transfer Tag; NO_TAG is the unsolicited one."""
    r2t_sn: int = 0
    delivered: bool = False
    """Its turn in CmdSN order has come."""
    started: bool = False
    aborted: bool = False
    fault: Fault | None = None
    scope: trio.CancelScope | None = None
    finished: trio.Event | None = None
    """Both only while the command runs in a task of its own."""

    # -- the first burst --------------------------------------------------------------------------

    def begin_write(self, limits: Parameters) -> None:
        """Take the immediate data and expect what the F bit promises."""
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
        elif length:
            self.data = memoryview(bytearray(length))
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
        if pdu.data_sn != burst.data_sn:
            # A gap means a PDU that was lost to a digest error (RFC 7143 §7.9, §7.8).
            self._fail(sense.PROTOCOL_SERVICE_CRC_ERROR)
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

    def next_r2t(self, target_transfer_tag: int, limits: Parameters) -> R2T | None:
        """The next R2T to send, if data is still wanted and another may be outstanding.

        Data sequences are in order (DataSequenceInOrder=Yes), so an unsolicited burst that is
        still open comes first.
        """
        start, end = self.solicited_to, len(self.data)
        if self.failure is not None or start >= end or NO_TAG in self.bursts:
            return None
        if len(self.bursts) >= limits.max_outstanding_r2t:
            return None
        length = min(end - start, limits.max_burst_length)
        self.bursts[target_transfer_tag] = Burst(start, start + length, start)
        self.solicited_to = start + length
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
        return self.failure is not None or self.solicited_to >= len(self.data)

    def _store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Keep what the command wants of `data`; surplus is dropped."""
        length = min(len(data), max(0, len(self.data) - offset))
        if length:  # immediate data that is complete has no place of its own: it is read-only
            self.data[offset : offset + length] = data[:length]

    def _fail(self, reason: sense.SenseData) -> None:
        if self.failure is None:
            self.failure = check_condition(reason)
