"""The SCSI commands of a session: arrival, data, execution, answer (RFC 7143 §11.3, §11.4).

Everything here happens on the trio thread without waiting, except commands whose device has to
wait: those run in a task of their own. A batch of PDUs is handled, its answers are queued, and one
`flush` sends them.

`answer` has a short way and a careful one. The short way is ErrorRecoveryLevel 0 with one
connection, where an answer that was queued needs no further thought. Elsewhere it may have to be
kept for retransmission, to wait for a reassignment, or to wait behind a fence.
"""

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol.pdu import DataIn, DataOut, RejectReason, ScsiCommand
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import (
    LUN_NOT_SUPPORTED,
    POWER_ON,
    REPORTED_LUNS_CHANGED,
    SenseData,
)
from orion_iscsifs.target.access import Access
from orion_iscsifs.target.answers import answers
from orion_iscsifs.target.catalog import data_out_length, execute, execute_without_unit
from orion_iscsifs.target.mischief import answer_wrongly, arrive_wrongly, misbehave, send_r2t
from orion_iscsifs.target.reserving import CONFLICT
from orion_iscsifs.target.tasks import Recovery, Task
from orion_iscsifs.target.unit import LogicalUnit, Outcome, check_condition

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel
    from orion_iscsifs.target.session import Session

_IMMEDIATE_MAX: Final = 32
"""Immediate commands beyond the window that may be here at once."""
_CLEAR_OF_ATTENTION: Final = frozenset({OpCode.INQUIRY, OpCode.REPORT_LUNS, OpCode.REQUEST_SENSE})
"""These never report a unit attention as their status (SAM-5 §5.14)."""

_NO_ACCESS: Final = Access((), lambda _: None)
"""Of a discovery session, which has no commands."""


