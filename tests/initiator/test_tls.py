"""TLS below a login: good certificates, every kind of bad one, and the wire itself under load."""

import os
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from orion_iscsifs.config import SessionConfig, TlsConfig
from orion_iscsifs.errors import (
    CertificateRefused,
    ConnectFailed,
    ConnectionLost,
    NotIscsi,
    TlsError,
)
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, dial
from orion_iscsifs.initiator.tls import TlsWire, context
from orion_iscsifs.initiator.wire import Buffer
from orion_iscsifs.protocol.framing import Framer, encode
from orion_iscsifs.protocol.pdu import NopIn, NopOut, Pdu
from orion_iscsifs.testing.certificates import Authority, Pair
from tests.initiator.peer import ISID, TARGET, PlayedTarget

T = TypeVar("T")


@dataclass(frozen=True)
class Certificates:
    ours: Authority
    theirs: Authority
    server: Pair
    client: Pair


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
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


@pytest.mark.parametrize(
    ("host", "as_host"),
    [("127.0.0.1", None), ("127.0.0.1", "localhost"), ("::1", None)],
)
async def test_the_name_or_the_address_is_in_the_certificate(
    made: Certificates, host: str, as_host: str | None
) -> None:
    await log_in(server_context(made.server), trusting(made), host=host, as_host=as_host)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_certificate(made: Certificates, version: ssl.TLSVersion) -> None:
    server = server_context(made.server, clients=made.ours.ca)
    server.minimum_version = server.maximum_version = version
    both = trusting(made, cert=made.client.cert, key=made.client.key)
    await log_in(server, both)
    with pytest.raises(CertificateRefused, match=r"certificate|TLS handshake") as caught:
        await log_in(server, trusting(made))
    assert "tls_cert=" in caught.value.line


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_certificate_that_the_target_does_not_trust(
    made: Certificates, version: ssl.TLSVersion
) -> None:
    server = server_context(made.server, clients=made.ours.ca)
    server.minimum_version = server.maximum_version = version
    stranger = made.theirs.issue(client=True)
    tls = trusting(made, cert=stranger.cert, key=stranger.key)
    with pytest.raises(CertificateRefused, match="does not know the authority of our certificate"):
        await log_in(server, tls)


async def test_a_client_certificate_that_has_expired(made: Certificates) -> None:
    server = server_context(made.server, clients=made.ours.ca)
    old = made.ours.issue(client=True, days=(-2, -1))
    with pytest.raises(CertificateRefused, match="our certificate has expired"):
        await log_in(server, trusting(made, cert=old.cert, key=old.key))


@pytest.mark.parametrize(
    ("names", "days", "self_signed", "words"),
    [
        (["127.0.0.1"], (-2, -1), False, "has expired (renew it"),
        (["127.0.0.1"], (1, 2), False, "is not valid yet (check the clocks"),
        (["127.0.0.1"], (-1, 1), True, "is self-signed and not trusted"),
        (["192.0.2.1", "other.example"], (-1, 1), False, "is not for this address (use the host"),
        ([], (-1, 1), False, "is not for this address"),
    ],
)
async def test_a_certificate_that_is_refused(
    made: Certificates,
    names: list[str],
    days: tuple[float, float],
    self_signed: bool,
    words: str,
) -> None:
    pair = made.ours.issue(*names, days=days, self_signed=self_signed)
    with pytest.raises(CertificateRefused) as caught:
        await log_in(server_context(pair), trusting(made))
    assert words in caught.value.line
    assert not caught.value.retry_may_help


async def test_a_certificate_for_another_name(made: Certificates) -> None:
    pair = made.ours.issue("other.example", "127.0.0.1")
    with pytest.raises(CertificateRefused, match=r"localhost.*is for another host name"):
        await log_in(server_context(pair), trusting(made), as_host="localhost")


async def test_a_certificate_of_a_client_is_none_for_a_server(made: Certificates) -> None:
    with pytest.raises(CertificateRefused, match="is not meant for servers"):
        await log_in(server_context(made.client), trusting(made))


@pytest.mark.parametrize("ca", ["theirs", "system"])
async def test_an_unknown_authority(made: Certificates, ca: str) -> None:
    tls = TlsConfig(ca=str(made.theirs.ca) if ca == "theirs" else None)
    with pytest.raises(CertificateRefused, match="signed by an unknown authority") as caught:
        await log_in(server_context(made.server), tls)
    assert "tls_ca=FILE" in caught.value.line


async def test_the_servers_own_certificate_can_be_trusted(made: Certificates) -> None:
    for self_signed in (True, False):
        pair = made.theirs.issue("127.0.0.1", self_signed=self_signed)
        await log_in(server_context(pair), TlsConfig(ca=str(pair.cert)))


