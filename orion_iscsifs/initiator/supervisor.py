"""How a session outlives its connections: RFC 7143 §7.1.4's classes of recovery, from the top.

Theory of operation
-------------------
While one session lasts (one TSIH), each connection is *served* by a task of its own, which also
cleans up when the connection ends (`cleanup`): the commands go on over other connections, or over
one that replaces it. `_replenish` keeps the number of connections up.

When that fails, the session is over and *reinstated*: a login with the same ISID and TSIH 0, so
the target ends the old nexus before it answers (§6.3.5), and a write that lingers from an old
connection can't land after its own retry. A target that was restarted may show another disk under
the same LUN: `Session.checks` run on *urgent* tasks before anything else is sent.

The outage's clock starts when the last connection ends. After `replacement_timeout` all that is
held fails, new requests fail at once, and logging in goes on in the background.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.errors import (
    ConnectionLost,
    DigestError,
    LoginError,
    OrionError,
    ProtocolViolation,
)
from orion_iscsifs.initiator.budget import LoginPolicy
from orion_iscsifs.initiator.cleanup import LOGOUT_TIMEOUT_S, Cleanup
from orion_iscsifs.initiator.connection import Connection
from orion_iscsifs.initiator.dial import LoggedIn, Portal, dial
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.protocol.keys import Role
from orion_iscsifs.protocol.pdu import LogoutRequest
from orion_iscsifs.protocol.sequence import CommandWindow
from orion_iscsifs.protocol.states import (
    CONNECTION_NEXT,
    SESSION_NEXT,
    ConnectionEvent,
    SessionEvent,
    SessionState,
    may,
    session_next,
)

if TYPE_CHECKING:
    from orion_iscsifs.initiator.session import Session

log = logging.getLogger(__name__)

FIRST_CMD_SN: Final = 1
_JOIN_BACKOFF_FIRST_S: Final = 0.5
_JOIN_BACKOFF_MAX_S: Final = 30.0


class Supervisor:
    """The life of one `Session`. `login`, then `run` in the background, at last `logout`."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._state = SessionState.FREE
        self._nursery: trio.Nursery | None = None
        self._over = trio.Event()
        self._short = trio.Event()
        """There are fewer connections than there should be."""
        self._cleaning = trio.Lock()
        self._unsettled: set[int] = set()
        """CIDs of dead connections whose commands are not settled."""
        self._life = trio.CancelScope(shield=True)
        self._wanted = 1
        self._checked = False
        """The checks after the login are done: it is known whose disks these are."""
        self._time2wait_s = 0.0

    # -- the session's life ------------------------------------------------------------------

    async def login(self) -> None:
        """The first login; its errors are the caller's."""
        session = self._session
        self._enter(await dial(session.route, session.nexus, cmd_sn=FIRST_CMD_SN))

    async def run(self) -> None:
        """Serve session after session until `logout`.

        Shielded: whoever is cancelled above may have to flush, and logs out on this connection.
        """
        session = self._session
        with self._life:
            while True:
                async with trio.open_nursery() as self._nursery:
                    for connection in list(session.connections):
                        self.start(self._serve, connection)
                    self.start(self._resume)
                    self.start(self._replenish)
                    await self._over.wait()
                    self._nursery.cancel_scope.cancel()
                    if not self._is_closed():
                        # Before the tasks here have ended: one of them may be cancelled in a
                        # command, and wait for that to be settled.
                        self._forget()
                if self._is_closed():
                    return
                await self._reinstate()

    def _is_closed(self) -> bool:
        """Asked anew after an await, which the type checker does not expect of `state`."""
        return self._session.state is State.CLOSED

    def end(self, error: OrionError, time2wait_s: float | None = None) -> None:
        """The session can't go on: a new one has to take its place, after Time2Wait."""
        session = self._session
        if self._over.is_set():
            return
        session.last_error = error
        self._time2wait_s = (
            session.parameters.default_time2wait if time2wait_s is None else time2wait_s
        )
        for connection in session.connections:
            connection.fail(error)
        self._over.set()

    def _forget(self) -> None:
        """The session is over: what was in flight is held."""
        session = self._session
        error = session.last_error or ConnectionLost(f"{session.portal}: connection lost")
        for connection in list(session.connections):
            self._drop(connection, error)
        self._unsettled.clear()
        self._move(SessionEvent.FAILED)
        if session.state is State.LOGGED_IN:
            session.enter(State.RECOVERING)
        session.outage.lost(trio.current_time(), self._time2wait_s)
        held = list(session.tasks.values())
        log.warning("%s: %s; %d commands held, logging in again", session.portal, error, len(held))
        session.hold(held, error)

    def _enter(self, logged_in: LoggedIn) -> None:
        """The leading connection of a new session is in the full-feature phase."""
        session = self._session
        self._move(SessionEvent.REINSTATED)
        self._move(SessionEvent.LOGIN_SUCCEEDED)
        self._over = trio.Event()
        session.window = CommandWindow(logged_in.cmd_sn, logged_in.exp_cmd_sn, logged_in.max_cmd_sn)
        session.parameters = logged_in.parameters
        session.tsih = logged_in.tsih
        session.outage.entered(trio.current_time())
        session.counters.logins += 1
        self._wanted = min(session.nexus.config.connections, session.parameters.max_connections)
        self._add(logged_in)
        self._checked = session.state is State.CLOSED or not session.checks
        if self._checked:
            session.enter(State.LOGGED_IN)

    def _move(self, event: SessionEvent) -> None:
        """Take a transition of RFC 7143 §8.3 if it leads anywhere from here."""
        if may(SESSION_NEXT, Role.INITIATOR, self._state, event):
            self._state = session_next(Role.INITIATOR, self._state, event)

    async def _resume(self) -> None:
        """After a new login: the checks, then what has been held."""
        session = self._session
        if session.state is State.CLOSED:
            return
        if session.state is State.LOGGED_IN:
            session.go_on()
            return
        try:
            with trio.fail_at(self.deadline):
                for check in session.checks:
                    await check()
        except trio.TooSlowError:
            self.end(ConnectionLost(f"{session.portal}: the checks after the login take long"))
            return
        except OrionError as error:
            if not self._is_closed():
                self.end(error)
            return
        # No await from here on: the session is still the one that was checked.
        if not self._is_closed():
            self._checked = True
            session.go_on()
            self._short.set()

    async def logout(self) -> None:
        """End the session in order, bounded in time; afterwards it is CLOSED."""
        session = self._session
        session.enter(State.CLOSED)
        live = [connection for connection in session.connections if not connection.silenced]
        if live:
            request = LogoutRequest(session.next_tag(), cmd_sn=session.window.cmd_sn)
            for connection in live[1:]:
                connection.silenced = True
            try:
                await live[0].request(request, LOGOUT_TIMEOUT_S)
            except OrionError as error:
                log.info("%s: the logout is not answered: %s", session.portal, error)
        # Before any buffer goes back to its owner: nothing may be sent from it any more.
        for connection in session.connections:
            connection.fail(session.verdict())
        self._move(SessionEvent.CLOSED)
        session.fail_all(session.verdict())
        self._life.cancel()

    # -- connections -------------------------------------------------------------------------

    def start(self, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run something that waits beside the connections, as long as this session lasts."""
        assert self._nursery is not None
        self._nursery.start_soon(self._guard, function, *arguments)

    async def _guard(self, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        try:
            await function(*arguments)
        except Exception as error:
            # A bug, perhaps woken by the target's bytes: the mount has to outlive it.
            log.exception("%s: the session is given up", self._session.portal)
            self.end(ConnectionLost(f"{self._session.portal}: internal error: {error!r}"))

    def _add(self, logged_in: LoggedIn) -> Connection:
        session = self._session
        connection = Connection(logged_in, session, session.nexus.config)
        session.connections.append(connection)
        session.sort_connections()
        return connection

    def _drop(self, connection: Connection, error: OrionError) -> None:
        session = self._session
        session.connections.remove(connection)
        session.sort_connections()
        session.counters.connections_lost += 1
        session.last_error = error
        if may(CONNECTION_NEXT, Role.INITIATOR, connection.state, ConnectionEvent.LOST):
            connection.move(ConnectionEvent.LOST)

    async def _serve(self, connection: Connection) -> None:
        """One connection, until it ends, and the cleanup after it."""
        session = self._session
        try:
            await connection.run()
        except OrionError as error:
            if session.state is State.CLOSED or self._over.is_set():
                return
            self._drop(connection, error)
            if isinstance(error, ProtocolViolation) and not isinstance(error, DigestError):
                # The target's own fault, and it would come again with its command: RFC 7143 §7.7.
                self.end(error)
                return
            self._unsettled.add(connection.cid)
            await self._clean_up(connection, error)
        self._unsettled.discard(connection.cid)
        self._short.set()

    async def _clean_up(self, dead: Connection, error: OrionError) -> None:
        """Settle the commands of a connection that has ended, or end the session."""
        session = self._session
        if not session.connections:
            recovers = session.parameters.error_recovery_level == 2 and not dead.logged_out
            if not recovers or not self._checked:
                self.end(error, dead.time2wait_s)
                return
            session.outage.lost(trio.current_time(), dead.time2wait_s)
            self._move(SessionEvent.FAILED)
            if session.state is State.LOGGED_IN:
                session.enter(State.RECOVERING)
        log.warning(
            "%s: connection %d: %s; %d commands wait for its cleanup",
            session.portal,
            dead.cid,
            error,
            len(dead.tasks),
        )
        cleanup = Cleanup(session, dead)
        async with self._cleaning:
            settled = await cleanup.run()
        if not settled:
            self.end(error)
        elif session.state is not State.LOGGED_IN and session.connections:
            self._continued()

    async def replace(self, dead: Connection) -> None:
        """Log in with the CID of a connection that has ended; raises what `dial` raises."""
        self._take_over(await self._dial(dead.portal, dead.cid, dead.inbound.status.exp_stat_sn))

    def _continued(self) -> None:
        """A session that was without connections goes on (§6.3.6)."""
        session = self._session
        self._move(SessionEvent.CONTINUATION_SUCCEEDED)
        session.outage.entered(trio.current_time())
        if session.state is not State.CLOSED:
            session.go_on()

    async def _replenish(self) -> None:
        """Add connections until there are as many as wanted."""
        session = self._session
        pause_s = _JOIN_BACKOFF_FIRST_S
        while True:
            self._short = trio.Event()
            if session.state is not State.LOGGED_IN or not session.connections:
                await self._short.wait()
                continue
            if len(session.connections) + len(self._unsettled) >= self._wanted:
                pause_s = _JOIN_BACKOFF_FIRST_S
                await self._short.wait()
                continue
            if not await self._join():
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, _JOIN_BACKOFF_MAX_S)

    async def _join(self) -> bool:
        """One more connection for the session."""
        session = self._session
        used = self._unsettled | {connection.cid for connection in session.connections}
        cid = next(number for number in range(len(used) + 1) if number not in used)
        try:
            logged_in = await self._dial(session.connections[0].portal, cid)
        except LoginError as error:
            log.warning("%s: no further connection: %s", session.portal, error)
            if error.status_class == 2:
                # The target has its own limit: what there is has to do.
                self._wanted = len(session.connections)
            return False
        except OrionError as error:
            log.info("%s: no further connection: %s", session.portal, error)
            return False
        self._take_over(logged_in)
        session.counters.connections_added += 1
        return True

    async def _dial(self, portal: Portal, cid: int, exp_stat_sn: int = 0) -> LoggedIn:
        """A connection of the session that lasts, in the portal group where it is."""
        session = self._session
        return await dial(
            portal,
            session.nexus,
            cmd_sn=session.window.cmd_sn,
            cid=cid,
            tsih=session.tsih,
            exp_stat_sn=exp_stat_sn,
            session=session.parameters,
        )

    def _take_over(self, logged_in: LoggedIn) -> Connection:
        """A connection has joined the session that lasts."""
        session = self._session
        session.window.update(logged_in.exp_cmd_sn, logged_in.max_cmd_sn)
        connection = self._add(logged_in)
        self.start(self._serve, connection)
        return connection

    # -- a new session -----------------------------------------------------------------------

    async def _reinstate(self) -> None:
        """Log in again, however long it takes; give up what is held when its time is over."""
        session = self._session
        policy = LoginPolicy()
        pause_s = session.outage.pause_s(trio.current_time())
        while True:
            with trio.move_on_at(self.deadline):
                await trio.sleep(pause_s)
                error = await self._try_login()
                if error is None:
                    return
                decision = policy.after(error, trio.current_time())
                pause_s = decision.wait_s
                if decision.give_up and session.state is State.RECOVERING:
                    session.give_up(policy.verdict)
            if trio.current_time() >= self.deadline:
                session.give_up()

    @property
    def deadline(self) -> float:
        """When what is held has to fail; infinite once it has failed, or without a limit."""
        session = self._session
        return session.outage.deadline if session.state is State.RECOVERING else float("inf")

    async def _try_login(self) -> OrionError | None:
        """One login; what it failed with."""
        session = self._session
        try:
            logged_in = await dial(session.route, session.nexus, cmd_sn=FIRST_CMD_SN)
        except OrionError as error:
            if str(error) != str(session.last_error):
                log.warning("%s: login failed: %s", session.route, error)
            session.last_error = error
            return error
        except Exception as error:
            # A bug, perhaps woken by the target's bytes: the mount has to outlive it.
            log.exception("%s: login failed", session.route)
            session.last_error = ConnectionLost(f"{session.route}: internal error: {error!r}")
            return session.last_error
        # The login ended: no await from here on until the connection is ours to close.
        if session.state is State.CLOSED:
            logged_in.wire.close()
            return session.verdict()
        self._enter(logged_in)
        log.warning("%s: logged in again", session.route)
        return None
