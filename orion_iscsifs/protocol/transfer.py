"""How the data of one SCSI command moves (RFC 7143 §4.2.5, §11.7 and §11.8), initiator's side.

`WriteTransfer` says which bytes go out with the command, which follow unsolicited, and how an R2T
is answered; `ReadTransfer` checks what comes in. Both hold the negotiated limits and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.framing import PADDING
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import NO_TAG, R2T, DataIn, DataOut, Opcode
from orion_iscsifs.protocol.pdu.base import FINAL, Buffer
from orion_iscsifs.protocol.pdu.data import DATA_OUT_HEADER


@dataclass(slots=True)
class ReadTransfer:
    """What has arrived of a read of `expected_bytes` (its ExpectedDataTransferLength)."""

    expected_bytes: int
    received_bytes: int = 0
    data_sn: int = 0
    """DataSN that is due next, which is also the count of Data-In PDUs so far."""

    def place(self, pdu: DataIn, length: int) -> int | None:
        """Check a Data-In of `length` bytes; where its data begins in the reader's buffer.

        In order, as DataPDUInOrder and DataSequenceInOrder are always Yes here.
        """
        if pdu.data_sn != self.data_sn:
            raise ProtocolViolation(
                pdu.name, f"DataSN {pdu.data_sn} where {self.data_sn} was due", section="11.7.5"
            )
        if length and pdu.buffer_offset != self.received_bytes:
            raise ProtocolViolation(
                pdu.name,
                f"BufferOffset {pdu.buffer_offset} where {self.received_bytes} was due",
                section="11.7.6",
            )
        end = self.received_bytes + length
        if end > self.expected_bytes:
            raise ProtocolViolation(
                pdu.name,
                f"{end} bytes for a command that expects {self.expected_bytes}",
                section="11.7.6",
            )
        offset, self.received_bytes = self.received_bytes, end
        self.data_sn += 1
        return offset


def prompt_bytes_max(limits: Parameters) -> int:
    """The most that a write can carry without waiting for an R2T (§13.10, §13.11, §13.14)."""
    if not limits.initial_r2t:
        return limits.first_burst_length
    if not limits.immediate_data:
        return 0
    return min(limits.first_burst_length, limits.max_send_data_segment_length)


@dataclass(slots=True)
class WriteTransfer:
    """The data of a write: `data` is its whole buffer."""

    data: memoryview
    parameters: Parameters
    r2t_sn: int = 0
    """R2TSN that is due next."""
    solicited_end: int = 0
    """End of what R2Ts have asked for so far."""

    @property
    def immediate_bytes(self) -> int:
        """Length of the data segment of the SCSI Command itself (§11.3.4)."""
        limits = self.parameters
        if not limits.immediate_data:
            return 0
        return min(len(self.data), limits.first_burst_length, limits.max_send_data_segment_length)

    @property
    def first_burst_bytes(self) -> int:
        """Everything that goes out without an R2T: immediate and unsolicited data (§13.14)."""
        if self.parameters.initial_r2t:
            return self.immediate_bytes
        return min(len(self.data), self.parameters.first_burst_length)

    def unsolicited(self, lun: int, initiator_task_tag: int) -> "Burst":
        """The Data-Out PDUs that follow the command on their own."""
        start, end = self.immediate_bytes, self.first_burst_bytes
        return self._burst(lun, initiator_task_tag, NO_TAG, start, end)

    def solicited(self, r2t: R2T) -> "Burst | None":
        """The answer to an R2T, with its tag and LUN; raises ProtocolViolation.

        None: the R2T is a duplicate and wants none (ErrorRecoveryLevel 1 and above only).
        """
        offset, length = r2t.buffer_offset, r2t.desired_data_transfer_length
        self._check(r2t, offset, length)
        self.r2t_sn += 1
        self.solicited_end = offset + length
        return self._burst(
            r2t.lun, r2t.initiator_task_tag, r2t.target_transfer_tag, offset, offset + length
        )

    def _check(self, r2t: R2T, offset: int, length: int) -> None:
        if r2t.r2t_sn != self.r2t_sn:
            raise ProtocolViolation(
                r2t.name, f"R2TSN {r2t.r2t_sn} where {self.r2t_sn} was due", section="11.8.2"
            )
        self.check_shape(r2t)
        if offset < self.solicited_end:
            # DataSequenceInOrder is Yes here, and only recovery levels above 0 ask twice. It also
            # bounds what a target can make us queue.
            raise ProtocolViolation(
                r2t.name,
                f"asks for {offset}+{length} after all before {self.solicited_end} was asked for",
                section="11.8",
            )

    def check_shape(self, r2t: R2T) -> None:
        """What holds for every R2T, at every recovery level; raises ProtocolViolation."""
        offset, length = r2t.buffer_offset, r2t.desired_data_transfer_length
        if r2t.target_transfer_tag == NO_TAG:
            raise ProtocolViolation(
                r2t.name, "the reserved Target Transfer Tag ffffffff", section="11.8.5"
            )
        if not 0 < length <= self.parameters.max_burst_length:
            raise ProtocolViolation(
                r2t.name,
                f"Desired Data Transfer Length {length} with MaxBurstLength"
                f" {self.parameters.max_burst_length}",
                section="11.8.4",
            )
        if offset + length > len(self.data):
            raise ProtocolViolation(
                r2t.name, f"asks for {offset}+{length} of {len(self.data)} bytes", section="11.8.4"
            )

    def _burst(self, lun: int, itt: int, ttt: int, start: int, end: int) -> "Burst":
        segment = self.parameters.max_send_data_segment_length
        return Burst(lun, itt, ttt, self.data, start, end, segment)


@dataclass(frozen=True, slots=True)
class Burst:
    """One sequence of Data-Out PDUs: DataSN begins at 0 and the last PDU has F (§11.7.5).

    A target that takes 8 KiB a PDU makes 128 of them out of 1 MiB, so there is a second way to
    the wire besides iterating: `encode` goes from the burst to its bytes without a PDU object.
    """

    lun: int
    initiator_task_tag: int
    target_transfer_tag: int
    data: memoryview
    """All data of the command; `[start, end)` of it is the burst."""
    start: int
    end: int
    segment_bytes: int
    """Longest data segment that the target takes."""

    def __iter__(self) -> Iterator[DataOut]:
        for data_sn, offset in enumerate(range(self.start, self.end, self.segment_bytes)):
            stop = min(offset + self.segment_bytes, self.end)
            yield DataOut(
                lun=self.lun,
                initiator_task_tag=self.initiator_task_tag,
                target_transfer_tag=self.target_transfer_tag,
                data_sn=data_sn,
                buffer_offset=offset,
                final=stop == self.end,
                data=self.data[offset:stop],
            )

    def encode(self, exp_stat_sn: int) -> list[Buffer]:
        """The pieces of all PDUs for a gathering send, on a connection without digests."""
        pieces: list[Buffer] = []
        header, data, end, step = DATA_OUT_HEADER.pack, self.data, self.end, self.segment_bytes
        tags = self.lun, self.initiator_task_tag, self.target_transfer_tag
        for data_sn, offset in enumerate(range(self.start, end, step)):
            length = min(step, end - offset)
            flags = FINAL if offset + length == end else 0
            pieces.append(
                header(Opcode.DATA_OUT, flags, 0, length, *tags, exp_stat_sn, data_sn, offset)
            )
            pieces.append(data[offset : offset + length])
            if length & 3:
                pieces.append(PADDING[length & 3])
        return pieces