async def test_old_tls_is_refused(made: Certificates) -> None:
    server = server_context(made.server)
    server.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        server.minimum_version = server.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(TlsError, match=r"older than 1\.2"):
        await log_in(server, trusting(made))


async def test_a_file_that_went_bad_under_a_running_mount(made: Certificates) -> None:
    with pytest.raises(CertificateRefused, match="tls_ca=/nonexistent: can't be read: No such"):
        await dial(Portal("127.0.0.1", 1), nexus(TlsConfig(ca="/nonexistent")), cmd_sn=1)


# -- who answers ----------------------------------------------------------------------------------


async def dial_server(
    answer: Callable[[trio.SocketStream], Awaitable[None]], tls: TlsConfig | None, limit_s: float
) -> None:
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        portal = Portal("127.0.0.1", listeners[0].socket.getsockname()[1])
        try:
            await dial(portal, nexus(tls, limit_s), cmd_sn=1)
        except (ConnectFailed, TlsError, NotIscsi) as error:
            failure = error
        nursery.cancel_scope.cancel()
    assert failure is not None
    raise failure


async def test_no_tls_at_the_port(made: Certificates) -> None:
    async def plain(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(b"\x3f\x80" + bytes(46))

    with pytest.raises(TlsError, match="the answer is not TLS") as caught:
        await dial_server(plain, trusting(made), 5)
    assert "iscsi://" in caught.value.line


async def test_a_port_that_hangs_up(made: Certificates) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.aclose()

    with pytest.raises(TlsError, match="closed during the TLS handshake: is this a TLS port"):
        await dial_server(hang_up, trusting(made), 5)


async def test_a_port_that_says_nothing(made: Certificates) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    with pytest.raises(ConnectFailed, match=r"TLS handshake did not end within 0\.1 s"):
        await dial_server(silent, trusting(made), 0.1)


async def test_tls_where_plain_iscsi_was_asked_for(made: Certificates) -> None:
    """OpenSSL hangs up on what is not TLS; others send an alert first."""
    with pytest.raises(NotIscsi, match="closed before any answer") as caught:
        await log_in(server_context(made.server), None)
    assert "iscsis://" in caught.value.line

    async def alert(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(bytes.fromhex("15030300020246"))

    with pytest.raises(NotIscsi, match="the answer is TLS") as caught:
        await dial_server(alert, None, 5)
    assert "iscsis://" in caught.value.line


async def test_a_tls_server_without_a_target_behind_it(made: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        dead = Portal("127.0.0.1", nobody.getsockname()[1])
    failure: NotIscsi | None = None
    async with tls_front(dead, server_context(made.server), "127.0.0.1") as portal:
        try:
            await dial(portal, nexus(trusting(made)), cmd_sn=1)
        except NotIscsi as error:
            failure = error
    assert failure is not None
    assert "closed before any answer (check what the TLS server forwards to" in failure.line


# -- the wire -------------------------------------------------------------------------------------


async def test_pdus_of_every_size_both_ways(made: Certificates) -> None:
    """Pings whose data is small, a record, many records: whole and in order."""
    sizes = [0, 1, 100, 16380, 16384, 16388, 70_000, 200_000, 4, 333_333]
    source = random.Random(1)
    payloads = [source.randbytes(size) for size in sizes]

    async def use(logged_in: LoggedIn, target: PlayedTarget) -> None:
        wire = logged_in.wire
        wire.framer.data_segment_length_max = 1 << 20

        async def echo() -> None:
            for payload in payloads:
                ping = await target.latest.expect(NopOut)
                assert bytes(ping.data) == payload
                await target.latest.reply(NopIn(ping.initiator_task_tag, data=ping.data))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            pieces = []
            for tag, payload in enumerate(payloads):
                ping = NopOut(tag, cmd_sn=1, data=payload)
                pieces += encode(ping, header_digest=False, data_digest=False)
            await wire.send(pieces)
            answers: list[Pdu] = []
            with trio.fail_after(5):
                while len(answers) < len(payloads):
                    answers += await wire.receive()
        assert [bytes(answer.data) for answer in answers] == payloads
        assert wire.receive_nowait() is None

    await log_in(server_context(made.server), trusting(made), use)


async def tls_pair(
    made: Certificates, small: bool
) -> tuple[TlsWire, trio.SSLStream[trio.SocketStream]]:
    """Our wire and the other end of it. `small`: with tiny socket buffers."""
    left, right = socket.socketpair()
    if small:
        for sock in (left, right):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    left.setblocking(False)
    framer = Framer(data_segment_length_max=1 << 20)
    wire = TlsWire(left, framer, "peer", context(trusting(made)), "127.0.0.1")
    other = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(right)),
        server_context(made.server),
        server_side=True,
        https_compatible=True,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.do_handshake)
        await wire.handshake()
    return wire, other


async def test_a_full_socket(made: Certificates) -> None:
    """What is left over is sent again from where it stopped, whatever is queued behind it."""
    wire, other = await tls_pair(made, small=True)
    data = random.Random(2).randbytes(3_000_000)
    cuts = [0, 5, 40, 100, 30_000, 300_000, 300_048, 2_999_999, 3_000_000]
    received = bytearray()

    async def drain() -> None:
        while len(received) < len(data):
            received.extend(await other.receive_some(50_000))
            if len(received) % 7 == 0:
                await trio.lowlevel.checkpoint()

    rest: list[Buffer] = [data[start:end] for start, end in pairwise(cuts)]
    rest, later = rest[:4], rest[4:]
    blocked = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        while rest:
            rest = [*wire.send_nowait(rest), *later]
            later = []
            blocked += bool(rest)
            await trio.lowlevel.wait_writable(wire._sock)
    assert blocked > 10
    assert received == data
    wire.close()
    await trio.aclose_forcefully(other)


async def test_both_directions_at_once_on_a_full_socket(made: Certificates) -> None:
    wire, other = await tls_pair(made, small=True)
    ping = NopIn(1, data=os.urandom(200_000))
    stream = b"".join(map(bytes, encode(ping, header_digest=False, data_digest=False)))
    count = 10

    async def read_other() -> None:
        left = 2_000_000
        while left:
            left -= len(await other.receive_some(65536))

    async def write_other() -> None:
        for _ in range(count):
            await other.send_all(stream)

    async def read_ours() -> None:
        pdus: list[Pdu] = []
        while len(pdus) < count:
            pdus += await wire.receive()
        assert all(bytes(pdu.data) == ping.data for pdu in pdus)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_other)
            nursery.start_soon(write_other)
            nursery.start_soon(read_ours)
            await wire.send([bytes(2_000_000)])
    wire.close()
    await trio.aclose_forcefully(other)


