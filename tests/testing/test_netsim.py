"""The misbehaving TCP proxy does what its controls say, at the time they return."""

import socket
import threading
from collections.abc import Iterator

import pytest

from orion_iscsifs.testing.netsim import Direction, TcpProxy
from orion_iscsifs.testing.programs import wait_until


class EchoServer:
    """Sends back whatever arrives, on every connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._echo, args=(connection,))
            thread.start()
            self._threads.append(thread)

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while arrived := connection.recv(65536):
                    connection.sendall(arrived)
            except ConnectionError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    server = EchoServer()
    with TcpProxy("127.0.0.1", server.port) as proxy:
        yield proxy
    server.close()


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def receive(connection: socket.socket, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            break
        received += part
    return bytes(received)


def echo(connection: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    received = receive(connection, len(data))
    sender.join(5)
    return received


def test_forwards_both_ways_and_counts(proxy: TcpProxy) -> None:
    data = bytes(range(256)) * 20_000
    with connect(proxy) as connection:
        assert echo(connection, data) == data
    assert proxy.connections_accepted == 1
    # The proxy counts after it has sent: the last bytes may be here before they are counted.
    complete = dict.fromkeys(Direction, len(data))
    wait_until(lambda: proxy.bytes_forwarded == complete, what="the proxy's count", timeout_s=5)


def test_end_of_stream_is_passed_on(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        assert echo(connection, b"last words") == b"last words"
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_cut_resets_every_connection_and_welcomes_new_ones(proxy: TcpProxy) -> None:
    with connect(proxy) as first, connect(proxy) as second:
        assert echo(first, b"1") == b"1"
        assert echo(second, b"2") == b"2"
        assert proxy.cut() == 2
        for connection in (first, second):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    with connect(proxy) as connection:
        assert echo(connection, b"again") == b"again"
    assert proxy.cut() == 0 or proxy.connections_accepted == 3


def test_refuse_and_accept(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        assert echo(connection, b"1") == b"1"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.accept()
    with connect(proxy) as connection:
        assert echo(connection, b"open again") == b"open again"


def test_stall_holds_bytes_and_flow_lets_them_go(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        assert echo(connection, b"1") == b"1"
        proxy.stall()
        connection.sendall(b"patience")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(5)
        proxy.flow()
        assert receive(connection, 8) == b"patience"


@pytest.mark.parametrize("direction", Direction)
def test_corrupt_next_flips_one_bit_once(proxy: TcpProxy, direction: Direction) -> None:
    with connect(proxy) as connection:
        assert echo(connection, b"clean") == b"clean"
        proxy.corrupt_next(direction, after_bytes=3)
        assert echo(connection, b"\x00" * 8) == b"\x00\x00\x00\x10\x00\x00\x00\x00"
        assert echo(connection, b"\x00" * 8) == bytes(8)


def test_a_target_that_is_away_resets_the_initiator() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    # The reset may come before or after connect() has looked at the socket.
    with (
        TcpProxy("127.0.0.1", port) as proxy,
        pytest.raises(ConnectionResetError),
        connect(proxy) as connection,
    ):
        connection.recv(1)
