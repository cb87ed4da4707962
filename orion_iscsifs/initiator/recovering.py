"""What PDUs from the target mean at ErrorRecoveryLevel 1 and 2: gaps are asked for, not fatal.

Theory of operation
-------------------
`protocol.recovery` knows which numbers are missing; this file sends the SNACKs (RFC 7143 §11.16).
A SNACK leaves as soon as a gap is seen: by a number that jumps, by a damaged data segment, or by
the ExpDataSN of a response. What is resent arrives like anything else. `check` asks again for what
stays away, and after `_ASKS_MAX` times gives the connection up, which climbs to the next level of
recovery.

Statuses go through a `StatusQueue`, so they are dealt with in the order of StatSN, and none is
acknowledged before its command has all of its data (§7.9).

MaxRecvDataSegmentLength never changes here after a login, so no resegmentation (R-Data SNACK) is
ever needed (§11.16.3).
"""

from typing import Final

from orion_iscsifs.errors import ConnectionLost, ProtocolViolation
from orion_iscsifs.initiator.inbound import Inbound, Link, Owner, Reply
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.framing import Damaged
from orion_iscsifs.protocol.pdu import (
    BHS_BYTES,
    NO_TAG,
    R2T,
    AsyncMessage,
    DataIn,
    NopIn,
    Opcode,
    Pdu,
    Reject,
    ScsiResponse,
    SnackRequest,
    SnackType,
)
from orion_iscsifs.protocol.recovery import (
    RecoveringRead,
    RecoveringWrite,
    Run,
    StatusQueue,
    first_run,
)

_ASK_AGAIN_S: Final = 2.0
_ASKS_MAX: Final = 4
_OPCODE: Final = 0x3F
"""Opcode bits of a header's first byte."""