async def test_the_end_of_a_connection(made: Certificates) -> None:
    wire, other = await tls_pair(made, small=False)
    part = NopIn(1, data=b"last words")
    stream = b"".join(map(bytes, encode(part, header_digest=False, data_digest=False)))
    await other.send_all(stream)
    await trio.aclose_forcefully(other)
    (pdu,) = await wire.receive()
    assert bytes(pdu.data) == b"last words"
    with pytest.raises(ConnectionLost, match="closed the connection"):
        await wire.receive()
    with pytest.raises(ConnectionLost, match=r"closed the connection|connection lost"):
        await wire.receive()
    wire.close()
    wire.close()


async def test_after_a_shutdown_nothing_is_read_undecrypted(made: Certificates) -> None:
    wire, other = await tls_pair(made, small=False)
    ping = NopIn(1, data=bytes(1000))
    await other.send_all(b"".join(map(bytes, encode(ping, header_digest=False, data_digest=False))))
    wire.shutdown()
    (pdu,) = wire.receive_nowait() or []
    assert isinstance(pdu, NopIn)
    with pytest.raises(ConnectionLost):
        wire.receive_nowait()
    with pytest.raises(ConnectionLost):
        await wire.send([b"x" * 100_000])
    wire.close()
    await trio.aclose_forcefully(other)


@pytest.mark.parametrize("said", [b"", b"hello"])
async def test_reset_before_the_handshake(made: Certificates, said: bytes) -> None:
    """Between our connection and our first byte: an error in words, and no socket is left."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        other.send(said)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.close()
        ours.setblocking(False)
        await trio.lowlevel.wait_readable(ours)
        descriptor = ours.fileno()
        framer = Framer(data_segment_length_max=8192)
        trust = context(TlsConfig(ca=str(made.ours.ca)))
        with pytest.raises(TlsError, match="closed during the TLS handshake"):
            TlsWire(ours, framer, "127.0.0.1:3260", trust, "localhost")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


async def test_a_host_name_that_no_certificate_has_leaves_no_socket(made: Certificates) -> None:
    ours, other = socket.socketpair()
    descriptor = ours.fileno()
    framer = Framer(data_segment_length_max=8192)
    trust = context(TlsConfig(ca=str(made.ours.ca)))
    with other, pytest.raises(TlsError, match="can't be in a certificate"):
        TlsWire(ours, framer, "x:3260", trust, "a" * 70 + ".example")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
