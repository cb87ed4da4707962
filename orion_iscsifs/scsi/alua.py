"""Asymmetric logical unit access (ALUA): which target ports are worth using (SPC-4 §5.15).

Target ports are gathered in target port groups; each group has one asymmetric access state. An
initiator learns the states with REPORT TARGET PORT GROUPS (§6.37), changes them with SET TARGET
PORT GROUPS (§6.45) where the device takes explicit transitions, and finds out which port and which
group its own path goes through in the Device Identification page (§7.8.6).
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.inquiry import Designator, DesignatorType
from orion_iscsifs.scsi.malformed import Buffer, MalformedData, field

SERVICE_ACTION: Final = 0x0A
"""REPORT TARGET PORT GROUPS under MAINTENANCE IN, SET TARGET PORT GROUPS under MAINTENANCE OUT."""

TPGS_NONE: Final = 0
TPGS_IMPLICIT: Final = 1
TPGS_EXPLICIT: Final = 2
TPGS_BOTH: Final = 3
"""The TPGS field of standard INQUIRY data (SPC-4 §6.6.2)."""

PORT_GROUPS_MAX: Final = 4096
"""More groups than this in one answer are not read: no device has them."""
_REPORT_HEADER: Final = "REPORT TARGET PORT GROUPS"
_TARGET_PORT: Final = 1
"""The ASSOCIATION of a designator that names the port of this path."""


class AccessState(enum.IntEnum):
    """ASYMMETRIC ACCESS STATE (SPC-4 table 244)."""

    ACTIVE_OPTIMIZED = 0x0
    ACTIVE_NON_OPTIMIZED = 0x1
    STANDBY = 0x2
    UNAVAILABLE = 0x3
    LBA_DEPENDENT = 0x4
    OFFLINE = 0xE
    TRANSITIONING = 0xF

    @property
    def usable(self) -> bool:
        """Reads and writes are carried out (LBA dependent: at least some of them)."""
        return self in _USABLE

    @property
    def words(self) -> str:
        """`active/non-optimized`."""
        return _WORDS[self]


_USABLE: Final = frozenset(
    {AccessState.ACTIVE_OPTIMIZED, AccessState.ACTIVE_NON_OPTIMIZED, AccessState.LBA_DEPENDENT}
)
_WORDS: Final = {
    AccessState.ACTIVE_OPTIMIZED: "active/optimized",
    AccessState.ACTIVE_NON_OPTIMIZED: "active/non-optimized",
    AccessState.STANDBY: "standby",
    AccessState.UNAVAILABLE: "unavailable",
    AccessState.LBA_DEPENDENT: "LBA dependent",
    AccessState.OFFLINE: "offline",
    AccessState.TRANSITIONING: "transitioning",
}


class ChangedBy(enum.IntEnum):
    """STATUS CODE: what the last change of the state came from."""

    NOTHING = 0
    SET_TARGET_PORT_GROUPS = 1
    DEVICE = 2


# The bit of byte 1 of a descriptor that says that the state is supported (SPC-4 table 318).
_SUPPORTED_BIT: Final = {
    AccessState.TRANSITIONING: 0x80,
    AccessState.OFFLINE: 0x40,
    AccessState.LBA_DEPENDENT: 0x10,
    AccessState.UNAVAILABLE: 0x08,
    AccessState.STANDBY: 0x04,
    AccessState.ACTIVE_NON_OPTIMIZED: 0x02,
    AccessState.ACTIVE_OPTIMIZED: 0x01,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PortGroup:
    """One target port group. `ports` are relative target port identifiers."""

    tag: int
    state: int
    """An `AccessState`, or a number that SPC-4 reserves."""
    preferred: bool = False
    supported: frozenset[AccessState] = frozenset()
    status_code: int = ChangedBy.NOTHING
    ports: tuple[int, ...] = ()

    @property
    def access(self) -> AccessState:
        """`state`; a reserved one counts as unavailable."""
        try:
            return AccessState(self.state)
        except ValueError:
            return AccessState.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class PortGroups:
    """All groups of a logical unit, in the device's order."""

    groups: tuple[PortGroup, ...]
    implicit_transition_time_s: int = 0
    """The longest that an implicit transition takes; 0: not reported (short header)."""

    def with_tag(self, tag: int) -> PortGroup | None:
        return next((group for group in self.groups if group.tag == tag), None)

    def with_port(self, port: int) -> PortGroup | None:
        """The group that has this relative target port identifier."""
        return next((group for group in self.groups if port in group.ports), None)


# -- REPORT TARGET PORT GROUPS ---------------------------------------------------------------------

_ALLOCATION_12: Final = Struct(">BB4xIxx4x")
_EXTENDED: Final = 1
"""PARAMETER DATA FORMAT: the header with the implicit transition time."""


def report_target_port_groups(allocation_length: int = 4096, *, extended: bool = False) -> bytes:
    """The CDB. `extended` asks for the longer header; a device of SPC-3 refuses or ignores that."""
    action = SERVICE_ACTION | (_EXTENDED if extended else 0) << 5
    return _ALLOCATION_12.pack(OpCode.MAINTENANCE_IN, action, allocation_length)


@dataclass(frozen=True, slots=True)
class ReportTargetPortGroups:
    parameter_data_format: int
    """0 length only, 1 extended header."""
    allocation_length: int


