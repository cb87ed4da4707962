"""What a user meets when the address is wrong, and who answers there."""

import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from orion_iscsifs.config import AuthConfig, ChapCredentials, Secret, SessionConfig
from orion_iscsifs.errors import (
    AuthenticationFailed,
    ConnectFailed,
    LoginError,
    NotIscsi,
    OrionError,
    ProtocolViolation,
    TargetNotFound,
)
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, dial
from orion_iscsifs.protocol.login import Offer, TargetAccess, TargetLogin
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, NopIn
from tests.initiator.peer import ISID, OFFER, TARGET, PlayedConnection, PlayedTarget


def config(login_timeout_s: float = 5, auth: AuthConfig | None = None) -> SessionConfig:
    return SessionConfig(
        initiator_name="iqn.2026-11.org.example:tester",
        login_timeout_s=login_timeout_s,
        auth=auth or AuthConfig(),
    )


async def dial_played(
    play: Callable[[PlayedConnection], Awaitable[object]], settings: SessionConfig | None = None
) -> None:
    """Log in to a target that does `play`; the login's error leaves as itself."""
    target = PlayedTarget()
    nexus = Nexus(target_name=TARGET, isid=ISID, config=settings or config())
    failure: OrionError | None = None
    try:
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                await play(await target.accept())

            nursery.start_soon(accept)
            try:
                (await dial(target.portal, nexus, cmd_sn=1)).wire.close()
            except OrionError as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        target.close()
    if failure is not None:
        raise failure


def portal_without_listener() -> Portal:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Portal("127.0.0.1", listener.getsockname()[1])


async def test_nobody_listens() -> None:
    portal = portal_without_listener()
    nexus = Nexus(target_name=TARGET, isid=ISID, config=config())
    with pytest.raises(ConnectFailed, match=f"{portal}: connection refused") as caught:
        await dial(portal, nexus, cmd_sn=1)
    assert "check that the target runs" in caught.value.line


async def test_the_name_does_not_exist() -> None:
    nexus = Nexus(target_name=TARGET, isid=ISID, config=config())
    with pytest.raises(ConnectFailed, match=r"no-such-host\.invalid:3260: host name not found"):
        await dial(Portal("no-such-host.invalid"), nexus, cmd_sn=1)


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
async def test_no_host_name_at_all(host: str) -> None:
    nexus = Nexus(target_name=TARGET, isid=ISID, config=config())
    with pytest.raises(ConnectFailed, match="can't be a host name"):
        await dial(Portal(host), nexus, cmd_sn=1)


async def test_an_http_server_is_told_apart() -> None:
    async def http(peer: PlayedConnection) -> None:
        await peer.expect(LoginRequest)
        await peer.wire.send([b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b" " * 30])

    with pytest.raises(NotIscsi, match="the answer is not iSCSI"):
        await dial_played(http)


async def test_a_server_that_hangs_up_is_told_apart() -> None:
    async def hang_up(peer: PlayedConnection) -> None:
        await peer.expect(LoginRequest)
        peer.cut()

    with pytest.raises(NotIscsi, match="closed before any answer"):
        await dial_played(hang_up)


async def test_a_silent_server_runs_into_login_timeout(mock_clock: trio.testing.MockClock) -> None:
    """The clock stands still until the connection is made and the request is there."""

    async def silent(peer: PlayedConnection) -> None:
        await peer.expect(LoginRequest)
        mock_clock.jump(15)
        await trio.sleep_forever()

    with pytest.raises(ConnectFailed, match=r"login did not end within 15 s"):
        await dial_played(silent, config(login_timeout_s=15))


async def test_a_pdu_of_the_full_feature_phase_has_no_place_in_the_login() -> None:
    async def nop(peer: PlayedConnection) -> None:
        await peer.expect(LoginRequest)
        await peer.reply(NopIn())

    with pytest.raises(ProtocolViolation, match=r"NOP-In: during the login phase.*§6\.3"):
        await dial_played(nop)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (0x0201, AuthenticationFailed, "authentication"),
        (0x0203, TargetNotFound, TARGET),
        (0x0202, LoginError, "not allowed|authoriz"),
    ],
)
@pytest.mark.checklist(39, "11.13.5")
async def test_a_refused_login_says_why(status: int, kind: type[LoginError], words: str) -> None:
    async def refuse(peer: PlayedConnection) -> None:
        request = await peer.expect(LoginRequest)
        response = LoginResponse(request.isid, request.initiator_task_tag)
        response.status_class, response.status_detail = status >> 8, status & 0xFF
        await peer.reply(response)

    with pytest.raises(kind, match=f"(?i){words}") as caught:
        await dial_played(refuse)
    assert (caught.value.status_class, caught.value.status_detail) == (2, status & 0xFF)


