"""What each PDU from the target means to its connection and session. No waiting anywhere.

StatSN moves on with every PDU that carries a status: SCSI Response, Data-In with S, the responses
to Text, Logout, task management and NOP-Out, Async Message and Reject. R2T and a NOP-In that the
target began carry the next StatSN without using it up (RFC 7143 §4.2.2.2, §11.8.3, §11.19.2).

This is ErrorRecoveryLevel 0, where a gap in any numbering ends the connection;
`recovering.RecoveringInbound` fills gaps.
"""

from collections.abc import Callable
from typing import Protocol

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    AsyncMessage,
    DataIn,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    ScsiResponse,
    TaskManagementResponse,
    TextResponse,
)
from orion_iscsifs.protocol.sequence import CommandWindow, StatusCounter
from orion_iscsifs.protocol.transfer import Burst

Reply = TextResponse | LogoutResponse | TaskManagementResponse | NopIn


class Owner(Protocol):
    """What a connection needs of its session."""

    window: CommandWindow
    tasks: dict[int, Task]
    """Commands in flight by Initiator Task Tag, on all connections, the oldest first."""

    @property
    def starved(self) -> bool:
        """Commands wait for a window that nothing in flight will open."""

    def task_done(self, task: Task) -> None:
        """The task's outcome is known."""

    def task_spoiled(self, task: Task) -> None:
        """The target has concluded the task, but its data can't be had: it has to start anew."""

    def task_late(self, task: Task) -> None:
        """The task has had no answer for its time."""

    def task_unacknowledged(self, task: Task) -> None:
        """The target has not taken the command, and has taken none behind it, for a while."""

    def window_moved(self) -> None:
        """More commands may be sent."""

    def next_tag(self) -> int:
        """An Initiator Task Tag that is not in use."""


class Link(Protocol):
    """What `Inbound` needs of its connection."""

    tasks: dict[int, Task]
    """Commands that are allegiant to this connection, by Initiator Task Tag."""
    ghosts: dict[int, None]
    """Tags of commands that are over without an answer: what still comes for them is dropped."""
    replies: dict[int, Callable[[Pdu], None]]
    """Who waits for the answer to another request than a SCSI command, by its tag."""

    def queue(self, pdu: Pdu) -> None: ...

    def queue_burst(self, burst: Burst) -> None: ...

    def remember(self, tag: int) -> None:
        """Make a ghost of a tag."""

    def notify(self, pdu: AsyncMessage) -> None:
        """The target sends an Async Message."""

    def rejected(self, pdu: Reject) -> None:
        """The target rejects what was sent to it."""


