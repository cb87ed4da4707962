"""A session with one target: the command window and the commands in flight.

Theory of operation
-------------------
A caller's `Task` is either *pending* (no slot in the command window, or no connection) or in the
table of *tasks* in flight under its Initiator Task Tag. `pump` moves pending tasks into the window
in the order of their arrival, each to the connection with the fewest commands; the reader of the
connection takes finished ones out and wakes their callers: one hand-off out, one back, whatever
the number of PDUs. CmdSN and the window are the session's, whatever the number of connections.

    CLOSED --login--> LOGGED_IN --last connection lost--> RECOVERING --login, checks--> LOGGED_IN
                                                              |
                                             replacement_timeout ran out
                                                              v
                                                           FAILED --login, checks--> LOGGED_IN

`supervisor` lets the session outlive its connections, `management` ends commands that take too
long, `events` deals with Async Messages and Rejects. They use the second half of this class: a
command whose connection is lost is *retried* with its old number when the target has not taken it,
and otherwise *held*, which puts it back to the head of the pending ones. READ, WRITE and
SYNCHRONIZE CACHE give the same result when done twice, so issuing them again is safe as soon as
the target can't carry out the first one any more.

A command that time after time ends the connection (its own time-out, or a violation in what the
target sends for it) fails in the end, so that one command can't keep all others from going on.
"""

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.errors import (
    ConnectionLost,
    OrionError,
    ProtocolViolation,
    ReplacementTimedOut,
    TransportError,
)
from orion_iscsifs.initiator.connection import CommandTimedOut, Connection
from orion_iscsifs.initiator.dial import Nexus, Portal, Route
from orion_iscsifs.initiator.events import Events
from orion_iscsifs.initiator.management import TaskManager
from orion_iscsifs.initiator.outage import Counters, Outage, State
from orion_iscsifs.initiator.supervisor import FIRST_CMD_SN, Supervisor
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import NO_TAG, AsyncMessage, Reject
from orion_iscsifs.protocol.sequence import CommandWindow
from orion_iscsifs.scsi.sense import SenseData

log = logging.getLogger(__name__)

QUEUE_DEPTH_MAX: Final = 128
"""Commands in flight of one session, whatever the target's window: of all its logical units."""
_CONNECTIONS_PER_COMMAND_MAX: Final = 3
"""A command that has ended so many connections fails."""


