"""A session with one target: the command window, the commands in flight, and its recovery.

Theory of operation
-------------------
A caller's `Task` is either *pending* (no slot in the command window, or no connection) or in the
table of *tasks* in flight under its Initiator Task Tag. `_pump` moves pending tasks into the window
in the order of their arrival; the reader of the connection takes finished ones out and wakes their
callers: one hand-off out, one back, whatever the number of PDUs.

    CLOSED --login--> LOGGED_IN --connection ended--> RECOVERING --login, checks--> LOGGED_IN
                                                          |
                                         replacement_timeout ran out
                                                          v
                                                       FAILED --login, checks--> LOGGED_IN

When the connection ends (ErrorRecoveryLevel 0), every task in flight goes back to the head of the
pending queue and is issued again after the next login. That login uses the same ISID and TSIH 0,
so the target ends the old nexus before it answers (session reinstatement, RFC 7143 §6.3.5): a
write that lingers from the old connection can't land after its own retry. READ, WRITE and
SYNCHRONIZE CACHE give the same result when done twice, so issuing them again is safe.

A target that was restarted may show another disk under the same LUN. So `checks` run after every
login but the first, on *urgent* tasks, and only then is anything else sent.

The outage's clock starts when the connection ends and stops with the first command that is
answered: logging in to a target that then answers nothing is no recovery. After
`replacement_timeout` all that is pending fails, new requests fail at once, and logging in goes on
in the background; the first success ends that state.

A command that time after time ends the connection (its own time-out, or a violation in what the
target sends for it) fails in the end, so that one command can't keep all others from going on.
"""

