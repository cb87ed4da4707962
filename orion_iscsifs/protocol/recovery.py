"""What an initiator at ErrorRecoveryLevel 1 and 2 keeps about PDUs that got lost. Pure.

Theory of operation
-------------------
TCP loses nothing, so a PDU is lost when its data digest does not match and it is thrown away
(RFC 7143 §7.8), or when the target never sent it. Its number is missing then: the DataSN of a
Data-In, the R2TSN of an R2T, or the StatSN of a response. Each class here follows one kind of
number and says which run of them is missing, for a SNACK (§11.16).

`RecoveringRead` places what arrives behind a gap at once, by its BufferOffset. The reader's data
is complete when no DataSN is missing, and `check` then proves that the pieces, in the order of
their DataSN, cover the buffer without a gap or an overlap.

`StatusQueue` hands statuses out in the order of StatSN. A status whose command still misses data
stays at the head: taking it would acknowledge it, and the target could forget the data (§7.9).
"""

from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.pdu import R2T, DataIn, Pdu
from orion_iscsifs.protocol.transfer import Burst, ReadTransfer, WriteTransfer

MISSING_MAX: Final = 4096
"""PDUs of one command that may be missing at once; more is no damage but a broken target."""
STATUSES_HELD_MAX: Final = 4096
"""Statuses that may wait behind a missing one (a bound of §4.2.2.2's "large difference")."""
_ASKED_TWICE_MAX: Final = 16
"""How many times its length a write may be asked for, recovery R2Ts included."""

Run = tuple[int, int]
"""BegRun and RunLength of a SNACK."""


def first_run(numbers: set[int]) -> Run:
    """The lowest of `numbers` and how many follow it without a gap."""
    start = min(numbers)
    length = 1
    while start + length in numbers:
        length += 1
    return start, length


def _check_jump(due: int, number: int, pdu: str, what: str) -> None:
    """A number far ahead of the one that is due is no loss: it bounds what we keep."""
    if number - due > MISSING_MAX:
        raise ProtocolViolation(pdu, f"{what} {number} where {due} was due", section="7.9")


