"""A session with one target: the command window, the commands in flight, and its recovery.

Theory of operation
-------------------
A caller's `Task` is either *pending* (no slot in the command window, or no connection) or in the
table of *tasks* in flight under its Initiator Task Tag. `_pump` moves pending tasks into the window
in the order of their arrival; the reader of the connection takes finished ones out and wakes their
callers: one hand-off out, one back, whatever the number of PDUs.

    CLOSED --login--> LOGGED_IN --connection ended--> RECOVERING --login--> LOGGED_IN
                                                          |
                                         replacement_timeout ran out
                                                          v
                                                       FAILED --login--> LOGGED_IN

When the connection ends (ErrorRecoveryLevel 0), every task in flight goes back to the head of the
pending queue and is issued again after the next login. That login uses the same ISID and TSIH 0,
so the target ends the old nexus before it answers (session reinstatement, RFC 7143 §6.3.5): a
write that lingers from the old connection can't land after its own retry. READ, WRITE and
SYNCHRONIZE CACHE give the same result when done twice, so issuing them again is safe.

The outage's clock starts when the connection ends and stops with the first command that is
answered: logging in to a target that then answers nothing is no recovery. After
`replacement_timeout` all that is pending fails, new requests fail at once, and logging in goes on
in the background; the first success ends that state.
"""

import enum
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.errors import (
    ConnectionLost,
    OrionError,
    ReplacementTimedOut,
    TransportError,
)
from orion_iscsifs.initiator.connection import CommandTimedOut, Connection
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, dial
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import NO_TAG, LogoutRequest
from orion_iscsifs.protocol.sequence import CommandWindow

log = logging.getLogger(__name__)

QUEUE_DEPTH_MAX: Final = 128
"""Commands in flight when `queue_depth` is not set; the target's window may be smaller."""
_FIRST_CMD_SN: Final = 1
_LOGOUT_TIMEOUT_S: Final = 5.0
_BACKOFF_FIRST_S: Final = 0.1
_BACKOFF_MAX_S: Final = 5.0
_COMMAND_TIMEOUTS_MAX: Final = 3
"""A command that has ended so many connections by its own time-out fails."""


class State(enum.StrEnum):
    """As `status --json` shows it."""

    CLOSED = "closed"
    LOGGED_IN = "logged-in"
    RECOVERING = "recovering"
    FAILED = "failed"


@dataclass(slots=True)
class Counters:
    """Since the session was opened."""

    logins: int = 0
    connections_lost: int = 0
    commands: int = 0
    commands_retried: int = 0


