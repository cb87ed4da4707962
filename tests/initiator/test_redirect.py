"""Redirections: where they lead, where they must not, and what is remembered (§11.13.5)."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from orion_iscsifs.config import AuthConfig, ChapCredentials, Secret, SessionConfig
from orion_iscsifs.errors import (
    ConnectFailed,
    LoginError,
    LoginRedirected,
    OrionError,
    ProtocolViolation,
)
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, Route, dial
from orion_iscsifs.initiator.redirect import REDIRECTIONS_MAX, Chain
from orion_iscsifs.protocol.login import Credentials, TargetAccess, TargetLogin
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from tests.initiator.peer import ISID, OFFER, TARGET, PlayedConnection, PlayedTarget

pytestmark = pytest.mark.checklist(38, "11.13.5")

TEMPORARY, PERMANENT = 0x01, 0x02
Play = Callable[[PlayedConnection], Awaitable[object]]


def nexus(auth: AuthConfig | None = None, login_timeout_s: float = 5) -> Nexus:
    config = SessionConfig(
        initiator_name="iqn.2026-11.org.example:tester",
        login_timeout_s=login_timeout_s,
        auth=auth or AuthConfig(),
    )
    return Nexus(target_name=TARGET, isid=ISID, config=config)


def moved(detail: int, *addresses: str) -> Play:
    """Answer the first Login Request with a redirection."""

    async def play(peer: PlayedConnection) -> None:
        request = await peer.expect(LoginRequest)
        await peer.reply(redirection(request, detail, *addresses))

    return play


def redirection(request: LoginRequest, detail: int, *addresses: str) -> LoginResponse:
    response = LoginResponse(request.isid, request.initiator_task_tag)
    response.csg = request.csg
    response.status_class, response.status_detail = 1, detail
    response.data = b"".join(b"TargetAddress=%s\0" % address.encode() for address in addresses)
    return response


async def let_in(peer: PlayedConnection) -> None:
    await peer.login(OFFER)


class Portals:
    """Played portals; `play[n]` is what portal n does to each connection."""

    def __init__(self, count: int) -> None:
        self.targets = [PlayedTarget() for _ in range(count)]
        self.play: list[Play] = [let_in] * count
        self.asked: list[int] = []

    def __getitem__(self, number: int) -> Portal:
        return self.targets[number].portal

    async def serve(self, number: int) -> None:
        while True:
            peer = await self._accept(number)
            self.asked.append(number)
            await self.play[number](peer)

    async def _accept(self, number: int) -> PlayedConnection:
        while True:
            try:
                return await self.targets[number].accept()
            except trio.TooSlowError:
                continue

    async def dial(self, portal: Portal | Route, who: Nexus | None = None) -> LoggedIn:
        """Dial once; the connection is closed."""
        self.asked.clear()
        logged_in = await dial(portal, who or nexus(), cmd_sn=1)
        logged_in.wire.close()
        return logged_in


@asynccontextmanager
async def portals(count: int) -> AsyncIterator[Portals]:
    made = Portals(count)
    failure: OrionError | None = None
    try:
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(made.serve, number)
            try:
                yield made
            except OrionError as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        for target in made.targets:
            target.close()
    if failure is not None:
        raise failure


async def test_a_temporary_move_holds_for_one_login() -> None:
    async with portals(2) as p:
        p.play[0] = moved(TEMPORARY, str(p[1]))
        route = Route(p[0])
        for _ in range(2):
            logged_in = await p.dial(route)
            assert logged_in.portal == p[1]
            assert p.asked == [0, 1]
        assert route.current == p[0]


async def test_a_permanent_move_is_remembered_until_it_fails() -> None:
    async with portals(2) as p:
        p.play[0] = moved(PERMANENT, str(p[1]))
        route = Route(p[0])
        await p.dial(route)
        assert p.asked == [0, 1]
        assert route.current == p[1]
        await p.dial(route)
        assert p.asked == [1]
        # Moved back: who was remembered refuses, the configured portal is asked again at once.
        p.play = [let_in, moved(TEMPORARY, "127.0.0.1:1")]
        logged_in = await p.dial(route)
        assert logged_in.portal == p[0]
        assert p.asked == [1, 0]
        assert route.current == p[0]


async def test_a_portal_by_itself_remembers_nothing() -> None:
    async with portals(2) as p:
        p.play[0] = moved(PERMANENT, str(p[1]))
        for _ in range(2):
            await p.dial(p[0])
            assert p.asked == [0, 1]


async def test_what_comes_behind_a_temporary_move_is_not_remembered() -> None:
    async with portals(4) as p:
        p.play[0] = moved(PERMANENT, str(p[1]))
        p.play[1] = moved(TEMPORARY, str(p[2]))
        p.play[2] = moved(PERMANENT, str(p[3]))
        route = Route(p[0])
        assert (await p.dial(route)).portal == p[3]
        assert route.current == p[1]
        assert (await p.dial(route)).portal == p[3]
        assert p.asked == [1, 2, 3]


async def test_a_circle_is_named() -> None:
    async with portals(2) as p:
        p.play[0] = moved(TEMPORARY, str(p[1]))
        p.play[1] = moved(PERMANENT, f"127.0.0.1:{p[0].port},1")
        with pytest.raises(LoginError, match="redirects in a circle") as caught:
            await p.dial(p[0])
        assert f"{p[0]} -> {p[1]} -> {p[0]}" in caught.value.line
        assert "\n" not in caught.value.line
        assert caught.value.status_class == 1


async def test_a_portal_that_redirects_to_itself() -> None:
    async with portals(1) as p:
        p.play[0] = moved(TEMPORARY, str(p[0]))
        with pytest.raises(LoginError, match="redirects in a circle"):
            await p.dial(p[0])
        assert p.asked == [0]


async def test_redirections_are_bounded() -> None:
    count = REDIRECTIONS_MAX + 2
    async with portals(count) as p:
        for number in range(count - 1):
            p.play[number] = moved(TEMPORARY, str(p[number + 1]))
        with pytest.raises(LoginError, match="redirects more than 8 times"):
            await p.dial(p[0])
        assert p.asked == list(range(count - 1))
        assert (await p.dial(p[1])).portal == p[count - 1]


async def test_an_error_behind_a_redirection_says_how_we_came_there() -> None:
    async with portals(1) as p:
        dead = Portal("127.0.0.1", 1)
        p.play[0] = moved(TEMPORARY, str(dead))
        with pytest.raises(ConnectFailed) as caught:
            await p.dial(p[0])
        assert f"{dead}: connection refused; redirected: {p[0]} -> {dead}" in str(caught.value)
        assert "check that the target runs" in caught.value.line


async def test_one_time_out_for_the_whole_way() -> None:
    async def silent(_peer: PlayedConnection) -> None:
        await trio.sleep_forever()

    async with portals(2) as p:
        p.play = [moved(TEMPORARY, str(p[1])), silent]
        with pytest.raises(ConnectFailed, match=r"login did not end within 0\.2 s; redirected"):
            await p.dial(p[0], nexus(login_timeout_s=0.2))


async def test_a_redirection_without_an_address_is_a_violation() -> None:
    async with portals(1) as p:
        p.play[0] = moved(TEMPORARY)
        with pytest.raises(ProtocolViolation, match="redirection without TargetAddress"):
            await p.dial(p[0])


SECRET = Secret("a-long-enough-secret")


@pytest.mark.parametrize("detail", [TEMPORARY, PERMANENT])
async def test_a_redirection_after_the_security_stage(detail: int) -> None:
    """Both portals authenticate us; the first moves us on after that."""
    auth = AuthConfig(initiator=ChapCredentials(user="me", secret=SECRET))
    credentials = Credentials(user="me", secret=SECRET.reveal().encode())

    async def authenticate(peer: PlayedConnection, address: str | None) -> None:
        login = TargetLogin(
            offer=OFFER,
            lookup=lambda _name: TargetAccess(incoming=credentials),
            portal_group_tag=1,
            random_bytes=os.urandom,
            assign_tsih=lambda _login: 7,
        )
        while not login.done:
            request = await peer.expect(LoginRequest)
            if request.csg == 1 and address is not None:
                await peer.reply(redirection(request, detail, address))
                return
            await peer.reply(login.receive(request))

    async with portals(2) as p:
        p.play[0] = lambda peer: authenticate(peer, str(p[1]))
        p.play[1] = lambda peer: authenticate(peer, None)
        assert (await p.dial(p[0], nexus(auth))).portal == p[1]
        assert p.asked == [0, 1]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.1", "192.0.2.1", 3260),
        ("192.0.2.1:5003", "192.0.2.1", 5003),
        ("192.0.2.1:5003,1", "192.0.2.1", 5003),
        ("[2001:db8::417a]", "2001:db8::417a", 3260),
        ("[2001:db8::417a]:5003", "2001:db8::417a", 5003),
        ("[2001:db8::417a],65", "2001:db8::417a", 3260),
        ("2001:db8::417a", "2001:db8::417a", 3260),
        ("node-1.storage.example", "node-1.storage.example", 3260),
        ("node-1.storage.example:860", "node-1.storage.example", 860),
    ],
)
def test_target_addresses(text: str, host: str, port: int) -> None:
    chain = Chain(Portal("vip"))
    chain.follow(LoginRedirected("moved", portal=text, permanent=False, status_detail=1))
    assert (chain.portal.host, chain.portal.port) == (host, port)
    assert chain.lasting is None


@pytest.mark.parametrize(
    "text",
    ["", ":3260", "h:0", "h:99999", "h:x", "[::1", "[zz]", "user%secret@h", "iscsi://h", "h/x"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ProtocolViolation, match=r"TargetAddress=.*13\.8") as caught:
        Chain(Portal("vip")).follow(
            LoginRedirected("moved", portal=text, permanent=False, status_detail=1)
        )
    assert caught.value.line.isprintable()


def test_upper_case_is_no_way_out_of_a_circle() -> None:
    chain = Chain(Portal("vip.example"))
    with pytest.raises(LoginError, match="circle"):
        chain.follow(
            LoginRedirected("moved", portal="VIP.example:3260", permanent=True, status_detail=2)
        )


@pytest.mark.parametrize("text", ["a b", "h?a=b", "h,x", "h,123456789012345678901", "h\x1b[2J"])
def test_what_is_no_address_either(text: str) -> None:
    test_what_is_no_address(text)
