"""Every row of the table in `initiator/portals.py`."""

import pytest

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.initiator.addresses import Portal
from orion_iscsifs.initiator.portals import (
    DiscoveredTarget,
    LeftOut,
    Rule,
    choose,
    is_name,
    login_order,
    parse_targets,
)

NAME = "iqn.2026-11.org.example:disk"
NAS = Portal("192.0.2.10", 13260)


def chosen(dialled: Portal, *addresses: str, reached: str = "") -> list[tuple[str, int | None]]:
    """What is used: `host:port` and group tag."""
    target = choose(NAME, addresses, dialled, reached)
    return [(str(portal), portal.group_tag) for portal in target.portals]


@pytest.mark.parametrize(
    ("host", "reached", "listed", "used"),
    [
        # as listed: addresses of both families, host names
        ("192.0.2.10", "", "10.0.0.5:3261,2", ("10.0.0.5:3261", 2)),
        ("192.0.2.10", "", "10.0.0.5,0", ("10.0.0.5:3260", 0)),
        ("192.0.2.10", "", "[2001:db8:0:0::1]:860,7", ("[2001:db8::1]:860", 7)),
        ("192.0.2.10", "", "san.example.org:3260,1", ("san.example.org:3260", 1)),
        # unspecified: the dialled host, the listed port and tag
        ("192.0.2.10", "", "0.0.0.0:3261,2", ("192.0.2.10:3261", 2)),
        ("nas.example", "", "[::]:3261,2", ("nas.example:3261", 2)),
        # the target's loopback, unless ours was dialled: by address, by name, or by any name
        ("192.0.2.10", "192.0.2.9", "127.0.0.1:3261,2", ("192.0.2.10:3261", 2)),
        ("192.0.2.10", "", "[::1]:3261,2", ("192.0.2.10:3261", 2)),
        ("127.0.0.1", "", "127.0.0.9:3261,2", ("127.0.0.9:3261", 2)),
        ("localhost", "", "[::1]:3261,2", ("[::1]:3261", 2)),
        ("nas.example", "127.0.0.1", "127.0.0.9:3261,2", ("127.0.0.9:3261", 2)),
        # link-local, because a link-local address was dialled; IPv6 gets the zone
        ("169.254.1.1", "", "169.254.1.2:3260,1", ("169.254.1.2:3260", 1)),
        ("nas.local", "169.254.9.9", "169.254.1.2:3260,1", ("169.254.1.2:3260", 1)),
        ("fe80::1%eth0", "", "[fe80::2]:3260,1", ("[fe80::2%eth0]:3260", 1)),
        ("fe80::1%eth0", "", "[fe80::2%br0]:3260,1", ("[fe80::2%br0]:3260", 1)),
        # nothing usable: the dialled portal, with the tag that all of them had
        ("192.0.2.10", "", "169.254.1.2:3260,4", ("192.0.2.10:13260", 4)),
        ("192.0.2.10", "", "[fe80::2]:3260,4", ("192.0.2.10:13260", 4)),
        ("192.0.2.10", "", "[::ffff:169.254.1.2]:3260,4", ("192.0.2.10:13260", 4)),
        ("192.0.2.10", "", "239.1.2.3:3260,4", ("192.0.2.10:13260", 4)),
        ("192.0.2.10", "", "255.255.255.255:3260,4", ("192.0.2.10:13260", 4)),
        ("192.0.2.10", "", "[ff02::1]:3260,4", ("192.0.2.10:13260", 4)),
        ("192.0.2.10", "", "nonsense here", ("192.0.2.10:13260", None)),
    ],
)
def test_a_single_address(
    host: str, reached: str, listed: str, used: tuple[str, int | None]
) -> None:
    assert chosen(Portal(host, 13260), listed, reached=reached) == [used]


def test_a_target_without_addresses_is_where_it_was_asked_for() -> None:
    assert chosen(NAS) == [(str(NAS), None)]


def test_link_local_ones_go_and_the_others_stay() -> None:
    listed = ("[fe80::1]:3260,1", "169.254.3.4:3260,1", "10.0.0.5:3260,1")
    target = choose(NAME, listed, NAS)
    assert target.portals == (Portal("10.0.0.5"),)
    assert target.left_out == (
        LeftOut("[fe80::1]:3260,1", Rule.LINK_LOCAL),
        LeftOut("169.254.3.4:3260,1", Rule.LINK_LOCAL),
    )


