"""Everything a LUN says of itself, for `inspect`: asked, and nothing changed.

No registration is made and no lock is taken. What a device does not tell is None or empty; what
takes a command that the device refuses is left out.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from orion_iscsifs.errors import DeviceError, OrionError
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.probe import LunInfo, probe, report_luns
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.scsi import alua, cdb, inquiry, support
from orion_iscsifs.scsi import reservation as codec
from orion_iscsifs.scsi.alua import PortGroups
from orion_iscsifs.scsi.inquiry import Designator, VpdPage
from orion_iscsifs.scsi.reservation import (
    Capabilities,
    FullStatus,
    InAction,
    Registration,
    Reservation,
)
from orion_iscsifs.scsi.support import OperationCode

_PAGE_BYTES: Final = 252
_LIST_BYTES: Final = 4096
_LIST_BYTES_MAX: Final = 0xFFFF

_T = TypeVar("_T")


@dataclass(slots=True)
class Reservations:
    """Who has registered, and who holds the LUN (SPC-4 §5.13)."""

    capabilities: Capabilities | None
    told: Reservation
    registrations: tuple[Registration, ...]
    """From READ FULL STATUS; without that only the keys are known, and nobody has a name."""


@dataclass(slots=True)
class Inspection:
    """One LUN."""

    number: int
    info: LunInfo | None = None
    error: OrionError | None = None
    """Why the rest is not known."""
    serial: str = ""
    designators: list[Designator] = field(default_factory=list)
    rotation_rate: int | None = None
    pages: list[int] = field(default_factory=list)
    reservations: Reservations | None = None
    """None: the device has no persistent reservations."""
    port_groups: PortGroups | None = None
    """None: the device has no ALUA."""
    own_group: int | None = None
    own_port: int | None = None
    commands: list[OperationCode] | None = None
    """None: the device does not tell."""


async def inspect_luns(session: Session, number: int | None) -> list[Inspection]:
    """The LUN, or all of the target (None). Raises what REPORT LUNS raises."""
    if number is not None:
        return [await inspect_lun(LogicalUnit(session, number))]
    numbers = sorted(set(await report_luns(LogicalUnit(session, 0))))
    return [await inspect_lun(LogicalUnit(session, each)) for each in numbers]


async def inspect_lun(unit: LogicalUnit) -> Inspection:
    """Raises a TransportError only: what the device refuses is a part of the answer."""
    found = Inspection(unit.number)
    try:
        found.info = await probe(unit)
    except DeviceError as error:
        found.error = error
    await _ask_pages(unit, found)
    found.reservations = await _optional(_reservations(unit))
    if found.info is not None and found.info.identity.tpgs:
        found.port_groups = await _optional(_port_groups(unit))
    found.commands = await _optional(_commands(unit))
    return found


async def _ask_pages(unit: LogicalUnit, found: Inspection) -> None:
    pages = await _optional(_page(unit, VpdPage.SUPPORTED, inquiry.decode_supported_pages))
    found.pages = sorted(pages or ())
    if VpdPage.UNIT_SERIAL_NUMBER in found.pages:
        page = _page(unit, VpdPage.UNIT_SERIAL_NUMBER, inquiry.decode_serial_number)
        found.serial = await _optional(page) or ""
    if VpdPage.DEVICE_IDENTIFICATION in found.pages:
        names = _page(unit, VpdPage.DEVICE_IDENTIFICATION, inquiry.decode_designators)
        found.designators = await _optional(names) or []
        found.own_group = alua.target_port_group(found.designators)
        found.own_port = alua.relative_target_port(found.designators)
    if VpdPage.BLOCK_DEVICE_CHARACTERISTICS in found.pages:
        rate = _page(unit, VpdPage.BLOCK_DEVICE_CHARACTERISTICS, inquiry.decode_rotation_rate)
        found.rotation_rate = await _optional(rate)


async def _optional(question: Awaitable[_T]) -> _T | None:
    try:
        return await question
    except DeviceError:
        return None


async def _page(unit: LogicalUnit, page: VpdPage, decode: Callable[[bytes], _T]) -> _T:
    command = cdb.inquiry(page, _PAGE_BYTES)
    return decode(await _read(unit, f"INQUIRY page {page:02X}h", command, _PAGE_BYTES))


async def _reservations(unit: LogicalUnit) -> Reservations:
    told = codec.decode_reservation(await _reserve_in(unit, InAction.READ_RESERVATION))
    keys = codec.decode_keys(await _reserve_in(unit, InAction.READ_KEYS))
    capabilities = await _optional(_reserve_in(unit, InAction.REPORT_CAPABILITIES))
    full = await _optional(_reserve_in(unit, InAction.READ_FULL_STATUS))
    status = FullStatus(keys.generation, ()) if full is None else codec.decode_full_status(full)
    unnamed = tuple(Registration(key=key) for key in keys.keys)
    return Reservations(
        None if capabilities is None else codec.decode_capabilities(capabilities),
        told,
        status.registrations or unnamed,
    )


async def _reserve_in(unit: LogicalUnit, action: InAction) -> bytes:
    what = f"PERSISTENT RESERVE IN {action.name.replace('_', ' ')}"
    listed = action in {InAction.READ_KEYS, InAction.READ_FULL_STATUS}
    return await _whole(
        unit,
        what,
        lambda size: codec.reserve_in(action, size),
        lambda data: codec.in_length(data) if listed and len(data) >= 8 else 0,
    )


async def _port_groups(unit: LogicalUnit) -> PortGroups:
    data = await _whole(
        unit,
        "REPORT TARGET PORT GROUPS",
        lambda size: alua.report_target_port_groups(size, extended=False),
        lambda data: alua.port_groups_length(data) if len(data) >= 4 else 0,
    )
    return alua.decode_port_groups(data)


async def _commands(unit: LogicalUnit) -> list[OperationCode]:
    data = await _whole(
        unit,
        "REPORT SUPPORTED OPERATION CODES",
        lambda size: cdb.report_supported_operation_codes(allocation_length=size),
        lambda data: support.all_commands_length(data) if len(data) >= 4 else 0,
    )
    return sorted(set(support.decode_all_commands(data)), key=_order)


def _order(command: OperationCode) -> tuple[int, int]:
    return command.opcode, command.service_action or 0


async def _whole(
    unit: LogicalUnit,
    what: str,
    command: Callable[[int], bytes],
    length: Callable[[bytes], int],
) -> bytes:
    """Asked again with more room if the answer says that it is longer."""
    size = _LIST_BYTES
    while True:
        data = await _read(unit, what, command(size), size)
        needed = length(data)
        if needed <= size or size == _LIST_BYTES_MAX:
            return data
        size = min(needed, _LIST_BYTES_MAX)


async def _read(unit: LogicalUnit, what: str, command: bytes, size: int) -> bytes:
    buffer = bytearray(size)
    count = await unit.read(what, command, memoryview(buffer))
    return bytes(buffer[:count])
