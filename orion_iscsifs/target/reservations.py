"""Persistent reservations of one logical unit (SPC-4 §5.13): who may do what. It only decides.

An I_T nexus *registers* a key; a registered one may *reserve* the unit with one of six types. What
others may still do then is a table by command: `conflicts`. Registrations outlive sessions: they
belong to the nexus, which is an initiator's name and ISID, and a target port. A loss of power ends
them, unless the last registration asked to have them kept (APTPL).

`carry_out` does PERSISTENT RESERVE OUT and says what follows: unit attentions for other nexuses,
and whose commands have to be aborted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.cdb import OpCode, ServiceAction
from orion_iscsifs.scsi.reservation import (
    SCOPE_LOGICAL_UNIT,
    Capabilities,
    Holder,
    OutAction,
    OutParameters,
    Registration,
    ReservationType,
    ReserveOut,
    TransportId,
)
from orion_iscsifs.scsi.sense import SenseData, SenseKey

Nexus = tuple[str, bytes, int]
"""Initiator name, ISID, target portal group tag."""

RESERVATIONS_PREEMPTED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x03)
RESERVATIONS_RELEASED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x04)
REGISTRATIONS_PREEMPTED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x05)
INVALID_RELEASE: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x26, 0x04)
INSUFFICIENT_REGISTRATION_RESOURCES: Final = SenseData(SenseKey.ILLEGAL_REQUEST, 0x55, 0x04)

REGISTRATIONS_MAX: Final = 4096
"""Of one unit: an initiator with many ISIDs must not use up the memory."""
_GENERATION_MASK: Final = 0xFFFF_FFFF

_EXCLUSIVE: Final = frozenset(
    {
        ReservationType.EXCLUSIVE_ACCESS,
        ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY,
        ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
    }
)
_FOR_HOLDER_ALONE: Final = frozenset(
    {ReservationType.WRITE_EXCLUSIVE, ReservationType.EXCLUSIVE_ACCESS}
)
_SHARED: Final = frozenset(ReservationType) - _FOR_HOLDER_ALONE


class Unacceptable(Exception):
    """The command ends with CHECK CONDITION."""

    def __init__(self, reason: SenseData) -> None:
        super().__init__(reason.describe())
        self.reason = reason


class Conflict(Exception):
    """The command ends with RESERVATION CONFLICT."""


# -- the table (SPC-4 table 51, SBC-3 table 13) ----------------------------------------------------

_ALWAYS: Final = frozenset(
    {
        OpCode.INQUIRY,
        OpCode.REPORT_LUNS,
        OpCode.REQUEST_SENSE,
        OpCode.TEST_UNIT_READY,
        OpCode.READ_CAPACITY_10,
        OpCode.PERSISTENT_RESERVE_IN,
        # Its own rules: a nexus without a registration gets the conflict there.
        OpCode.PERSISTENT_RESERVE_OUT,
    }
)
_READS: Final = frozenset(
    {
        OpCode.READ_6,
        OpCode.READ_10,
        OpCode.READ_12,
        OpCode.READ_16,
        OpCode.VERIFY_10,
        OpCode.VERIFY_12,
        OpCode.VERIFY_16,
        OpCode.PRE_FETCH_10,
        OpCode.PRE_FETCH_16,
    }
)
_START: Final = 0x01
_POWER_CONDITION: Final = 0xF0
_PREVENT: Final = 0x03
_REPORT_TARGET_PORT_GROUPS: Final = 0x0A


def _needs(cdb: bytes) -> bool | None:
    """What a command does to the unit: None nothing that matters, False reads it, True changes."""
    opcode, action = cdb[0], cdb[1] & 0x1F
    if opcode in _ALWAYS:
        return None
    if opcode in _READS:
        return False
    if opcode == OpCode.SERVICE_ACTION_IN_16:
        return None if action == ServiceAction.READ_CAPACITY_16 else False
    if opcode == OpCode.MAINTENANCE_IN:
        return None if action == _REPORT_TARGET_PORT_GROUPS else False
    if opcode == OpCode.START_STOP_UNIT and cdb[4] & _START and not cdb[4] & _POWER_CONDITION:
        return None
    if opcode == OpCode.PREVENT_ALLOW_MEDIUM_REMOVAL and not cdb[4] & _PREVENT:
        return None
    return True


# -- the state -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Effects:
    """What a PERSISTENT RESERVE OUT brings with it."""

    attentions: list[tuple[Nexus, SenseData]] = field(default_factory=list)
    aborted: list[Nexus] = field(default_factory=list)
    """Nexuses whose commands to the unit are to be aborted."""


class Reservations:
    """Of one logical unit."""

    def __init__(self) -> None:
        self.keys: dict[Nexus, int] = {}
        """In the order of registration."""
        self.generation = 0
        self.lasting = True
        """APTPL is supported."""
        self.persists = False
        """APTPL of the last registration."""
        self.kind: ReservationType | None = None
        """Of the reservation in force; None: there is none, and nothing conflicts."""
        self._holder: Nexus | None = None
        """With an all-registrants type every registered nexus holds it, and this is nobody."""

    # -- questions -----------------------------------------------------------------------------

    def conflicts(self, nexus: Nexus, cdb: bytes) -> bool:
        """Whether this command of `nexus` ends with RESERVATION CONFLICT."""
        if self.kind is None or self._may_all(nexus):
            return False
        needs = _needs(cdb)
        if needs is None:
            return False
        return needs or self.kind in _EXCLUSIVE

    def _may_all(self, nexus: Nexus) -> bool:
        return self._holds(nexus) or (self.kind in _SHARED and nexus in self.keys)

    def _holds(self, nexus: Nexus) -> bool:
        if self.kind is None:
            return False
        return nexus in self.keys if self.kind.all_registrants else nexus == self._holder

    @property
    def holder(self) -> Holder | None:
        """As READ RESERVATION tells it."""
        if self.kind is None:
            return None
        return Holder(0 if self._holder is None else self.keys[self._holder], self.kind)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            types=frozenset(ReservationType),
            persist_capable=self.lasting,
            persist_active=self.persists,
        )

    def registrations(self, port_of: Callable[[int], int]) -> Iterator[Registration]:
        """As READ FULL STATUS tells them; `port_of` gives the relative target port of a group."""
        for nexus, key in self.keys.items():
            name, isid, group = nexus
            yield Registration(
                key=key,
                is_holder=self._holds(nexus),
                kind=self.kind or 0,
                relative_port=port_of(group),
                initiator=TransportId(name, isid),
            )

    # -- changes -------------------------------------------------------------------------------

    def lose_power(self) -> None:
        """PRGENERATION starts anew; the rest stays if the last registration asked for it."""
        self.generation = 0
        if not self.persists:
            self.keys.clear()
            self._release()

    def carry_out(self, nexus: Nexus, command: ReserveOut, parameters: OutParameters) -> Effects:
        """PERSISTENT RESERVE OUT (SPC-4 §6.16). Raises Conflict or Unacceptable."""
        action = _ACTIONS.get(command.action)
        if action is None:
            raise Unacceptable(sense.INVALID_FIELD_IN_CDB)
        unsupported = parameters.all_target_ports or parameters.specify_initiator_ports
        if unsupported or (parameters.aptpl and not self.lasting):
            raise Unacceptable(sense.INVALID_FIELD_IN_PARAMETER_LIST)
        if command.action != OutAction.REGISTER_AND_IGNORE_EXISTING_KEY:
            registered = self.keys.get(nexus)
            may_register = command.action == OutAction.REGISTER and registered is None
            if parameters.key != (registered or 0) or (registered is None and not may_register):
                raise Conflict
        effects = Effects()
        action(self, nexus, command, parameters, effects)
        return effects

    def _register(
        self, nexus: Nexus, command: ReserveOut, parameters: OutParameters, effects: Effects
    ) -> None:
        del command
        key = parameters.service_action_key
        if key:
            if nexus not in self.keys and len(self.keys) >= REGISTRATIONS_MAX:
                raise Unacceptable(INSUFFICIENT_REGISTRATION_RESOURCES)
            self.keys[nexus] = key
        elif nexus not in self.keys:
            return
        else:
            self._unregister(nexus, effects)
        self.persists = parameters.aptpl
        self._count()

    def _unregister(self, nexus: Nexus, effects: Effects) -> None:
        held, kind = self._holds(nexus), self.kind
        del self.keys[nexus]
        if not held or kind is None or (kind.all_registrants and self.keys):
            return
        self._release()
        if kind in _SHARED:
            self._tell_all(RESERVATIONS_RELEASED, effects, but=nexus)

    def _reserve(
        self, nexus: Nexus, command: ReserveOut, parameters: OutParameters, effects: Effects
    ) -> None:
        del parameters, effects
        kind = _wanted(command)
        if self.kind is None:
            self._take(nexus, kind)
        elif not self._holds(nexus) or kind is not self.kind:
            raise Conflict

    def _release_command(
        self, nexus: Nexus, command: ReserveOut, parameters: OutParameters, effects: Effects
    ) -> None:
        del parameters
        if not self._holds(nexus):
            return
        if command.scope != SCOPE_LOGICAL_UNIT or command.kind != self.kind:
            raise Unacceptable(INVALID_RELEASE)
        shared = self.kind in _SHARED
        self._release()
        if shared:
            self._tell_all(RESERVATIONS_RELEASED, effects, but=nexus)

    def _clear(
        self, nexus: Nexus, command: ReserveOut, parameters: OutParameters, effects: Effects
    ) -> None:
        del command, parameters
        self._tell_all(RESERVATIONS_PREEMPTED, effects, but=nexus)
        self.keys.clear()
        self._release()
        self._count()

    def _preempt(
        self, nexus: Nexus, command: ReserveOut, parameters: OutParameters, effects: Effects
    ) -> None:
        """SPC-4 §5.13.11.2."""
        key = parameters.service_action_key
        everybody = self.kind is not None and self.kind.all_registrants and not key
        takes = everybody or (
            self._holder is not None and self.keys[self._holder] == key and key != 0
        )
        if not key and not everybody:
            wrong = self.kind is not None and not self.kind.all_registrants
            raise Unacceptable(sense.INVALID_FIELD_IN_PARAMETER_LIST) if wrong else Conflict
        kind = _wanted(command) if takes else None
        gone = [
            other
            for other, its in self.keys.items()
            if other != nexus and (everybody or its == key)
        ]
        if not gone and self.keys[nexus] != key and not everybody:
            raise Conflict
        for other in gone:
            del self.keys[other]
            effects.attentions.append((other, REGISTRATIONS_PREEMPTED))
        if command.action == OutAction.PREEMPT_AND_ABORT:
            effects.aborted += gone
        if kind is not None:
            if self.kind is not kind and self.kind in _SHARED:
                self._tell_all(RESERVATIONS_RELEASED, effects, but=nexus)
            self._take(nexus, kind)
        self._count()

    def _take(self, nexus: Nexus, kind: ReservationType) -> None:
        self.kind = kind
        self._holder = None if kind.all_registrants else nexus

    def _release(self) -> None:
        self.kind = self._holder = None

    def _count(self) -> None:
        self.generation = (self.generation + 1) & _GENERATION_MASK

    def _tell_all(self, attention: SenseData, effects: Effects, *, but: Nexus) -> None:
        effects.attentions += [(nexus, attention) for nexus in self.keys if nexus != but]


def _wanted(command: ReserveOut) -> ReservationType:
    """The type that the CDB asks for; raises Unacceptable for a scope or a type that is none."""
    if command.scope != SCOPE_LOGICAL_UNIT:
        raise Unacceptable(sense.INVALID_FIELD_IN_CDB)
    try:
        return ReservationType(command.kind)
    except ValueError:
        raise Unacceptable(sense.INVALID_FIELD_IN_CDB) from None


_Action = Callable[[Reservations, Nexus, ReserveOut, OutParameters, Effects], None]

_ACTIONS: Final[Mapping[int, _Action]] = {
    OutAction.REGISTER: Reservations._register,
    OutAction.REGISTER_AND_IGNORE_EXISTING_KEY: Reservations._register,
    OutAction.RESERVE: Reservations._reserve,
    OutAction.RELEASE: Reservations._release_command,
    OutAction.CLEAR: Reservations._clear,
    OutAction.PREEMPT: Reservations._preempt,
    OutAction.PREEMPT_AND_ABORT: Reservations._preempt,
}

RESERVE_OUT_ACTIONS: Final = tuple(_ACTIONS)
"""REGISTER AND MOVE is not among them."""
