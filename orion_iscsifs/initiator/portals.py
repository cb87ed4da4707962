"""Which of the listed addresses are used, and in which order: it only decides, a row for each case.

What SendTargets lists is what the target knows of itself. Behind address translation that is an
address of its inner network; on a host with many interfaces it is link-local ones, too; a target
that is bound to every address may list "every address". One portal is known to work whatever is
listed: the one that was *dialled* and has just answered. So:

| the list says                         | what is used                                             |
| ------------------------------------- | -------------------------------------------------------- |
| no address at all                     | the dialled portal (RFC 7143 Appendix C)                 |
| an address or a host name             | as it is listed                                          |
| 0.0.0.0 or ::                         | the dialled host, with the listed port and group tag     |
| the target's loopback (127/8, ::1)    | the same, unless a loopback address was dialled          |
| link-local (169.254/16, fe80::/10)    | nothing, unless a link-local address was dialled         |
| link-local without its zone           | the dialled portal's zone is added (fe80::1%eth0)        |
| multicast or broadcast                | nothing                                                  |
| an address that came before           | nothing                                                  |
| more than `_PORTALS_MAX` for a target | nothing                                                  |
| no address (text of another form)     | nothing                                                  |
| only addresses that are not used      | the dialled portal, with the group tag if all have one   |

`login_order` then says where to log in: first the dialled portal, even if it is not listed; then
what is listed; last the dialled host with each listed port, where a router forwards port by port.
"""

import enum
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.initiator.addresses import Portal, parse_target_address
from orion_iscsifs.protocol.text import shown
from orion_iscsifs.url import TARGET_NAME_BYTES_MAX

_PORTALS_MAX: Final = 64
"""Of one target; no real one has as many."""
_TARGETS_MAX: Final = 1 << 16
_LEFT_OUT_MAX: Final = 8
"""Unused addresses kept for the report, of one target."""
_ANSWER: Final = "Text Response"
_TAG_MAX: Final = 0xFFFF
_NAME: Final = re.compile(r"(?:iqn|eui|naa)\.[^\s/]+", re.IGNORECASE)
# A last label of digits alone is a number to the resolver ("127.1", "0"), not a name.
_NUMBER_HOST: Final = re.compile(r"(?:.*\.)?(?:0[xX][0-9A-Fa-f]*|[0-9]+)\.?")
_ZONE: Final = re.compile(r"[A-Za-z0-9_.-]{1,32}")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Rule(enum.StrEnum):
    """What became of a listed address. The values are words for the user and for `--json`."""

    AS_LISTED = "as listed"
    ZONE_ADDED = "the zone of the portal that was asked is added"
    UNSPECIFIED = "an unspecified address: the host that was asked is used"
    LOOPBACK = "the target's own loopback: the host that was asked is used"
    LINK_LOCAL = "link-local"
    NO_HOST = "multicast or broadcast"
    DUPLICATE = "listed twice"
    TOO_MANY = "too many addresses"
    MALFORMED = "no address"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A listed address that is not used, and why."""

    text: str
    rule: Rule


@dataclass(frozen=True, slots=True)
class DiscoveredTarget:
    """One TargetName and its portals, in the list's order; at least one."""

    name: str
    portals: tuple[Portal, ...]
    left_out: tuple[LeftOut, ...] = field(default=(), compare=False)

    @property
    def groups(self) -> dict[int | None, tuple[Portal, ...]]:
        """The portals of each portal group: one session can span one group (Appendix C)."""
        found: dict[int | None, tuple[Portal, ...]] = {}
        for portal in self.portals:
            found[portal.group_tag] = (*found.get(portal.group_tag, ()), portal)
        return found


def parse_targets(
    pairs: Iterable[tuple[str, str]], dialled: Portal, reached: str = ""
) -> list[DiscoveredTarget]:
    """The records of a SendTargets response (RFC 7143 Appendix C).

    `reached` is our own address on that connection: it tells a link-local or loopback connection
    where `dialled` is a name. A target whose name is none is left out: it becomes a folder's name.
    """
    listed: dict[str, list[str]] = {}
    addresses: list[str] | None = None
    for key, value in pairs:
        if key == "TargetName":
            if value not in listed and len(listed) == _TARGETS_MAX:
                raise ProtocolViolation(_ANSWER, f"more than {_TARGETS_MAX} targets", section="C")
            addresses = listed.setdefault(value, [])
        elif key == "TargetAddress":
            if addresses is None:
                raise ProtocolViolation(_ANSWER, "TargetAddress before any TargetName", section="C")
            addresses.append(value)
    return [
        choose(name, found, dialled, reached) for name, found in listed.items() if is_name(name)
    ]