@dataclass(slots=True)
class RecoveringRead(ReadTransfer):
    """A read whose Data-In PDUs may get lost. `data_sn` is one above the highest DataSN known."""

    missing: set[int] = field(default_factory=set)
    """DataSNs below `data_sn` that have not come."""
    acknowledge: DataIn | None = None
    """A Data-In with the A bit whose DataACK waits until nothing is missing (§11.16.2)."""
    given_up: bool = False
    """The target will not send what is missing (it rejected the SNACK)."""
    _extents: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Offset and end of each PDU that came, by DataSN."""

    def place(self, pdu: DataIn, length: int) -> int | None:
        """Where the data goes; None: a duplicate, to be thrown away (§7.9).

        Nothing is counted yet: the data digest is still to come.
        """
        _check_jump(self.data_sn, pdu.data_sn, pdu.name, "DataSN")
        if pdu.buffer_offset + length > self.expected_bytes:
            raise ProtocolViolation(
                pdu.name,
                f"{pdu.buffer_offset}+{length} bytes for a command that expects"
                f" {self.expected_bytes}",
                section="11.7.6",
            )
        return None if self._is_duplicate(pdu) else pdu.buffer_offset

    def _is_duplicate(self, pdu: DataIn) -> bool:
        return pdu.data_sn < self.data_sn and pdu.data_sn not in self.missing

    def arrived(self, pdu: DataIn) -> None:
        """The PDU is here, whole."""
        if self._is_duplicate(pdu):
            return
        self.expect_below(pdu.data_sn + 1)
        self.missing.discard(pdu.data_sn)
        length = len(pdu.data)
        self._extents[pdu.data_sn] = (pdu.buffer_offset, pdu.buffer_offset + length)
        self.received_bytes += length

    def expect_below(self, data_sn: int) -> None:
        """Data-In PDUs below this DataSN exist: those not seen so far are missing."""
        _check_jump(self.data_sn, data_sn, DataIn.name, "DataSN")
        self.missing.update(range(self.data_sn, data_sn))
        self.data_sn = max(self.data_sn, data_sn)

    def check(self, pdu: str) -> None:
        """Nothing is missing any more: are the pieces one whole? Raises ProtocolViolation."""
        due = 0
        for data_sn in sorted(self._extents):
            start, end = self._extents[data_sn]
            if start != due and start != end:
                raise ProtocolViolation(
                    pdu, f"BufferOffset {start} where {due} was due", section="11.7.6"
                )
            due = max(due, end)

    def resume(self) -> int:
        """The task moves to another connection: the ExpDataSN for TASK REASSIGN (§11.5.6).

        What came behind a gap was not acknowledged, so it is forgotten and comes again.
        """
        self.data_sn = min(self.missing, default=self.data_sn)
        self.missing.clear()
        self.acknowledge = None
        for data_sn in [number for number in self._extents if number >= self.data_sn]:
            start, end = self._extents.pop(data_sn)
            self.received_bytes -= end - start
        return self.data_sn


@dataclass(slots=True)
class RecoveringWrite(WriteTransfer):
    """A write that may be asked for the same bytes again (recovery R2Ts, §11.8)."""

    missing: set[int] = field(default_factory=set)
    """R2TSNs below `r2t_sn` that have not come."""
    asked_bytes: int = 0
    _replay: range = range(0)
    """R2TSNs that may come once more, in order: their answers may have died on the way."""

    def solicited(self, r2t: R2T) -> Burst | None:
        """The answer to an R2T; None for a duplicate (§7.9). Raises ProtocolViolation."""
        number = r2t.r2t_sn
        if number in self._replay:
            self._replay = range(number + 1, self._replay.stop)
        elif number < self.r2t_sn and number not in self.missing:
            return None
        self._check_range(r2t)
        self.expect_below(number + 1)
        self.missing.discard(number)
        return self._burst(
            r2t.lun,
            r2t.initiator_task_tag,
            r2t.target_transfer_tag,
            r2t.buffer_offset,
            r2t.buffer_offset + r2t.desired_data_transfer_length,
        )

    def expect_below(self, r2t_sn: int) -> None:
        """R2Ts below this R2TSN exist: those not seen so far are missing."""
        _check_jump(self.r2t_sn, r2t_sn, R2T.name, "R2TSN")
        self.missing.update(range(self.r2t_sn, r2t_sn))
        self.r2t_sn = max(self.r2t_sn, r2t_sn)

    def _check_range(self, r2t: R2T) -> None:
        self.check_shape(r2t)
        self.asked_bytes += r2t.desired_data_transfer_length
        if self.asked_bytes > _ASKED_TWICE_MAX * len(self.data):
            raise ProtocolViolation(
                r2t.name,
                f"asks for {self.asked_bytes} bytes of a write of {len(self.data)}",
                section="11.8.4",
            )

    def resume(self) -> None:
        """The task moves to another connection: the target asks anew for what it lacks.

        No R2T is acknowledged by a reassignment whose ExpDataSN is 0, so each may be a replica of
        one that was answered on the lost connection (§7.2.2).
        """
        self.missing.clear()
        self._replay = range(self.r2t_sn)


@dataclass(slots=True)
class StatusQueue:
    """Statuses of one connection in the order of StatSN. `end` is one above the highest known."""

    exp_stat_sn: int
    end: int = field(init=False)
    _held: dict[int, Pdu] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.end = self.exp_stat_sn

    def put(self, stat_sn: int, pdu: Pdu) -> bool:
        """Take a PDU that carries a status; False: a duplicate, which is dropped."""
        if serial.distance(self.exp_stat_sn, stat_sn) < 0 or stat_sn in self._held:
            return False
        self.expect_below(stat_sn, pdu.name)
        self.expect_below(serial.add(stat_sn, 1), pdu.name)
        self._held[stat_sn] = pdu
        return True

    def expect_below(self, stat_sn: int, pdu: str) -> None:
        """Statuses up to this StatSN exist; raises ProtocolViolation for too large a jump."""
        ahead = serial.distance(self.exp_stat_sn, stat_sn)
        if ahead > STATUSES_HELD_MAX:
            raise ProtocolViolation(
                pdu,
                f"StatSN {stat_sn:#x} where {self.exp_stat_sn:#x} was due",
                section="4.2.2.2",
            )
        if serial.less(self.end, stat_sn):
            self.end = stat_sn

    @property
    def head(self) -> Pdu | None:
        """The status that is due next, if it is here."""
        return self._held.get(self.exp_stat_sn)

    def take(self) -> None:
        """The head is dealt with: from now on ExpStatSN acknowledges it."""
        del self._held[self.exp_stat_sn]
        self.exp_stat_sn = serial.add(self.exp_stat_sn, 1)

    @property
    def missing(self) -> Run | None:
        """The first run of statuses that have not come."""
        start = self.exp_stat_sn
        while start != self.end and start in self._held:
            start = serial.add(start, 1)
        length = 0
        while serial.add(start, length) != self.end and serial.add(start, length) not in self._held:
            length += 1
        return (start, length) if length else None
