"""One TCP connection of a session in the full-feature phase.

Theory of operation
-------------------
Three tasks live as long as the connection. The *reader* takes every PDU that has arrived, handles
all of them, and only then waits again. The *writer* sends whatever has been queued since it last
looked with one system call. The *watchdog* sleeps until one deadline: it pings a silent target and
notices a command that takes too long.

`queue()` never waits. A command with nothing else in flight is sent at once by its own caller,
which saves a task switch where latency counts; as soon as others are in flight the writer gathers
them.

A command in flight belongs to one connection (its allegiance, RFC 7143 §4.2.2): `tasks`. What
still comes for a command that was aborted is dropped: `ghosts`.

The first of the three to meet an error ends all of them; `run()` raises that error and the
session decides what happens to the commands in flight. Nothing here retries.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn, Protocol

import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import ConnectionLost, OrionError, ProtocolViolation
from orion_iscsifs.initiator.dial import LoggedIn
from orion_iscsifs.initiator.inbound import Inbound, Owner
from orion_iscsifs.initiator.keepalive import Action, Keepalive
from orion_iscsifs.initiator.recovering import RecoveringInbound
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.keys import Role
from orion_iscsifs.protocol.pdu import (
    AsyncMessage,
    LogoutReason,
    LogoutRequest,
    NopOut,
    Pdu,
    Reject,
)
from orion_iscsifs.protocol.states import (
    ConnectionEvent,
    ConnectionState,
    connection_next,
)
from orion_iscsifs.protocol.transfer import Burst

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

_READS_BEFORE_YIELD: Final = 4
"""Receive calls in a row before other tasks get their turn, however much arrives."""
_PING_DATA: Final = b"orion-iscsifs"
_WATCH_STEP_MAX_S: Final = 1.0
_LATE_S: Final = 0.5
"""The watchdog woke up so much too late: this process was stopped, or very busy."""
_GHOSTS_MAX: Final = 4096
"""Tags of ended commands that a connection remembers; the oldest is forgotten first."""


class CommandTimedOut(ConnectionLost):
    """A command stayed without an answer for `command_timeout`."""


class ConnectionOwner(Owner, Protocol):
    """What a connection needs of its session besides what the meaning of PDUs takes."""

    def notify(self, connection: "Connection", pdu: AsyncMessage) -> None:
        """The target sends an Async Message."""

    def rejected(self, connection: "Connection", pdu: Reject) -> None:
        """The target rejects what was sent to it."""


class Connection:
    """Reader, writer and watchdog over one `Wire`. A time-out of 0 turns its check off."""

    def __init__(self, logged_in: LoggedIn, owner: ConnectionOwner, config: SessionConfig) -> None:
        wire = logged_in.wire
        self.cid = logged_in.cid
        self.portal = logged_in.portal
        self.local = wire.local
        self.parameters = logged_in.parameters
        self.state = ConnectionState.LOGGED_IN
        self.tasks: dict[int, Task] = {}
        self.ghosts: dict[int, None] = {}
        self.replies: dict[int, Callable[[Pdu], None]] = {}
        self.time2wait_s: float = self.parameters.default_time2wait
        self.time2retain_s: float = self.parameters.default_time2retain
        """How long the target keeps this connection's commands after its end, after the wait."""
        self.silenced = False
        """A Logout Request was the last PDU to be sent (RFC 7143 §11.14)."""
        self.logged_out = False
        """The target has confirmed the logout: the commands left here are over."""
        self.negotiating = False
        """A text exchange is going on: there is one at a time (§6.4)."""
        self._wire = wire
        self._owner = owner
        recovers = self.parameters.error_recovery_level > 0
        kind = RecoveringInbound if recovers else Inbound
        self.inbound = kind(owner, self, logged_in.exp_stat_sn)
        wire.framer.sink = self.inbound.place
        self._header_digest = wire.framer.header_digest
        self._data_digest = wire.framer.data_digest
        self._keepalive = Keepalive(
            config.noop_interval_s, config.noop_timeout_s, trio.current_time()
        )
        self._command_timeout_s = config.command_timeout_s
        self._early: Sequence[Pdu] = logged_in.early
        self._outbox: list[Buffer] = []
        self._sleeping_writer: trio.lowlevel.Task | None = None
        self._starved_since: float | None = None
        self._scope = trio.CancelScope()
        self._failure: OrionError | None = None
        self._drained: trio.Event | None = None
        self._waiting: set[trio.Event] = set()
        """Who waits in `request`."""

    # -- life --------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """`host:port`, for messages."""
        return self._wire.peer

    @property
    def takes_commands(self) -> bool:
        return self.state is ConnectionState.LOGGED_IN and self._failure is None

    @property
    def is_ending(self) -> bool:
        """It has failed, and whoever serves it is about to see to its commands, or does."""
        return self._failure is not None

    async def run(self) -> NoReturn:
        """Serve the connection until it ends; raises the OrionError that ended it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for part in (self._read, self._write, self._watch):
                        nursery.start_soon(self._guard, part)
        finally:
            self._wire.close()
        raise self._failure or ConnectionLost(f"{self.peer}: connection closed")

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except OrionError as error:
            self.fail(error)
        except Exception as error:
            # A bug, perhaps woken by the target's bytes: the mount has to outlive it.
            log.exception("%s: the connection is given up", self.peer)
            self.fail(ConnectionLost(f"{self.peer}: internal error: {error!r}"))

    def fail(self, error: OrionError) -> None:
        """End the connection because of `error`; the first one counts."""
        if self._failure is None:
            self._failure = error
        # The writer may be about to run once more; after this it can't send anything.
        self._wire.shutdown()
        self._scope.cancel()
        for event in self._waiting:
            event.set()

    def close(self) -> None:
        """Close the socket of a connection that `run` never served."""
        self._wire.close()

    def move(self, event: ConnectionEvent) -> None:
        """Take a transition of RFC 7143 §8.1."""
        self.state = connection_next(Role.INITIATOR, self.state, event)

    def lost_for(self, time2wait_s: float, time2retain_s: float) -> None:
        """The target says for how long it keeps the commands of this connection."""
        self.time2wait_s, self.time2retain_s = time2wait_s, time2retain_s

    # -- sending -----------------------------------------------------------------------------

    def queue(self, pdu: Pdu) -> None:
        """Put a PDU behind those that wait to be sent. `push` sees that they leave."""
        if self.silenced:
            return
        pdu.exp_stat_sn = self.inbound.status.exp_stat_sn  # type: ignore[attr-defined]
        self._outbox += encode(
            pdu, header_digest=self._header_digest, data_digest=self._data_digest
        )

    def queue_burst(self, burst: Burst) -> None:
        """Put a sequence of Data-Out PDUs behind those that wait to be sent."""
        if self._header_digest or self._data_digest or self.silenced:
            for data_out in burst:
                self.queue(data_out)
        else:
            self._outbox += burst.encode(self.inbound.status.exp_stat_sn)

    def push(self) -> None:
        """Send what is queued: now, when nothing else is in flight, or soon and gathered."""
        writer = self._sleeping_writer
        if writer is None or not self._outbox:
            return
        if len(self._owner.tasks) <= 1:
            try:
                self._outbox = self._wire.send_nowait(self._outbox)
            except OrionError as error:
                self.fail(error)
                return
        if self._outbox:
            self._sleeping_writer = None
            trio.lowlevel.reschedule(writer)

    async def _write(self) -> None:
        while True:
            while self._outbox:
                pieces, self._outbox = self._outbox, []
                await self._wire.send(pieces)
            self._sleeping_writer = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._wake_cancelled)

    def _wake_cancelled(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        # Now and not when the writer runs: a `push` in between must not wake it a second time.
        self._sleeping_writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def request(self, pdu: Pdu, timeout_s: float) -> Pdu:
        """Send a request that is no SCSI command and wait for its answer.

        Raises ConnectionLost when the connection ends before, or no answer comes in time. After a
        Logout Request nothing more is sent.
        """
        if self._failure is not None:
            raise ConnectionLost(f"{self.peer}: no {pdu.name}: {self._failure}")
        answers: list[Pdu] = []
        done = trio.Event()

        def take(answer: Pdu) -> None:
            answers.append(answer)
            done.set()

        tag = pdu.initiator_task_tag
        self.replies[tag] = take
        self._waiting.add(done)
        self.queue(pdu)
        self.silenced = self.silenced or self._is_last(pdu)
        self.push()
        try:
            with trio.move_on_after(timeout_s):
                await done.wait()
        finally:
            self._waiting.discard(done)
            if self.replies.pop(tag, None) is not None:
                self.remember(tag)
        if answers:
            return answers[0]
        why = self._failure or f"nothing for {timeout_s:g} s"
        raise ConnectionLost(f"{self.peer}: no answer to a {pdu.name}: {why}")

    def _is_last(self, pdu: Pdu) -> bool:
        """Nothing may follow a request that logs this connection out (§11.14)."""
        if not isinstance(pdu, LogoutRequest):
            return False
        return pdu.reason == LogoutReason.CLOSE_SESSION or pdu.cid == self.cid

    # -- commands ----------------------------------------------------------------------------

    def adopt(self, task: Task) -> None:
        """The command's allegiance is to this connection from now on."""
        self.tasks[task.initiator_task_tag] = task
        task.connection = self

    def release(self, task: Task, *, answered: bool = True) -> None:
        """The command is over here; one without an answer may still get a late one."""
        tag = task.initiator_task_tag
        del self.tasks[tag]
        task.connection = None
        if self._drained is not None and not self.tasks:
            self._drained.set()
        if not answered:
            self.remember(tag)
            self.divert(tag)

    async def drained(self) -> None:
        """Wait until no command is in flight here."""
        if self.tasks:
            self._drained = trio.Event()
            await self._drained.wait()

    def remember(self, tag: int) -> None:
        """Whatever still comes for this tag is dropped."""
        self.ghosts[tag] = None
        if len(self.ghosts) > _GHOSTS_MAX:
            del self.ghosts[next(iter(self.ghosts))]

    def divert(self, initiator_task_tag: int) -> None:
        """The reader's buffer of this task is wanted back (see `Framer.divert`)."""
        self._wire.framer.divert(initiator_task_tag)

    # -- receiving ---------------------------------------------------------------------------

    def notify(self, pdu: AsyncMessage) -> None:
        self._owner.notify(self, pdu)

    def rejected(self, pdu: Reject) -> None:
        self._owner.rejected(self, pdu)

    async def _read(self) -> None:
        wire, handle = self._wire, self.inbound.handle
        for pdu in self._early:
            handle(pdu)
        self.push()
        turns = 0
        while True:
            pdus = wire.receive_nowait()
            if pdus is None:
                turns = 0
                await wire.wait_readable()
                continue
            self._keepalive.last_received = trio.current_time()
            for pdu in pdus:
                handle(pdu)
            # Before any caller runs: the buffer of a command that has just ended is its own again.
            wire.framer.release(self.tasks)
            if self._outbox:
                self.push()  # answers to R2Ts and pings, all with one call
            turns += 1
            if turns == _READS_BEFORE_YIELD:
                turns = 0
                await trio.lowlevel.checkpoint()

    # -- watching ----------------------------------------------------------------------------

    async def _watch(self) -> None:
        step_s = min(_WATCH_STEP_MAX_S, self._command_timeout_s / 4 or _WATCH_STEP_MAX_S)
        while True:
            now = trio.current_time()
            due = max(now, min(self._keepalive.deadline, now + step_s))
            await trio.sleep_until(due)
            now = trio.current_time()
            if now - due > _LATE_S:
                continue  # We slept, not the target: what it sent meanwhile is read first.
            self._check_commands(now)
            self.inbound.check(now)
            self.push()
            match self._keepalive.check(now):
                case Action.SEND_PING:
                    self._ping()
                case Action.DROP_CONNECTION:
                    raise ConnectionLost(
                        f"{self.peer}: silent, and no answer to a ping within"
                        f" {self._keepalive.timeout_s:g} s"
                    )
                case Action.WAIT:
                    pass

    def _ping(self) -> None:
        tag = self._owner.next_tag()
        self.replies[tag] = self._pinged
        self.queue(NopOut(tag, cmd_sn=self._owner.window.cmd_sn, data=_PING_DATA))
        self.push()

    def _pinged(self, pdu: Pdu) -> None:
        # A target may cut the echo to its own limits (RFC 7143 §11.18); what comes must match. One
        # that rejects a ping is alive too.
        if not isinstance(pdu, Reject) and bytes(pdu.data) != _PING_DATA[: len(pdu.data)]:
            raise ProtocolViolation(pdu.name, "the ping data came back changed", section="11.19")

    def _check_commands(self, now: float) -> None:
        if not self._command_timeout_s:
            return
        if not self._owner.starved:
            self._starved_since = None
        elif self._starved_since is None:
            self._starved_since = now
        elif now - self._starved_since >= self._command_timeout_s:
            raise CommandTimedOut(
                f"{self.peer}: the target has kept its command window closed for"
                f" {self._command_timeout_s:g} s"
            )
        for task in self.tasks.values():
            if now - task.started_at >= self._command_timeout_s * task.patience:
                self._owner.task_late(task)
