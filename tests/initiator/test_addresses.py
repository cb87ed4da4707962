"""All addresses of a host name: their order, the race between them, and how failures are named."""

import errno
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import ConnectFailed, NotIscsi, OrionError
from orion_iscsifs.initiator import addresses
from orion_iscsifs.initiator.addresses import HEAD_START_S, Address, Candidates, Portal, interleave
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, dial
from orion_iscsifs.initiator.sources import Source
from orion_iscsifs.protocol.pdu import LoginRequest
from tests.initiator.peer import ISID, OFFER, TARGET, PlayedConnection, PlayedTarget

V4, V6 = socket.AF_INET, socket.AF_INET6


def v4(number: int) -> Address:
    return Address(V4, (f"192.0.2.{number}", 3260))


def v6(number: int) -> Address:
    return Address(V6, (f"2001:db8::{number}", 3260, 0, 0))


@pytest.mark.parametrize(
    ("given", "tried"),
    [
        ([], []),
        ([v4(1)], [v4(1)]),
        ([v6(1), v6(2), v6(3), v4(1)], [v6(1), v4(1), v6(2), v6(3)]),
        ([v4(1), v4(2), v6(1), v6(2), v6(3)], [v4(1), v6(1), v4(2), v6(2), v6(3)]),
    ],
)
def test_the_families_alternate(given: list[Address], tried: list[Address]) -> None:
    assert interleave(given) == tried


class Network:
    """Stands in for connecting: when, and how, each address answers."""

    def __init__(self) -> None:
        self.answers: dict[Address, tuple[float, int]] = {}
        self.started: dict[Address, float] = {}
        self.sockets: list[socket.socket] = []

    async def connect(self, address: Address, source: Source | None) -> socket.socket:
        assert source is None
        self.started[address] = trio.current_time()
        delay_s, code = self.answers[address]
        await trio.sleep(delay_s)
        if code:
            raise OSError(code, "no")
        self.sockets.append(socket.socket())
        return self.sockets[-1]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    made = Network()
    monkeypatch.setattr(addresses, "_connect", made.connect)
    yield made
    for sock in made.sockets:
        sock.close()


def candidates(*given: Address) -> Candidates:
    return Candidates(Portal("storage.example"), list(given))