def is_name(name: str) -> bool:
    """Whether this can be an iSCSI name (RFC 7143 §4.2.7)."""
    return (
        _NAME.fullmatch(name) is not None
        and name.isprintable()
        and len(name.encode(errors="replace")) <= TARGET_NAME_BYTES_MAX
    )


def choose(
    name: str, addresses: Sequence[str], dialled: Portal, reached: str = ""
) -> DiscoveredTarget:
    """The table above for one target."""
    origin = _Origin(dialled, reached)
    used: list[Portal] = []
    left_out: list[LeftOut] = []
    tags: set[int | None] = set()
    for text in addresses:
        portal, rule = origin.judge(text)
        tags |= {portal.group_tag} if portal is not None else set()
        if rule not in _UNUSED and portal in used:
            rule = Rule.DUPLICATE
        elif rule not in _UNUSED and len(used) == _PORTALS_MAX:
            rule = Rule.TOO_MANY
        if rule not in _UNUSED and portal is not None:
            used.append(portal)
        elif len(left_out) < _LEFT_OUT_MAX:
            left_out.append(LeftOut(text, rule))
    if not used:
        used = [_with_tag(dialled, tags)]
    return DiscoveredTarget(name, tuple(used), tuple(left_out))


_UNUSED: Final = frozenset(
    {Rule.LINK_LOCAL, Rule.NO_HOST, Rule.DUPLICATE, Rule.TOO_MANY, Rule.MALFORMED}
)


def login_order(target: DiscoveredTarget, dialled: Portal) -> tuple[Portal, ...]:
    """Every portal where a login may succeed, the likeliest first."""
    tags = {portal.group_tag for portal in target.portals}
    first = next((portal for portal in target.portals if portal == dialled), None)
    hidden = [replace(portal, host=dialled.host) for portal in target.portals]
    order = [first or _with_tag(dialled, tags), *target.portals, *hidden]
    return tuple(dict.fromkeys(order))


def _with_tag(dialled: Portal, tags: set[int | None]) -> Portal:
    """The dialled portal is in the group of the listed ones, if that is only one."""
    return replace(dialled, group_tag=next(iter(tags)) if len(tags) == 1 else None)


class _Origin:
    """The portal that was dialled: what it tells about listed addresses."""

    def __init__(self, dialled: Portal, reached: str) -> None:
        self._dialled = dialled
        ends = [end for end in (_address(dialled.host), _address(reached)) if end is not None]
        self._link_local = any(end.is_link_local for end in ends)
        self._loopback = any(end.is_loopback for end in ends) or dialled.host == "localhost"
        self._zone = next((zone for zone in map(_zone, ends) if zone), None)

    def judge(self, text: str) -> tuple[Portal | None, Rule]:
        """What one TargetAddress becomes. The portal is None for text that is no address."""
        try:
            portal = parse_address(text)
        except ProtocolViolation:
            return None, Rule.MALFORMED
        address = _address(portal.host)
        if address is None:
            return portal, Rule.AS_LISTED
        if address.is_unspecified:
            return replace(portal, host=self._dialled.host), Rule.UNSPECIFIED
        if address.is_loopback and not self._loopback:
            return replace(portal, host=self._dialled.host), Rule.LOOPBACK
        if address.is_multicast or str(address) == "255.255.255.255":
            return portal, Rule.NO_HOST
        if address.is_link_local:
            return self._judge_link_local(portal, address)
        return portal, Rule.AS_LISTED

    def _judge_link_local(self, portal: Portal, address: _Address) -> tuple[Portal, Rule]:
        if not self._link_local:
            return portal, Rule.LINK_LOCAL
        if address.version == 6 and not _zone(address) and self._zone:
            return replace(portal, host=f"{address}%{self._zone}"), Rule.ZONE_ADDED
        return portal, Rule.AS_LISTED


def _address(host: str) -> _Address | None:
    """The address that `host` spells; None for a name. An IPv4-mapped one is its IPv4 address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _zone(address: _Address) -> str | None:
    return address.scope_id if isinstance(address, ipaddress.IPv6Address) else None


def parse_address(text: str) -> Portal:
    """`host[:port][,portal-group-tag]` (RFC 7143 §13.8); raises ProtocolViolation.

    An address is spelled in its canonical form, so that two spellings of one are equal.
    """
    portal = parse_target_address(text, _ANSWER)
    address = _address(portal.host)
    zone = None if address is None else _zone(address)
    strange = _NUMBER_HOST.fullmatch(portal.host) is not None and address is None
    if strange or (zone and not _ZONE.fullmatch(zone)) or (portal.group_tag or 0) > _TAG_MAX:
        problem = f"TargetAddress={shown(text)} is no address"
        raise ProtocolViolation(_ANSWER, problem, section="13.8")
    return portal if address is None else replace(portal, host=str(address))
