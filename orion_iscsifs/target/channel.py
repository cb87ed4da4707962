"""One connection of a session in full feature phase (RFC 7143 §4.2.2.2, §8.1).

A `Channel` is what a session knows of a `Connection`: its CID, its own parameters, its StatSN and
what of it is not acknowledged, its text exchange, its pings, its state. PDUs that arrive go to the
session's parts; whatever answers them is sent on the channel that it belongs to (connection
allegiance).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.errors import ConnectionLost, DigestError, ProtocolViolation
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.framing import Damaged
from orion_iscsifs.protocol.keys import Role
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    AsyncMessage,
    DataIn,
    DataOut,
    LogoutRequest,
    LogoutResponse,
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
from orion_iscsifs.protocol.states import (
    CONNECTION_NEXT,
    ConnectionEvent,
    ConnectionState,
    connection_next,
    may,
)
from orion_iscsifs.target.connection import Connection
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.tasks import Task
from orion_iscsifs.target.texts import Texts

if TYPE_CHECKING:
    from orion_iscsifs.target.session import Session

_DRAIN_TIMEOUT_S: Final = 5.0
_KEPT_MAX: Final = 1024
"""Answers of one connection that wait for their acknowledgment."""
_ANSWERED: Final = frozenset({ConnectionState.LOGGED_IN, ConnectionState.LOGOUT_REQUESTED})

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


@dataclass(slots=True)
class Kept:
    """A numbered answer that the initiator has not acknowledged, and the command it ended."""

    pdu: TargetPdu
    task: Task | None


class Channel:
    """`cid` and `parameters` are this connection's; session-wide ones are repeated in them."""

    def __init__(self, session: "Session", connection: Connection, texts: Texts) -> None:
        self.session = session
        self.connection = connection
        self.cid = connection.cid
        self.parameters = texts.parameters
        self.texts = texts
        self.state = ConnectionState.LOGGED_IN
        self.live = True
        """In full feature phase, as far as anybody knows."""
        self.logged_out = False
        agreed = session.parameters
        self.times_s = (agreed.default_time2wait, agreed.default_time2retain)
        """Time2Wait and Time2Retain once the connection is gone; an Async Message changes them."""
        self.acknowledged = connection.stat_sn
        """ExpStatSN: every StatSN before it has arrived."""
        self.kept: deque[Kept] = deque()
        """Unacknowledged answers, oldest first (ErrorRecoveryLevel 1 and 2)."""
        self.finished: dict[int, Task] = {}
        """The commands among them by Initiator Task Tag."""
        self.acknowledgment = trio.Event()
        """Set and replaced whenever ExpStatSN moves and somebody may wait for it."""
        self.text_requests = 0
        """How many have come, for who waits for one."""
        self._order = session.order
        self._placed: Pdu | None = None
        """The Data-Out whose data segment the framer puts straight into its task's buffer."""
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        execution, keeping = session.execution, agreed.error_recovery_level > 0
        self._keeping = keeping
        self._tracking = keeping or agreed.max_connections > 1
        take = session.order.take
        self._handlers: dict[type, Callable[..., None]] = {
            ScsiCommand: execution.scsi_command,
            DataOut: execution.data_out,
            NopOut: take,
            TaskManagementRequest: take,
            TextRequest: take,
            LogoutRequest: take,
            SnackRequest: session.retransmission.snack,
            Damaged: session.retransmission.damaged,
        }

    # -- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """For the task of this connection; that of the leading one keeps the session going."""
        await self.session.run(self)

    async def serve(self) -> None:
        """Until logout, a broken connection, or `drop`."""
        connection = self.connection
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.write_loop)
                    nursery.start_soon(self._keep_alive)
                    connection.flush()
                    with self._reading:
                        await self._receive()
                    with trio.move_on_after(_DRAIN_TIMEOUT_S):
                        await connection.drain()
                    nursery.cancel_scope.cancel()
        finally:
            connection.close()
            self.session.left(self)

    async def _receive(self) -> None:
        connection, session, handlers = self.connection, self.session, self._handlers
        tracking, queue_max = self._tracking, session.limits.send_queue_bytes_max
        try:
            while not self.logged_out:
                for pdu in await connection.receive():
                    if tracking:
                        self._note_acknowledgment(pdu)
                    handler = handlers.get(type(pdu))
                    if handler is None:
                        self.reject(pdu, RejectReason.PROTOCOL_ERROR)
                    else:
                        handler(self, pdu)
                    if connection.queued_bytes > queue_max:
                        await connection.drain()
                    if self.logged_out or connection.closed:
                        break
                connection.flush()
                if tracking:
                    session.flush()
        except ConnectionLost:
            pass
        except ProtocolViolation as error:
            session.stats.protocol_errors += 1
            session.stats.last_error = str(error)
            # A damaged header costs the connection (§7.8), a format error the session (§7.7).
            if not isinstance(error, DigestError):
                session.kill()

    async def _keep_alive(self) -> None:
        """Ping a silent initiator; close when it stays silent."""
        connection, pinged = self.connection, False
        while True:
            await trio.sleep(self.session.limits.ping_interval_s)
            if connection.heard:
                connection.heard = pinged = False
            elif pinged:
                self.drop()
            else:
                pinged = True
                self.ping()

    def drop(self) -> None:
        """Close the connection without a word."""
        self.connection.close()
        self._scope.cancel()

    def log_out(self) -> None:
        """End in peace: what is queued is still sent."""
        self.logged_out = True
        self.happened(ConnectionEvent.LOGOUT_SUCCEEDED, ConnectionEvent.SESSION_CLOSED)
        self._reading.cancel()

    def ask_for_logout(self) -> None:
        """An Async Message has asked for a logout (T11)."""
        self.happened(ConnectionEvent.LOGOUT_ASKED_FOR)

    def happened(self, *events: ConnectionEvent) -> bool:
        """Move to the state after the first of `events` that can happen now (§8.1)."""
        for event in events:
            if may(CONNECTION_NEXT, Role.TARGET, self.state, event):
                self.state = connection_next(Role.TARGET, self.state, event)
                self.live = self.state in _ANSWERED
                return True
        return False

    # -- receiving -----------------------------------------------------------------------------

    def place(self, pdu: Pdu, length: int) -> memoryview | None:
        """The framer asks where this data segment belongs."""
        if type(pdu) is not DataOut:
            return None
        task = self.session.tasks.get(pdu.initiator_task_tag)
        view = task.place(pdu, length) if task is not None and task.channel is self else None
        self._placed = pdu if view is not None else None
        return view

    def was_placed(self, pdu: Pdu) -> bool:
        """Whether the data segment of `pdu` is already where `place` said."""
        placed, self._placed = self._placed is pdu, None
        return placed

    def _note_acknowledgment(self, pdu: Pdu) -> None:
        # In a Logout Request for another connection, ExpStatSN is that connection's (§11.14.4).
        if type(pdu) is not LogoutRequest or pdu.cid == self.cid or pdu.reason == 0:
            self.acknowledge(getattr(pdu, "exp_stat_sn", self.acknowledged))

    def acknowledge(self, exp_stat_sn: int) -> None:
        """Everything before ExpStatSN has arrived (§4.2.2.2); nonsense is ignored."""
        if exp_stat_sn == self.acknowledged or not serial.less(self.acknowledged, exp_stat_sn):
            return
        if serial.less(self.connection.stat_sn, exp_stat_sn):
            return
        self.acknowledged = exp_stat_sn
        kept = self.kept
        while kept and serial.less(kept[0].pdu.stat_sn, exp_stat_sn):
            self._forget(kept.popleft())
        self.acknowledgment.set()
        self.acknowledgment = trio.Event()

    def _forget(self, kept: Kept) -> None:
        task = kept.task
        if task is None:
            self.session.retransmission.kept_bytes -= len(kept.pdu.data)
            return
        if task.channel is self:  # else it waits for a reassignment, or had one
            self.session.retransmission.release(task)
        if self.finished.get(task.pdu.initiator_task_tag) is task:
            del self.finished[task.pdu.initiator_task_tag]

    def forget_answers(self) -> None:
        """No answer of this connection will be asked for again."""
        while self.kept:
            self._forget(self.kept.popleft())

    # -- sending -------------------------------------------------------------------------------

    def send(self, pdu: TargetPdu, spoil: Act | None = None) -> None:
        """Queue a PDU without a number of its own; lost when the connection is."""
        order = self._order
        pdu.exp_cmd_sn, pdu.max_cmd_sn = order.exp_cmd_sn, order.max_cmd_sn
        self.connection.send(pdu, spoil)

    def send_status(
        self, pdu: TargetPdu, spoil: Act | None = None, *, task: Task | None = None
    ) -> None:
        """Queue a PDU that takes a StatSN; `task` is the command that it ends."""
        if self._keeping:
            self.number(pdu, task)
        else:
            connection, order = self.connection, self._order
            pdu.stat_sn = connection.stat_sn
            connection.stat_sn = (pdu.stat_sn + 1) & 0xFFFF_FFFF
            pdu.exp_cmd_sn, pdu.max_cmd_sn = order.exp_cmd_sn, order.max_cmd_sn
        self.connection.send(pdu, spoil)

    def number(self, pdu: TargetPdu, task: Task | None = None) -> None:
        """Give a PDU its StatSN, and keep it where it may be asked for again."""
        connection, order = self.connection, self._order
        pdu.stat_sn = connection.stat_sn
        connection.stat_sn = (pdu.stat_sn + 1) & 0xFFFF_FFFF
        pdu.exp_cmd_sn, pdu.max_cmd_sn = order.exp_cmd_sn, order.max_cmd_sn
        if self._keeping:
            self.kept.append(Kept(pdu, task))
            if task is not None:
                self.finished[task.pdu.initiator_task_tag] = task
            else:
                self.session.retransmission.kept_bytes += len(pdu.data)
            while len(self.kept) > _KEPT_MAX or (
                self.session.retransmission.overfull and len(self.kept) > 1
            ):
                self._forget(self.kept.popleft())

    def flush(self) -> None:
        self.connection.flush()

    def ping(self) -> None:
        """A NOP-In that wants an answer."""
        tag = self.session.new_tag()
        self.send(NopIn(target_transfer_tag=tag, stat_sn=self.connection.stat_sn))
        self.flush()

    def report_window(self) -> None:
        """A NOP-In that wants no answer; it tells MaxCmdSN."""
        self.send(NopIn(stat_sn=self.connection.stat_sn))
        self.flush()

    def reject(self, pdu: Pdu, reason: int, data_sn: int = 0) -> None:
        """A Reject with the header of what is rejected (RFC 7143 §11.17)."""
        self.session.stats.rejects += 1
        header = pdu.pack(len(pdu.ahs) >> 2, len(pdu.data)) + bytes(pdu.ahs)
        self.send_status(Reject(reason, data_sn=data_sn, data=header))

    def nop_out(self, pdu: NopOut) -> None:
        """Echo a ping; an answer to ours (ITT ffffffff) needs nothing."""
        if pdu.initiator_task_tag == NO_TAG:
            return
        data = memoryview(pdu.data)[: self.parameters.max_send_data_segment_length]
        self.send_status(NopIn(pdu.initiator_task_tag, lun=pdu.lun, data=data))

    def text(self, pdu: TextRequest) -> None:
        self.text_requests += 1
        response = self.texts.receive(pdu)
        if response is None:
            self.reject(pdu, RejectReason.PROTOCOL_ERROR)
        else:
            self.send_status(response)
            self.parameters = self.texts.parameters
