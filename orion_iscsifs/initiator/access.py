"""Asymmetric access (ALUA, SPC-4 §5.15) as one path sees it: asked, and asked to change."""

from typing import Final

from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.scsi import alua, cdb, inquiry
from orion_iscsifs.scsi.alua import AccessState, PortGroup, Wish
from orion_iscsifs.scsi.inquiry import VpdPage

_PAGE_BYTES: Final = 252
_GROUPS_BYTES: Final = 4096
_GROUPS_BYTES_MAX: Final = 1 << 16


async def own_port_group(unit: LogicalUnit) -> int | None:
    """The target port group that this path leads through; None: the device does not say."""
    command = cdb.inquiry(VpdPage.DEVICE_IDENTIFICATION, _PAGE_BYTES)
    data = await _read(unit, "INQUIRY page 83h", command, _PAGE_BYTES)
    return alua.target_port_group(inquiry.decode_designators(data))


async def port_group(unit: LogicalUnit, tag: int) -> PortGroup | None:
    """What REPORT TARGET PORT GROUPS says of one group; raises what the command raises."""
    what, size = "REPORT TARGET PORT GROUPS", _GROUPS_BYTES
    while True:
        data = await _read(unit, what, alua.report_target_port_groups(size), size)
        needed = alua.port_groups_length(data) if len(data) >= 4 else 0
        if needed <= size or size == _GROUPS_BYTES_MAX:
            return alua.decode_port_groups(data).with_tag(tag)
        size = min(needed, _GROUPS_BYTES_MAX)


async def request_active(unit: LogicalUnit, tag: int) -> None:
    """An explicit transition of one group to active/optimized; raises what the command raises."""
    wishes = alua.encode_wishes([Wish(tag, AccessState.ACTIVE_OPTIMIZED)])
    command = alua.set_target_port_groups(len(wishes))
    await unit.send("SET TARGET PORT GROUPS", command, wishes)


async def is_ready(unit: LogicalUnit) -> None:
    """TEST UNIT READY; raises a DeviceError if it is not."""
    await unit.command("TEST UNIT READY", cdb.test_unit_ready())


async def _read(unit: LogicalUnit, what: str, command: bytes, size: int) -> bytes:
    buffer = bytearray(size)
    count = await unit.read(what, command, memoryview(buffer))
    return bytes(buffer[:count])
