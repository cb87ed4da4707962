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

The first of the three to meet an error ends all of them; `run()` raises that error and the
session decides what happens to the commands in flight. Nothing here retries.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn

import trio

from orion_iscsifs.errors import ConnectionLost, OrionError, ProtocolViolation
from orion_iscsifs.initiator.inbound import Inbound, Owner
from orion_iscsifs.initiator.keepalive import Action, Keepalive
from orion_iscsifs.initiator.wire import Wire
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.pdu import NopOut, Pdu
from orion_iscsifs.protocol.transfer import Burst

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

_READS_BEFORE_YIELD: Final = 4
"""Receive calls in a row before other tasks get their turn, however much arrives."""
_PING_DATA: Final = b"orion-iscsifs"
_WATCH_STEP_MAX_S: Final = 1.0
_LATE_S: Final = 0.5
"""The watchdog woke up so much too late: this process was stopped, or very busy."""


class CommandTimedOut(ConnectionLost):
    """A command stayed without an answer for `command_timeout`."""


class Connection:
    """Reader, writer and watchdog over one `Wire`. Times in seconds; 0 turns a check off."""

    def __init__(
        self,
        wire: Wire,
        owner: Owner,
        exp_stat_sn: int,
        early: Sequence[Pdu] = (),
        *,
        noop_interval_s: float,
        noop_timeout_s: float,
        command_timeout_s: float,
    ) -> None:
        self._wire = wire
        self._owner = owner
        self.inbound = Inbound(owner, exp_stat_sn, self.queue, self.queue_burst, wire.peer)
        wire.framer.sink = self.inbound.place
        self._header_digest = wire.framer.header_digest
        self._data_digest = wire.framer.data_digest
        self._keepalive = Keepalive(noop_interval_s, noop_timeout_s, trio.current_time())
        self._command_timeout_s = command_timeout_s
        self._early = early
        self._outbox: list[Buffer] = []
        self._sleeping_writer: trio.lowlevel.Task | None = None
        self._starved_since: float | None = None
        self._scope = trio.CancelScope()
        self._failure: OrionError | None = None

    # -- life --------------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """Serve the connection until it ends; raises the OrionError that ended it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for part in (self._read, self._write, self._watch):
                        nursery.start_soon(self._guard, part)
        finally:
            self._wire.close()
        raise self._failure or ConnectionLost(f"{self._wire.peer}: connection closed")

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except OrionError as error:
            self.fail(error)
        except Exception as error:
            # A bug, perhaps woken by the target's bytes: the mount has to outlive it.
            log.exception("%s: the connection is given up", self._wire.peer)
            self.fail(ConnectionLost(f"{self._wire.peer}: internal error: {error!r}"))

    def fail(self, error: OrionError) -> None:
        """End the connection because of `error`; the first one counts."""
        if self._failure is None:
            self._failure = error
        # The writer may be about to run once more; after this it can't send anything.
        self._wire.shutdown()
        self._scope.cancel()

    # -- sending -----------------------------------------------------------------------------

    def queue(self, pdu: Pdu) -> None:
        """Put a PDU behind those that wait to be sent. `push` sees that they leave."""
        pdu.exp_stat_sn = self.inbound.status.exp_stat_sn  # type: ignore[attr-defined]
        self._outbox += encode(
            pdu, header_digest=self._header_digest, data_digest=self._data_digest
        )

    def queue_burst(self, burst: Burst) -> None:
        """Put a sequence of Data-Out PDUs behind those that wait to be sent."""
        if self._header_digest or self._data_digest:
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

    def divert(self, initiator_task_tag: int) -> None:
        """The reader's buffer of this task is wanted back (see `Framer.divert`)."""
        self._wire.framer.divert(initiator_task_tag)

    # -- receiving ---------------------------------------------------------------------------

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
            match self._keepalive.check(now):
                case Action.SEND_PING:
                    self._ping()
                case Action.DROP_CONNECTION:
                    raise ConnectionLost(
                        f"{self._wire.peer}: silent, and no answer to a ping within"
                        f" {self._keepalive.timeout_s:g} s"
                    )
                case Action.WAIT:
                    pass

    def _ping(self) -> None:
        tag = self._owner.next_tag()
        self.inbound.replies[tag] = self._pinged
        self.queue(NopOut(tag, cmd_sn=self._owner.window.cmd_sn, data=_PING_DATA))
        self.push()

    def _pinged(self, pdu: Pdu) -> None:
        # A target may cut the echo to its own limits (RFC 7143 §11.18); what comes must match.
        if bytes(pdu.data) != _PING_DATA[: len(pdu.data)]:
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
                f"{self._wire.peer}: the target has kept its command window closed for"
                f" {self._command_timeout_s:g} s"
            )
        for task in self._owner.tasks.values():
            if now - task.started_at >= self._command_timeout_s * task.patience:
                task.timeouts += 1
                raise CommandTimedOut(
                    f"{self._wire.peer}: a command got no answer for"
                    f" {self._command_timeout_s * task.patience:g} s"
                )
