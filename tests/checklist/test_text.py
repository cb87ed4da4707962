"""Text Requests as an initiator sends them: discovery over more than one PDU (check 56)."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.initiator.discovery import DiscoveredTarget, discover
from orion_iscsifs.protocol.pdu import NO_TAG, LogoutRequest, TextRequest, TextResponse
from tests.initiator.peer import CONFIG, ISID, PlayedConnection, PlayedTarget

Play = Callable[[PlayedConnection], Awaitable[None]]


async def discovered(play: Play) -> list[DiscoveredTarget]:
    """Discovery at a portal that does `play` after the login; errors leave as themselves."""
    target = PlayedTarget()
    found: list[DiscoveredTarget] = []
    failure: ProtocolViolation | None = None
    try:
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                await play(await (await target.accept()).login())

            nursery.start_soon(accept)
            try:
                found = await discover(target.portal, CONFIG, ISID)
            except ProtocolViolation as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        target.close()
    if failure is not None:
        raise failure
    return found


@pytest.mark.checklist(56, "11.10")
async def test_a_long_answer_is_one_task() -> None:
    """One ITT and one I bit; each request has F=1 and the TTT and LUN of the answer before."""
    requests: list[TextRequest] = []

    async def play(peer: PlayedConnection) -> None:
        for number in range(4):
            request = await peer.expect(TextRequest)
            requests.append(request)
            assert request.final
            assert not request.continued
            part = TextResponse(request.initiator_task_tag, data=b"TargetName=iqn.%d\0" % number)
            if number < 3:
                part.final, part.target_transfer_tag, part.lun = False, 0x100 + number, number << 48
            await peer.reply(part)
        await peer.serve_logout()

    found = await discovered(play)
    assert [target.name for target in found] == [f"iqn.{number}" for number in range(4)]
    first, *others = requests
    assert bytes(first.data) == b"SendTargets=All\0"
    assert (first.target_transfer_tag, first.lun) == (NO_TAG, 0)
    assert [bytes(request.data) for request in others] == [b""] * 3
    assert [request.target_transfer_tag for request in others] == [0x100, 0x101, 0x102]
    assert [request.lun for request in others] == [0, 1 << 48, 2 << 48]
    assert len({(request.initiator_task_tag, request.immediate) for request in requests}) == 1


@pytest.mark.checklist(56, "11.10.4")
async def test_the_ttt_of_a_final_answer_is_ignored() -> None:
    async def play(peer: PlayedConnection) -> None:
        tag = (await peer.expect(TextRequest)).initiator_task_tag
        last = TextResponse(tag, target_transfer_tag=5, data=b"TargetName=iqn.a\0")
        await peer.reply(last)
        await peer.serve_logout()

    assert [target.name for target in await discovered(play)] == ["iqn.a"]


async def no_tag(peer: PlayedConnection, request: TextRequest) -> None:
    await peer.reply(TextResponse(request.initiator_task_tag, final=False))


async def other_task(peer: PlayedConnection, request: TextRequest) -> None:
    await peer.reply(TextResponse(request.initiator_task_tag + 1))


@pytest.mark.checklist(56, "11.11")
@pytest.mark.parametrize(
    ("misbehave", "section"),
    [
        pytest.param(no_tag, "11.11", id="F=0 without a TTT"),
        pytest.param(other_task, "11.11", id="another ITT"),
    ],
)
async def test_an_answer_that_can_not_go_on_is_a_violation(
    misbehave: Callable[[PlayedConnection, TextRequest], Awaitable[None]], section: str
) -> None:
    async def play(peer: PlayedConnection) -> None:
        await misbehave(peer, await peer.expect(TextRequest))
        await trio.sleep_forever()

    with pytest.raises(ProtocolViolation, match="Text Response") as caught:
        await discovered(play)
    assert caught.value.section.startswith(section)


@pytest.mark.checklist(35, "4.3")
@pytest.mark.checklist(51, "11.14")
async def test_a_discovery_session_sends_nothing_but_text_and_its_logout() -> None:
    """Named by SessionType alone; closed with reason 0, close the session."""
    logins: list[bytes] = []

    async def play(peer: PlayedConnection) -> None:
        assert peer.login_request is not None
        logins.append(bytes(peer.login_request.data))
        tag = (await peer.expect(TextRequest)).initiator_task_tag
        await peer.reply(TextResponse(tag, data=b"TargetName=iqn.a\0"))
        logout = await peer.expect(LogoutRequest)
        assert logout.reason == 0
        await peer.nothing()
        peer.cut()

    assert [target.name for target in await discovered(play)] == ["iqn.a"]
    assert b"SessionType=Discovery\0" in logins[0]
    assert b"TargetName" not in logins[0]
