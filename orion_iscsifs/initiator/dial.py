"""From a portal to a connection in the full-feature phase.

    route     where this login starts: the configured portal, or where the target has moved
    chain     each portal on the way, as the target redirects (`redirect`)
    address   each address of a portal's host name, the first connection wins (`addresses`)
    TLS       where the source is `iscsis://` (`tls`)
    login     the Login Phase (`login`)

One deadline, `login_timeout`, covers the way from the first portal to the last Login Response.
"""

import enum
import logging
import socket
from typing import Final

import trio

from orion_iscsifs.errors import (
    ConnectFailed,
    ConnectionLost,
    LoginRedirected,
    NotIscsi,
    OrionError,
    TlsError,
)
from orion_iscsifs.initiator.addresses import Candidates, Portal, resolve
from orion_iscsifs.initiator.login import (
    LOGIN_SEGMENT_BYTES_MAX,
    LoggedIn,
    Nexus,
    Place,
    log_in,
    offer,
)
from orion_iscsifs.initiator.redirect import Chain, Route
from orion_iscsifs.initiator.tls import TlsWire, context
from orion_iscsifs.initiator.wire import Wire
from orion_iscsifs.protocol.framing import Framer
from orion_iscsifs.protocol.keys import Parameters

__all__ = ["LoggedIn", "Nexus", "Portal", "Route", "dial", "offer"]

log = logging.getLogger(__name__)


class _Phase(enum.Enum):
    """What a login is waiting for, as the words of a time-out."""

    NAME = "the host name was not found"
    CONNECTION = "no answer"
    HANDSHAKE = "connected, but the TLS handshake did not end"
    LOGIN = "connected, but the login did not end"


_ADVICE: Final = {
    _Phase.NAME: "check the name servers, or write the address instead",
    _Phase.CONNECTION: "check the address and that no firewall drops the packets",
    _Phase.HANDSHAKE: "check that a TLS server answers at this port",
    _Phase.LOGIN: "check that an iSCSI target answers at this port",
}


_WRONG_PEER: Final = (NotIscsi, ConnectionLost, TlsError)
"""Who answered is no target that works: another address of the name may be one."""


async def dial(
    portal: Portal | Route,
    nexus: Nexus,
    *,
    cmd_sn: int,
    cid: int = 0,
    tsih: int = 0,
    exp_stat_sn: int = 0,
    session: Parameters | None = None,
) -> LoggedIn:
    """Connect and log in. Raises TransportError, LoginError or ProtocolViolation.

    With `tsih` 0 the connection leads a new session, or reinstates the one with this ISID (RFC 7143
    §6.3.5). Otherwise it joins that session, whose negotiated parameters are `session`; a `cid`
    that the session has in use is reinstated (§6.3.4). Redirections are followed. A `Route`
    remembers the permanent ones from login to login; when nobody logs in there any more, the
    configured portal is asked within the same call.
    """
    route = portal if isinstance(portal, Route) else Route(portal)
    place = Place(cmd_sn=cmd_sn, cid=cid, tsih=tsih, exp_stat_sn=exp_stat_sn, session=session)
    try:
        return await _follow(route, nexus, place)
    except OrionError as error:
        moved = route.current
        if not route.forget():
            raise
        log.info("%s: %s; back to %s, which had redirected there", moved, error, route.configured)
    return await _follow(route, nexus, place)


async def _follow(route: Route, nexus: Nexus, place: Place) -> LoggedIn:
    """Log in where the target redirects to, portal after portal."""
    chain = Chain(route.current)
    deadline = trio.current_time() + nexus.config.login_timeout_s
    while True:
        try:
            logged_in = await _Attempt(chain.portal, nexus, place).run(deadline)
        except LoginRedirected as error:
            log.info("%s: %s", chain.portal, error)
            chain.follow(error)
        except OrionError as error:
            chain.explain(error)
            raise
        else:
            if chain.lasting is not None:
                route.remember(chain.lasting)
            return logged_in


class _Attempt:
    """One portal: each of its addresses at most once."""

    def __init__(self, portal: Portal, nexus: Nexus, place: Place) -> None:
        self._portal = portal
        self._nexus = nexus
        self._place = place
        self._candidates = Candidates(portal, [])
        self._phase = _Phase.NAME
        config = nexus.config.tls
        self._tls = None if config is None else context(config)

    async def run(self, deadline: float) -> LoggedIn:
        try:
            with trio.fail_at(deadline):
                self._candidates = await resolve(self._portal, self._nexus.config.bind)
                return await self._first_that_serves()
        except trio.TooSlowError:
            raise self._too_slow() from None

    async def _first_that_serves(self) -> LoggedIn:
        """Another address is asked where the first connection led to something that is no target.

        What the first one was is what the user has to know, so that error is kept.
        """
        first: OrionError | None = None
        while True:
            self._phase = _Phase.CONNECTION
            try:
                sock = await self._candidates.connect()
            except ConnectFailed:
                if first is None:
                    raise
                raise first from None
            try:
                return await self._log_in(sock)
            except _WRONG_PEER as error:
                first = first or error
                if not self._candidates.left:
                    raise first from None
                log.info("%s; trying the other addresses", error)

    async def _log_in(self, sock: socket.socket) -> LoggedIn:
        framer = Framer(data_segment_length_max=LOGIN_SEGMENT_BYTES_MAX)
        peer = str(self._portal)
        wire = (
            Wire(sock, framer, peer)
            if self._tls is None
            else TlsWire(sock, framer, peer, self._tls, self._portal.host)
        )
        try:
            if isinstance(wire, TlsWire):
                self._phase = _Phase.HANDSHAKE
                await wire.handshake()
            self._phase = _Phase.LOGIN
            return await log_in(wire, self._portal, self._nexus, self._place)
        except BaseException:
            wire.close()
            raise

    def _too_slow(self) -> ConnectFailed:
        limit_s = self._nexus.config.login_timeout_s
        silent = self._candidates.silence() if self._phase is _Phase.CONNECTION else ""
        return ConnectFailed(
            f"{self._portal}: {self._phase.value} within {limit_s:g} s{silent}",
            advice=_ADVICE[self._phase],
        )
