"""A portal's addresses, and the first TCP connection to one of them.

A host name may have many addresses of both families. They are tried in the order that the resolver
gives, families alternating, each a short head start after the one before it or as soon as that one
has failed; the first connection wins (RFC 8305, "happy eyeballs"). So a dead IPv6 route costs a
quarter of a second and no time-out.

That somebody accepts a connection does not make it an iSCSI target: `Candidates` keeps what has not
been tried, so that the caller can go on with the rest.
"""

import errno
import os
import socket
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Final

import trio

from orion_iscsifs.errors import ConnectFailed, ProtocolViolation, UsageError
from orion_iscsifs.initiator.sources import Source
from orion_iscsifs.protocol.text import parse_number, shown
from orion_iscsifs.url import DEFAULT_PORT, parse_portal

HEAD_START_S: Final = 0.25
"""RFC 8305 §5's Connection Attempt Delay."""
_ADDRESSES_MAX: Final = 16
"""Of one host name; a name server's answer must not make us open hundreds of connections."""

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Portal:
    """Where a target listens. `group_tag` as SendTargets told it, if it did."""

    host: str
    port: int = DEFAULT_PORT
    group_tag: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_target_address(text: str, pdu: str) -> Portal:
    """`host[:port][,portal-group-tag]` (RFC 7143 §13.8); raises ProtocolViolation naming `pdu`.

    Some targets write an IPv6 address without the brackets that §13.8 demands; as long as no port
    follows, it can't be mistaken for anything else.
    """
    address, _, tag = text.partition(",")
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    group_tag = parse_number(tag) if tag else None
    try:
        # What only a URL may have is for users to write, not for targets.
        if not address or set("/@?") & set(address) or (tag and group_tag is None):
            raise UsageError("no address")
        source = parse_portal(address)
    except UsageError:
        problem = f"TargetAddress={shown(text)} is no address"
        raise ProtocolViolation(pdu, problem, section="13.8") from None
    return Portal(source.host, source.port, group_tag)


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a portal's host, as the socket wants it."""

    family: int
    sockaddr: SocketAddress

    def __str__(self) -> str:
        return str(self.sockaddr[0])


def interleave(addresses: list[Address]) -> list[Address]:
    """In turn one address of each family; each family in its own order (RFC 8305 §4)."""
    first = [item for item in addresses if item.family == addresses[0].family]
    others = [item for item in addresses if item.family != addresses[0].family]
    pairs = zip_longest(first, others)
    return [item for pair in pairs for item in pair if item is not None]


async def resolve(portal: Portal, bind: str | None = None) -> "Candidates":
    """Every address of the portal's host; raises ConnectFailed.

    `bind`: the source address or interface of the connections (`sources`).
    """
    source = None if bind is None else Source.parse(bind)
    try:
        found = await trio.socket.getaddrinfo(
            portal.host, portal.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
    except socket.gaierror as error:
        raise ConnectFailed(
            f"{portal}: host name not found: {error.strerror}", advice="check the host name"
        ) from None
    except ValueError:
        # What the resolver's own encoding refuses (UnicodeError): an empty or overlong label.
        raise ConnectFailed(
            f"{portal}: this can't be a host name", advice="check the host name"
        ) from None
    except OSError as error:
        raise ConnectFailed(f"{portal}: {_reason(error)}", advice="check the host name") from None
    unique = dict.fromkeys(Address(family, sockaddr) for family, _, _, _, sockaddr in found)
    usable = [address for address in unique if source is None or source.suits(address.family)]
    if not usable:
        raise ConnectFailed(
            f"{portal}: no address of the same family as bind={bind}",
            advice="bind= and the portal are both IPv4 or both IPv6",
        )
    return Candidates(portal, interleave(usable)[:_ADDRESSES_MAX], source)


class Candidates:
    """The addresses of a portal that are left to try, and how the others failed."""

    def __init__(
        self, portal: Portal, addresses: list[Address], source: Source | None = None
    ) -> None:
        self.portal = portal
        self.left = addresses
        self._source = source
        self.failures: list[tuple[Address, OSError]] = []

    async def connect(self) -> socket.socket:
        """The first connection: a non-blocking socket, whose address is taken off the list.

        Raises ConnectFailed when no address is left.
        """
        winners: list[socket.socket] = []
        try:
            async with trio.open_nursery() as nursery:
                for address in tuple(self.left):
                    failed = trio.Event()
                    nursery.start_soon(self._attempt, address, failed, winners, nursery)
                    with trio.move_on_after(HEAD_START_S):
                        await failed.wait()
        except BaseException:
            # Our caller's time was over at the moment of success.
            for sock in winners:
                sock.close()
            raise
        if not winners:
            raise self._failed()
        for late in winners[1:]:
            late.close()
        return winners[0]

    async def _attempt(
        self,
        address: Address,
        failed: trio.Event,
        winners: list[socket.socket],
        nursery: trio.Nursery,
    ) -> None:
        try:
            sock = await _connect(address, self._source)
        except OSError as error:
            self.left.remove(address)
            self.failures.append((address, error))
            failed.set()
            return
        if not winners:
            self.left.remove(address)
        winners.append(sock)
        nursery.cancel_scope.cancel()

    def _failed(self) -> ConnectFailed:
        return ConnectFailed(
            f"{self.portal}: {self._reasons()}",
            advice="check that the target runs and the port is right",
        )

    def _reasons(self) -> str:
        """`connection refused`; with several addresses each is named."""
        if [str(address) for address, _ in self.failures] == [self.portal.host]:
            return _reason(self.failures[0][1])
        where: dict[str, list[str]] = {}
        for address, error in self.failures:
            where.setdefault(_reason(error), []).append(str(address))
        return "; ".join(f"{reason} at {', '.join(hosts)}" for reason, hosts in where.items())

    def silence(self) -> str:
        """Who has not answered so far, as the tail of a sentence about a time-out."""
        text = ""
        if [str(address) for address in self.left] != [self.portal.host]:
            text = " from " + ", ".join(str(address) for address in self.left)
        return text + (f"; {self._reasons()}" if self.failures else "")


async def _connect(address: Address, source: Source | None) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source is not None:
            source.apply(sock)
        code = sock.connect_ex(address.sockaddr)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _reason(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)
