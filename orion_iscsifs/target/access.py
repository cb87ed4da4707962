"""Asymmetric access at the target (SPC-4 §5.15): a state for each of its portal groups.

A SCSI target port is a target portal group (RFC 7143 §4.4.1), and each of them is a target port
group of its own here, with the same number as its tag. Relative target port identifiers count the
groups in ascending order of their tags, from 1.

Tests set states while the target runs; initiators do with SET TARGET PORT GROUPS. The hot path asks
`restricted` and nothing else: it is False as long as every group is active.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.scsi import alua, sense
from orion_iscsifs.scsi.alua import AccessState, ChangedBy, PortGroup, PortGroups
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.malformed import MalformedData
from orion_iscsifs.scsi.sense import SenseData, SenseKey
from orion_iscsifs.target.unit import GOOD, LogicalUnit, Outcome, Refused, check_condition

if TYPE_CHECKING:
    from orion_iscsifs.target.commands import Result
    from orion_iscsifs.target.session import Session

STATE_CHANGED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x06)
SUPPORTED: Final = frozenset(AccessState) - {AccessState.LBA_DEPENDENT, AccessState.OFFLINE}

_EXTENDED_HEADER: Final = 1
_NOT_READY: Final[Mapping[AccessState, Outcome]] = {
    state: check_condition(SenseData(SenseKey.NOT_READY, 0x04, ascq))
    for state, ascq in (
        (AccessState.TRANSITIONING, 0x0A),
        (AccessState.STANDBY, 0x0B),
        (AccessState.UNAVAILABLE, 0x0C),
        (AccessState.OFFLINE, 0x0C),
    )
}
_ALWAYS: Final = frozenset({OpCode.INQUIRY, OpCode.REPORT_LUNS, OpCode.REQUEST_SENSE})
_IN_STANDBY: Final = _ALWAYS | {
    OpCode.MODE_SENSE_6,
    OpCode.MODE_SENSE_10,
    OpCode.MODE_SELECT_6,
    OpCode.MODE_SELECT_10,
    OpCode.PERSISTENT_RESERVE_IN,
    OpCode.PERSISTENT_RESERVE_OUT,
}
_CARRIED_OUT: Final[Mapping[AccessState, frozenset[int]]] = {
    AccessState.TRANSITIONING: _ALWAYS,
    AccessState.STANDBY: _IN_STANDBY,
    AccessState.UNAVAILABLE: _ALWAYS,
    AccessState.OFFLINE: _ALWAYS,
}
"""What each state still answers (SPC-4 §5.15.2.4.4, §5.15.2.4.5, §5.15.2.5), beside the service
actions of `_names_port_groups`."""


class Access:
    """The states of one target's groups. `on_change` makes unit attentions of changes.

    `explicit_delay_s`: how long a change by SET TARGET PORT GROUPS takes; meanwhile the group is
    transitioning. `tpgs` is what INQUIRY says; without TPGS_EXPLICIT, SET TARGET PORT GROUPS is
    refused.
    """

    def __init__(
        self, groups: Iterable[int], on_change: Callable[["Session | None"], None]
    ) -> None:
        self.states = dict.fromkeys(sorted(set(groups)), AccessState.ACTIVE_OPTIMIZED)
        self.restricted = False
        """Some group is in a state in which commands are refused."""
        self.tpgs = alua.TPGS_BOTH
        self.preferred: int | None = None
        self.explicit_delay_s = 0.0
        self.implicit_transition_time_s = 0
        self.changes = 0
        """States that were set, transitions counted once."""
        self._on_change = on_change
        self._changed_by: dict[int, ChangedBy] = {}
        self._generation = dict.fromkeys(self.states, 0)

    def port(self, group: int) -> int:
        """The relative target port identifier of a group."""
        return list(self.states).index(group) + 1

    # -- states: for tests and for SET TARGET PORT GROUPS ------------------------------------------

    def set(self, group: int, state: AccessState) -> None:
        """An implicit change, at once: every session hears of it by a unit attention."""
        self.change({group: state}, ChangedBy.DEVICE)

    async def transition(self, group: int, state: AccessState, delay_s: float) -> None:
        """An implicit change that takes `delay_s`; the group is transitioning meanwhile.

        Cancelled, it is over at once. A later change of the same group takes its place.
        """
        await self.change_slowly({group: state}, ChangedBy.DEVICE, delay_s)

    def change(
        self,
        wanted: Mapping[int, AccessState],
        cause: ChangedBy,
        *,
        but: "Session | None" = None,
    ) -> None:
        """Set states; every session except `but` hears of it if something did change."""
        changed = {group for group, state in wanted.items() if self.states[group] is not state}
        for group, state in wanted.items():
            self._generation[group] += 1
            self.states[group] = state
        for group in changed:
            self._changed_by[group] = cause
        self.restricted = any(not state.usable for state in self.states.values())
        self.changes += len(changed)
        if changed:
            self._on_change(but)

    async def change_slowly(
        self,
        wanted: Mapping[int, AccessState],
        cause: ChangedBy,
        delay_s: float,
        *,
        but: "Session | None" = None,
    ) -> None:
        for group in wanted:
            self._generation[group] += 1
            self.states[group] = AccessState.TRANSITIONING
        self.restricted = True
        begun = {group: self._generation[group] for group in wanted}
        try:
            await trio.sleep(delay_s)
        finally:
            # What was changed again while we slept is no longer ours.
            mine = {g: s for g, s in wanted.items() if self._generation[g] == begun[g]}
            self.change(mine, cause, but=but)

    def report(self) -> PortGroups:
        groups = (
            PortGroup(
                tag=group,
                state=state,
                preferred=group == self.preferred,
                supported=SUPPORTED,
                status_code=self._changed_by.get(group, ChangedBy.NOTHING),
                ports=(self.port(group),),
            )
            for group, state in self.states.items()
        )
        return PortGroups(tuple(groups), self.implicit_transition_time_s)

    # -- commands ----------------------------------------------------------------------------------

    def refuses(self, group: int, cdb: bytes) -> Outcome | None:
        """Why this command is not carried out through `group`; None: it is."""
        state = self.states[group]
        if state.usable or cdb[0] in _CARRIED_OUT[state] or _names_port_groups(cdb, state):
            return None
        return _NOT_READY[state]


def _names_port_groups(cdb: bytes, state: AccessState) -> bool:
    """REPORT and, but for a group in transition, SET TARGET PORT GROUPS."""
    if cdb[1] & 0x1F != alua.SERVICE_ACTION:
        return False
    if cdb[0] == OpCode.MAINTENANCE_OUT:
        return state is not AccessState.TRANSITIONING
    return cdb[0] == OpCode.MAINTENANCE_IN


def access_of(session: "Session") -> Access:
    """Commands run in normal sessions only: those have a target."""
    assert session.target is not None
    return session.target.access


def report_target_port_groups(session: "Session", _unit: LogicalUnit, cdb: bytes) -> Outcome:
    """MAINTENANCE IN, service action 0Ah (SPC-4 §6.37)."""
    asked = alua.parse_report_target_port_groups(cdb)
    if asked.parameter_data_format > _EXTENDED_HEADER:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    extended = asked.parameter_data_format == _EXTENDED_HEADER
    data = alua.encode_port_groups(access_of(session).report(), extended=extended)
    return Outcome(data=data[: asked.allocation_length])


def wishes_length(_: LogicalUnit, cdb: bytes) -> int:
    """How much Data-Out SET TARGET PORT GROUPS has; a list for every group that there can be."""
    length = alua.parse_set_target_port_groups(cdb)
    if cdb[1] & 0x1F != alua.SERVICE_ACTION or length > 4 + 4 * 0xFFFF:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return length


def set_target_port_groups(
    session: "Session", _unit: LogicalUnit, cdb: bytes, data: Buffer
) -> "Result":
    """MAINTENANCE OUT, service action 0Ah (SPC-4 §6.45)."""
    access = access_of(session)
    if cdb[1] & 0x1F != alua.SERVICE_ACTION or not access.tpgs & alua.TPGS_EXPLICIT:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    if len(data) < alua.parse_set_target_port_groups(cdb):
        raise Refused(sense.PARAMETER_LIST_LENGTH_ERROR)
    try:
        wishes = alua.decode_wishes(data)
    except MalformedData:
        raise Refused(sense.PARAMETER_LIST_LENGTH_ERROR) from None
    wanted: dict[int, AccessState] = {}
    for wish in wishes:
        # A group in transition is a state to pass through, not one to ask for.
        known = wish.tag in access.states and wish.state in SUPPORTED
        if not known or wish.state == AccessState.TRANSITIONING:
            raise Refused(sense.INVALID_FIELD_IN_PARAMETER_LIST)
        wanted[wish.tag] = AccessState(wish.state)
    if math.isclose(access.explicit_delay_s, 0) or not wanted:
        access.change(wanted, ChangedBy.SET_TARGET_PORT_GROUPS, but=session)
        return GOOD
    return _set_slowly(session, access, wanted)


async def _set_slowly(
    session: "Session", access: Access, wanted: Mapping[int, AccessState]
) -> Outcome:
    cause, delay_s = ChangedBy.SET_TARGET_PORT_GROUPS, access.explicit_delay_s
    await access.change_slowly(wanted, cause, delay_s, but=session)
    return GOOD
