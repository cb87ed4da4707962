"""Task management: what an initiator does about commands that take too long, or lost their place.

Theory of operation
-------------------
A command that stays without an answer for `command_timeout` climbs a ladder (RFC 7143 §7.11):

    its 1st time-out    QUERY TASK (RFC 7144, if negotiated), ABORT TASK
    its 2nd             LOGICAL UNIT RESET, which ends all commands of the unit
    its 3rd             a new session; and it fails

A rung that gets no answer, or a refusal, leads straight to the next one. After a rung has worked,
the target can't carry the command out any more, so it is issued anew, under another tag: a tag is
never used again while a late answer may come. R2Ts are answered until the target confirms the
abort (§11.5.1).

At ErrorRecoveryLevel 2, TASK REASSIGN moves a command to another connection (§7.2.2). All of these
are immediate commands.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.initiator.connection import CommandTimedOut, Connection
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    Pdu,
    Reject,
    RejectReason,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.protocol.recovery import RecoveringRead, RecoveringWrite

if TYPE_CHECKING:
    from orion_iscsifs.initiator.session import Session

log = logging.getLogger(__name__)

Function = TaskManagementFunction
Code = TmfResponseCode

QUERY_PROTOCOL_LEVEL: Final = 2
"""iSCSIProtocolLevel from which on the QUERY functions exist (RFC 7144 §6.1)."""
_ANSWER_TIMEOUT_MAX_S: Final = 15.0
_REJECTS_MAX: Final = 3
_REJECT_PAUSE_S: Final = 0.2
_OF_ONE_UNIT: Final = frozenset(
    {
        Function.ABORT_TASK,
        Function.ABORT_TASK_SET,
        Function.CLEAR_ACA,
        Function.CLEAR_TASK_SET,
        Function.LOGICAL_UNIT_RESET,
        Function.QUERY_TASK,
        Function.QUERY_TASK_SET,
        Function.QUERY_ASYNC_EVENT,
    }
)
"""Functions whose LUN field is not reserved (§11.5.3, RFC 7144 §5)."""


class TaskManager:
    """Task management requests of one session."""

    def __init__(self, session: "Session") -> None:
        self._session = session

    async def manage(
        self, function: Function, *, lun: int = 0, task: Task | None = None
    ) -> int | None:
        """Ask for a function; the Response code, None if the target refuses even to answer.

        `lun` is the 64-bit LUN field, `task` the command that ABORT TASK and QUERY TASK refer to.
        Raises ConnectionLost when no answer comes.
        """
        tag = None if task is None else task.initiator_task_tag
        for _ in range(_REJECTS_MAX):
            if task is not None and task.initiator_task_tag != tag:
                break  # It has been issued anew meanwhile, and that one is none of ours.
            connection = self._place(task)
            answer = await connection.request(
                self._request(function, lun, task), self._answer_timeout_s
            )
            if isinstance(answer, TaskManagementResponse):
                return answer.response
            if not isinstance(answer, Reject):
                break
            if answer.reason != RejectReason.IMMEDIATE_COMMAND_REJECT:
                break
            await trio.sleep(_REJECT_PAUSE_S)
        return None

    def _place(self, task: Task | None) -> Connection:
        """ABORT TASK goes to the connection of its task (§11.5.1), the rest anywhere."""
        if task is not None and task.connection is not None:
            return task.connection
        connection = next((one for one in self._session.connections if one.takes_commands), None)
        if connection is None:
            raise ConnectionLost(f"{self._session.portal}: no connection")
        return connection

    def _request(self, function: Function, lun: int, task: Task | None) -> TaskManagementRequest:
        session = self._session
        session.counters.task_management += 1
        return TaskManagementRequest(
            function,
            session.next_tag(),
            lun if function in _OF_ONE_UNIT else 0,
            NO_TAG if task is None else task.initiator_task_tag,
            cmd_sn=session.window.cmd_sn,
            ref_cmd_sn=0 if task is None else task.cmd_sn,
        )

    @property
    def _answer_timeout_s(self) -> float:
        return min(
            self._session.nexus.config.command_timeout_s or _ANSWER_TIMEOUT_MAX_S,
            _ANSWER_TIMEOUT_MAX_S,
        )

    # -- commands that take too long ---------------------------------------------------------

    def task_late(self, task: Task) -> None:
        """`task` has had no answer in its time; called again until that has had its effect."""
        if not task.climbing:
            task.climbing = True
            task.timeouts += 1
            self._session.supervisor.start(self._climb, task)

    async def _climb(self, task: Task) -> None:
        session = self._session
        tag, connection = task.initiator_task_tag, task.connection
        error = CommandTimedOut(
            f"{session.portal}: a command got no answer for"
            f" {session.nexus.config.command_timeout_s * task.patience:g} s"
        )
        rungs: tuple[Callable[[Task], Awaitable[bool]], ...] = (self._abort_task, self._reset_unit)
        for rung in rungs[task.timeouts - 1 :]:
            try:
                ended = await rung(task)
            except ConnectionLost as silence:
                log.warning("%s", silence)
                ended = False
            if session.tasks.get(tag) is not task:
                return  # It has been answered after all, or is over in another way.
            if task.connection is not connection or connection is None or connection.is_ending:
                return  # Its connection was lost: what comes of it is not ours to say.
            if ended:
                log.warning("%s: it was ended (%s)", error, rung.__name__.strip("_"))
                session.hold([task], error)
                session.pump()
                return
        session.supervisor.end(error)

    async def _abort_task(self, task: Task) -> bool:
        session, tag = self._session, task.initiator_task_tag
        if session.parameters.iscsi_protocol_level >= QUERY_PROTOCOL_LEVEL:
            code = await self.manage(Function.QUERY_TASK, lun=task.lun, task=task)
            if session.tasks.get(tag) is not task:
                return False
            taken = serial.less(task.cmd_sn, session.window.exp_cmd_sn)
            if code == Code.FUNCTION_COMPLETE and taken:
                return True  # It is not there: it was carried out, and its answer got lost.
            # An abort also fills the gap that a command leaves which has never arrived (§7.11).
        code = await self.manage(Function.ABORT_TASK, lun=task.lun, task=task)
        return code in (Code.FUNCTION_COMPLETE, Code.TASK_DOES_NOT_EXIST)

    async def _reset_unit(self, task: Task) -> bool:
        session = self._session
        affected = [
            other
            for connection in session.connections
            for other in connection.tasks.values()
            if other.lun == task.lun
        ]  # not those of a lost connection: the cleanup after it settles them
        code = await self.manage(Function.LOGICAL_UNIT_RESET, lun=task.lun)
        if code != Code.FUNCTION_COMPLETE:
            return False
        reset = ConnectionLost(f"{session.portal}: the logical unit was reset")
        left = [
            other
            for other in affected
            if other is not task
            and session.tasks.get(other.initiator_task_tag) is other
            and other.connection in session.connections
        ]
        session.hold(left, reset)
        return True

    # -- commands that lost their connection -------------------------------------------------

    def reassign(self, task: Task, connection: Connection) -> None:
        """TASK REASSIGN: go on with `task` on `connection` (§7.2.2, §11.5.6).

        The task belongs to the new connection at once: what the target sends for it may follow
        its response immediately.
        """
        session = self._session
        exp_data_sn = 0
        if isinstance(task.read, RecoveringRead):
            exp_data_sn = task.read.resume()
        if isinstance(task.write, RecoveringWrite):
            task.write.resume()
            task.write.parameters = connection.parameters
        assert task.connection is not None
        task.connection.release(task)
        connection.adopt(task)
        task.started_at = trio.current_time()
        task.climbing = False
        session.counters.commands_reassigned += 1
        request = self._request(Function.TASK_REASSIGN, 0, task)
        request.ref_cmd_sn, request.exp_data_sn = 0, exp_data_sn
        connection.replies[request.initiator_task_tag] = partial(
            self._reassigned, task, task.initiator_task_tag
        )
        connection.queue(request)

    def _reassigned(self, task: Task, tag: int, answer: Pdu) -> None:
        session = self._session
        if session.tasks.get(tag) is not task:
            return
        code = answer.response if isinstance(answer, TaskManagementResponse) else None
        match code:
            case Code.FUNCTION_COMPLETE | Code.FUNCTION_REJECTED:
                # LIO says 255 when it means 0: what follows shows it, and else the time-out.
                pass
            case Code.TASK_DOES_NOT_EXIST:
                session.hold([task], ConnectionLost(f"{session.portal}: a command was forgotten"))
                session.pump()
            case _:
                # The old command may still be carried out: only a new session excludes that.
                session.supervisor.end(
                    ConnectionLost(f"{session.portal}: TASK REASSIGN was refused (response {code})")
                )
