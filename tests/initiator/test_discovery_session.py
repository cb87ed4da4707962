"""The PDUs of a discovery session, played one by one: what is in order, and what is not."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from orion_iscsifs.errors import ConnectFailed, OrionError, ProtocolViolation, TransportError
from orion_iscsifs.initiator.discovery import DiscoveredTarget, DiscoveryRefused, discover
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    AsyncMessage,
    LogoutRequest,
    NopIn,
    Reject,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.protocol.pdu.service import AsyncEvent, RejectReason
from tests.initiator.peer import CONFIG, ISID, PlayedConnection, PlayedTarget

Play = Callable[[PlayedConnection], Awaitable[None]]
ANSWER = b"TargetName=iqn.a\0"


async def ask(play: Play, *, window: int = 32) -> list[DiscoveredTarget]:
    """Discover at a portal that does `play` after the login; errors leave as themselves."""
    target = PlayedTarget()
    failure: OrionError | None = None
    found: list[DiscoveredTarget] = []
    try:
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                await play(await (await target.accept()).login(window=window))

            nursery.start_soon(accept)
            try:
                found = await discover(target.portal, CONFIG, ISID)
            except OrionError as error:
                failure = error
    finally:
        target.close()
    if failure is not None:
        raise failure
    return found


async def finish(peer: PlayedConnection) -> None:
    request = await peer.expect(TextRequest)
    await peer.reply(TextResponse(request.initiator_task_tag, data=ANSWER))
    await peer.serve_logout()


@pytest.mark.checklist(35, "13.21")
async def test_the_login_asks_for_a_discovery_session_and_nothing_that_it_may_not() -> None:
    async def play(peer: PlayedConnection) -> None:
        assert peer.login_request is not None
        text = bytes(peer.login_request.data)
        assert b"SessionType=Discovery\0" in text
        assert b"TargetName=" not in text
        for key in (b"MaxConnections", b"ErrorRecoveryLevel", b"InitialR2T", b"FirstBurstLength"):
            assert key not in text
        await finish(peer)

    assert [target.name for target in await ask(play)] == ["iqn.a"]


@pytest.mark.checklist(2, "4.2.2.1")
async def test_requests_wait_for_the_command_window() -> None:
    async def play(peer: PlayedConnection) -> None:
        request = await peer.expect(TextRequest)
        peer.max_cmd_sn = peer.exp_cmd_sn - 1
        first = TextResponse(request.initiator_task_tag, final=False, continued=True, data=b"Tar")
        first.target_transfer_tag, first.lun = 77, 5
        await peer.reply(first)
        await peer.nothing()
        await peer.open_window(1)
        again = await peer.expect(TextRequest)
        assert (again.target_transfer_tag, again.lun, again.cmd_sn) == (77, 5, request.cmd_sn + 1)
        await peer.reply(TextResponse(again.initiator_task_tag, data=b"getName=iqn.a\0"))
        await peer.serve_logout()

    assert [target.name for target in await ask(play, window=1)] == ["iqn.a"]


@pytest.mark.checklist(6, "4.2.2.2")
async def test_what_was_sent_twice_is_taken_once() -> None:
    async def play(peer: PlayedConnection) -> None:
        request = await peer.expect(TextRequest)
        part = TextResponse(request.initiator_task_tag, final=False, continued=True, data=ANSWER)
        part.target_transfer_tag = 1
        await peer.reply(part)
        await peer.send(part)
        await finish(peer)

    assert [target.name for target in await ask(play)] == ["iqn.a"]


@pytest.mark.checklist(28, "6.2")
@pytest.mark.checklist(27, "6.1")
async def test_thousands_of_targets_in_pieces_that_end_anywhere() -> None:
    count = 5000
    text = b"".join(
        b"TargetName=iqn.2026-11.org.example:%05d\0TargetAddress=10.0.0.1:3260,%d\0" % (n, n % 9)
        for n in range(count)
    )

    async def play(peer: PlayedConnection) -> None:
        for start in range(0, len(text), 4001):
            request = await peer.expect(TextRequest)
            last = start + 4001 >= len(text)
            response = TextResponse(
                request.initiator_task_tag,
                final=last,
                continued=not last,
                data=text[start : start + 4001],
            )
            response.target_transfer_tag = NO_TAG if last else 3
            await peer.reply(response)
        await peer.serve_logout()

    found = await ask(play)
    assert len(found) == count
    assert found[-1].name.endswith(":04999")
    assert found[-1].portals[0].group_tag == 4999 % 9


@pytest.mark.checklist(56, "11.11.1")
@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (TextResponse(1, final=True, continued=True), "C and F are both 1"),
        (TextResponse(1, final=False), "without a Target Transfer Tag"),
        (TextResponse(99), "another Initiator Task Tag"),
        (TextResponse(1, data=b"TargetName=iqn.a"), "no null delimiter"),
        (TextResponse(1, data=b"TargetAddress=10.0.0.1,1\0"), "before any TargetName"),
        (TextResponse(1, data=b"A=\0" * 300_000), "key=value pairs"),
    ],
)
async def test_a_broken_answer_is_a_violation(response: TextResponse, problem: str) -> None:
    async def play(peer: PlayedConnection) -> None:
        await peer.expect(TextRequest)
        await peer.reply(response)

    with pytest.raises(ProtocolViolation, match=problem):
        await ask(play)


async def test_a_list_without_end_is_cut_off() -> None:
    sent = 0

    async def play(peer: PlayedConnection) -> None:
        nonlocal sent
        part = TextResponse(1, final=False, continued=True, target_transfer_tag=1)
        part.data = b"x" * (1 << 19)
        with suppress(OrionError):  # the initiator hangs up
            while True:
                await peer.expect(TextRequest)
                await peer.reply(part)
                sent += len(part.data)

    with pytest.raises(ProtocolViolation, match="bytes of text"):
        await ask(play)
    assert sent <= 5 << 20


@pytest.mark.checklist(47, "7.3")
@pytest.mark.parametrize("counted", [True, False])
async def test_a_reset_negotiation_is_begun_again_without_a_gap(counted: bool) -> None:
    async def play(peer: PlayedConnection) -> None:
        request = await peer.expect(TextRequest)
        if not counted:
            peer.exp_cmd_sn -= 1
        await peer.reply(Reject(RejectReason.NEGOTIATION_RESET, data=bytes(48)))
        again = await peer.expect(TextRequest)
        assert again.cmd_sn == request.cmd_sn + counted
        assert again.initiator_task_tag != request.initiator_task_tag
        assert again.target_transfer_tag == NO_TAG
        await peer.reply(TextResponse(again.initiator_task_tag, data=ANSWER))
        await peer.serve_logout()

    assert [target.name for target in await ask(play)] == ["iqn.a"]


async def test_a_rejected_request_is_told_in_words_and_logged_out() -> None:
    async def play(peer: PlayedConnection) -> None:
        await peer.expect(TextRequest)
        await peer.reply(Reject(RejectReason.COMMAND_NOT_SUPPORTED, data=bytes(48)))
        await peer.serve_logout()

    with pytest.raises(DiscoveryRefused, match=r"0x05 \(command not supported\)"):
        await ask(play)


async def test_a_reset_for_ever_ends() -> None:
    async def play(peer: PlayedConnection) -> None:
        for _ in range(3):
            await peer.expect(TextRequest)
            await peer.reply(Reject(RejectReason.NEGOTIATION_RESET, data=bytes(48)))
        await peer.serve_logout()

    with pytest.raises(DiscoveryRefused, match="negotiation reset"):
        await ask(play)


async def test_the_key_itself_is_refused() -> None:
    async def play(peer: PlayedConnection) -> None:
        request = await peer.expect(TextRequest)
        await peer.reply(TextResponse(request.initiator_task_tag, data=b"SendTargets=Reject\0"))
        await peer.serve_logout()

    with pytest.raises(DiscoveryRefused, match="SendTargets=Reject") as caught:
        await ask(play)
    assert "iscsi://HOST/IQN" in caught.value.line


@pytest.mark.checklist(5, "4.2.2.2")
async def test_events_that_do_not_matter_use_a_stat_sn_up() -> None:
    async def play(peer: PlayedConnection) -> None:
        await peer.reply(AsyncMessage(AsyncEvent.VENDOR_SPECIFIC))
        await peer.reply(NopIn(), advance=False)
        await finish(peer)

    assert [target.name for target in await ask(play)] == ["iqn.a"]


@pytest.mark.checklist(50, "11.9.1")
async def test_a_target_that_wants_us_gone_gets_a_logout() -> None:
    logged_out = False

    async def play(peer: PlayedConnection) -> None:
        nonlocal logged_out
        await peer.expect(TextRequest)
        await peer.reply(AsyncMessage(AsyncEvent.TARGET_REQUESTS_LOGOUT, parameter3=1))
        await peer.expect(LogoutRequest)
        logged_out = True
        peer.cut()

    with pytest.raises(TransportError, match="ends the discovery session"):
        await ask(play)
    assert logged_out


async def test_a_flood_of_pings_is_no_answer() -> None:
    async def play(peer: PlayedConnection) -> None:
        await peer.expect(TextRequest)
        for _ in range(80):
            await peer.reply(NopIn(), advance=False)

    with pytest.raises(ProtocolViolation, match="no answer to SendTargets among them"):
        await ask(play)


async def test_silence_ends(autojump_clock: trio.testing.MockClock) -> None:
    async def play(peer: PlayedConnection) -> None:
        await peer.expect(TextRequest)

    with pytest.raises(ConnectFailed, match="no answer to SendTargets"):
        await ask(play)
