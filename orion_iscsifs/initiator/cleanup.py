"""What becomes of the commands of a connection that has ended (RFC 7143 §§7.2, 7.14, 8.2).

Theory of operation
-------------------
Nothing may be done with a command of a dead connection before the target has logged that
connection out: until then it may still carry the command out. There are three ways to that:

    another connection is left   a logout of the dead one's CID over it: reason "remove the
                                 connection for recovery" at ErrorRecoveryLevel 2, else "close the
                                 connection" (§11.14)
    none is left, level 2        a login with the same TSIH and CID, which replaces it (§6.3.4)
    none is left, below          none: the session is over, and a new one ends them all

None of it begins before Time2Wait is over, or has a use after Time2Retain (§7.5). A logout settles
every command: what the target has not acknowledged by ExpCmdSN it discards, so it is *retried*
with its old CmdSN, which also plugs the gap (§7.2.1). What it has acknowledged is *reassigned* at
level 2 (§7.2.2); below, the target has ended it, and it is issued *anew*.

Some targets (tgt) take every logout for one of the connection that carries it: they close that one,
and the dead one lives on. So below level 2 a ping follows the logout, and without an answer to it
nothing is settled: a new session ends everything.
"""

import logging
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.errors import ConnectionLost, LoginError, OrionError
from orion_iscsifs.initiator.connection import Connection
from orion_iscsifs.initiator.outage import TIME2WAIT_MAX_S
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.keys import Role
from orion_iscsifs.protocol.pdu import (
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    NopOut,
)
from orion_iscsifs.protocol.states import CleanupEvent, CleanupState, cleanup_next

if TYPE_CHECKING:
    from orion_iscsifs.initiator.session import Session

log = logging.getLogger(__name__)

LOGOUT_TIMEOUT_S: Final = 5.0
_BACKOFF_FIRST_S: Final = 0.1
_BACKOFF_MAX_S: Final = 5.0
_TRIES_MAX: Final = 3
"""Tries to log a dead connection out before the session is given up."""


class Cleanup:
    """The end of one connection."""

    def __init__(self, session: "Session", dead: Connection) -> None:
        self._session = session
        self._dead = dead
        self._state = CleanupState.CLEANUP_WAIT
        self._begins_at = trio.current_time() + min(dead.time2wait_s, TIME2WAIT_MAX_S)
        self._reassign: bool | None = None
        """The target has logged it out, and whether its commands wait to be reassigned."""
        self._misread = False
        """The target has logged the wrong connection out."""

    @property
    def _recovers(self) -> bool:
        return self._session.parameters.error_recovery_level == 2

    async def run(self) -> bool:
        """Settle the commands of the dead connection; False: only a new session can."""
        if self._dead.logged_out:
            return self._distribute(reassign=False)
        await trio.sleep_until(self._begins_at)
        for _ in range(_TRIES_MAX):
            live = self._least_busy()
            if live is None and not self._recovers:
                return False
            if live is not None and self._reassign is not None:
                return self._distribute(reassign=self._reassign)
            self._move(CleanupEvent.STARTED)
            settled = await (self._log_out(live) if live is not None else self._replace())
            self._move(CleanupEvent.SUCCEEDED if settled else CleanupEvent.FAILED)
            if settled or live is None or self._misread:
                return settled
        return False

    def _move(self, event: CleanupEvent) -> None:
        """Take a transition of RFC 7143 §8.2."""
        self._state = cleanup_next(Role.INITIATOR, self._state, event)

    def _least_busy(self) -> Connection | None:
        return min(
            (connection for connection in self._session.connections if connection.takes_commands),
            key=lambda connection: len(connection.tasks),
            default=None,
        )

    async def _log_out(self, live: Connection) -> bool:
        """Explicit logout of the dead connection over another one (§11.14)."""
        session, dead = self._session, self._dead
        reason = (
            LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY
            if self._recovers
            else LogoutReason.CLOSE_CONNECTION
        )
        request = LogoutRequest(session.next_tag(), reason, dead.cid, cmd_sn=session.window.cmd_sn)
        try:
            answer = await live.request(request, LOGOUT_TIMEOUT_S)
        except ConnectionLost as error:
            log.info("%s", error)
            return False
        if not isinstance(answer, LogoutResponse):
            return False
        match answer.response:
            case LogoutResponseCode.CLOSED if self._recovers:
                self._reassign = True
                await trio.sleep(min(answer.time2wait_s, TIME2WAIT_MAX_S))
                return self._distribute(reassign=True)
            case LogoutResponseCode.CLOSED | LogoutResponseCode.CID_NOT_FOUND:
                # Not found: the target has ended it by itself, and its commands with it (§7.6 b).
                if not (self._recovers or await self._survives(live)):
                    return False
                self._reassign = False
                return self._distribute(reassign=False)
        log.warning(
            "%s: logout of connection %d: response %d", session.portal, dead.cid, answer.response
        )
        await trio.sleep(min(answer.time2wait_s, TIME2WAIT_MAX_S))
        return False

    async def _survives(self, carrier: Connection) -> bool:
        """Whether the connection that carried the logout is still there."""
        session = self._session
        ping = NopOut(session.next_tag(), cmd_sn=session.window.cmd_sn)
        try:
            await carrier.request(ping, LOGOUT_TIMEOUT_S)
        except ConnectionLost as error:
            log.warning(
                "%s: the logout of connection %d has ended connection %d: %s",
                session.portal,
                self._dead.cid,
                carrier.cid,
                error,
            )
            self._misread = True
        return not self._misread

    async def _replace(self) -> bool:
        """Connection reinstatement: a login that logs the old connection out (§6.3.4)."""
        session, dead = self._session, self._dead
        supervisor = session.supervisor
        pause_s = _BACKOFF_FIRST_S
        until = min(self._begins_at + dead.time2retain_s, supervisor.deadline)
        with trio.move_on_at(until):
            while True:
                try:
                    await supervisor.replace(dead)
                except LoginError as error:
                    log.warning("%s: the session can't be continued: %s", session.portal, error)
                    return False
                except OrionError as error:
                    session.last_error = error
                else:
                    return self._distribute(reassign=True)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, _BACKOFF_MAX_S)
        return False

    def _distribute(self, *, reassign: bool) -> bool:
        """The dead connection is logged out: its commands go to the others, if there are any."""
        session, dead = self._session, self._dead
        exp_cmd_sn = session.window.exp_cmd_sn
        anew = []
        for task in list(dead.tasks.values()):
            live = self._least_busy()
            if live is None:
                return False
            if not serial.less(task.cmd_sn, exp_cmd_sn):
                session.retry(task, live)
            elif reassign and task.waiter is not None and not task.urgent:
                session.manager.reassign(task, live)
            else:
                anew.append(task)
        session.hold(anew, session.last_error or ConnectionLost(f"{dead.peer}: connection lost"))
        session.counters.connections_recovered += 1
        log.warning(
            "%s: connection %d is logged out; %d of its commands start anew",
            session.portal,
            dead.cid,
            len(anew),
        )
        session.pump()
        session.push()
        return True