class RecoveringInbound(Inbound):
    """`Inbound` with the recovery within commands and within the connection (§7.1.4)."""

    def __init__(self, owner: Owner, link: Link, exp_stat_sn: int) -> None:
        super().__init__(owner, link, exp_stat_sn)
        self._queue = StatusQueue(exp_stat_sn)
        self._handlers[Damaged] = self._damaged
        self._incomplete: dict[int, Task] = {}
        """Commands with missing PDUs, by tag."""
        self._asks = 0
        self._asked_at = 0.0
        self._asked_for: object = None
        self.snacks = 0
        """How many SNACKs have been sent."""

    # -- data --------------------------------------------------------------------------------

    def _data_in(self, pdu: DataIn) -> None:
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None:
            self._stray(pdu)
        else:
            read = _read_of(task, pdu)
            if not pdu.data:
                read.place(pdu, 0)
            self._ask_for_data(task, read, pdu.data_sn)
            read.arrived(pdu)
            if pdu.acknowledge:
                read.acknowledge = pdu
            if read.acknowledge is not None and not read.missing and not read.given_up:
                self._acknowledge(read)
        if pdu.has_status:
            self._expect_status(pdu.stat_sn, pdu.name)
            self._queue.put(pdu.stat_sn, pdu)
        self._settle()

    def _ask_for_data(self, task: Task, read: RecoveringRead, below: int) -> None:
        """Data-In PDUs up to DataSN `below` exist: ask for those that are newly missing."""
        start = read.data_sn
        if below > start and not read.given_up:
            read.expect_below(below)
            self._incomplete[task.initiator_task_tag] = task
            self._snack(SnackType.DATA_OR_R2T, (start, below - start), task)

    def _acknowledge(self, read: RecoveringRead) -> None:
        pdu, read.acknowledge = read.acknowledge, None
        assert pdu is not None
        self._link.queue(
            SnackRequest(
                SnackType.DATA_ACK,
                target_transfer_tag=pdu.target_transfer_tag,
                lun=pdu.lun,
                beg_run=read.data_sn,
            )
        )
        self.snacks += 1

    def _r2t(self, pdu: R2T) -> None:
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        self._expect_status(pdu.stat_sn, pdu.name)
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None:
            self._stray(pdu)
            return
        write = task.write
        if not isinstance(write, RecoveringWrite):
            raise ProtocolViolation(pdu.name, "for a command that writes nothing", section="11.8")
        start = write.r2t_sn
        burst = write.solicited(pdu)
        if pdu.r2t_sn > start:
            self._incomplete[task.initiator_task_tag] = task
            self._snack(SnackType.DATA_OR_R2T, (start, pdu.r2t_sn - start), task)
        if burst is not None:
            self._link.queue_burst(burst)

    def _damaged(self, pdu: Damaged) -> None:
        """A data digest does not match: as if it had not come, and ask for it (§7.8)."""
        lost = pdu.pdu
        task = self._tasks.get(lost.initiator_task_tag)
        if not isinstance(lost, DataIn):
            # Its header is thrown away too: whatever has not been seen so far is asked for. It may
            # have been the answer to such a question.
            start = self._queue.end if self._queue.missing is None else self._queue.missing[0]
            self._snack(SnackType.STATUS, (start, 0))
            return
        if lost.has_status:
            # It comes again with its data, so there is no need to ask for it as a status.
            self._queue.expect_below(serial.add(lost.stat_sn, 1), lost.name)
        if task is None:
            self._stray(lost)
            return
        read = _read_of(task, lost)
        if lost.data_sn >= read.data_sn:
            self._ask_for_data(task, read, lost.data_sn + 1)
        elif lost.data_sn in read.missing:
            self._snack(SnackType.DATA_OR_R2T, (lost.data_sn, 1), task)

    # -- statuses ----------------------------------------------------------------------------

    def _nop_in(self, pdu: NopIn) -> None:
        if pdu.initiator_task_tag == NO_TAG:
            self._expect_status(pdu.stat_sn, pdu.name)
        super()._nop_in(pdu)

    def _expect_status(self, stat_sn: int, name: str) -> None:
        """A PDU that carries the next StatSN without using it up."""
        start = self._queue.end
        self._queue.expect_below(stat_sn, name)
        if self._queue.end != start:
            self._snack(SnackType.STATUS, (start, serial.distance(start, stat_sn)))

    def _numbered(self, pdu: Reply | ScsiResponse | AsyncMessage | Reject) -> None:
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        self._expect_status(pdu.stat_sn, pdu.name)
        fresh = self._queue.put(pdu.stat_sn, pdu)
        if isinstance(pdu, ScsiResponse):
            task = self._tasks.get(pdu.initiator_task_tag)
            if task is not None and isinstance(task.read, RecoveringRead) and not pdu.response:
                self._ask_for_data(task, task.read, pdu.exp_data_sn)
        elif isinstance(pdu, Reject) and fresh:
            self._see_reject(pdu)
        self._settle()

    def _settle(self) -> None:
        """Deal with the statuses that are due, as far as their commands are complete."""
        queue = self._queue
        while (pdu := queue.head) is not None:
            task = self._tasks.get(pdu.initiator_task_tag)
            if (
                task is not None
                and isinstance(task.read, RecoveringRead)
                and not task.read.given_up
            ):
                if task.read.missing:
                    return
                task.read.check(pdu.name)
            queue.take()
            self.status.exp_stat_sn = queue.exp_stat_sn
            if task is not None and self._is_spoiled(task):
                self._owner.task_spoiled(task)
            else:
                self._conclusions[type(pdu)](pdu)
            self._incomplete.pop(pdu.initiator_task_tag, None)
            if task is not None:
                # What was asked for twice may come a second time, after the end.
                self._link.remember(pdu.initiator_task_tag)

    def _is_spoiled(self, task: Task) -> bool:
        return isinstance(task.read, RecoveringRead) and task.read.given_up

    # -- SNACKs ------------------------------------------------------------------------------

    def _snack(self, kind: SnackType, run: Run, task: Task | None = None) -> None:
        tag, lun = (NO_TAG, 0) if task is None else (task.initiator_task_tag, task.lun)
        self._link.queue(SnackRequest(kind, tag, lun=lun, beg_run=run[0], run_length=run[1]))
        self.snacks += 1

    def _see_reject(self, pdu: Reject) -> None:
        """A rejected SNACK counts at once: what it asked for may hold up this very Reject."""
        header = bytes(pdu.data[:BHS_BYTES])
        if len(header) == BHS_BYTES and header[0] & _OPCODE == Opcode.SNACK_REQUEST:
            self._snack_rejected(SnackRequest.unpack(header), pdu.reason)

    def _snack_rejected(self, snack: SnackRequest, reason: int) -> None:
        """The target does not resend (§7.8 a). Raises ConnectionLost if nothing else will do."""
        if snack.type == SnackType.STATUS:
            # Without a gap, the question was about a damaged PDU that had no status.
            lost = self._queue.missing is not None
        else:
            task = self._tasks.get(snack.initiator_task_tag)
            if snack.type != SnackType.DATA_OR_R2T or task is None:
                return
            lost = bool(_missing_of(task))
            if lost and isinstance(task.read, RecoveringRead):
                # The status comes, or has come: then the command starts anew.
                task.read.given_up = True
                task.read.missing.clear()
                return
        if lost:
            raise ConnectionLost(
                f"the target does not send a lost response again (Reject {reason:#04x})"
            )

    def check(self, now: float) -> None:
        """Ask again for what stays missing; raises ConnectionLost when asking does not help."""
        self._plug_gap(now)
        missing = self._missing()
        if not missing or missing != self._asked_for:
            self._asked_for, self._asked_at, self._asks = missing, now, 0
            return
        if now - self._asked_at < _ASK_AGAIN_S:
            return
        self._asks += 1
        self._asked_at = now
        if self._asks >= _ASKS_MAX:
            raise ConnectionLost("the target does not send again what was lost")
        if self._queue.missing is not None:
            self._snack(SnackType.STATUS, self._queue.missing)
        for task in self._incomplete.values():
            numbers = _missing_of(task)
            if numbers:
                self._snack(SnackType.DATA_OR_R2T, first_run(numbers), task)

    def _plug_gap(self, now: float) -> None:
        """Send a command again that the target may have thrown away (§7.1.4.2 a, §7.2.1).

        If it has not, it ignores the duplicate. All later commands wait behind a gap.
        """
        due = self._owner.window.exp_cmd_sn
        task = next((task for task in self._tasks.values() if task.cmd_sn == due), None)
        if task is None or task.retries >= _ASKS_MAX or now - task.started_at < _ASK_AGAIN_S:
            return
        if task.climbing:
            return  # An abort fills the gap, and must not be followed by its command.
        task.retries += 1
        self._owner.task_unacknowledged(task)

    def _missing(self) -> list[object]:
        """All that is missing, to be compared with an earlier look."""
        numbers: list[object] = [] if self._queue.missing is None else [self._queue.missing]
        for tag in [tag for tag in self._incomplete if tag not in self._tasks]:
            del self._incomplete[tag]
        for tag, task in self._incomplete.items():
            missing = _missing_of(task)
            if missing:
                numbers.append((tag, frozenset(missing)))
        return numbers


def _missing_of(task: Task) -> set[int]:
    if isinstance(task.read, RecoveringRead):
        return task.read.missing
    return task.write.missing if isinstance(task.write, RecoveringWrite) else set()


def _read_of(task: Task, pdu: Pdu) -> RecoveringRead:
    if not isinstance(task.read, RecoveringRead):
        raise ProtocolViolation(pdu.name, "for a command that reads nothing", section="11.7")
    return task.read
