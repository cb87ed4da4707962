"""A session in full feature phase: what its connections have in common (RFC 7143 §4.4, §8.3).

    channel.py          one connection: StatSN, texts, pings, state
    ordering.py         CmdSN order across the connections, the command window
    execution.py        SCSI commands
    retransmission.py   SNACKs, damaged PDUs, answers that are kept (ErrorRecoveryLevel 1)
    allegiance.py       connections that are lost, logged out or replaced; reassignment (level 2)
    management.py       task management functions
    fences.py           answers that must not overtake each other on several connections
    events.py           Asynchronous Messages and what they announce

The task that serves the leading connection owns the nursery of the session and stays until the
session ends, whatever becomes of that connection; further connections are served by their own.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import trio

from orion_iscsifs.protocol.keys import DISCOVERY, Role
from orion_iscsifs.protocol.login import TargetLogin
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    TaskManagementRequest,
    TextRequest,
)
from orion_iscsifs.protocol.states import (
    SESSION_NEXT,
    ConnectionEvent,
    SessionEvent,
    SessionState,
    may,
    session_next,
)
from orion_iscsifs.scsi.sense import SenseData
from orion_iscsifs.target import allegiance, events
from orion_iscsifs.target.channel import Channel
from orion_iscsifs.target.connection import Connection
from orion_iscsifs.target.execution import Execution
from orion_iscsifs.target.fences import Fence
from orion_iscsifs.target.management import carry_out, manage
from orion_iscsifs.target.mischief import pong_wrongly
from orion_iscsifs.target.ordering import CommandOrder, Sequenced
from orion_iscsifs.target.registry import Stats, Target
from orion_iscsifs.target.retransmission import Retransmission
from orion_iscsifs.target.settings import Limits
from orion_iscsifs.target.tasks import Task
from orion_iscsifs.target.texts import Directory, Texts
from orion_iscsifs.target.unit import Units

RECOVERY: Final = 2
"""The ErrorRecoveryLevel at which a session survives the loss of all its connections."""
_CONTINUED: Final = (SessionEvent.CONTINUATION_STARTED, SessionEvent.CONTINUATION_SUCCEEDED)


class Session:
    """`target` is None in a discovery session."""

    def __init__(
        self, login: TargetLogin, target: Target | None, *, limits: Limits, stats: Stats
    ) -> None:
        self.target = target
        self.limits = limits
        self.parameters = login.parameters
        self.initiator_name = login.initiator_name
        self.isid = login.isid
        self.tsih = login.tsih
        self.portal_group_tag = login.parameters.target_portal_group_tag or 0
        # A name, an ISID and a portal group are one nexus (RFC 7143 §6.3.1): the same name and
        # ISID at another group are another session.
        self.nexus = (login.initiator_name, login.isid, self.portal_group_tag)
        self.stats = stats
        self.state = SessionState.LOGGED_IN
        self.discovery = login.session_type == DISCOVERY
        self.units = target.units if target is not None else Units("", {}, 0)
        self.channels: dict[int, Channel] = {}
        """By CID; those that were lost stay until they are logged out, replaced or timed out."""
        self.tasks: dict[int, Task] = {}
        """Active ones, on any connection or on none, by Initiator Task Tag."""
        self.next_tag = 0
        self.order = CommandOrder(login.cmd_sn, limits.command_window, self._deliver)
        self.retransmission = Retransmission(self)
        self.fence = Fence(self)
        self.execution = Execution(self)
        self.managing: set[int] = set()
        """Initiator Task Tags of task management functions that wait for something."""
        self.joining = 0
        """Connections whose login is about to be answered."""
        self.newest: dict[int, Connection] = {}
        """By CID: of the connections that are joining, the last that came."""
        self.ending: dict[int, list[trio.Event]] = {}
        """By CID: terminated commands that still ran when their connection was given up."""
        self._leading: Channel | None = None
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self._ended = trio.Event()
        self._failures = 0

    # -- life ----------------------------------------------------------------------------------

    async def run(self, channel: Channel) -> None:
        """Serve `channel`; for the leading one, until the session ends."""
        if channel is not self._leading:
            await channel.serve()
            return
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    if self.parameters.error_recovery_level:
                        self._nursery.start_soon(self.retransmission.watch)
                    await channel.serve()
                    await self._over.wait()
                    self._nursery.cancel_scope.cancel()
        finally:
            self._finish()

    def _finish(self) -> None:
        self._stop_commands()
        for channel in list(self.channels.values()):
            channel.happened(ConnectionEvent.SESSION_CLOSED)
            channel.drop()
        if self.target is not None:
            self.target.forget(self)
        self._ended.set()

    async def end(self) -> None:
        """End the session and wait until no command of it can write any more."""
        self.kill(SessionEvent.REINSTATED)
        await self._ended.wait()

    def kill(self, event: SessionEvent = SessionEvent.CLOSED) -> None:
        """The session is over: its connections close without a word, its commands end."""
        if may(SESSION_NEXT, Role.TARGET, self.state, event):
            self.state = session_next(Role.TARGET, self.state, event)
        self._stop_commands()
        self._scope.cancel()
        for channel in list(self.channels.values()):
            channel.drop()
        if self.target is not None and not self.execution.running:
            # Nobody has to wait for this one: its name is free at once.
            self.target.forget(self)

    def _stop_commands(self) -> None:
        """Whatever has not begun never does: held requests, data on its way, delayed commands."""
        self._over.set()
        self.order.held.clear()
        for task in self.tasks.values():
            task.aborted = True

    def drop(self) -> None:
        """Every connection breaks without a word. What that means is up to the recovery level."""
        for channel in list(self.channels.values()):
            channel.drop()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def later(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run something that waits beside the readers; it ends with the session."""
        assert self._nursery is not None
        if not self.over:
            self._nursery.start_soon(function, *arguments)

    # -- connections ---------------------------------------------------------------------------

    def add(self, connection: Connection, login: TargetLogin, directory: Directory) -> Channel:
        """A connection has logged in: the leading one, or one more."""
        parameters = login.parameters
        if self._leading is not None:
            parameters = replace(
                self.parameters,
                header_digest=parameters.header_digest,
                data_digest=parameters.data_digest,
                max_recv_data_segment_length=parameters.max_recv_data_segment_length,
                max_send_data_segment_length=parameters.max_send_data_segment_length,
            )
        channel = Channel(self, connection, Texts(connection, directory, parameters))
        self.channels[connection.cid] = channel
        if self._leading is None:
            self._leading = channel
        return channel

    async def join(
        self, connection: Connection, login: TargetLogin, directory: Directory, exp_stat_sn: int
    ) -> Channel | None:
        """One more connection, or a new one in the place of an old one with its CID (§6.3.4).

        `exp_stat_sn` acknowledges what the old one sent (§11.12.9). None if, while the commands of
        earlier connections with this CID ended, the session did, too, or another login came for
        the CID, or there is no place left.
        """
        self.joining += 1
        self.newest[connection.cid] = connection
        try:
            if (old := self.channels.get(connection.cid)) is not None:
                old.acknowledge(exp_stat_sn)
                allegiance.replace(self, old)
            # Whoever is first to replace a connection, every login for its CID waits: what the
            # old one wrote must not land after what the new one is answered.
            for finished in tuple(self.ending.get(connection.cid, ())):
                await finished.wait()
            if self.newest.get(connection.cid) is not connection:
                return None
            self.ending.pop(connection.cid, None)
            if self.over or connection.closed or self.refuses(connection.cid):
                return None
            self.stats.joined += 1
            self._failures += 1
            if self.state is SessionState.FAILED:
                for event in _CONTINUED:
                    self.state = session_next(Role.TARGET, self.state, event)
            return self.add(connection, login, directory)
        finally:
            if self.newest.get(connection.cid) is connection:
                del self.newest[connection.cid]
            self.joining -= 1
            self.settle()

    def refuses(self, cid: int) -> bool:
        """Whether a connection with `cid` would be one too many.

        At level 2 even a session of one connection lets a second one in, to log the first out
        (§6.3.4).
        """
        limit = self.parameters.max_connections
        if limit == 1 and self.parameters.error_recovery_level == RECOVERY:
            limit = 2
        return sum(channel.cid != cid for channel in self.live) >= limit

    @property
    def live(self) -> list[Channel]:
        """Connections in full feature phase."""
        return [channel for channel in self.channels.values() if channel.live]

    @property
    def connection(self) -> Connection:
        """The first that is alive, or the last known one of the leading CID."""
        channel = next(iter(self.live), self._leading)
        assert channel is not None
        return channel.connection

    @property
    def texts(self) -> Texts:
        """The text exchanges of the leading connection."""
        assert self._leading is not None
        return self._leading.texts

    def has(self, connection: Connection) -> bool:
        return any(channel.connection is connection for channel in self.channels.values())

    def left(self, channel: Channel) -> None:
        """The connection is closed: in peace after a logout, or it was lost."""
        if self.over:
            return
        if channel.happened(ConnectionEvent.LOST):
            self.stats.lost_connections += 1
            allegiance.lost(self, channel)
        elif self.channels.get(channel.cid) is channel:
            del self.channels[channel.cid]
        if not self.over:
            self.settle()

    def settle(self) -> None:
        """Without a connection: the session is over, or waits for one (§6.3.5, §6.3.6)."""
        if self.live or self.joining or self.over or self.state is SessionState.FAILED:
            return
        waiting = any(task.channel is None for task in self.tasks.values())
        if self.parameters.error_recovery_level < RECOVERY or not (self.channels or waiting):
            self.kill()
        else:
            parameters = self.parameters
            self.fail(parameters.default_time2wait + parameters.default_time2retain)

    def fail(self, delay_s: float) -> None:
        """The last connection is gone; the session too, unless one comes back in time (§7.5)."""
        if may(SESSION_NEXT, Role.TARGET, self.state, SessionEvent.FAILED):
            self.state = session_next(Role.TARGET, self.state, SessionEvent.FAILED)
        self._failures += 1
        self.later(self._time_out, self._failures, delay_s)

    async def _time_out(self, failure: int, delay_s: float) -> None:
        await trio.sleep(delay_s)
        if failure == self._failures and not self.live:
            self.stats.timed_out_sessions += 1
            self.kill(SessionEvent.TIMED_OUT)

    def flush(self) -> None:
        """Send what is queued, on every connection."""
        for channel in self.channels.values():
            channel.connection.flush()

    # -- requests in their turn ----------------------------------------------------------------

    def _deliver(self, channel: Channel, pdu: Sequenced) -> None:
        """The turn of `pdu` in CmdSN order has come."""
        match pdu:
            case ScsiCommand():
                self.execution.begin(pdu)
                return
            case NopOut():
                if self.target is None or not pong_wrongly(channel, pdu, self.target.faults):
                    channel.nop_out(pdu)
            case TaskManagementRequest():
                manage(self, channel, pdu)
            case TextRequest():
                channel.text(pdu)
            case LogoutRequest():
                allegiance.log_out(self, channel, pdu)
        if not pdu.immediate:
            self.order.ended()

    def carry_out(self, channel: Channel, request: TaskManagementRequest) -> None:
        """A task management function that a fault has delayed."""
        carry_out(self, channel, request)

    def new_tag(self) -> int:
        """A Target Transfer Tag; ffffffff is reserved."""
        tag = self.next_tag
        self.next_tag = (tag + 1) % NO_TAG
        return tag

    # -- what tests and faults ask for ---------------------------------------------------------

    def ping(self) -> None:
        """A NOP-In that wants an answer, on the first connection."""
        for channel in self.live[:1]:
            channel.ping()

    def send_async_message(
        self, event: int, parameters: tuple[int, int, int] = (0, 0, 0), *, vcode: int = 0
    ) -> None:
        """RFC 7143 §11.9, on the first connection. What the event announces does not happen."""
        for channel in self.live[:1]:
            events.send(channel, event, parameters, vcode=vcode)

    def act_out(
        self, event: int, parameters: tuple[int, int, int] = (0, 0, 0), *, vcode: int = 0
    ) -> None:
        """As `send_async_message`, and what the event announces happens."""
        for channel in self.live[:1]:
            events.act_out(channel, event, parameters, vcode=vcode)

    def add_attention(self, number: int, attention: SenseData) -> None:
        """The next command to unit `number` is answered with `attention`."""
        self.execution.add_attention(number, attention)

    def freeze_window(self) -> None:
        """Commands that end no longer move MaxCmdSN."""
        self.order.freeze()

    def thaw_window(self) -> None:
        """Give back what `freeze_window` kept, and tell the initiator with a NOP-In."""
        self.order.thaw()
        for channel in self.live[:1]:
            channel.report_window()