class Session:
    """One session over one connection. Made by `open_session`."""

    def __init__(self, portal: Portal, nexus: Nexus) -> None:
        self.portal = portal
        self.nexus = nexus
        self.state = State.CLOSED
        self.window = CommandWindow(_FIRST_CMD_SN, _FIRST_CMD_SN, _FIRST_CMD_SN)
        self.tasks: dict[int, Task] = {}
        self.parameters = Parameters()
        self.tsih = 0
        self.local = ""
        self.counters = Counters()
        self.last_error: OrionError | None = None
        self._pending: deque[Task] = deque()
        self._connection: Connection | None = None
        self._tag = 0
        self._depth = nexus.config.queue_depth or QUEUE_DEPTH_MAX
        self._down_since: float | None = None

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
            self._issue(task)
            self._push()
        elif self.state in (State.FAILED, State.CLOSED):
            raise self._verdict()
        else:
            self._pending.append(task)
        task.waiter = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(partial(self._abort, task))
        if task.error is not None:
            raise task.error

    def _has_slot(self) -> bool:
        return len(self.tasks) < self._depth and self.window.free > 0

    def _issue(self, task: Task) -> None:
        connection = self._connection
        assert connection is not None
        tag = self.next_tag()
        cmd_sn = self.window.take()
        command = task.begin(tag, cmd_sn, self.parameters, trio.current_time())
        self.tasks[tag] = task
        self.counters.commands += 1
        connection.queue(command)
        if not command.final and task.write is not None:
            for data_out in task.write.unsolicited(task.lun, tag):
                connection.queue(data_out)

    def _push(self) -> None:
        if self._connection is not None:
            self._connection.push()

    def _pump(self) -> None:
        """Issue pending tasks while there are slots."""
        if self.state is not State.LOGGED_IN:
            return
        issued = False
        while self._pending and self._has_slot():
            self._issue(self._pending.popleft())
            issued = True
        if issued:
            self._push()

    def next_tag(self) -> int:
        """An Initiator Task Tag that no command in flight has (RFC 7143 §11.2.1.8)."""
        while True:
            self._tag = (self._tag + 1) & NO_TAG
            if self._tag != NO_TAG and self._tag not in self.tasks:
                return self._tag

    def task_done(self, task: Task) -> None:
        """The connection has the task's outcome."""
        del self.tasks[task.initiator_task_tag]
        if self._down_since is not None:
            self._down_since = None
            log.info("%s: I/O goes on", self.portal)
        self._wake(task)
        if self._pending:
            self._pump()

    def window_moved(self) -> None:
        if self._pending:
            self._pump()

    def _wake(self, task: Task) -> None:
        waiter, task.waiter = task.waiter, None
        if waiter is not None:
            trio.lowlevel.reschedule(waiter)

    def _abort(self, task: Task, _raise_cancel: object) -> trio.lowlevel.Abort:
        """The caller of `task` is cancelled: may it go?"""
        if self.tasks.get(task.initiator_task_tag) is not task:
            self._pending.remove(task)
        elif task.write_from is not None:
            return trio.lowlevel.Abort.FAILED
        elif task.read_into is not None:
            task.read_into = memoryview(bytearray(len(task.read_into)))
            if self._connection is not None:
                self._connection.divert(task.initiator_task_tag)
        task.waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    # -- life --------------------------------------------------------------------------------

    async def login(self) -> None:
        """The first login; its errors are the caller's."""
        self._enter(await dial(self.portal, self.nexus, cmd_sn=_FIRST_CMD_SN))

    async def supervise(self) -> None:
        """Serve connection after connection until cancelled."""
        while True:
            assert self._connection is not None
            try:
                await self._connection.run()
            except OrionError as error:
                self._lost(error)
            await self._reinstate()

    async def logout(self) -> None:
        """End the session in order, bounded in time; afterwards it is CLOSED."""
        connection, was = self._connection, self.state
        self.state = State.CLOSED
        if connection is not None and was is State.LOGGED_IN:
            done = trio.Event()
            tag = self.next_tag()
            connection.inbound.replies[tag] = lambda _response: done.set()
            connection.queue(LogoutRequest(tag, cmd_sn=self.window.cmd_sn))
            connection.push()
            with trio.move_on_after(_LOGOUT_TIMEOUT_S):
                await done.wait()
        self._fail_all(self._verdict())

    def _enter(self, logged_in: LoggedIn) -> None:
        """A new connection is in the full-feature phase."""
        config = self.nexus.config
        self.window = CommandWindow(logged_in.cmd_sn, logged_in.exp_cmd_sn, logged_in.max_cmd_sn)
        self.parameters = logged_in.parameters
        self.tsih = logged_in.tsih
        self.local = logged_in.wire.local
        self._connection = Connection(
            logged_in.wire,
            self,
            logged_in.exp_stat_sn,
            noop_interval_s=config.noop_interval_s,
            noop_timeout_s=config.noop_timeout_s,
            command_timeout_s=config.command_timeout_s,
        )
        self.state = State.LOGGED_IN
        self.counters.logins += 1

    def _lost(self, error: OrionError) -> None:
        """The connection has ended: hold what was in flight."""
        self.counters.connections_lost += 1
        self.last_error = error
        self._connection = None
        if self._down_since is None:
            self._down_since = trio.current_time()
        if self.state is State.LOGGED_IN:
            self.state = State.RECOVERING
        held = [task for task in self.tasks.values() if task.waiter is not None]
        self.tasks.clear()
        self.counters.commands_retried += len(held)
        log.warning("%s: %s; %d commands held, logging in again", self.portal, error, len(held))
        for task in reversed(held):
            if task.timeouts >= _COMMAND_TIMEOUTS_MAX and isinstance(error, CommandTimedOut):
                task.error = error
                self._wake(task)
            else:
                self._pending.appendleft(task)

    async def _reinstate(self) -> None:
        """Log in again, however long it takes; give up what is held when its time is over."""
        pause_s = 0.0
        while True:
            with trio.move_on_at(self._deadline()):
                await trio.sleep(pause_s)
                if await self._try_login():
                    return
            if trio.current_time() >= self._deadline():
                self._give_up()
            pause_s = min(max(2 * pause_s, _BACKOFF_FIRST_S), _BACKOFF_MAX_S)

    def _deadline(self) -> float:
        """When what is held has to fail; infinite once it has failed, or without a limit."""
        limit_s = self.nexus.config.replacement_timeout_s
        if self.state is not State.RECOVERING or self._down_since is None or limit_s < 0:
            return float("inf")
        return self._down_since + limit_s

    async def _try_login(self) -> bool:
        try:
            logged_in = await dial(self.portal, self.nexus, cmd_sn=_FIRST_CMD_SN)
        except OrionError as error:
            if str(error) != str(self.last_error):
                log.warning("%s: login failed: %s", self.portal, error)
            self.last_error = error
            return False
        # The login ended: no await from here on until the connection is ours to close.
        self._enter(logged_in)
        log.warning("%s: logged in again", self.portal)
        self._pump()
        return True

    def _give_up(self) -> None:
        self.state = State.FAILED
        log.error(
            "%s: no connection for %g s: I/O fails with EIO until the target is back",
            self.portal,
            self.nexus.config.replacement_timeout_s,
        )
        self._fail_all(self._verdict())

    def _verdict(self) -> TransportError:
        if self.state is State.CLOSED:
            return ConnectionLost(f"{self.portal}: the session is closed")
        return ReplacementTimedOut(
            f"{self.portal}: no connection within"
            f" {self.nexus.config.replacement_timeout_s:g} s: {self.last_error}"
        )

    def _fail_all(self, error: OrionError) -> None:
        tasks = [*self.tasks.values(), *self._pending]
        self.tasks.clear()
        self._pending.clear()
        for task in tasks:
            task.error = error
            self._wake(task)


@asynccontextmanager
async def open_session(portal: Portal, nexus: Nexus) -> AsyncIterator[Session]:
    """Log in and keep the session up while the body runs; log out when it ends.

    Raises what the first login raises: ConnectFailed, NotIscsi, LoginError, ProtocolViolation.
    """
    session = Session(portal, nexus)
    await session.login()
    async with background(session.supervise):
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True):
                await session.logout()
