"""Portals and the life of the whole target."""

import errno
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from orion_iscsifs.errors import BusyError, OrionError, UsageError
from orion_iscsifs.protocol.text import Pair
from orion_iscsifs.target.connection import Connection
from orion_iscsifs.target.login import Door
from orion_iscsifs.target.registry import PORTAL_GROUP_TAG, Registry, Stats, Target
from orion_iscsifs.target.session import Session
from orion_iscsifs.target.settings import Limits, TargetConfig

Address = tuple[str, int]

_log = logging.getLogger(__name__)
_BACKLOG: Final = 128
_CONNECTIONS_MAX: Final = 256
_ACCEPT_PAUSE_S: Final = 0.1
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - recognised here, not bound


class Running:
    """A server in operation: what tests look at and turn.

    `portals` are the addresses really bound. `stop` and `start` play a target that goes away and
    comes back at the same addresses with the same disks.
    """

    def __init__(
        self,
        targets: Sequence[TargetConfig],
        portals: Sequence[Address],
        limits: Limits,
        nursery: trio.Nursery,
    ) -> None:
        self.limits = limits
        self.stats = Stats()
        self.targets = [Target(config, limits, self.stats) for config in targets]
        self.portals: list[Address] = list(portals)
        self._registry = Registry(self.targets)
        self._door = Door(self._registry, limits, self.stats)
        self._nursery = nursery
        self._listeners: list[socket.socket] = []
        self._connections: set[Connection] = set()
        self._idle = trio.Event()
        self._idle.set()

    # -- for users of the handle --------------------------------------------------------------

    @property
    def sessions(self) -> list[Session]:
        """Normal sessions, of all targets."""
        return [session for target in self.targets for session in target.sessions.values()]

    def url(self, lun: int | None = None, *, target: int = 0) -> str:
        host, port = self.portals[0]
        base = f"iscsi://{_bracketed(host)}:{port}/{self.targets[target].iqn}"
        return base if lun is None else f"{base}/{lun}"

    def drop_connections(self) -> None:
        """Every TCP connection breaks without a word; portals stay open."""
        for session in self.sessions:
            session.drop()
        for connection in list(self._connections):
            connection.close()

    async def stop(self) -> None:
        """Close the portals and all connections; returns when no command runs any more."""
        for listener in self._listeners:
            trio.lowlevel.notify_closing(listener)
            listener.close()
        self._listeners.clear()
        self.drop_connections()
        await self._idle.wait()

    async def start(self) -> None:
        """Open the portals (again); raises UsageError for an address that can't be bound."""
        for index, address in enumerate(self.portals):
            listener = await _listen(address)
            self._listeners.append(listener)
            # Port 0 has become a real one: a restart binds the same.
            self.portals[index] = listener.getsockname()[:2]
            self._nursery.start_soon(self._accept, listener)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    # -- connections --------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                await trio.lowlevel.wait_readable(listener)
                sock, _ = listener.accept()
            except trio.ClosedResourceError:
                return
            except BlockingIOError:
                continue
            except OSError as error:
                if listener.fileno() < 0:
                    return
                # Out of descriptors, or the peer has gone already.
                _log.info("accept: %s", error.strerror)
                await trio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._connections) >= _CONNECTIONS_MAX:
                sock.close()
                continue
            self._nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock)
        except OSError:
            sock.close()
            return
        self._connections.add(connection)
        self._idle = trio.Event() if self._idle.is_set() else self._idle
        try:
            session = await self._door.log_in(connection, partial(self._directory, connection))
            if session is not None:
                await session.run()
        except OrionError as error:
            self.stats.last_error = str(error)
        except Exception:
            # One connection's bug must not take the other disks away.
            _log.exception("%s: the connection failed", connection.peer)
        finally:
            connection.close()
            self._connections.discard(connection)
            if not self._connections:
                self._idle.set()

    def _directory(self, connection: Connection, wanted: str) -> list[Pair]:
        """The answer to SendTargets (RFC 7143 Appendix C)."""
        pairs: list[Pair] = []
        for target in self.targets:
            if wanted in {"All", target.iqn} or (not wanted and self._is_of(connection, target)):
                pairs.append(("TargetName", target.iqn))
                pairs += [
                    ("TargetAddress", f"{_seen_from(connection, address)},{PORTAL_GROUP_TAG}")
                    for address in self.portals
                ]
        return pairs

    def _is_of(self, connection: Connection, target: Target) -> bool:
        return any(session.connection is connection for session in target.sessions.values())


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _seen_from(connection: Connection, address: Address) -> str:
    """A portal bound to every address is reachable at the one that this initiator used."""
    host, port = address
    return f"{_bracketed(connection.local[0] if host in _WILDCARDS else host)}:{port}"


async def _listen(address: Address) -> socket.socket:
    host, port = address
    try:
        found = await trio.socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        what = f"portal {_bracketed(host)}:{port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            advice = "another program listens there: stop it, or choose another port"
            raise BusyError(what, advice=advice) from error
        raise UsageError(what, advice="give an address of this host") from error
    return listener


@asynccontextmanager
async def serve(
    targets: Sequence[TargetConfig],
    portals: Sequence[Address] = (("127.0.0.1", 0),),
    *,
    limits: Limits | None = None,
) -> AsyncIterator[Running]:
    """Serve `targets` at `portals` while the block runs; port 0 picks a free one.

    The devices stay the caller's: close them after this.
    """
    try:
        async with trio.open_nursery() as nursery:
            running = Running(targets, portals, limits or Limits(), nursery)
            try:
                await running.start()
                yield running
            finally:
                with trio.CancelScope(shield=True):
                    await running.stop()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The nursery is our business: the caller sees its own exception as it was raised.
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
