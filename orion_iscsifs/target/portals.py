"""Portals: where a target listens, in which portal group, and what SendTargets says of it."""

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from orion_iscsifs.errors import BusyError, UsageError

Address = tuple[str, int]

_BACKLOG: Final = 128
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - recognised here, not bound

Advertise = Sequence[str] | Callable[[str, Address], Sequence[str]]
"""What SendTargets names instead of the portals: TargetAddress values, portal group tag included
(RFC 7143 §13.8), or a function of the target's name and the address that the initiator dialled."""


@dataclass(frozen=True, slots=True)
class Portal:
    """One address, and the portal group that it belongs to: a session never leaves its group."""

    host: str
    port: int
    group: int = 1

    @classmethod
    def of(cls, portal: "Portal | Address") -> "Portal":
        """A plain address is in group 1."""
        return portal if isinstance(portal, Portal) else cls(*portal)


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def target_addresses(
    portals: Sequence[Portal], advertise: Advertise | None, iqn: str, dialled: Address
) -> Sequence[str]:
    """The TargetAddress values of one target.

    A portal bound to every address is reachable at the one that this initiator used.
    """
    if advertise is None:
        return [
            f"{bracketed(dialled[0] if p.host in _WILDCARDS else p.host)}:{p.port},{p.group}"
            for p in portals
        ]
    return advertise(iqn, dialled) if callable(advertise) else advertise


async def listen(portal: Portal) -> socket.socket:
    """Raises BusyError or UsageError for an address that can't be bound."""
    try:
        found = await trio.socket.getaddrinfo(
            portal.host or None, portal.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
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
        what = f"portal {bracketed(portal.host)}:{portal.port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            advice = "another program listens there: stop it, or choose another port"
            raise BusyError(what, advice=advice) from error
        raise UsageError(what, advice="give an address of this host") from error
    return listener