def parse_report_target_port_groups(cdb: Buffer) -> ReportTargetPortGroups:
    return ReportTargetPortGroups(cdb[1] >> 5, field(cdb, 6, 4))


def encode_port_groups(reported: PortGroups, *, extended: bool = False) -> bytes:
    """Parameter data (SPC-4 §6.37.2), complete: the caller cuts it to the allocation length."""
    body = b"".join(_encode_group(group) for group in reported.groups)
    if extended:
        body = bytes((_EXTENDED << 4, min(reported.implicit_transition_time_s, 255), 0, 0)) + body
    return len(body).to_bytes(4, "big") + body


def _encode_group(group: PortGroup) -> bytes:
    supported = sum(_SUPPORTED_BIT[state] for state in group.supported)
    head = bytes((group.preferred << 7 | group.state, supported)) + group.tag.to_bytes(2, "big")
    ports = b"".join(bytes(2) + port.to_bytes(2, "big") for port in group.ports)
    return head + bytes((0, group.status_code, 0, len(group.ports))) + ports


def port_groups_length(data: Buffer) -> int:
    """The allocation length that fetches everything."""
    return 4 + field(data, 0, 4)


def decode_port_groups(data: Buffer) -> PortGroups:
    """Either header format. What is cut off is left out; MalformedData: not even a header."""
    if len(data) < 4:
        raise MalformedData(_REPORT_HEADER, f"{len(data)} bytes where at least 4 are due")
    body = data[4 : port_groups_length(data)]
    # The extended header has its format (1) where a descriptor has PREF and reserved bits: in a
    # descriptor those three bits are zero.
    extended = len(body) >= 4 and body[0] >> 4 & 7 == _EXTENDED
    time_s = field(body, 1, 1) if extended else 0
    return PortGroups(tuple(_decode_groups(body, 4 if extended else 0)), time_s)


def _decode_groups(body: Buffer, offset: int) -> Iterator[PortGroup]:
    for _ in range(PORT_GROUPS_MAX):
        if offset + 8 > len(body):
            return
        end = offset + 8 + 4 * body[offset + 7]
        ports = (field(body, at + 2, 2) for at in range(offset + 8, min(end, len(body) - 3), 4))
        flags = body[offset + 1]
        yield PortGroup(
            tag=field(body, offset + 2, 2),
            state=body[offset] & 0x0F,
            preferred=bool(body[offset] & 0x80),
            supported=frozenset(state for state, bit in _SUPPORTED_BIT.items() if flags & bit),
            status_code=body[offset + 5],
            ports=tuple(ports),
        )
        offset = end


# -- SET TARGET PORT GROUPS ------------------------------------------------------------------------

_LIST_HEADER_BYTES: Final = 4
_DESCRIPTOR_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Wish:
    """One descriptor of SET TARGET PORT GROUPS: group `tag` shall be in `state`."""

    tag: int
    state: int


def set_target_port_groups(parameter_list_length: int) -> bytes:
    """The CDB; the list itself is `encode_wishes`."""
    return _ALLOCATION_12.pack(OpCode.MAINTENANCE_OUT, SERVICE_ACTION, parameter_list_length)


def parse_set_target_port_groups(cdb: Buffer) -> int:
    """The PARAMETER LIST LENGTH."""
    return field(cdb, 6, 4)


def encode_wishes(wishes: Sequence[Wish]) -> bytes:
    return bytes(_LIST_HEADER_BYTES) + b"".join(
        bytes((wish.state, 0)) + wish.tag.to_bytes(2, "big") for wish in wishes
    )


def decode_wishes(data: Buffer) -> list[Wish]:
    """MalformedData: the length is not that of a header and whole descriptors. Empty: no wishes."""
    if not data:
        return []
    odd = (len(data) - _LIST_HEADER_BYTES) % _DESCRIPTOR_BYTES
    if len(data) < _LIST_HEADER_BYTES or odd:
        raise MalformedData("SET TARGET PORT GROUPS", f"a parameter list of {len(data)} bytes")
    return [
        Wish(field(data, offset + 2, 2), data[offset] & 0x0F)
        for offset in range(_LIST_HEADER_BYTES, len(data), _DESCRIPTOR_BYTES)
    ]


# -- where this path goes --------------------------------------------------------------------------


def port_designators(port: int, group: int) -> tuple[Designator, Designator]:
    """What page 83h says of the port that it was asked through (SPC-4 §7.8.6.8, §7.8.6.9)."""
    return (
        Designator(
            DesignatorType.RELATIVE_TARGET_PORT, port.to_bytes(4, "big"), association=_TARGET_PORT
        ),
        Designator(
            DesignatorType.TARGET_PORT_GROUP, group.to_bytes(4, "big"), association=_TARGET_PORT
        ),
    )


def relative_target_port(designators: Sequence[Designator]) -> int | None:
    """The relative target port identifier of this path; None: the device does not say."""
    return _number(designators, DesignatorType.RELATIVE_TARGET_PORT)


def target_port_group(designators: Sequence[Designator]) -> int | None:
    """The target port group of this path; None: the device does not say."""
    return _number(designators, DesignatorType.TARGET_PORT_GROUP)


def _number(designators: Sequence[Designator], kind: DesignatorType) -> int | None:
    return next(
        (
            field(designator.value, 2, 2)
            for designator in designators
            if designator.kind == kind
            and designator.association == _TARGET_PORT
            and len(designator.value) >= 4
        ),
        None,
    )