async def test_a_dead_address_costs_a_head_start(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    network.answers = {v6(1): (100, 0), v4(1): (0.01, 0), v4(2): (0, 0)}
    tried, began = candidates(v6(1), v4(1), v4(2)), trio.current_time()
    assert await tried.connect() is network.sockets[0]
    assert trio.current_time() - began == pytest.approx(HEAD_START_S + 0.01)
    assert tried.left == [v6(1), v4(2)]
    assert v4(2) not in network.started


async def test_after_a_failure_the_next_one_is_tried_at_once(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    network.answers = {v6(1): (0.01, errno.ENETUNREACH), v4(1): (0.01, 0)}
    tried, began = candidates(v6(1), v4(1)), trio.current_time()
    await tried.connect()
    assert trio.current_time() - began == pytest.approx(0.02)
    assert tried.left == []


async def test_a_slow_first_address_may_still_win(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    network.answers = {v6(1): (0.3, 0), v4(1): (10, 0)}
    tried = candidates(v6(1), v4(1))
    await tried.connect()
    assert tried.left == [v4(1)]


async def test_every_failure_is_named(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    network.answers = {
        v6(1): (0, errno.ENETUNREACH),
        v4(1): (0, errno.ECONNREFUSED),
        v4(2): (0, errno.ECONNREFUSED),
    }
    with pytest.raises(ConnectFailed) as caught:
        await candidates(v6(1), v4(1), v4(2)).connect()
    assert str(caught.value) == (
        "storage.example:3260: network is unreachable at 2001:db8::1; "
        "connection refused at 192.0.2.1, 192.0.2.2"
    )


async def test_who_stayed_silent_is_named(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    network.answers = {v6(1): (0, errno.ENETUNREACH), v4(1): (100, 0), v4(2): (100, 0)}
    tried = candidates(v6(1), v4(1), v4(2))
    with trio.move_on_after(5):
        await tried.connect()
    assert tried.silence() == (" from 192.0.2.1, 192.0.2.2; network is unreachable at 2001:db8::1")


# -- with real sockets ----------------------------------------------------------------------------


class Names(trio.abc.HostnameResolver):
    """A resolver that gives loopback addresses, so that they share one port."""

    def __init__(self, *hosts: str) -> None:
        self._hosts = hosts

    async def getaddrinfo(  # type: ignore[override]
        self, host: bytes, port: int, *_rest: object
    ) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        assert host == b"storage.example"
        return [(V4, socket.SOCK_STREAM, 6, "", (each, port)) for each in self._hosts]

    async def getnameinfo(self, *_rest: object) -> tuple[str, str]:
        raise NotImplementedError


@pytest.fixture
def names() -> Callable[..., None]:
    """Sets what `storage.example` means until the test's trio run ends."""

    def use(*hosts: str) -> None:
        trio.socket.set_custom_hostname_resolver(Names(*hosts))

    return use


Play = Callable[[PlayedConnection], Awaitable[object]]


async def hang_up(peer: PlayedConnection) -> None:
    await peer.expect(LoginRequest)
    peer.cut()


async def let_in(peer: PlayedConnection) -> None:
    await peer.login(OFFER)


async def dial_name(plays: dict[str, Play]) -> LoggedIn:
    """Log in at `storage.example`, with a server at each address that does its play."""
    port = 0
    listeners: dict[str, socket.socket] = {}
    for host in plays:
        listeners[host] = socket.create_server((host, port))
        port = listeners[host].getsockname()[1]
    config = SessionConfig(initiator_name="iqn.2026-11.org.example:tester", login_timeout_s=5)
    nexus = Nexus(target_name=TARGET, isid=ISID, config=config)
    outcome: LoggedIn | OrionError
    async with trio.open_nursery() as nursery:

        async def serve(listener: socket.socket, play: Play) -> None:
            listener.setblocking(False)
            await trio.lowlevel.wait_readable(listener)
            peer = PlayedConnection(listener.accept()[0])
            try:
                await play(peer)
            finally:
                peer.wire.close()

        for host, play in plays.items():
            nursery.start_soon(serve, listeners[host], play)
        try:
            outcome = await dial(Portal("storage.example", port), nexus, cmd_sn=1)
            outcome.wire.close()
        except OrionError as error:
            outcome = error
        nursery.cancel_scope.cancel()
    for listener in listeners.values():
        listener.close()
    if isinstance(outcome, OrionError):
        raise outcome
    return outcome


async def test_another_address_is_asked_where_the_first_is_no_target(
    names: Callable[..., None],
) -> None:
    names("127.0.0.2", "127.0.0.3")
    logged_in = await dial_name({"127.0.0.2": hang_up, "127.0.0.3": let_in})
    assert logged_in.portal.host == "storage.example"


async def test_the_first_answer_is_what_is_reported(names: Callable[..., None]) -> None:
    names("127.0.0.2", "127.0.0.3", "127.0.0.4")
    with pytest.raises(
        NotIscsi, match=r"storage\.example:[0-9]+: the connection was closed before"
    ):
        await dial_name({"127.0.0.2": hang_up, "127.0.0.3": hang_up})


async def test_one_address_twice_is_tried_once(names: Callable[..., None]) -> None:
    names("127.0.0.2", "127.0.0.2")
    with pytest.raises(NotIscsi):
        await dial_name({"127.0.0.2": hang_up})


async def test_a_listener_that_is_reached_by_its_name() -> None:
    target = PlayedTarget()
    try:
        tried = await addresses.resolve(Portal("localhost", target.portal.port))
        (await tried.connect()).close()
    finally:
        target.close()
