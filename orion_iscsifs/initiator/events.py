"""What the target says without being asked: Async Messages and Rejects (RFC 7143 §11.9, §11.17)."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.errors import ConnectionLost, OrionError, ProtocolViolation
from orion_iscsifs.initiator.connection import Connection
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.keys import Role
from orion_iscsifs.protocol.pdu import (
    BHS_BYTES,
    AsyncEvent,
    AsyncMessage,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    NopOut,
    Opcode,
    Pdu,
    Reject,
    RejectReason,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.protocol.states import (
    CONNECTION_NEXT,
    ConnectionEvent,
    ConnectionState,
    may,
)
from orion_iscsifs.protocol.text_negotiation import TextExchange
from orion_iscsifs.scsi.lun import decode_lun
from orion_iscsifs.scsi.sense import Status, decode_sense
from orion_iscsifs.scsi.verdict import Action, judge

if TYPE_CHECKING:
    from orion_iscsifs.initiator.session import Session

log = logging.getLogger(__name__)

_VENDOR_FIRST: Final = 248
_LOGOUT_TIMEOUT_S: Final = 5.0
_RETRIES_MAX: Final = 3
"""A command that has been damaged on its way so often is not sent again as it is."""
_FIN_TIMEOUT_S: Final = 2.0
_TEXT_TIMEOUT_S: Final = 15.0
_DRAIN_SHARE: Final = 0.5
"""How much of the time that the target grants is waited for commands to end."""

_ANSWERED_OTHERWISE: Final = frozenset({Opcode.DATA_OUT, Opcode.SNACK_REQUEST})
"""By the status of the command (§7.3); by `recovering`, out of turn."""

_COMMAND_STAYS: Final = frozenset(
    {
        # The logout settles what the target has not taken.
        RejectReason.WAITING_FOR_LOGOUT,
        # It was the second copy of a command that the target is carrying out.
        RejectReason.TASK_IN_PROGRESS,
    }
)

_REASONS: Final[Mapping[int, str]] = {
    RejectReason.DATA_DIGEST_ERROR: "data digest error",
    RejectReason.SNACK_REJECT: "SNACK reject",
    RejectReason.PROTOCOL_ERROR: "protocol error",
    RejectReason.COMMAND_NOT_SUPPORTED: "command not supported",
    RejectReason.IMMEDIATE_COMMAND_REJECT: "too many immediate commands",
    RejectReason.TASK_IN_PROGRESS: "task in progress",
    RejectReason.INVALID_DATA_ACK: "invalid data acknowledgment",
    RejectReason.INVALID_PDU_FIELD: "invalid PDU field",
    RejectReason.LONG_OPERATION_REJECT: "out of resources for a long operation",
    RejectReason.NEGOTIATION_RESET: "negotiation reset",
    RejectReason.WAITING_FOR_LOGOUT: "waiting for logout",
}
"""RFC 7143 §11.17.1."""


class Events:
    """Reactions of one session."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._reactions: dict[int, Callable[[Connection, AsyncMessage], None]] = {
            AsyncEvent.SCSI_EVENT: self._scsi_event,
            AsyncEvent.TARGET_REQUESTS_LOGOUT: self._logout_requested,
            AsyncEvent.TARGET_DROPS_CONNECTION: self._connection_dropped,
            AsyncEvent.TARGET_DROPS_ALL_CONNECTIONS: self._session_dropped,
            AsyncEvent.TARGET_REQUESTS_NEGOTIATION: self._negotiation_requested,
            AsyncEvent.TASKS_TERMINATED: self._tasks_terminated,
        }

    # -- Async Messages ----------------------------------------------------------------------

    def notify(self, connection: Connection, pdu: AsyncMessage) -> None:
        """Act on an Async Message; raises ProtocolViolation."""
        reaction = self._reactions.get(pdu.async_event)
        if reaction is not None:
            reaction(connection, pdu)
        elif pdu.async_event >= _VENDOR_FIRST:
            log.info("%s: vendor event %d", connection.peer, pdu.async_vcode)
        else:
            log.warning("%s: unknown async event %d", connection.peer, pdu.async_event)

    def _scsi_event(self, connection: Connection, pdu: AsyncMessage) -> None:
        length = int.from_bytes(pdu.data[:2], "big")
        sense = decode_sense(bytes(pdu.data[2 : 2 + length]))
        number = decode_lun(pdu.lun)
        log.warning("%s: LUN %s reports: %s", connection.peer, number, sense.describe())
        if judge(Status.CHECK_CONDITION, sense) is Action.RESCAN_LUNS:
            self._session.luns_changed()
        for listener in self._session.scsi_event_listeners:
            listener(pdu.lun, sense)

    def _logout_requested(self, connection: Connection, pdu: AsyncMessage) -> None:
        event = ConnectionEvent.LOGOUT_ASKED_FOR
        again = connection.state is not ConnectionState.LOGGED_IN
        if not may(CONNECTION_NEXT, Role.INITIATOR, connection.state, event):
            return
        connection.move(event)
        self._session.sort_connections()
        if not again:
            log.warning(
                "%s: the target asks for a logout within %d s", connection.peer, pdu.parameter3
            )
            self._session.supervisor.start(self._log_out, connection, pdu.parameter3)

    async def _log_out(self, connection: Connection, within_s: float) -> None:
        """Let the commands of the connection end, then close it in order (§11.9.1)."""
        session = self._session
        with trio.move_on_after(within_s * _DRAIN_SHARE):
            await connection.drained()
        if not may(
            CONNECTION_NEXT, Role.INITIATOR, connection.state, ConnectionEvent.LOGOUT_STARTED
        ):
            return  # It was lost meanwhile.
        connection.move(ConnectionEvent.LOGOUT_STARTED)
        request = LogoutRequest(
            session.next_tag(),
            LogoutReason.CLOSE_CONNECTION,
            connection.cid,
            cmd_sn=session.window.cmd_sn,
        )
        try:
            answer = await connection.request(request, _LOGOUT_TIMEOUT_S)
        except ConnectionLost as error:
            connection.fail(error)
            return
        if isinstance(answer, LogoutResponse) and answer.response == LogoutResponseCode.CLOSED:
            connection.move(ConnectionEvent.LOGOUT_SUCCEEDED)
            connection.logged_out = True
            # LIO does not like the next logout before it has closed this connection.
            with trio.move_on_after(_FIN_TIMEOUT_S):
                await trio.sleep_forever()
        connection.fail(ConnectionLost(f"{connection.peer}: logged out at the target's request"))

    def _connection_dropped(self, connection: Connection, pdu: AsyncMessage) -> None:
        for other in self._session.connections:
            if other.cid == pdu.parameter1:
                other.lost_for(pdu.parameter2, pdu.parameter3)
                other.fail(ConnectionLost(f"{other.peer}: the target drops connection {other.cid}"))

    def _session_dropped(self, connection: Connection, pdu: AsyncMessage) -> None:
        error = ConnectionLost(f"{connection.peer}: the target drops all connections")
        for other in self._session.connections:
            other.lost_for(pdu.parameter2, pdu.parameter3)
            other.fail(error)

    def _negotiation_requested(self, connection: Connection, pdu: AsyncMessage) -> None:
        self._session.supervisor.start(self._negotiate, connection)

    async def _negotiate(self, connection: Connection) -> None:
        """Ask the target what it wants; what both agree on holds from then on (§6.4)."""
        if connection.negotiating:
            return
        session, connection.negotiating = self._session, True
        exchange = TextExchange(
            initiator_task_tag=session.next_tag(), parameters=connection.parameters, immediate=True
        )
        request: TextRequest | None = exchange.start([])
        try:
            while request is not None:
                request.cmd_sn = session.window.cmd_sn
                answer = await connection.request(request, _TEXT_TIMEOUT_S)
                if not isinstance(answer, TextResponse):
                    reason = answer.reason if isinstance(answer, Reject) else 0
                    exchange.rejected(reason)
                    break
                request = exchange.receive(answer)
        except OrionError as error:
            connection.fail(error)
            return
        finally:
            connection.negotiating = False
        if exchange.failure is not None:
            log.warning("%s: the negotiation failed: %s", connection.peer, exchange.failure)
        connection.parameters = exchange.parameters
        for task in connection.tasks.values():
            if task.write is not None:
                task.write.parameters = exchange.parameters

    def _tasks_terminated(self, connection: Connection, pdu: AsyncMessage) -> None:
        """Only with TaskReporting=FastAbort, which is not offered (§13.23)."""
        raise ProtocolViolation(
            pdu.name, "event 5 although FastAbort was not negotiated", section="11.9.1"
        )

    # -- Rejects -----------------------------------------------------------------------------

    def rejected(self, connection: Connection, pdu: Reject) -> None:
        """Act on a Reject by its reason and by what was rejected; raises ProtocolViolation."""
        header = bytes(pdu.data[:BHS_BYTES])
        words = _REASONS.get(pdu.reason, "unknown reason")
        log.warning("%s: Reject %#04x (%s)", connection.peer, pdu.reason, words)
        if pdu.reason == RejectReason.NEGOTIATION_RESET:
            raise ProtocolViolation(pdu.name, "the deprecated reason 0b", section="11.17.1")
        if len(header) < BHS_BYTES:
            return
        opcode, tag = header[0] & 0x3F, int.from_bytes(header[16:20], "big")
        if opcode == Opcode.SCSI_COMMAND:
            task = connection.tasks.get(tag)
            if task is not None:
                self._command_rejected(connection, task, pdu.reason, words)
        elif opcode not in _ANSWERED_OTHERWISE and tag in connection.replies:
            connection.replies.pop(tag)(pdu)

    def _command_rejected(
        self, connection: Connection, task: Task, reason: int, words: str
    ) -> None:
        """The command never was: its CmdSN is a gap that has to be plugged (§7.3)."""
        session = self._session
        error = ProtocolViolation(
            Reject.name, f"the target rejects a SCSI Command: {words}", section="11.17.1"
        )
        if reason in _COMMAND_STAYS:
            return
        task.violations += 1
        if reason == RejectReason.DATA_DIGEST_ERROR and task.violations < _RETRIES_MAX:
            session.retry(task, connection)
            return
        self._plug(connection, task.cmd_sn)
        session.hold([task], error)
        session.pump()

    def _plug(self, connection: Connection, cmd_sn: int) -> None:
        """Use a CmdSN up with a ping, which does nothing else."""
        tag = self._session.next_tag()
        connection.replies[tag] = _ignore
        connection.queue(NopOut(tag, immediate=False, cmd_sn=cmd_sn))
        connection.push()


def _ignore(_: Pdu) -> None:
    """The answer to a plug says nothing."""