class Session:
    """One session over one or more connections. Made by `open_session`."""

    def __init__(self, portal: Portal, nexus: Nexus) -> None:
        self.portal = portal
        self.nexus = nexus
        self.route = Route(portal)
        self.state = State.CLOSED
        self.window = CommandWindow(FIRST_CMD_SN, FIRST_CMD_SN, FIRST_CMD_SN)
        self.tasks: dict[int, Task] = {}
        self.connections: list[Connection] = []
        self.parameters = Parameters()
        """What the leading login agreed on; a connection has its own for what is its own."""
        self.tsih = 0
        self.counters = Counters()
        self.last_error: OrionError | None = None
        self.outage = Outage(nexus.config.replacement_timeout_s)
        self.supervisor = Supervisor(self)
        self.manager = TaskManager(self)
        self.checks: list[Callable[[], Awaitable[None]]] = []
        """Awaited in turn after a new login, before held commands are sent. They use urgent tasks;
        an OrionError ends the connection."""
        self.scsi_event_listeners: list[Callable[[int, SenseData], None]] = []
        """Called with the LUN field and the sense data of a SCSI event (async event 0)."""
        self.state_listeners: list[Callable[[], None]] = []
        """Called, synchronously, after each change of `state`."""
        self.lun_listeners: list[Callable[[], None]] = []
        """Called when the target says that it has other LUNs than before (3F/0E)."""
        self.is_one_of_several = False
        """What this session fails is carried out by another one."""
        self._events = Events(self)
        self._refusal: OrionError | None = None
        """Why the target does not let us in again."""
        self._pending: deque[Task] = deque()
        self._open: list[Connection] = []
        """The connections that take commands."""
        self._tag = 0
        self.queue_depth = nexus.config.queue_depth or QUEUE_DEPTH_MAX
        """Of each logical unit, at the most: `commands.LogicalUnit` keeps to it."""
        self.in_flight_max = max(self.queue_depth, QUEUE_DEPTH_MAX)

    # -- commands ----------------------------------------------------------------------------

    async def execute(self, task: Task) -> None:
        """Carry out a SCSI command; `task.status` and `task.sense` are set when this returns.

        Waits for a slot in the command window and through an outage. Raises
        ReplacementTimedOut when the outage lasts too long, CommandTimedOut when the target never
        answers this command, ProtocolViolation when the target says that it failed to carry it
        out. A cancelled read may be left by its caller at once; a cancelled write that is on the
        wire is waited for, since its buffer is.
        """
        if self.state is State.LOGGED_IN and not self._pending and self._has_slot():
            self._issue(task).push()
        elif task.urgent:
            self._admit_urgent(task)
        elif self.state in (State.FAILED, State.CLOSED):
            raise self.verdict()
        else:
            self._pending.append(task)
        task.waiter = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(partial(self._abort, task))
        if task.error is not None:
            if task.raise_cancel is not None:
                task.raise_cancel()
            raise task.error

    def _admit_urgent(self, task: Task) -> None:
        if not self.connections or self.state is State.CLOSED:
            raise ConnectionLost(f"{self.portal}: the connection ended during the checks after it")
        self._pending.appendleft(task)
        self.pump()

    def _has_slot(self) -> bool:
        return len(self.tasks) < self.in_flight_max and self.window.free > 0 and bool(self._open)

    def _issue(self, task: Task) -> Connection:
        self.counters.commands += 1
        connection = self._open[0] if len(self._open) == 1 else self._least_busy()
        self._send(task, connection, self.next_tag(), self.window.take())
        return connection

    def _least_busy(self) -> Connection:
        return min(self._open, key=lambda connection: len(connection.tasks))

    def _send(self, task: Task, connection: Connection, tag: int, cmd_sn: int) -> None:
        command = task.begin(tag, cmd_sn, connection.parameters, trio.current_time())
        self.tasks[tag] = task
        connection.adopt(task)
        connection.queue(command)
        if not command.final and task.write is not None:
            connection.queue_burst(task.write.unsolicited(task.lun, tag))

    def pump(self) -> None:
        """Issue pending tasks while there are slots; before the checks are done, urgent ones."""
        if self.state is State.CLOSED:
            return
        issued = False
        while self._pending and self._has_slot():
            if self.state is not State.LOGGED_IN and not self._pending[0].urgent:
                break
            self._issue(self._pending.popleft())
            issued = True
        if issued:
            self.push()

    def push(self) -> None:
        """Send what is queued on any connection."""
        for connection in self.connections:
            connection.push()

    def next_tag(self) -> int:
        """An Initiator Task Tag that no command in flight has (RFC 7143 §11.2.1.8)."""
        while True:
            self._tag = (self._tag + 1) & NO_TAG
            if self._tag != NO_TAG and self._tag not in self.tasks:
                return self._tag

    def _wake(self, task: Task) -> None:
        waiter, task.waiter = task.waiter, None
        if waiter is not None:
            trio.lowlevel.reschedule(waiter)

    def _abort(self, task: Task, raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        """The caller of `task` is cancelled: may it go?"""
        if task.connection is None:
            self._pending.remove(task)
        elif task.write_from is not None:
            task.raise_cancel = raise_cancel
            return trio.lowlevel.Abort.FAILED
        elif task.read_into is not None:
            task.read_into = memoryview(bytearray(len(task.read_into)))
            task.connection.divert(task.initiator_task_tag)
        task.waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    # -- what a connection reports -----------------------------------------------------------

    def task_done(self, task: Task) -> None:
        del self.tasks[task.initiator_task_tag]
        assert task.connection is not None
        task.connection.release(task)
        if self.outage.since is not None and not task.urgent:
            self.outage.over()
            log.info("%s: I/O goes on", self.portal)
        self._wake(task)
        if self._pending:
            self.pump()

    def task_spoiled(self, task: Task) -> None:
        task.violations += 1
        self.hold([task], ProtocolViolation("SCSI Data-In", "lost for good", section="7.8"))
        self.pump()

    def task_late(self, task: Task) -> None:
        self.manager.task_late(task)

    def task_unacknowledged(self, task: Task) -> None:
        if task.connection is not None:
            self.retry(task, task.connection)

    def window_moved(self) -> None:
        if self._pending:
            self.pump()

    @property
    def starved(self) -> bool:
        """Commands wait, none is in flight, and still the target's window is closed."""
        return bool(self._pending) and not self.tasks and self.window.free == 0

    def notify(self, connection: Connection, pdu: AsyncMessage) -> None:
        self._events.notify(connection, pdu)

    def rejected(self, connection: Connection, pdu: Reject) -> None:
        self._events.rejected(connection, pdu)

    # -- for supervisor, management and events -----------------------------------------------

    def enter(self, state: State) -> None:
        """The one place where `state` changes."""
        if state is self.state:
            return
        self.state = state
        for listener in self.state_listeners:
            listener()

    def sort_connections(self) -> None:
        """A connection has come, gone, or changed its state."""
        self._open = [connection for connection in self.connections if connection.takes_commands]

    def retry(self, task: Task, connection: Connection) -> None:
        """Send a command again that the target has not taken: same tag, same CmdSN (§7.2.1)."""
        if task.connection is not None:
            task.connection.release(task)
        self.counters.commands_retried += 1
        self._send(task, connection, task.initiator_task_tag, task.cmd_sn)
        connection.push()

    def hold(self, tasks: Iterable[Task], error: OrionError) -> None:
        """These are over at the target, because of `error`: issue them anew, or fail them."""
        for task in reversed(list(tasks)):
            del self.tasks[task.initiator_task_tag]
            assert task.connection is not None
            task.connection.release(task, answered=False)
            self._hold(task, error)

    def _hold(self, task: Task, error: OrionError) -> None:
        # A cancelled caller has waited for its buffer only, and that is free now.
        if task.raise_cancel is not None or task.urgent or _is_to_blame(task, error):
            task.error = error
            self._wake(task)
        elif task.waiter is not None:
            self.counters.commands_retried += 1
            self._pending.appendleft(task)

    def fail(self, task: Task, error: OrionError) -> None:
        """The command is over at the target and has failed."""
        del self.tasks[task.initiator_task_tag]
        assert task.connection is not None
        task.connection.release(task, answered=False)
        task.error = error
        self._wake(task)

    def luns_changed(self) -> None:
        """The target says that it has other LUNs than before."""
        for listener in self.lun_listeners:
            listener()

    @property
    def is_idle(self) -> bool:
        return not self.tasks and not self._pending

    def go_on(self) -> None:
        """LOGGED_IN again: send what has been held."""
        self._refusal = None
        self.enter(State.LOGGED_IN)
        self.pump()
        if self.is_idle:
            # Nobody waits for an answer that could prove the outage over.
            self.outage.over()

    def give_up(self, refusal: OrionError | None = None) -> None:
        """Nothing has helped for `replacement_timeout`, or the target refuses for good."""
        self._refusal = refusal
        self.enter(State.FAILED)
        verdict = self.verdict()
        if self.is_one_of_several:
            log.warning("%s: this path is lost; logging in goes on", self.portal)
        else:
            log.error("%s; I/O fails with EIO until that has changed", verdict)
        self.fail_all(verdict)

    def verdict(self) -> TransportError:
        """What requests fail with that can't be carried out now."""
        if self.state is State.CLOSED:
            return ConnectionLost(f"{self.portal}: the session is closed")
        if self._refusal is not None:
            return ReplacementTimedOut(
                f"{self.portal}: the login is refused: {self._refusal}",
                advice=self._refusal.advice,
            )
        return ReplacementTimedOut(
            f"{self.portal}: no connection within"
            f" {self.nexus.config.replacement_timeout_s:g} s: {self.last_error}"
        )

    def fail_held(self, lun: int, error: OrionError, *, writes_only: bool = False) -> None:
        """Fail what is held for a logical unit (the 64-bit LUN field) that must not have it."""
        for task in [task for task in self._pending if task.lun == lun and not task.urgent]:
            if writes_only and task.write_from is None:
                continue
            self._pending.remove(task)
            task.error = error
            self._wake(task)

    def fail_all(self, error: OrionError) -> None:
        tasks = [*self.tasks.values(), *self._pending]
        self.tasks.clear()
        self._pending.clear()
        for task in tasks:
            if task.connection is not None:
                task.connection.release(task, answered=False)
            task.error = error
            self._wake(task)


def _is_to_blame(task: Task, error: OrionError) -> bool:
    """Whether `task` has ended connections in this way too often."""
    if isinstance(error, CommandTimedOut):
        return task.timeouts >= _CONNECTIONS_PER_COMMAND_MAX
    return isinstance(error, ProtocolViolation) and task.violations >= _CONNECTIONS_PER_COMMAND_MAX


@asynccontextmanager
async def open_session(portal: Portal, nexus: Nexus) -> AsyncIterator[Session]:
    """Log in and keep the session up while the body runs; log out when it ends.

    Raises what the first login raises: ConnectFailed, NotIscsi, LoginError, ProtocolViolation.
    """
    session = Session(portal, nexus)
    await session.supervisor.login()
    async with background(session.supervisor.run):
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True):
                await session.supervisor.logout()