@pytest.mark.checklist(43, "9.2")
async def test_a_target_that_skips_authentication_is_refused() -> None:
    """Checklist 43: with credentials set the initiator fails closed (RFC 7143 §9.2)."""
    secret = Secret("not-shown-anywhere")
    auth = AuthConfig(initiator=ChapCredentials(user="me", secret=secret))

    async def lets_anyone_in(peer: PlayedConnection) -> None:
        await peer.login(OFFER)

    with pytest.raises(AuthenticationFailed) as caught:
        await dial_played(lets_anyone_in, config(auth=auth))
    assert "not-shown" not in caught.value.line


# -- whose connection it is -----------------------------------------------------------------------


async def logged_in_with(offer: Offer = OFFER, **place: Any) -> tuple[LoggedIn, list[LoginRequest]]:
    """Log in to a played target; what it was asked."""
    target = PlayedTarget()
    settings = SessionConfig(
        initiator_name="iqn.2026-11.org.example:tester", connections=4, erl=2, login_timeout_s=5
    )
    nexus = Nexus(target_name=TARGET, isid=ISID, config=settings)
    requests: list[LoginRequest] = []
    results: list[LoggedIn] = []
    try:
        async with trio.open_nursery() as nursery:

            async def dialled() -> None:
                results.append(await dial(target.portal, nexus, **place))

            nursery.start_soon(dialled)
            peer = await target.accept()
            login = TargetLogin(
                offer=offer,
                lookup=lambda _name: TargetAccess(),
                portal_group_tag=1,
                random_bytes=os.urandom,
                assign_tsih=lambda login: login.requested_tsih or 7,
            )
            while not login.done:
                requests.append(await peer.expect(LoginRequest))
                await peer.reply(login.receive(requests[-1]))
    finally:
        target.close()
    results[0].wire.close()
    assert results[0].portal == target.portal
    return results[0], requests


@pytest.mark.checklist(36, "6.3.5")
async def test_a_leading_login_reinstates_the_session_of_its_isid() -> None:
    """The same ISID and TSIH 0 at every login, whatever the CID."""
    for cid in (0, 3):
        logged_in, requests = await logged_in_with(cmd_sn=77, cid=cid)
        assert {(each.isid, each.tsih, each.cid, each.cmd_sn) for each in requests} == {
            (ISID, 0, cid, 77)
        }
        assert (logged_in.tsih, logged_in.cid, logged_in.cmd_sn) == (7, cid, 77)


@pytest.mark.checklist(37, "6.3.4")
async def test_a_connection_joins_or_comes_back_to_its_session() -> None:
    leading, _ = await logged_in_with(
        replace(OFFER, max_connections=4, error_recovery_level=2), cmd_sn=1
    )
    assert leading.parameters.max_connections == 4
    assert leading.parameters.error_recovery_level == 2
    assert leading.wire.framer.keep_damaged
    joined, requests = await logged_in_with(
        cmd_sn=5, cid=2, tsih=7, exp_stat_sn=99, session=leading.parameters
    )
    assert {(each.isid, each.tsih, each.cid, each.cmd_sn) for each in requests} == {(ISID, 7, 2, 5)}
    assert requests[0].exp_stat_sn == 99
    assert b"MaxConnections" not in b"".join(bytes(each.data) for each in requests)
    assert (joined.tsih, joined.cid) == (7, 2)
    assert joined.parameters.max_burst_length == leading.parameters.max_burst_length
    assert joined.wire.framer.keep_damaged


async def test_damaged_data_ends_the_connection_at_level_0() -> None:
    logged_in, _ = await logged_in_with(cmd_sn=1)
    assert logged_in.parameters.error_recovery_level == 0
    assert not logged_in.wire.framer.keep_damaged