class Inbound:
    """Dispatches the PDUs received on one connection."""

    def __init__(self, owner: Owner, link: Link, exp_stat_sn: int) -> None:
        self._owner = owner
        self._link = link
        self._tasks = link.tasks
        self.status = StatusCounter(exp_stat_sn)
        self._handlers: dict[type, Callable[..., None]] = {
            DataIn: self._data_in,
            ScsiResponse: self._numbered,
            R2T: self._r2t,
            NopIn: self._nop_in,
            TextResponse: self._numbered,
            LogoutResponse: self._numbered,
            TaskManagementResponse: self._numbered,
            AsyncMessage: self._numbered,
            Reject: self._numbered,
        }
        self._conclusions: dict[type, Callable[..., None]] = {
            DataIn: self._conclude_with_data,
            ScsiResponse: self._scsi_response,
            NopIn: self._reply,
            TextResponse: self._reply,
            LogoutResponse: self._reply,
            TaskManagementResponse: self._reply,
            AsyncMessage: link.notify,
            Reject: link.rejected,
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
            self.blame(pdu.initiator_task_tag)
            raise

    def check(self, now: float) -> None:
        """Called now and then: whether something that was asked for stays away for too long."""

    def blame(self, initiator_task_tag: int) -> None:
        """The violation is in what the target sent for this command, if it is one."""
        task = self._tasks.get(initiator_task_tag)
        if task is not None:
            task.violations += 1

    # -- data --------------------------------------------------------------------------------

    def place(self, pdu: Pdu, length: int) -> memoryview | None:
        """Where a Data-In's data segment belongs: in its reader's own buffer (a framing Sink)."""
        if type(pdu) is not DataIn:
            return None
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None:
            self._stray(pdu)
            return None
        try:
            if task.read is None or task.read_into is None:
                raise _reads_nothing(pdu)
            offset = task.read.place(pdu, length)
        except ProtocolViolation:
            task.violations += 1
            raise
        return None if offset is None else task.read_into[offset : offset + length]

    def _stray(self, pdu: Pdu) -> None:
        """No command in flight here has this tag: fine after an abort, else a violation."""
        if pdu.initiator_task_tag not in self._link.ghosts:
            raise ProtocolViolation(
                pdu.name,
                f"no command here has the tag {pdu.initiator_task_tag:#x}",
                section="11.2.1.8",
            )

    def _data_in(self, pdu: DataIn) -> None:
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None:
            self._stray(pdu)
        elif not pdu.data:
            # A data segment of length 0 did not pass through place().
            if task.read is None:
                raise _reads_nothing(pdu)
            task.read.place(pdu, 0)
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        if pdu.has_status and self.status.advance(pdu.stat_sn, pdu.name) and task is not None:
            task.finish_with_data(pdu)
            self._owner.task_done(task)

    def _r2t(self, pdu: R2T) -> None:
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None:
            self._stray(pdu)
            return
        if task.write is None:
            raise ProtocolViolation(pdu.name, "for a command that writes nothing", section="11.8")
        burst = task.write.solicited(pdu)
        if burst is not None:
            self._link.queue_burst(burst)

    def _nop_in(self, pdu: NopIn) -> None:
        if pdu.initiator_task_tag != NO_TAG:
            if pdu.target_transfer_tag != NO_TAG:
                raise ProtocolViolation(pdu.name, "both an answer and a question", section="7.7")
            self._numbered(pdu)
            return
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        if pdu.target_transfer_tag != NO_TAG:
            # The target pings; StatSN is not used up and our answer asks for none.
            cmd_sn = self._owner.window.cmd_sn
            self._link.queue(NopOut(NO_TAG, pdu.target_transfer_tag, pdu.lun, cmd_sn=cmd_sn))

    # -- what carries a status ---------------------------------------------------------------

    def _numbered(self, pdu: Reply | ScsiResponse | AsyncMessage | Reject) -> None:
        fresh = self.status.advance(pdu.stat_sn, pdu.name)
        self._see_window(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        if fresh:
            self._conclusions[type(pdu)](pdu)

    def _conclude_with_data(self, pdu: DataIn) -> None:
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is not None:
            task.finish_with_data(pdu)
            self._owner.task_done(task)

    def _scsi_response(self, pdu: ScsiResponse) -> None:
        task = self._tasks.get(pdu.initiator_task_tag)
        if task is None:
            self._stray(pdu)
            return
        task.finish(pdu)
        self._owner.task_done(task)

    def _reply(self, pdu: Reply) -> None:
        handler = self._link.replies.pop(pdu.initiator_task_tag, None)
        if handler is not None:
            handler(pdu)
        elif pdu.initiator_task_tag not in self._link.ghosts:
            raise ProtocolViolation(
                pdu.name,
                f"no request here has the tag {pdu.initiator_task_tag:#x}",
                section="11.2.1.8",
            )

    def _see_window(self, exp_cmd_sn: int, max_cmd_sn: int) -> None:
        if self._owner.window.update(exp_cmd_sn, max_cmd_sn):
            self._owner.window_moved()


def _reads_nothing(pdu: Pdu) -> ProtocolViolation:
    return ProtocolViolation(pdu.name, "for a command that reads nothing", section="11.7")
