"""A session in full feature phase: CmdSN order, dispatch, answers (RFC 7143 §4.2.2, §11).

Everything here happens on the trio thread without waiting, except commands whose device has to
wait: those run in a task of their own. A batch of PDUs is handled, its answers are queued, and one
`flush` sends them.

The command window is real: MaxCmdSN moves by one when a command ends, so at most `command_window`
are here at once. A command ahead of ExpCmdSN is held until the gap fills; one outside the window
is ignored. One connection for now: `connection` is where a list would come.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Final

import trio

from orion_iscsifs.errors import ConnectionLost, ProtocolViolation
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.keys import DISCOVERY
from orion_iscsifs.protocol.login import TargetLogin
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    AsyncMessage,
    DataIn,
    DataOut,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    TaskManagementRequest,
    TaskManagementResponse,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import POWER_ON, SenseData
from orion_iscsifs.target.answers import answers, target_failure
from orion_iscsifs.target.catalog import data_out_length, execute, execute_without_unit
from orion_iscsifs.target.connection import Connection
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.management import manage
from orion_iscsifs.target.mischief import misbehave
from orion_iscsifs.target.registry import Stats, Target
from orion_iscsifs.target.settings import Limits
from orion_iscsifs.target.tasks import Task
from orion_iscsifs.target.texts import Directory, Texts
from orion_iscsifs.target.unit import Outcome, Units, check_condition

_IMMEDIATE_MAX: Final = 32
"""Immediate commands beyond the window that may be here at once."""
_DRAIN_TIMEOUT_S: Final = 5.0
_CLEAR_OF_ATTENTION: Final = frozenset({OpCode.INQUIRY, OpCode.REPORT_LUNS, OpCode.REQUEST_SENSE})
"""These never report a unit attention as their status (SAM-5 §5.14)."""

TargetPdu = (
    AsyncMessage
    | DataIn
    | LogoutResponse
    | NopIn
    | R2T
    | Reject
    | ScsiResponse
    | TaskManagementResponse
    | TextResponse
)
Sequenced = ScsiCommand | TaskManagementRequest | NopOut | TextRequest | LogoutRequest


class Session:
    """`target` is None in a discovery session."""

    def __init__(
        self,
        connection: Connection,
        login: TargetLogin,
        target: Target | None,
        *,
        limits: Limits,
        directory: Directory,
        stats: Stats,
    ) -> None:
        self.connection = connection
        self.target = target
        self.limits = limits
        self.parameters = login.parameters
        self.initiator_name = login.initiator_name
        self.isid = login.isid
        self.tsih = login.tsih
        self.portal_group_tag = login.parameters.target_portal_group_tag or 0
        # A name, an ISID and a portal group are one nexus (RFC 7143 §6.3.1): the same name and
        # ISID at another group are another session.
        self.nexus = (login.initiator_name, login.isid, self.portal_group_tag)
        self.stats = stats
        self.tasks: dict[int, Task] = {}
        self.exp_cmd_sn = login.cmd_sn
        self.max_cmd_sn = serial.add(login.cmd_sn, limits.command_window - 1)
        self.discovery = login.session_type == DISCOVERY
        self.units = target.units if target is not None else Units("", {}, 0)
        self._held: dict[int, Sequenced] = {}
        self._attentions = {number: [POWER_ON] for number in self.units.by_number}
        self._frozen_window: int | None = None
        """Commands that ended while a fault keeps MaxCmdSN where it is."""
        self.texts = Texts(connection, directory, login.parameters)
        self._next_tag = 0
        self._placed: Pdu | None = None
        """The Data-Out whose data segment the framer puts straight into its task's buffer."""
        self._logged_out = False
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        self._handlers: dict[type, Callable[..., None]] = {
            ScsiCommand: self._scsi_command,
            DataOut: self._data_out,
            NopOut: self._sequenced,
            TaskManagementRequest: self._sequenced,
            TextRequest: self._sequenced,
            LogoutRequest: self._sequenced,
            SnackRequest: self._snack,
        }

    # -- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until logout, a broken connection, or `end`."""
        connection = self.connection
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(connection.write_loop)
                    self._nursery.start_soon(self._keep_alive)
                    connection.flush()
                    await self._serve()
                    with trio.move_on_after(_DRAIN_TIMEOUT_S):
                        await connection.drain()
                    self._nursery.cancel_scope.cancel()
        finally:
            for task in self.tasks.values():
                task.aborted = True
            connection.close()
            if self.target is not None:
                self.target.forget(self)
            self._ended.set()

    async def end(self) -> None:
        """Close the connection and wait until no command of this session can write any more."""
        self.drop()
        await self._ended.wait()

    def drop(self) -> None:
        """Close the connection without a word."""
        self.connection.close()
        self._scope.cancel()

    async def _serve(self) -> None:
        connection = self.connection
        try:
            while not self._logged_out:
                for pdu in await connection.receive():
                    self._handle(pdu)
                    if self._logged_out or connection.closed:
                        break
                    if connection.queued_bytes > self.limits.send_queue_bytes_max:
                        await connection.drain()
                connection.flush()
        except ConnectionLost:
            pass
        except ProtocolViolation as error:
            # ErrorRecoveryLevel 0: the session ends, the initiator reinstates it (§7.1.5).
            self.stats.protocol_errors += 1
            self.stats.last_error = str(error)

    async def _keep_alive(self) -> None:
        """Ping a silent initiator; close when it stays silent."""
        connection, pinged = self.connection, False
        while True:
            await trio.sleep(self.limits.ping_interval_s)
            if connection.heard:
                connection.heard = pinged = False
            elif pinged:
                self.drop()
            else:
                pinged = True
                self.ping()

    # -- what tests and faults ask for ---------------------------------------------------------

    def ping(self) -> None:
        """A NOP-In that wants an answer."""
        self._send(NopIn(target_transfer_tag=self._new_tag(), stat_sn=self.connection.stat_sn))
        self.connection.flush()

    def send_async_message(
        self, event: int, parameters: tuple[int, int, int] = (0, 0, 0), *, vcode: int = 0
    ) -> None:
        """RFC 7143 §11.9. What the event announces is up to the caller."""
        self._send_status(AsyncMessage(event, vcode, *parameters))
        self.connection.flush()

    def add_attention(self, number: int, attention: SenseData) -> None:
        """The next command to unit `number` is answered with `attention`."""
        pending = self._attentions.setdefault(number, [])
        if attention not in pending:
            pending.append(attention)

    def freeze_window(self) -> None:
        """Commands that end no longer move MaxCmdSN."""
        if self._frozen_window is None:
            self._frozen_window = 0

    def thaw_window(self) -> None:
        """Give back what `freeze_window` kept, and tell the initiator with a NOP-In."""
        count, self._frozen_window = self._frozen_window or 0, None
        self.max_cmd_sn = serial.add(self.max_cmd_sn, count)
        self._send(NopIn(stat_sn=self.connection.stat_sn))
        self.connection.flush()

    # -- dispatch ------------------------------------------------------------------------------

    def place(self, pdu: Pdu, length: int) -> memoryview | None:
        """The framer asks where this data segment belongs."""
        if type(pdu) is not DataOut:
            return None
        task = self.tasks.get(pdu.initiator_task_tag)
        view = task.place(pdu, length) if task is not None else None
        self._placed = pdu if view is not None else None
        return view

    def _handle(self, pdu: Pdu) -> None:
        handler = self._handlers.get(type(pdu))
        if handler is None:
            self.reject(pdu, RejectReason.PROTOCOL_ERROR)
        else:
            handler(pdu)

    def _sequenced(self, pdu: Sequenced) -> None:
        """Deliver in CmdSN order; immediate ones at once (RFC 7143 §4.2.2.1)."""
        if pdu.immediate:
            self._deliver(pdu)
            return
        if not self._in_window(pdu.cmd_sn):
            return
        if pdu.cmd_sn != self.exp_cmd_sn:
            self._held.setdefault(pdu.cmd_sn, pdu)
            return
        following: Sequenced | None = pdu
        while following is not None and not self._logged_out:
            self.exp_cmd_sn = serial.add(self.exp_cmd_sn, 1)
            self._deliver(following)
            following = self._held.pop(self.exp_cmd_sn, None) if self._held else None

    def _in_window(self, cmd_sn: int) -> bool:
        """Neither old, nor beyond MaxCmdSN; everything else is silently ignored."""
        size = (self.max_cmd_sn - self.exp_cmd_sn + 1) & 0xFFFF_FFFF
        return (cmd_sn - self.exp_cmd_sn) & 0xFFFF_FFFF < size

    def _deliver(self, pdu: Sequenced) -> None:
        match pdu:
            case ScsiCommand():
                task = self.tasks.get(pdu.initiator_task_tag)
                if task is not None and task.pdu is pdu:
                    self._begin(task)
                else:
                    self._command_ended()  # aborted while it was held
                return
            case NopOut():
                self._nop_out(pdu)
            case TaskManagementRequest():
                manage(self, pdu)
            case TextRequest():
                self._text(pdu)
            case LogoutRequest():
                self._logout(pdu)
        if not pdu.immediate:
            self._command_ended()

    def _command_ended(self) -> None:
        """A non-immediate request left: there is room for another."""
        if self._frozen_window is None:
            self.max_cmd_sn = serial.add(self.max_cmd_sn, 1)
        else:
            self._frozen_window += 1

    # -- SCSI commands -------------------------------------------------------------------------

    def _scsi_command(self, pdu: ScsiCommand) -> None:
        """A command has arrived; its data may, its turn in CmdSN order need not have."""
        if not pdu.immediate and (pdu.cmd_sn in self._held or not self._in_window(pdu.cmd_sn)):
            return
        if self.discovery:
            self.reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)
            return
        if pdu.initiator_task_tag in self.tasks:
            self.reject(pdu, RejectReason.TASK_IN_PROGRESS)
            return
        if pdu.immediate and len(self.tasks) >= self.limits.command_window + _IMMEDIATE_MAX:
            self.reject(pdu, RejectReason.IMMEDIATE_COMMAND_REJECT)
            return
        task = Task(pdu, self.units.find(pdu.lun))
        self.tasks[pdu.initiator_task_tag] = task
        if pdu.write:
            wanted = data_out_length(task.unit, pdu.cdb, pdu.expected_data_transfer_length)
            if type(wanted) is int:
                task.wanted_bytes = wanted
            elif type(wanted) is Outcome:
                task.failure = wanted
            task.begin_write(self.parameters)
        self._sequenced(pdu)

    def _begin(self, task: Task) -> None:
        """The command's turn in CmdSN order."""
        opcode = task.pdu.cdb[0]
        self.stats.commands[opcode] += 1
        task.delivered = True
        unit = task.unit
        if unit is not None and self._attentions:
            pending = self._attentions.get(unit.number)
            if pending and opcode not in _CLEAR_OF_ATTENTION:
                task.failure = check_condition(pending.pop(0))
            elif not pending:
                self._attentions.pop(unit.number, None)
        faults = self.target.faults if self.target is not None else None
        if faults:
            task.fault = faults.take(opcode)
            if task.fault is not None:
                misbehave(self, task, task.fault)
                return
        self.advance(task)

    def advance(self, task: Task) -> None:
        """Ask for more data, or carry the command out if all is here."""
        if task.aborted or task.started or not task.delivered:
            return
        while (r2t := task.next_r2t(self._next_tag, self.parameters)) is not None:
            self._new_tag()
            r2t.stat_sn = self.connection.stat_sn
            self._send(r2t)
        if not task.complete:
            return
        task.started = True
        if task.failure is not None:
            self.answer(task, task.failure)
            return
        if task.unit is None:
            self.answer(task, execute_without_unit(self.units, task.pdu.cdb))
            return
        result = execute(task.unit, task.pdu.cdb, task.data)
        if type(result) is Outcome:
            self.answer(task, result)
        else:
            assert isinstance(result, Coroutine)
            assert self._nursery is not None
            task.scope, task.finished = trio.CancelScope(), trio.Event()
            self._nursery.start_soon(self._run, task, result)

    async def _run(self, task: Task, work: Coroutine[object, object, Outcome]) -> None:
        """A command that has to wait. Cancelled by an abort, it ends without an answer."""
        assert task.scope is not None
        assert task.finished is not None
        try:
            with task.scope:
                outcome = await work
                if not task.aborted:
                    self.answer(task, outcome)
                    self.connection.flush()
        finally:
            task.finished.set()

    def answer(self, task: Task, outcome: Outcome) -> None:
        """Queue Data-In and status; the task is over."""
        self.retire(task)
        spoil = None
        if task.fault is not None:
            if task.fault.act is Act.DROP_AFTER:
                self.drop()
                return
            if task.fault.act is Act.TARGET_FAILURE:
                self._send_status(target_failure(task))
                return
            spoil = task.fault.act
        for pdu in answers(task, outcome, self.parameters):
            if type(pdu) is DataIn and not pdu.has_status:
                self._send(pdu, spoil)
            else:
                self._send_status(pdu, spoil)

    def retire(self, task: Task) -> None:
        """The task is over: its tag is free, its place in the window too."""
        self.tasks.pop(task.pdu.initiator_task_tag, None)
        if task.delivered and not task.pdu.immediate:
            self._command_ended()

    def _data_out(self, pdu: DataOut) -> None:
        placed, self._placed = self._placed is pdu, None
        task = self.tasks.get(pdu.initiator_task_tag)
        if task is None or not task.receive(pdu, placed=placed):
            self.stats.late_data_out += 1
        elif pdu.final:
            self.advance(task)

    # -- other requests ------------------------------------------------------------------------

    def _nop_out(self, pdu: NopOut) -> None:
        """Echo a ping; an answer to ours (ITT ffffffff) needs nothing."""
        if pdu.initiator_task_tag == NO_TAG:
            return
        data = memoryview(pdu.data)[: self.parameters.max_send_data_segment_length]
        self._send_status(NopIn(pdu.initiator_task_tag, lun=pdu.lun, data=data))

    def _text(self, pdu: TextRequest) -> None:
        response = self.texts.receive(pdu)
        if response is None:
            self.reject(pdu, RejectReason.PROTOCOL_ERROR)
        else:
            self._send_status(response)
            self.parameters = self.texts.parameters

    def _logout(self, pdu: LogoutRequest) -> None:
        response = LogoutResponseCode.CLOSED
        if pdu.reason == LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY:
            response = LogoutResponseCode.RECOVERY_NOT_SUPPORTED
        elif pdu.reason == LogoutReason.CLOSE_CONNECTION and pdu.cid != self.connection.cid:
            response = LogoutResponseCode.CID_NOT_FOUND
        self._logged_out = response is LogoutResponseCode.CLOSED
        if self._logged_out:
            for task in list(self.tasks.values()):
                self.abort(task)
        self._send_status(LogoutResponse(pdu.initiator_task_tag, response))

    def _snack(self, pdu: SnackRequest) -> None:
        """ErrorRecoveryLevel 0 knows no SNACK (RFC 7143 §11.16)."""
        self.reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)

    def reject(self, pdu: Pdu, reason: RejectReason) -> None:
        """A Reject with the header of what is rejected (RFC 7143 §11.17)."""
        self.stats.rejects += 1
        header = pdu.pack(len(pdu.ahs) >> 2, len(pdu.data)) + bytes(pdu.ahs)
        self._send_status(Reject(reason, data=header))

    # -- what task management needs ------------------------------------------------------------

    def abort(self, task: Task) -> trio.Event | None:
        """End a task without an answer; an event if it still runs and has to be waited for."""
        task.aborted = True
        self.retire(task)
        if task.scope is None or task.finished is None:
            return None
        task.scope.cancel()
        return task.finished

    def plug(self, cmd_sn: int, before: int) -> bool:
        """Take a CmdSN in the window as received, though its command never came (§11.6.1)."""
        if not self._in_window(cmd_sn) or not serial.less(cmd_sn, before):
            return False
        # A NOP-Out that wants no answer: it fills the gap and does nothing.
        self._sequenced(NopOut(immediate=False, cmd_sn=cmd_sn))
        return True

    def respond(self, pdu: TaskManagementResponse) -> None:
        self._send_status(pdu)

    def later(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run something that waits beside the reader; it ends with the session."""
        assert self._nursery is not None
        self._nursery.start_soon(function, *arguments)

    # -- sending -------------------------------------------------------------------------------

    def _send(self, pdu: TargetPdu, spoil: Act | None = None) -> None:
        pdu.exp_cmd_sn, pdu.max_cmd_sn = self.exp_cmd_sn, self.max_cmd_sn
        self.connection.send(pdu, spoil)

    def _send_status(self, pdu: TargetPdu, spoil: Act | None = None) -> None:
        """A PDU that takes a StatSN."""
        connection = self.connection
        pdu.stat_sn = connection.stat_sn
        connection.stat_sn = (pdu.stat_sn + 1) & 0xFFFF_FFFF
        pdu.exp_cmd_sn, pdu.max_cmd_sn = self.exp_cmd_sn, self.max_cmd_sn
        connection.send(pdu, spoil)

    def _new_tag(self) -> int:
        """A Target Transfer Tag; ffffffff is reserved."""
        tag = self._next_tag
        self._next_tag = (tag + 1) % NO_TAG
        return tag
