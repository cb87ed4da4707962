"""What each PDU from the target means to its connection and session. No waiting anywhere.

StatSN moves on with every PDU that carries a status: SCSI Response, Data-In with S, the responses
to Text, Logout and NOP-Out, Async Message and Reject. R2T and a NOP-In that the target began carry
the next StatSN without using it up (RFC 7143 §4.2.2.2, §11.8.3, §11.19.2).
"""

from collections.abc import Callable
from typing import Protocol

from orion_iscsifs.errors import ConnectionLost, ProtocolViolation
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    AsyncEvent,
    AsyncMessage,
    DataIn,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    ScsiResponse,
    TextResponse,
)
from orion_iscsifs.protocol.sequence import CommandWindow, StatusCounter
from orion_iscsifs.protocol.transfer import Burst


class Owner(Protocol):
    """What a connection needs of its session."""

    window: CommandWindow
    tasks: dict[int, Task]
    """Commands in flight by Initiator Task Tag, the oldest first."""

    @property
    def starved(self) -> bool:
        """Commands wait for a window that nothing in flight will open."""

    def task_done(self, task: Task) -> None:
        """The task's outcome is known."""

    def window_moved(self) -> None:
        """More commands may be sent."""

    def next_tag(self) -> int:
        """An Initiator Task Tag that is not in use."""


class Inbound:
    """Dispatches received PDUs. `send` and `send_burst` queue answers; `peer` is for messages."""

    def __init__(
        self,
        owner: Owner,
        exp_stat_sn: int,
        send: Callable[[Pdu], None],
        send_burst: Callable[[Burst], None],
        peer: str,
    ) -> None:
        self._owner = owner
        self._send = send
        self._send_burst = send_burst
        self._peer = peer
        self.status = StatusCounter(exp_stat_sn)
        self.replies: dict[int, Callable[[Pdu], None]] = {}
        """Who waits for the answer to a Text, Logout or NOP-Out request, by its tag."""
        self._handlers: dict[type, Callable[..., None]] = {
            DataIn: self._data_in,
            ScsiResponse: self._scsi_response,
            R2T: self._r2t,
            NopIn: self._nop_in,
            TextResponse: self._reply,
            LogoutResponse: self._reply,
            AsyncMessage: self._async_message,
            Reject: self._reject,
        }

    def handle(self, pdu: Pdu) -> None:
        """Take one PDU; raises ProtocolViolation or ConnectionLost to end the connection."""
        handler = self._handlers.get(type(pdu))
        if handler is None:
            raise ProtocolViolation(
                pdu.name, "has no place in the full-feature phase", section="11.1"
            )
        try:
            handler(pdu)
        except ProtocolViolation:
            self._blame(pdu.initiator_task_tag)
            raise

    def _blame(self, initiator_task_tag: int) -> None:
        """The violation is in what the target sent for this command, if it is one."""
        task = self._owner.tasks.get(initiator_task_tag)
        if task is not None:
            task.violations += 1

    def place(self, pdu: Pdu, length: int) -> memoryview | None:
        """Where a Data-In's data segment belongs: in its reader's own buffer (a framing Sink)."""
        if type(pdu) is not DataIn:
            return None
        task = self._task(pdu)
        try:
            if task.read is None or task.read_into is None:
                raise ProtocolViolation(
                    pdu.name, "for a command that reads nothing", section="11.7"
                )
            offset = task.read.place(pdu, length)
        except ProtocolViolation:
            task.violations += 1
            raise
        return task.read_into[offset : offset + length]

    def _task(self, pdu: Pdu) -> Task:
        task = self._owner.tasks.get(pdu.initiator_task_tag)
        if task is None:
            raise ProtocolViolation(
                pdu.name, f"no command has the tag {pdu.initiator_task_tag:#x}", section="11.2.1.8"
            )
        return task

    def _data_in(self, pdu: DataIn) -> None:
        task = self._task(pdu)
        if not pdu.data:
            # A data segment of length 0 did not pass through place().
            if task.read is None:
                raise ProtocolViolation(
                    pdu.name, "for a command that reads nothing", section="11.7"
                )
            task.read.place(pdu, 0)
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        if pdu.has_status and self.status.advance(pdu.stat_sn, pdu.name):
            task.finish_with_data(pdu)
            self._owner.task_done(task)

    def _scsi_response(self, pdu: ScsiResponse) -> None:
        fresh = self.status.advance(pdu.stat_sn, pdu.name)
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        if fresh:
            task = self._task(pdu)
            task.finish(pdu)
            self._owner.task_done(task)

    def _r2t(self, pdu: R2T) -> None:
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        task = self._task(pdu)
        if task.write is None:
            raise ProtocolViolation(pdu.name, "for a command that writes nothing", section="11.8")
        self._send_burst(task.write.solicited(pdu))

    def _nop_in(self, pdu: NopIn) -> None:
        if pdu.target_transfer_tag != NO_TAG:
            # The target pings; StatSN is not used up and our answer asks for none.
            self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
            cmd_sn = self._owner.window.cmd_sn
            self._send(NopOut(NO_TAG, pdu.target_transfer_tag, pdu.lun, cmd_sn=cmd_sn))
        elif pdu.initiator_task_tag != NO_TAG:
            self._reply(pdu)
        else:
            self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)

    def _reply(self, pdu: TextResponse | LogoutResponse | NopIn) -> None:
        fresh = self.status.advance(pdu.stat_sn, pdu.name)
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        handler = self.replies.pop(pdu.initiator_task_tag, None)
        if fresh and handler is None:
            raise ProtocolViolation(
                pdu.name, f"no request has the tag {pdu.initiator_task_tag:#x}", section="11.2.1.8"
            )
        if fresh and handler is not None:
            handler(pdu)

    def _async_message(self, pdu: AsyncMessage) -> None:
        self.status.advance(pdu.stat_sn, pdu.name)
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        event = pdu.async_event
        if event == AsyncEvent.SCSI_EVENT or event > AsyncEvent.TASKS_TERMINATED:
            return
        # Every other event asks for a new login or brings one about (§11.9.1).
        raise ConnectionLost(f"{self._peer}: the target ends the connection (async event {event})")

    def _reject(self, pdu: Reject) -> None:
        self.status.advance(pdu.stat_sn, pdu.name)
        # Its data is the header of what was rejected, with that command's tag (§11.17.4).
        self._blame(int.from_bytes(pdu.data[16:20], "big"))
        raise ProtocolViolation(
            pdu.name, f"the target rejected a PDU, reason {pdu.reason:#04x}", section="11.17.1"
        )

    def _see_window(self, exp_cmd_sn: int, max_cmd_sn: int) -> None:
        if self._owner.window.update(exp_cmd_sn, max_cmd_sn):
            self._owner.window_moved()
