"""Answers that may be wanted again, and data that came damaged (RFC 7143 §7.8, §7.9, §11.16).

At ErrorRecoveryLevel 1 and above an answer is kept until the initiator acknowledges its StatSN:
the PDU with the status in `Channel.kept`, the command with its Data-In and R2Ts in
`Channel.finished`. SNACKs are served from there. At level 2 the same answers are what a
reassigned command is given on its new connection, with new numbers. All of it is bounded by
`Limits.retained_bytes_max`: the oldest are given up, and a SNACK for them is refused.

The other direction: a Data-Out that was damaged, left out, or does not come is asked for again
with a recovery R2T. Nothing here is used at level 0.
"""

from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.framing import Damaged
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    DataOut,
    RejectReason,
    ScsiResponse,
    SnackRequest,
    SnackType,
)
from orion_iscsifs.target.answers import answers, resumed_answers
from orion_iscsifs.target.mischief import snack_wrongly
from orion_iscsifs.target.tasks import EMPTY, Burst, Task
from orion_iscsifs.target.unit import Outcome

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel
    from orion_iscsifs.target.session import Session

_UNACKNOWLEDGED_TAGS_MAX: Final = 4096


class Retransmission:
    """One for a session; a SNACK is answered on the connection that it came on."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._level = session.parameters.error_recovery_level
        self._bytes_max = session.limits.retained_bytes_max
        self.kept_bytes = 0
        """Data of the answers that are kept, on all connections."""
        self._data_acks: dict[int, tuple[Task, int]] = {}
        """By Target Transfer Tag of a Data-In with the A bit: its command and DataSN + 1."""

    # -- what is kept --------------------------------------------------------------------------

    @property
    def overfull(self) -> bool:
        return self.kept_bytes > self._bytes_max

    def _keep(self, task: Task, outcome: Outcome) -> None:
        if task.recovery.outcome is None:
            task.recovery.outcome = outcome
            self.kept_bytes += len(outcome.data)
            # A write is over: only its answer may be wanted again.
            task.data, task.pdu.data = EMPTY, b""

    def release(self, task: Task) -> None:
        """Nobody will ask for this command's answer again."""
        if not self._level:
            return
        recovery = task.recovery
        if recovery.outcome is not None:
            self.kept_bytes -= len(recovery.outcome.data)
            recovery.outcome = None
            recovery.sent.clear()

    def keep_for_reassignment(self, task: Task, outcome: Outcome) -> None:
        """The command ended while no connection was there to carry its answer."""
        if self._level < 2 or self.kept_bytes + len(outcome.data) > self._bytes_max:
            return
        self._keep(task, outcome)
        self._session.tasks[task.pdu.initiator_task_tag] = task

    # -- answers -------------------------------------------------------------------------------

    def answer(
        self, channel: "Channel", task: Task, outcome: Outcome, *, separate_status: bool = False
    ) -> None:
        """Send Data-In and status, and keep them where the recovery level wants that."""
        for pdu in self.prepare(channel, task, outcome, separate_status=separate_status):
            if type(pdu) is DataIn and not pdu.has_status:
                channel.send(pdu)
            else:
                channel.send_status(pdu, task=task)

    def prepare(
        self, channel: "Channel", task: Task, outcome: Outcome, *, separate_status: bool = False
    ) -> list[DataIn | ScsiResponse]:
        """The answer, noted as sent; `answer` in two steps, for those who spoil it."""
        limits = channel.parameters
        # A Data-In has no place for the SNACK Tag of an R-Data SNACK that came early (§11.16.3).
        if separate_status or (task.memory is not None and task.memory.snack_tag):
            pdus = list(
                resumed_answers(task, outcome, limits, data_sn=0, offset=0, separate_status=True)
            )
        else:
            pdus = list(answers(task, outcome, limits))
        if self._level:
            self._keep(task, outcome)
            self._note(task, pdus)
        return pdus

    def _note(self, task: Task, pdus: list[DataIn | ScsiResponse]) -> None:
        """Remember Data-In; ask for an acknowledgment at the end of each full burst (§11.7.2)."""
        for pdu in pdus:
            if type(pdu) is not DataIn:
                continue
            task.recovery.sent.append(pdu)
            if pdu.final and not pdu.has_status and pdu is not pdus[-1]:
                self.ask_for_data_ack(task, pdu)

    def ask_for_data_ack(self, task: Task, pdu: DataIn) -> None:
        """Set the A bit."""
        pdu.acknowledge, pdu.lun = True, task.pdu.lun
        pdu.target_transfer_tag = self._session.new_tag()
        self._data_acks[pdu.target_transfer_tag] = (task, pdu.data_sn + 1)
        if len(self._data_acks) > _UNACKNOWLEDGED_TAGS_MAX:
            del self._data_acks[next(iter(self._data_acks))]

    def answer_again(self, channel: "Channel", task: Task, exp_data_sn: int) -> None:
        """The rest of an answer and its status on a new connection (§7.2.2, §11.5.6)."""
        outcome = task.recovery.outcome
        assert outcome is not None
        first = task.recovery.acknowledged_data
        if first < exp_data_sn <= len(task.recovery.sent):
            first = task.recovery.acknowledged_data = exp_data_sn
        for pdu in self._anew(channel, task, outcome, first, separate_status=False):
            if type(pdu) is DataIn and not pdu.has_status:
                channel.send(pdu)
            else:
                channel.send_status(pdu, task=task)

    def _anew(
        self,
        channel: "Channel",
        task: Task,
        outcome: Outcome,
        first: int,
        *,
        separate_status: bool,
    ) -> list[DataIn | ScsiResponse]:
        """The answer from DataSN `first` on, cut as the connection now wants it."""
        # The numbers that these would acknowledge are given anew.
        stale = [tag for tag, (owner, _) in self._data_acks.items() if owner is task]
        for tag in stale:
            del self._data_acks[tag]
        offset = 0
        if first:
            before = task.recovery.sent[first - 1]
            offset = before.buffer_offset + len(before.data)
        del task.recovery.sent[first:]
        pdus = list(
            resumed_answers(
                task,
                outcome,
                channel.parameters,
                data_sn=first,
                offset=offset,
                separate_status=separate_status,
            )
        )
        self._note(task, pdus)
        return pdus

    # -- SNACK ---------------------------------------------------------------------------------

    def snack(self, channel: "Channel", pdu: SnackRequest) -> None:
        """RFC 7143 §11.16. ErrorRecoveryLevel 0 knows none."""
        if not self._level:
            channel.reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)
            return
        self._session.stats.snacks += 1
        target = self._session.target
        if target is not None and snack_wrongly(channel, pdu, target.faults):
            return
        match pdu.type:
            case SnackType.DATA_OR_R2T:
                self._resend_data(channel, pdu)
            case SnackType.STATUS:
                self._resend_status(channel, pdu)
            case SnackType.DATA_ACK:
                self._acknowledge_data(channel, pdu)
            case SnackType.R_DATA:
                self._resegment(channel, pdu)
            case _:
                channel.reject(pdu, RejectReason.INVALID_PDU_FIELD)

    def _command_of(self, channel: "Channel", pdu: SnackRequest) -> Task | None:
        """The command that a SNACK is about, if it belongs to this connection."""
        tag = pdu.initiator_task_tag
        task = self._session.tasks.get(tag) or channel.finished.get(tag)
        return task if task is not None and task.channel is channel else None

    def _resend_data(self, channel: "Channel", pdu: SnackRequest) -> None:
        task = self._command_of(channel, pdu)
        if task is None:
            channel.reject(pdu, RejectReason.PROTOCOL_ERROR)
            return
        sent: list[DataIn] | list[R2T] = task.recovery.sent if task.pdu.read else task.recovery.r2ts
        acknowledged = task.recovery.acknowledged_data if task.pdu.read else 0
        first = pdu.beg_run or (0 if pdu.run_length else acknowledged)
        last = first + pdu.run_length if pdu.run_length else len(sent)
        if first < acknowledged or last > len(sent) or first >= last:
            channel.reject(pdu, RejectReason.PROTOCOL_ERROR, data_sn=len(sent))
            return
        for lost in sent[first:last]:
            if type(lost) is R2T:
                lost.stat_sn = channel.connection.stat_sn
            channel.send(lost)

    def _resend_status(self, channel: "Channel", pdu: SnackRequest) -> None:
        """Replicas of numbered answers; a Data-In with status among them comes with its data."""
        next_sn = channel.connection.stat_sn
        first = pdu.beg_run
        if not pdu.beg_run and not pdu.run_length:
            first = channel.acknowledged
        last = serial.add(first, pdu.run_length) if pdu.run_length else next_sn
        if serial.less(first, channel.acknowledged) or serial.less(next_sn, last):
            channel.reject(pdu, RejectReason.PROTOCOL_ERROR)
            return
        found = [
            kept
            for kept in channel.kept
            if serial.less_equal(first, kept.pdu.stat_sn) and serial.less(kept.pdu.stat_sn, last)
        ]
        if len(found) != serial.distance(first, last):
            channel.reject(pdu, RejectReason.SNACK_REJECT)
            return
        for kept in found:
            channel.send(kept.pdu)

    def _acknowledge_data(self, channel: "Channel", pdu: SnackRequest) -> None:
        """DataACK: nothing before BegRun will be asked for again (§11.16.2)."""
        found = self._data_acks.get(pdu.target_transfer_tag)
        if found is None or pdu.run_length or pdu.initiator_task_tag != NO_TAG:
            channel.reject(pdu, RejectReason.INVALID_DATA_ACK)
            return
        task, highest = found
        if pdu.beg_run > highest or pdu.lun != task.pdu.lun:
            channel.reject(pdu, RejectReason.INVALID_DATA_ACK)
            return
        self._session.stats.data_acks += 1
        del self._data_acks[pdu.target_transfer_tag]
        task.recovery.acknowledged_data = max(task.recovery.acknowledged_data, pdu.beg_run)

    def _resegment(self, channel: "Channel", pdu: SnackRequest) -> None:
        """R-Data SNACK: all unacknowledged data anew, then a response with the SNACK Tag."""
        task = self._command_of(channel, pdu)
        tagged = pdu.target_transfer_tag not in (0, NO_TAG)
        if task is None or not tagged or pdu.beg_run or pdu.run_length or not task.pdu.read:
            channel.reject(pdu, RejectReason.PROTOCOL_ERROR)
            return
        task.recovery.snack_tag = pdu.target_transfer_tag
        outcome = task.recovery.outcome
        if outcome is None:
            return  # still at work: its answer will carry the tag
        kept = next(kept for kept in channel.kept if kept.task is task)
        first = task.recovery.acknowledged_data
        for again in self._anew(channel, task, outcome, first, separate_status=True):
            if type(again) is ScsiResponse:
                # Every response of a command has the same StatSN (§11.4.4).
                again.stat_sn = kept.pdu.stat_sn
                kept.pdu = again
            channel.send(again)

    # -- Data-Out ------------------------------------------------------------------------------

    def damaged(self, channel: "Channel", pdu: Damaged) -> None:
        """A PDU whose data digest is wrong is rejected and forgotten (§7.8)."""
        session, inner = self._session, pdu.pdu
        session.stats.digest_errors += 1
        channel.was_placed(inner)
        channel.reject(inner, RejectReason.DATA_DIGEST_ERROR)
        if type(inner) is DataOut:
            task = session.tasks.get(inner.initiator_task_tag)
            if task is not None and task.channel is channel and task.lose(inner):
                session.execution.advance(task)

    async def watch(self) -> None:
        """Ask again for Data-Out that has stood still for a whole period (§7.9)."""
        before: dict[tuple[Task, int], tuple[int, int]] = {}
        while True:
            await trio.sleep(self._session.limits.sequence_timeout_s)
            now = {
                (task, tag): (burst.position, burst.data_sn)
                for task in self._session.tasks.values()
                for tag, burst in task.bursts.items()
                if task.recovery.asks_again and task.channel is not None and task.channel.live
            }
            for (task, tag), progress in now.items():
                if before.get((task, tag)) == progress:
                    self._ask_again(task, tag, task.bursts[tag])
            before = now
            self._session.flush()

    def _ask_again(self, task: Task, tag: int, burst: Burst) -> None:
        """Nothing came: the R2T itself may be lost. A part came: ask for the rest."""
        channel = task.channel
        assert channel is not None
        self._session.stats.sequence_timeouts += 1
        r2t = next((r2t for r2t in task.recovery.r2ts if r2t.target_transfer_tag == tag), None)
        if r2t is not None and burst.data_sn == 0 and task.recovery.recoveries == 0:
            task.recovery.recoveries += 1
            r2t.stat_sn = channel.connection.stat_sn
            channel.send(r2t)
            return
        task.suspend(tag)
        self._session.execution.advance(task)
