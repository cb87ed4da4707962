"""TLS below a login: the wire itself, under load and at its end."""

import os
import random
import socket
import struct
from itertools import pairwise

import pytest
import trio

from orion_iscsifs.config import TlsConfig
from orion_iscsifs.errors import ConnectionLost, TlsError
from orion_iscsifs.initiator.dial import LoggedIn
from orion_iscsifs.initiator.tls import TlsWire, context
from orion_iscsifs.initiator.wire import Buffer
from orion_iscsifs.protocol.framing import Framer, encode
from orion_iscsifs.protocol.pdu import NopIn, NopOut, Pdu
from tests.initiator.peer import PlayedTarget
from tests.initiator.tls_front import (
    Certificates,
    log_in,
    make_certificates,
    server_context,
    trusting,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


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
