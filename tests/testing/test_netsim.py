"""The misbehaving TCP proxy does what its controls say, at the time they return."""

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from orion_iscsifs.testing.link import CATCH_UP_S, CHUNK_BYTES, IN_FLIGHT_BYTES_MAX, Link
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


# -- a slow or long line ---------------------------------------------------------------------------


def round_trip_s(connection: socket.socket) -> float:
    began = time.monotonic()
    assert echo(connection, b"ping") == b"ping"
    return time.monotonic() - began


def test_a_delay_holds_bytes_both_ways(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        proxy.shape(delay_s=0.05)
        assert round_trip_s(connection) >= 0.1
        proxy.shape(delay_s=0.05, direction=Direction.TO_INITIATOR)
        proxy.shape(direction=Direction.TO_TARGET)
        assert round_trip_s(connection) >= 0.05
        data = bytes(range(256)) * 4096
        assert echo(connection, data) == data
        proxy.shape()
        assert echo(connection, b"done") == b"done"


def test_jitter_keeps_the_order(proxy: TcpProxy) -> None:
    proxy.shape(delay_s=0.001, jitter_s=0.02)
    with connect(proxy) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        for number in range(100):
            piece = number.to_bytes(2, "big") * 10
            connection.sendall(piece)
            data += piece
        assert receive(connection, len(data)) == data


def test_a_rate_holds_the_sender_back(proxy: TcpProxy) -> None:
    """Never faster than the rate, but for what the link may catch up and TCP's own buffers."""
    rate, data = 4_000_000, bytes(2_000_000)
    proxy.shape(bytes_per_s=rate, direction=Direction.TO_TARGET)
    with connect(proxy) as connection:
        began = time.monotonic()
        assert echo(connection, data) == data
        assert time.monotonic() - began >= len(data) / rate - 2 * CATCH_UP_S


def test_connections_share_the_rate(proxy: TcpProxy) -> None:
    rate, data = 4_000_000, bytes(500_000)
    proxy.shape(bytes_per_s=rate, direction=Direction.TO_TARGET)
    with connect(proxy) as first, connect(proxy) as second:
        began = time.monotonic()
        other = threading.Thread(target=echo, args=(second, data))
        other.start()
        assert echo(first, data) == data
        other.join(10)
        assert time.monotonic() - began >= 2 * len(data) / rate - 2 * CATCH_UP_S


def test_connections_are_dropped_at_random(proxy: TcpProxy) -> None:
    proxy.drop_randomly(0.01)
    for _ in range(3):
        with connect(proxy) as connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
    wait_until(lambda: proxy.connections_dropped == 3, what="three drops", timeout_s=5)
    proxy.drop_randomly(None)
    with connect(proxy) as connection:
        assert echo(connection, b"stays") == b"stays"


def test_half_close_ends_one_direction(proxy: TcpProxy) -> None:
    """To the initiator: it sees the end, and what it sends still arrives at the target."""
    with connect(proxy) as connection:
        assert echo(connection, b"1") == b"1"
        proxy.half_close(Direction.TO_INITIATOR)
        assert connection.recv(1) == b""
        connection.sendall(b"still here")
        wait_until(lambda: proxy.bytes_forwarded[Direction.TO_TARGET] == 11, what="it", timeout_s=5)
    # The other way round the echo server ends its own direction, and the connection is over.
    with connect(proxy) as connection:
        assert echo(connection, b"2") == b"2"
        proxy.half_close(Direction.TO_TARGET)
        assert connection.recv(1) == b""


def test_half_close_lets_arrive_what_is_in_flight(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        proxy.shape(delay_s=0.05, direction=Direction.TO_INITIATOR)
        connection.sendall(b"in flight")
        wait_until(lambda: proxy.bytes_forwarded[Direction.TO_TARGET] == 9, what="it", timeout_s=5)
        proxy.half_close(Direction.TO_TARGET)
        assert receive(connection, 10) == b"in flight"


def best_speed(connection: socket.socket, length: int, *, enough: float) -> float:
    """In bytes/s, of up to five tries: others may be using this machine."""
    speeds, data = [0.0], bytes(length)
    while len(speeds) <= 5 and max(speeds) < enough:
        began = time.monotonic()
        assert echo(connection, data) == data
        speeds.append(length / (time.monotonic() - began))
    return max(speeds)


@pytest.mark.slow
def test_rates_are_kept_and_the_proxy_itself_is_fast(proxy: TcpProxy) -> None:
    """Within a tenth of the rate, and 200 MB/s without one."""
    with connect(proxy) as connection:
        for rate in (1_000_000, 20_000_000, 100_000_000):
            proxy.shape(bytes_per_s=rate, direction=Direction.TO_TARGET)
            speed = best_speed(connection, rate, enough=0.9 * rate)
            assert speed == pytest.approx(rate, rel=0.1)
        proxy.shape()
        assert best_speed(connection, 200_000_000, enough=2e8) >= 2e8


# -- the link by itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [10_000.0, 1e6, 1e9])
def test_a_link_keeps_its_rate_though_it_is_woken_late(rate: float) -> None:
    link, chance, now, taken = Link(bytes_per_s=rate), random.Random(1), 100.0, 0
    while now < 110.0:
        while length := link.take_max(now):
            assert length <= CHUNK_BYTES
            link.took(length, now)
            taken += length
        assert link.busy_until > now
        now = link.busy_until + chance.uniform(0, CATCH_UP_S / 2)
    assert taken / (now - 100.0) == pytest.approx(rate, rel=0.02)


def test_an_idle_link_saves_no_more_than_it_may_catch_up() -> None:
    link, taken = Link(bytes_per_s=1e6), 0
    while length := link.take_max(1000.0):
        link.took(length, 1000.0)
        taken += length
    assert taken == pytest.approx(1e6 * CATCH_UP_S, abs=6000)


def test_arrivals_are_in_order_and_within_the_jitter() -> None:
    link, chance, previous = Link(delay_s=0.1, jitter_s=0.05), random.Random(1), 0.0
    for step in range(1000):
        now = step / 1000
        due = link.arrival(now, previous, chance)
        assert due >= previous
        assert now + 0.1 <= due <= now + 0.15
        previous = due
    assert link.room_bytes == IN_FLIGHT_BYTES_MAX
    assert Link().arrival(5.0, 4.0, chance) == 5.0
    assert Link().arrival(5.0, 6.0, chance) == 6.0, "a delay was taken away: no overtaking"