import enum
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
_CONNECTIONS_PER_COMMAND_MAX: Final = 3
"""A command that has ended so many connections fails."""
_QUICK_LOSS_S: Final = 0.02
_QUICK_PAUSE_MAX_S: Final = 1.0
_QUICK_LOSSES_MAX: Final = 4
"""Connections in a row that may end at once before the next login has to wait."""


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
        self._entered_at = 0.0
        self._quick_losses = 0
        self._life = trio.CancelScope(shield=True)
        self._ended = trio.Event()
        self.checks: list[Callable[[], Awaitable[None]]] = []
        """Awaited in turn after a new login, before held commands are sent. They use urgent tasks;
        an OrionError ends the connection."""

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
        elif task.urgent:
            self._admit_urgent(task)
        elif self.state in (State.FAILED, State.CLOSED):
            raise self._verdict()
        else:
            self._pending.append(task)
        task.waiter = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(partial(self._abort, task))
        if task.error is not None:
            if task.raise_cancel is not None:
                task.raise_cancel()
            raise task.error

    def _admit_urgent(self, task: Task) -> None:
        if self._connection is None or self.state is State.CLOSED:
            raise ConnectionLost(f"{self.portal}: the connection ended during the checks after it")
        self._pending.appendleft(task)
        self._pump()

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
            connection.queue_burst(task.write.unsolicited(task.lun, tag))

    def _push(self) -> None:
        if self._connection is not None:
            self._connection.push()

    def _pump(self) -> None:
        """Issue pending tasks while there are slots; before the checks are done, urgent ones."""
        if self._connection is None or self.state is State.CLOSED:
            return
        issued = False
        while self._pending and self._has_slot():
            if self.state is not State.LOGGED_IN and not self._pending[0].urgent:
                break
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
        if self._down_since is not None and not task.urgent:
            self._down_since = None
            log.info("%s: I/O goes on", self.portal)
        self._wake(task)
        if self._pending:
            self._pump()

    def window_moved(self) -> None:
        if self._pending:
            self._pump()

    @property
    def starved(self) -> bool:
        """Commands wait, none is in flight, and still the target's window is closed."""
        return bool(self._pending) and not self.tasks and self.window.free == 0

    def _wake(self, task: Task) -> None:
        waiter, task.waiter = task.waiter, None
        if waiter is not None:
            trio.lowlevel.reschedule(waiter)

    def _abort(self, task: Task, raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        """The caller of `task` is cancelled: may it go?"""
        if self.tasks.get(task.initiator_task_tag) is not task:
            self._pending.remove(task)
        elif task.write_from is not None:
            task.raise_cancel = raise_cancel
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
        """Serve connection after connection until `logout`.

        Shielded: whoever is cancelled above may have to flush, and logs out on this connection.
        """
        with self._life:
            while True:
                await self._serve()
                if self.state is State.CLOSED:
                    return
                await self._reinstate()

    async def _serve(self) -> None:
        """One connection, until it ends."""
        connection = self._connection
        assert connection is not None
        try:
            async with background(self._resume):
                await connection.run()
        except OrionError as error:
            self._ended.set()
            self._lost(error)

    async def _resume(self) -> None:
        """After a new login: the checks, then what has been held."""
        connection = self._connection
        if connection is None or self.state in (State.LOGGED_IN, State.CLOSED):
            return
        try:
            with trio.fail_at(self._deadline()):
                for check in self.checks:
                    await check()
        except trio.TooSlowError:
            connection.fail(ConnectionLost(f"{self.portal}: the checks after the login take long"))
            return
        except OrionError as error:
            if not self._is_closed():
                connection.fail(error)
            return
        # No await from here on: the connection is still the one that was checked.
        if not self._is_closed():
            self.state = State.LOGGED_IN
            self._go_on()

    def _is_closed(self) -> bool:
        """Asked anew after an await, which the type checker does not expect of `state`."""
        return self.state is State.CLOSED

    async def logout(self) -> None:
        """End the session in order, bounded in time; afterwards it is CLOSED."""
        connection = self._connection
        self.state = State.CLOSED
        if connection is not None:
            self._ended = trio.Event()
            tag = self.next_tag()
            connection.inbound.replies[tag] = lambda _response: self._ended.set()
            connection.queue(LogoutRequest(tag, cmd_sn=self.window.cmd_sn))
            connection.push()
            with trio.move_on_after(_LOGOUT_TIMEOUT_S):
                await self._ended.wait()
            # Before any buffer goes back to its owner: nothing may be sent from it any more.
            connection.fail(self._verdict())
        self._fail_all(self._verdict())
        self._life.cancel()

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
            logged_in.early,
            noop_interval_s=config.noop_interval_s,
            noop_timeout_s=config.noop_timeout_s,
            command_timeout_s=config.command_timeout_s,
        )
        self._entered_at = trio.current_time()
        if self.state is State.CLOSED or not self.checks:
            self.state = State.LOGGED_IN
        self.counters.logins += 1

    def _lost(self, error: OrionError) -> None:
        """The connection has ended: hold what was in flight."""
        self._connection = None
        if self.state is State.CLOSED:
            return
        now = trio.current_time()
        self.counters.connections_lost += 1
        self.last_error = error
        quick = now - self._entered_at < _QUICK_LOSS_S
        self._quick_losses = self._quick_losses + 1 if quick else 0
        if self._down_since is None:
            self._down_since = now
        if self.state is State.LOGGED_IN:
            self.state = State.RECOVERING
        held = [task for task in self.tasks.values() if task.waiter is not None]
        self.tasks.clear()
        log.warning("%s: %s; %d commands held, logging in again", self.portal, error, len(held))
        for task in reversed(held):
            self._hold(task, error)

    def _hold(self, task: Task, error: OrionError) -> None:
        """`task` was in flight when `error` ended the connection."""
        # A cancelled caller has waited for its buffer only, and that is free now.
        if task.raise_cancel is not None or task.urgent or _is_to_blame(task, error):
            task.error = error
            self._wake(task)
        else:
            self.counters.commands_retried += 1
            self._pending.appendleft(task)

    async def _reinstate(self) -> None:
        """Log in again, however long it takes; give up what is held when its time is over."""
        again = self._quick_losses - _QUICK_LOSSES_MAX
        pause_s = min(_BACKOFF_FIRST_S * 2.0**again, _QUICK_PAUSE_MAX_S) if again >= 0 else 0.0
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
        except Exception as error:
            # A bug, perhaps woken by the target's bytes: the mount has to outlive it.
            log.exception("%s: login failed", self.portal)
            self.last_error = ConnectionLost(f"{self.portal}: internal error: {error!r}")
            return False
        # The login ended: no await from here on until the connection is ours to close.
        if self.state is State.CLOSED:
            logged_in.wire.close()
            return False
        self._enter(logged_in)
        log.warning("%s: logged in again", self.portal)
        if self.state is State.LOGGED_IN:
            self._go_on()
        return True

    def _go_on(self) -> None:
        """LOGGED_IN again: send what has been held."""
        self._pump()
        if not self.tasks and not self._pending:
            # Nobody waits for an answer that could prove the outage over.
            self._down_since = None

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

    def fail_held(self, lun: int, error: OrionError) -> None:
        """Fail what is held for a logical unit (the 64-bit LUN field) that must not have it."""
        for task in [task for task in self._pending if task.lun == lun and not task.urgent]:
            self._pending.remove(task)
            task.error = error
            self._wake(task)

    def _fail_all(self, error: OrionError) -> None:
        tasks = [*self.tasks.values(), *self._pending]
        self.tasks.clear()
        self._pending.clear()
        for task in tasks:
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
    await session.login()
    async with background(session.supervise):
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True):
                await session.logout()
