"""Portals and the life of the whole target."""

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from orion_iscsifs.errors import OrionError
from orion_iscsifs.protocol.keys import DISCOVERY
from orion_iscsifs.protocol.login import TargetLogin
from orion_iscsifs.protocol.text import Pair
from orion_iscsifs.target.connection import Connection
from orion_iscsifs.target.login import Door
from orion_iscsifs.target.login_faults import LoginFaults
from orion_iscsifs.target.portals import (
    Address,
    Advertise,
    Portal,
    bracketed,
    listen,
    target_addresses,
)
from orion_iscsifs.target.registry import Registry, Stats, Target
from orion_iscsifs.target.session import Session
from orion_iscsifs.target.settings import Limits, TargetConfig

_log = logging.getLogger(__name__)
_CONNECTIONS_MAX: Final = 256
_ACCEPT_PAUSE_S: Final = 0.1


class Running:
    """A server in operation: what tests look at and turn.

    `portals` are the addresses really bound, `portal_groups` the groups that they are in.
    `advertise`, when it is not None, is what SendTargets lists instead of them. `stop` and `start`
    play a target that goes away and comes back at the same addresses with the same disks.
    """

    def __init__(
        self,
        targets: Sequence[TargetConfig],
        portals: Sequence[Portal | Address],
        limits: Limits,
        nursery: trio.Nursery,
        advertise: Advertise | None = None,
    ) -> None:
        found = [Portal.of(portal) for portal in portals]
        self.limits = limits
        self.stats = Stats()
        groups = [portal.group for portal in found]
        self.targets = [Target(config, limits, self.stats, groups) for config in targets]
        self.portals: list[Address] = [(portal.host, portal.port) for portal in found]
        self.portal_groups = groups
        self.advertise = advertise
        self.discovery_faults = LoginFaults()
        """What discovery logins meet; those of a target are in its `TargetConfig`."""
        self._registry = Registry(self.targets)
        self._door = Door(self._registry, limits, self.stats, self.discovery_faults)
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
        base = f"iscsi://{bracketed(host)}:{port}/{self.targets[target].iqn}"
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
        for session in self.sessions:
            session.kill()
        await self._idle.wait()

    async def start(self) -> None:
        """Open the portals (again); raises UsageError for an address that can't be bound.

        It is as after a loss of power: what is kept through that is kept.
        """
        for target in self.targets:
            target.lose_power()
        for index, address in enumerate(self.portals):
            group = self.portal_groups[index]
            listener = await listen(Portal(*address, group))
            self._listeners.append(listener)
            # Port 0 has become a real one: a restart binds the same.
            self.portals[index] = listener.getsockname()[:2]
            self._nursery.start_soon(self._accept, listener, group)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    # -- connections --------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket, group: int) -> None:
        # It may have been closed before this task has run for the first time.
        while listener.fileno() >= 0:
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
            self._nursery.start_soon(self._serve, sock, group)

    async def _serve(self, sock: socket.socket, group: int) -> None:
        try:
            connection = Connection(sock)
        except OSError:
            sock.close()
            return
        self._connections.add(connection)
        self._idle = trio.Event() if self._idle.is_set() else self._idle
        try:
            directory = partial(self._directory, connection)
            channel = await self._door.log_in(connection, directory, portal_group_tag=group)
            if channel is not None:
                await channel.run()
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

    def _directory(
        self, connection: Connection, login: TargetLogin, wanted: str
    ) -> list[Pair] | None:
        """The answer to SendTargets (RFC 7143 Appendix C); None: not to be asked like this.

        A normal session hears of its own target only, and of that by name or by no name.
        """
        if login.session_type == DISCOVERY:
            names = [target.iqn for target in self.targets]
            wanted_all, refused = wanted == "All", not wanted
        else:
            names = [login.target_name or ""]
            wanted_all, refused = not wanted, wanted == "All"
        if refused:
            return None
        portals = [Portal(*a, g) for a, g in zip(self.portals, self.portal_groups, strict=True)]
        pairs: list[Pair] = []
        for target in self.targets:
            iqn = target.iqn
            if iqn not in names or not (wanted_all or wanted == iqn):
                continue
            if not target.config.admits(login.initiator_name):
                continue
            pairs.append(("TargetName", iqn))
            addresses = target_addresses(portals, self.advertise, iqn, connection.local)
            pairs += [("TargetAddress", address) for address in addresses]
        return pairs


@asynccontextmanager
async def serve(
    targets: Sequence[TargetConfig],
    portals: Sequence[Portal | Address] = (("127.0.0.1", 0),),
    *,
    limits: Limits | None = None,
    advertise: Advertise | None = None,
) -> AsyncIterator[Running]:
    """Serve `targets` at `portals` while the block runs; port 0 picks a free one.

    A plain address is in portal group 1; `Portal` says another. `advertise` is what SendTargets
    lists instead of the portals. The devices stay the caller's: close them after this.
    """
    try:
        async with trio.open_nursery() as nursery:
            running = Running(targets, portals, limits or Limits(), nursery, advertise)
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