def test_duplicates_in_every_spelling() -> None:
    listed = ("10.0.0.5,1", "10.0.0.5:3260,1", "[::ffff:10.0.0.5]:3260,2", "[2001:DB8::1],1")
    target = choose(NAME, (*listed, "[2001:db8:0::1]:3260,1"), NAS)
    assert target.portals == (Portal("10.0.0.5"), Portal("2001:db8::1"))
    assert [address.rule for address in target.left_out] == [Rule.DUPLICATE] * 3


def test_every_wildcard_is_one_portal() -> None:
    assert chosen(NAS, "0.0.0.0:3260,1", "[::]:3260,1") == [("192.0.2.10:3260", 1)]


def test_portal_groups() -> None:
    """Appendix C's example: five addresses in three groups."""
    listed = ("10.1.0.45:3000,1", "10.1.1.46:3000,1", "10.1.0.47:3000,2", "10.1.1.49:3000,3")
    groups = choose(NAME, listed, NAS).groups
    assert {tag: [str(portal) for portal in found] for tag, found in groups.items()} == {
        1: ["10.1.0.45:3000", "10.1.1.46:3000"],
        2: ["10.1.0.47:3000"],
        3: ["10.1.1.49:3000"],
    }


@pytest.mark.parametrize(
    ("listed", "order"),
    [
        # a NAT hides the only portal: the dialled one takes its tag; its port is tried, too
        (["10.0.0.5:3260,3"], [(13260, 3, "nas"), (3260, 3, "inner"), (3260, 3, "nas")]),
        # the dialled one is listed: with its own tag
        (
            ["10.0.0.5:13260,1", "192.0.2.10:13260,2"],
            [(13260, 2, "nas"), (13260, 1, "inner")],
        ),
        # two groups are listed and the dialled one is in neither: no tag is assumed
        (
            ["10.0.0.5:1,1", "10.0.0.5:2,2"],
            [
                (13260, None, "nas"),
                (1, 1, "inner"),
                (2, 2, "inner"),
                (1, 1, "nas"),
                (2, 2, "nas"),
            ],
        ),
        ([], [(13260, None, "nas")]),
    ],
)
def test_the_order_of_logins(listed: list[str], order: list[tuple[int, int | None, str]]) -> None:
    hosts = {"nas": NAS.host, "inner": "10.0.0.5"}
    found = login_order(choose(NAME, listed, NAS), NAS)
    assert [(p.host, p.port, p.group_tag) for p in found] == [
        (hosts[where], port, tag) for port, tag, where in order
    ]


@pytest.mark.parametrize(
    "text",
    [
        "0,1",
        "127.1,1",
        "0x7f000001,1",
        "a.b.3,1",
        "[fe80::1%\x1b[0m]:3260,1",
        "h,65536",
        "[::1",
        "h b",
    ],
)
def test_what_only_a_resolver_would_take_for_an_address(text: str) -> None:
    target = choose(NAME, [text], NAS)
    assert target.portals == (NAS,)
    assert target.left_out == (LeftOut(text, Rule.MALFORMED),)


def test_a_hostile_list_of_addresses_is_cut() -> None:
    target = choose(NAME, [f"10.{n >> 8}.{n & 255}.1,1" for n in range(20_000)], NAS)
    assert len(target.portals) == 64
    assert target.left_out[0].rule is Rule.TOO_MANY
    assert len(target.left_out) == 8


@pytest.mark.parametrize(
    "name", ["", "disk1", "iqn.a/b", "iqn.../../etc", "iqn.a b", "iqn.a\x1b[2J", "iqn." + "x" * 220]
)
def test_a_name_that_would_be_no_folder_is_left_out(name: str) -> None:
    assert not is_name(name)
    pairs = [("TargetName", name), ("TargetAddress", "10.0.0.5,1"), ("TargetName", NAME)]
    assert parse_targets(pairs, NAS) == [DiscoveredTarget(NAME, (NAS,))]


def test_records_of_one_name_are_one_target() -> None:
    pairs = [
        ("TargetName", NAME),
        ("TargetAddress", "10.0.0.5,1"),
        ("TargetName", "eui.02004567A425678D"),
        ("TargetName", NAME),
        ("TargetAddress", "10.0.0.6,1"),
    ]
    assert parse_targets(pairs, NAS) == [
        DiscoveredTarget(NAME, (Portal("10.0.0.5"), Portal("10.0.0.6"))),
        DiscoveredTarget("eui.02004567A425678D", (NAS,)),
    ]


def test_an_address_of_nothing() -> None:
    with pytest.raises(ProtocolViolation, match="before any TargetName"):
        parse_targets([("TargetAddress", "10.0.0.5,1")], NAS)