class Execution:
    """`attentions` are pending unit attention conditions by unit number."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._tasks = session.tasks
        self._stats = session.stats
        self._units = session.units
        self._faults = session.target.faults if session.target is not None else None
        self._access = session.target.access if session.target is not None else _NO_ACCESS
        self._write_room_bytes = session.limits.write_buffer_bytes_max
        self._tasks_max = session.limits.command_window + _IMMEDIATE_MAX
        self._recover = session.parameters.error_recovery_level > 0 and session.limits.recovery_r2ts
        self._keeping = session.parameters.error_recovery_level > 0
        self._short_way = not self._keeping and session.parameters.max_connections == 1
        self.running = 0
        """Commands that run in a task of their own."""
        self.attentions = {number: [POWER_ON] for number in session.units.by_number}

    def add_attention(self, number: int, attention: SenseData) -> None:
        """The next command to unit `number` is answered with `attention`."""
        pending = self.attentions.setdefault(number, [])
        if attention not in pending:
            pending.append(attention)

    # -- arrival -------------------------------------------------------------------------------

    def scsi_command(self, channel: "Channel", pdu: ScsiCommand) -> None:
        """A command has arrived; its data may, its turn in CmdSN order need not have."""
        session = self._session
        order = session.order
        if not pdu.immediate and (pdu.cmd_sn in order.held or not order.covers(pdu.cmd_sn)):
            return
        if session.discovery:
            channel.reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)
            return
        if self._faults and arrive_wrongly(channel, pdu, self._faults):
            return
        tag = pdu.initiator_task_tag
        if tag in self._tasks and not self._gives_way(tag):
            channel.reject(pdu, RejectReason.TASK_IN_PROGRESS)
            return
        if pdu.immediate and len(self._tasks) >= self._tasks_max:
            channel.reject(pdu, RejectReason.IMMEDIATE_COMMAND_REJECT)
            return
        task = Task(pdu, self._units.find(pdu.lun), channel)
        if self._keeping:
            task.memory = Recovery(asks_again=self._recover)
        self._tasks[tag] = task
        if pdu.write:
            self._expect_data(task, channel)
        order.take(channel, pdu)

    def _gives_way(self, tag: int) -> bool:
        """A command whose answer the initiator has had, though nobody acknowledged it."""
        old = self._tasks[tag]
        if old.channel is not None or old.recovery.outcome is None:
            return False
        self.retire(old)
        self._session.retransmission.release(old)
        return True

    def _expect_data(self, task: Task, channel: "Channel") -> None:
        pdu = task.pdu
        wanted = data_out_length(task.unit, pdu.cdb, pdu.expected_data_transfer_length)
        if type(wanted) is int:
            task.wanted_bytes = wanted
        elif type(wanted) is Outcome:
            task.failure = wanted
        task.begin_write(channel.parameters, self._write_room_bytes)
        self._write_room_bytes -= task.buffer_bytes

    def data_out(self, channel: "Channel", pdu: DataOut) -> None:
        placed = channel.was_placed(pdu)
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None or task.channel is not channel or not task.receive(pdu, placed=placed):
            self._stats.late_data_out += 1
        elif pdu.final:
            self.advance(task)

    # -- execution -----------------------------------------------------------------------------

    def begin(self, pdu: ScsiCommand) -> None:
        """The command's turn in CmdSN order."""
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None or task.pdu is not pdu:
            self._session.order.ended()  # aborted while it was held
            return
        opcode = pdu.cdb[0]
        self._stats.commands[opcode] += 1
        task.delivered = True
        unit = task.unit
        if unit is not None:
            reservations = unit.reservations
            if reservations.kind and reservations.conflicts(self._session.nexus, pdu.cdb):
                task.failure = CONFLICT
            if self._access.restricted:
                refusal = self._access.refuses(self._session.portal_group_tag, pdu.cdb)
                task.failure = refusal or task.failure
        if self.attentions:
            self._attend(task, opcode)
        if self._faults:
            assert task.channel is not None
            task.fault = self._faults.take(opcode, task.channel.cid)
            if task.fault is not None:
                misbehave(self._session, task, task.fault)
                return
        self.advance(task)

    def _attend(self, task: Task, opcode: int) -> None:
        """Report one unit attention; REPORT LUNS clears that of changed LUNs (SPC-4 §6.33)."""
        if opcode == OpCode.REPORT_LUNS:
            for number, pending in list(self.attentions.items()):
                self.attentions[number] = [a for a in pending if a != REPORTED_LUNS_CHANGED]
        if task.unit is None:
            return
        pending = self.attentions.get(task.unit.number, [])
        if pending and opcode not in _CLEAR_OF_ATTENTION:
            task.failure = check_condition(pending.pop(0))
        elif not pending:
            self.attentions.pop(task.unit.number, None)

    def forsake(self, unit: LogicalUnit) -> None:
        """`unit` is gone: what has not begun on it ends with LOGICAL UNIT NOT SUPPORTED."""
        self.attentions.pop(unit.number, None)
        for task in [t for t in self._tasks.values() if t.unit is unit and not t.started]:
            task.failure = task.failure or check_condition(LUN_NOT_SUPPORTED)
            # A fault that holds the command back lets it go when its time has come.
            if task.fault is None:
                self.advance(task)
        self._session.flush()

    def advance(self, task: Task) -> None:
        """Ask for more data, or carry the command out if all is here."""
        if task.aborted or task.started or not task.delivered:
            if task.doomed is not None and not task.bursts:
                task.doomed.set()
            return
        if not task.complete:
            self._ask_for_data(task)
            return
        task.started = True
        if task.failure is not None:
            self.answer(task, task.failure)
            return
        if task.unit is None:
            self.answer(task, execute_without_unit(self._units, task.pdu.cdb))
            return
        result = execute(self._session, task.unit, task.pdu.cdb, task.data)
        if type(result) is Outcome:
            self.answer(task, result)
        else:
            assert isinstance(result, Coroutine)
            task.scope, task.finished = trio.CancelScope(), trio.Event()
            self.running += 1
            task.unit.running += 1
            self._session.later(self._run, task, result)

    def _ask_for_data(self, task: Task) -> None:
        """R2Ts, as many as may be outstanding. None while no connection is there to answer."""
        channel, session = task.channel, self._session
        if channel is None or not channel.live:
            return
        while (r2t := task.next_r2t(session.next_tag, channel.parameters)) is not None:
            session.new_tag()
            if self._keeping:
                task.recovery.r2ts.append(r2t)
            r2t.stat_sn = channel.connection.stat_sn
            if task.fault is None:
                channel.send(r2t)
            else:
                send_r2t(channel, task, r2t)

    async def _run(self, task: Task, work: Coroutine[object, object, Outcome]) -> None:
        """A command that has to wait. Cancelled by an abort, it ends without an answer."""
        assert task.scope is not None
        assert task.finished is not None
        try:
            with task.scope:
                outcome = await work
                if not task.aborted:
                    self.answer(task, outcome)
                    if task.channel is not None:
                        task.channel.flush()
        finally:
            self.running -= 1
            if task.unit is not None:
                task.unit.ended()
            task.finished.set()

    # -- answers -------------------------------------------------------------------------------

    def answer(self, task: Task, outcome: Outcome) -> None:
        """Queue Data-In and status; the task is over, unless a fence keeps its answer back."""
        if not self._short_way or task.fault is not None:
            if not self._session.fence.holds(task, outcome):
                self.answer_now(task, outcome)
            return
        self.retire(task)
        channel = task.channel
        assert channel is not None
        for pdu in answers(task, outcome, channel.parameters):
            if type(pdu) is DataIn and not pdu.has_status:
                channel.send(pdu)
            else:
                channel.send_status(pdu)

    def answer_now(self, task: Task, outcome: Outcome) -> None:
        """The careful way, once no fence is in it."""
        session, channel = self._session, task.channel
        self.retire(task)
        if channel is None or not channel.live:
            session.retransmission.keep_for_reassignment(task, outcome)
        elif task.fault is not None:
            answer_wrongly(channel, task, outcome)
        else:
            session.retransmission.answer(channel, task, outcome)

    def retire(self, task: Task) -> None:
        """The task is over: its tag is free, its place in the window and its memory too."""
        tag = task.pdu.initiator_task_tag
        if self._tasks.get(tag) is task:
            del self._tasks[tag]
        if task.delivered and not task.released and not task.pdu.immediate:
            task.released = True
            self._session.order.ended()
        if task.buffer_bytes:
            self._write_room_bytes += task.buffer_bytes
            task.buffer_bytes = 0

    def abort(self, task: Task) -> trio.Event | None:
        """End a task without an answer; an event if it still runs and has to be waited for."""
        task.aborted = True
        self.retire(task)
        self._session.retransmission.release(task)
        if task.scope is None or task.finished is None or task.finished.is_set():
            return None
        task.scope.cancel()
        return task.finished
