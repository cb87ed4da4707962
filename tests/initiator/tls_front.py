"""A TLS server in front of a played target, and certificates for both sides."""

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from orion_iscsifs.config import SessionConfig, TlsConfig
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, dial
from orion_iscsifs.initiator.tls import TlsWire
from orion_iscsifs.testing.certificates import Authority, Pair
from tests.initiator.peer import ISID, TARGET, PlayedTarget

T = TypeVar("T")


@dataclass(frozen=True)
class Certificates:
    ours: Authority
    theirs: Authority
    server: Pair
    client: Pair


def make_certificates(folder: Path) -> Certificates:
    """Ours is the authority that is trusted, theirs is not."""
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    names = ("localhost", "127.0.0.1", "::1")
    return Certificates(ours, theirs, ours.issue(*names), ours.issue(client=True))


def server_context(pair: Pair, clients: Path | None = None) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(pair.cert, pair.key)
    if clients is not None:
        made.load_verify_locations(clients)
        made.verify_mode = ssl.CERT_REQUIRED
    return made


async def patiently(sock: ssl.SSLSocket, step: Callable[[], T]) -> T:
    """One operation of a non-blocking TLS socket. The handshake's alerts leave, unlike trio's."""
    while True:
        try:
            return step()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)


async def forward(sock: ssl.SSLSocket, behind: Portal) -> None:
    await patiently(sock, sock.do_handshake)
    plain = await trio.open_tcp_stream(behind.host, behind.port)

    async def inwards() -> None:
        while piece := await patiently(sock, lambda: sock.recv(65536)):
            await plain.send_all(piece)

    async with plain, trio.open_nursery() as nursery:
        nursery.start_soon(inwards)
        while piece := await plain.receive_some(16384):
            await patiently(sock, partial(sock.send, piece))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def tls_front(behind: Portal, server: ssl.SSLContext, host: str) -> AsyncIterator[Portal]:
    """A TLS server that forwards to a plain portal, as stunnel does."""

    async def serve(stream: trio.SocketStream) -> None:
        plain = socket.socket(fileno=stream.socket.detach())
        plain.setblocking(False)
        with server.wrap_socket(plain, server_side=True, do_handshake_on_connect=False) as sock:
            try:
                await forward(sock, behind)
            except* (trio.BrokenResourceError, OSError):
                pass  # the handshake failed, or one side went away: that is what the tests do

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host=host)
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield Portal(host, listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def nexus(tls: TlsConfig | None, login_timeout_s: float = 5) -> Nexus:
    config = SessionConfig(
        initiator_name="iqn.2026-11.org.example:tester", tls=tls, login_timeout_s=login_timeout_s
    )
    return Nexus(target_name=TARGET, isid=ISID, config=config)


async def log_in(
    server: ssl.SSLContext,
    tls: TlsConfig | None,
    use: Callable[[LoggedIn, PlayedTarget], Awaitable[None]] | None = None,
    *,
    host: str = "127.0.0.1",
    as_host: str | None = None,
) -> None:
    """Log in to a played target behind TLS, and `use` the connection."""
    target = PlayedTarget()
    failure: Exception | None = None
    try:
        async with tls_front(target.portal, server, host) as portal, trio.open_nursery() as nursery:

            async def accept() -> None:
                await (await target.accept()).login()

            nursery.start_soon(accept)
            try:
                asked = Portal(as_host or portal.host, portal.port)
                logged_in = await dial(asked, nexus(tls), cmd_sn=1)
                assert isinstance(logged_in.wire, TlsWire) is (tls is not None)
                if use is not None:
                    await use(logged_in, target)
                logged_in.wire.close()
            except (AssertionError, OSError):
                raise
            except Exception as error:  # leaves the nurseries as itself, not in a group
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        target.close()
    if failure is not None:
        raise failure


def trusting(made: Certificates, **more: Path) -> TlsConfig:
    return TlsConfig(ca=str(made.ours.ca), **{name: str(path) for name, path in more.items()})
