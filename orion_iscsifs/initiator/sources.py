"""`bind=`: the source address or the interface of our connections."""

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Self

from orion_iscsifs.errors import ConnectFailed

_ADVICE = "`ip address` lists the addresses and interfaces of this host"


@dataclass(frozen=True, slots=True)
class Source:
    """Where connections start: one of `sockaddr` (an address of ours) and `interface`."""

    text: str
    family: int | None = None
    """Of the address; an interface has no family of its own."""
    sockaddr: tuple[str | int | bytes, ...] = ()
    interface: bytes = b""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConnectFailed for what is neither an address nor an interface of this host."""
        try:
            ipaddress.ip_address(text)
        except ValueError:
            return cls._interface(text)
        flags = socket.AI_NUMERICHOST | socket.AI_PASSIVE
        try:
            family, *_, sockaddr = socket.getaddrinfo(
                text, 0, type=socket.SOCK_STREAM, flags=flags
            )[0]
            source = cls(text, int(family), sockaddr)
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                source.apply(trial)
        except OSError as error:
            what = "is no address of this host"
            if error.errno != errno.EADDRNOTAVAIL and not isinstance(error, socket.gaierror):
                what = f"can't be bound to: {error.strerror}"
            raise ConnectFailed(f"bind={text}: {what}", advice=_ADVICE) from None
        return source

    @classmethod
    def _interface(cls, text: str) -> Self:
        try:
            socket.if_nametoindex(text)
        except (OSError, ValueError):
            raise ConnectFailed(
                f"bind={text}: neither an address nor an interface of this host", advice=_ADVICE
            ) from None
        return cls(text, interface=text.encode())

    def suits(self, family: int) -> bool:
        """Whether a connection to an address of this family can start here."""
        return self.family is None or self.family == family

    def apply(self, sock: socket.socket) -> None:
        """Before `connect`; raises OSError."""
        if self.interface:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.interface)
        else:
            # The port is chosen at connect(), so that each peer has all ports to choose from.
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind(self.sockaddr)


_IP_BIND_ADDRESS_NO_PORT = 24
"""ip(7); the socket module lacks the name. It works for IPv6 sockets as well."""
