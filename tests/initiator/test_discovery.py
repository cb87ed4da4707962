"""SendTargets: continuation, pings in between, and addresses of every form."""

import pytest
import trio

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.initiator.dial import Portal
from orion_iscsifs.initiator.discovery import (
    DiscoveredTarget,
    discover,
    parse_address,
)
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    TextRequest,
    TextResponse,
)
from tests.initiator.peer import CONFIG, ISID, PlayedTarget


@pytest.mark.checklist(28, "6.2")
@pytest.mark.checklist(56, "11.10")
@pytest.mark.checklist(28, "6.2")
@pytest.mark.checklist(31, "11.10")
@pytest.mark.checklist(56, "11.10.4")
async def test_a_long_answer_comes_in_parts_and_pings_are_answered_meanwhile() -> None:
    """Checklist 28 and 56: the tag is copied, an empty request asks for the rest."""
    target = PlayedTarget()
    text = (
        b"TargetName=iqn.a\0TargetAddress=10.0.0.1:3260,1\0TargetAddress=[2001:db8::1]:860,2\0"
        b"TargetName=iqn.b\0TargetName=iqn.c\0TargetAddress=host.example,3\0"
    )

    async def play() -> None:
        peer = await (await target.accept()).login()
        request = await peer.expect(TextRequest)
        assert bytes(request.data) == b"SendTargets=All\0"
        assert request.target_transfer_tag == NO_TAG
        tag = request.initiator_task_tag
        first = TextResponse(tag, final=False, continued=True, target_transfer_tag=5)
        first.data = text[:50]
        await peer.reply(first)
        request = await peer.expect(TextRequest)
        assert (request.target_transfer_tag, bytes(request.data)) == (5, b"")
        assert (request.initiator_task_tag, request.cmd_sn) == (tag, 2)
        await peer.reply(NopIn(target_transfer_tag=9, lun=3), advance=False)
        answer = await peer.expect(NopOut)
        assert (answer.target_transfer_tag, answer.lun) == (9, 3)
        await peer.reply(TextResponse(tag, data=text[50:]))
        logout = await peer.expect(LogoutRequest)
        await peer.reply(LogoutResponse(logout.initiator_task_tag))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        found = await discover(target.portal, CONFIG, ISID)
    target.close()
    assert found == [
        DiscoveredTarget("iqn.a", (Portal("10.0.0.1"), Portal("2001:db8::1", 860))),
        DiscoveredTarget("iqn.b", (target.portal,)),
        DiscoveredTarget("iqn.c", (Portal("host.example"),)),
    ]
    assert [portal.group_tag for portal in found[0].portals] == [1, 2]


async def test_a_portal_that_hangs_up_at_the_logout_has_answered_all_the_same() -> None:
    target = PlayedTarget()

    async def play() -> None:
        peer = await (await target.accept()).login()
        request = await peer.expect(TextRequest)
        await peer.reply(TextResponse(request.initiator_task_tag, data=b"TargetName=iqn.a\0"))
        await peer.expect(LogoutRequest)
        peer.cut()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        found = await discover(target.portal, CONFIG, ISID)
    target.close()
    assert [entry.name for entry in found] == ["iqn.a"]


@pytest.mark.parametrize(
    ("text", "portal"),
    [
        ("10.1.2.3", Portal("10.1.2.3", 3260)),
        ("10.1.2.3:1", Portal("10.1.2.3", 1)),
        ("[fe80::1]", Portal("fe80::1", 3260)),
        ("[fe80::1]:77,4", Portal("fe80::1", 77)),
        ("name.example:3261,1", Portal("name.example", 3261)),
    ],
)
def test_addresses(text: str, portal: Portal) -> None:
    assert parse_address(text) == portal


@pytest.mark.parametrize("text", ["", ":3260", "host:", "host:0", "host:99999", "host:x", "h,x"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(ProtocolViolation, match="is no address"):
        parse_address(text)
