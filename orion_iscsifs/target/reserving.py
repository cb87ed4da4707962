"""PERSISTENT RESERVE IN and OUT: the commands around `reservations` (SPC-4 §6.15, §6.16)."""

from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.scsi import reservation as codec
from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.reservation import InAction, Keys, Reservation
from orion_iscsifs.scsi.sense import Status
from orion_iscsifs.target.access import access_of
from orion_iscsifs.target.reservations import Conflict, Effects, Unacceptable
from orion_iscsifs.target.unit import GOOD, LogicalUnit, Outcome, Refused

if TYPE_CHECKING:
    from orion_iscsifs.target.commands import Result
    from orion_iscsifs.target.session import Session

CONFLICT: Final = Outcome(status=Status.RESERVATION_CONFLICT)


def reserve_in(session: "Session", unit: LogicalUnit, cdb: bytes, _data: Buffer) -> "Result":
    """PERSISTENT RESERVE IN, all four service actions."""
    asked = codec.parse_reserve_in(cdb)
    state = unit.reservations
    if asked.action == InAction.READ_KEYS:
        data = codec.encode_keys(Keys(state.generation, tuple(state.keys.values())))
    elif asked.action == InAction.READ_RESERVATION:
        data = codec.encode_reservation(Reservation(state.generation, state.holder))
    elif asked.action == InAction.REPORT_CAPABILITIES:
        data = codec.encode_capabilities(state.capabilities)
    elif asked.action == InAction.READ_FULL_STATUS:
        found = state.registrations(access_of(session).port)
        data = codec.encode_full_status(state.generation, found)
    else:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return Outcome(data=data[: asked.allocation_length])


def parameters_length(_unit: LogicalUnit, cdb: bytes) -> int:
    """Data-Out of PERSISTENT RESERVE OUT; raises Refused for a length that no list has."""
    length = codec.parse_reserve_out(cdb).parameter_bytes
    if length != codec.OUT_BYTES:
        raise Refused(sense.PARAMETER_LIST_LENGTH_ERROR)
    return length


def reserve_out(session: "Session", unit: LogicalUnit, cdb: bytes, data: Buffer) -> "Result":
    """PERSISTENT RESERVE OUT; answered when the commands that it aborts are over."""
    if len(data) < codec.OUT_BYTES:
        raise Refused(sense.PARAMETER_LIST_LENGTH_ERROR)
    command = codec.parse_reserve_out(cdb)
    try:
        effects = unit.reservations.carry_out(session.nexus, command, codec.decode_out(data))
    except Conflict:
        return CONFLICT
    except Unacceptable as refusal:
        raise Refused(refusal.reason) from None
    waits = _spread(session, unit, effects)
    return _after(waits) if waits else GOOD


def _spread(session: "Session", unit: LogicalUnit, effects: Effects) -> list[trio.Event]:
    """Tell the others, and end the commands of those that were preempted."""
    assert session.target is not None
    sessions = session.target.sessions
    for nexus, attention in effects.attentions:
        if (other := sessions.get(nexus)) is not None:
            other.add_attention(unit.number, attention)
    waits: list[trio.Event] = []
    for nexus in effects.aborted:
        if (other := sessions.get(nexus)) is not None:
            for task in [task for task in other.tasks.values() if task.unit is unit]:
                finished = other.execution.abort(task)
                if finished is not None:
                    waits.append(finished)
    return waits


async def _after(waits: list[trio.Event]) -> Outcome:
    for finished in waits:
        await finished.wait()
    return GOOD
