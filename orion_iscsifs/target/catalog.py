"""Which SCSI commands there are: one table that dispatches them and reports them (SPC-4 §6.35)."""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.errors import OrionError
from orion_iscsifs.scsi import alua, sense
from orion_iscsifs.scsi import cdb as cdbs
from orion_iscsifs.scsi.cdb import OpCode, ServiceAction
from orion_iscsifs.scsi.reservation import InAction
from orion_iscsifs.target import access, commands, inquiries, reserving
from orion_iscsifs.target.commands import Result
from orion_iscsifs.target.reservations import RESERVE_OUT_ACTIONS
from orion_iscsifs.target.unit import (
    LogicalUnit,
    Outcome,
    Refused,
    Units,
    check_condition,
    sense_of,
)

if TYPE_CHECKING:
    from orion_iscsifs.target.session import Session

Handler = Callable[[LogicalUnit, bytes, Buffer], Result]
NexusHandler = Callable[["Session", LogicalUnit, bytes, Buffer], Result]
"""Of a command whose answer depends on the I_T nexus, the session, that it came through."""
DataOutLength = Callable[[LogicalUnit, bytes], int]


@dataclass(frozen=True, slots=True)
class Command:
    """`usage` is the CDB USAGE DATA: the bits of each CDB byte that mean something.

    `usages` has that of single service actions, where it differs. Exactly one of `handler` and
    `of_nexus` carries the command out.
    """

    handler: Handler | None
    usage: str
    data_out: DataOutLength | None = None
    service_actions: tuple[int, ...] = ()
    writes: bool = False
    exact: bool = False
    """The initiator must have just as much Data-Out as the CDB asks for."""
    of_nexus: NexusHandler | None = None
    usages: Mapping[int, str] = field(default_factory=dict)


def maintenance_in(session: "Session", unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    """REPORT TARGET PORT GROUPS and REPORT SUPPORTED OPERATION CODES."""
    if cdb[1] & 0x1F == alua.SERVICE_ACTION:
        return access.report_target_port_groups(session, unit, cdb)
    return _report_supported_operation_codes(cdb)


def _report_supported_operation_codes(cdb: bytes) -> Result:
    if cdb[1] & 0x1F != ServiceAction.REPORT_SUPPORTED_OPERATION_CODES:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    asked = cdbs.parse_report_supported_operation_codes(cdb)
    if asked.options > 3:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    data = _all(asked.return_timeouts) if asked.options == 0 else _one(asked)
    return Outcome(data=data[: asked.allocation_length])


_REPORTING_OPTIONS: Final = 2
"""The byte of the CDB. Unless the sense names it, initiators take the whole command as unknown."""
_NO_TIMEOUTS: Final = b"\x00\x0a" + bytes(10)
"""A command timeouts descriptor (SPC-4 §6.35.4) that names none."""


def _all(with_timeouts: bool) -> bytes:
    body = b""
    for opcode, command in COMMANDS.items():
        flags = with_timeouts << 1 | bool(command.service_actions)
        for action in command.service_actions or (0,):
            body += bytes((opcode, 0)) + action.to_bytes(2, "big") + bytes((0, flags))
            body += (len(command.usage) // 2).to_bytes(2, "big")
            body += _NO_TIMEOUTS if with_timeouts else b""
    return len(body).to_bytes(4, "big") + body


def _one(asked: cdbs.ReportSupportedOperationCodes) -> bytes:
    """Options 1 and 2 insist that the operation code has no, or has, service actions."""
    command = COMMANDS.get(asked.opcode)
    actions = command.service_actions if command is not None else ()
    if command is not None and asked.options == (1 if actions else 2):
        raise Refused(replace(sense.INVALID_FIELD_IN_CDB, cdb_field=_REPORTING_OPTIONS))
    if command is None or (actions and asked.service_action not in actions):
        return bytes((0, 1, 0, 0))
    text = command.usages.get(asked.service_action, command.usage) if actions else command.usage
    usage = bytes((asked.opcode,)) + bytes.fromhex(text)[1:]
    head = bytes((0, asked.return_timeouts << 7 | 3)) + len(usage).to_bytes(2, "big")
    return head + usage + (_NO_TIMEOUTS if asked.return_timeouts else b"")


_6: Final = "ff1fffffff00"
_10: Final = "fffaffffffff1fffff00"
_10_CHECK: Final = "fff6ffffffff1fffff00"
_12: Final = "fffaffffffffffffffff1f00"
_12_CHECK: Final = "fff6ffffffffffffffff1f00"
_16: Final = "fffaffffffffffffffffffffffff1f00"
_16_CHECK: Final = "fff6ffffffffffffffffffffffff1f00"

COMMANDS: Final[dict[int, Command]] = {
    OpCode.TEST_UNIT_READY: Command(inquiries.unit_ready, "ff0000000000"),
    OpCode.REQUEST_SENSE: Command(inquiries.request_sense, "ff010000ff00"),
    OpCode.READ_6: Command(commands.read, _6),
    OpCode.WRITE_6: Command(commands.write, _6, commands.write_length, writes=True),
    OpCode.INQUIRY: Command(None, "ff01ffffff00", of_nexus=inquiries.inquire),
    OpCode.MODE_SENSE_6: Command(inquiries.mode_sense, "ff08ffffff00"),
    OpCode.START_STOP_UNIT: Command(inquiries.start_stop_unit, "ff0100f1f700"),
    OpCode.PREVENT_ALLOW_MEDIUM_REMOVAL: Command(
        inquiries.prevent_allow_medium_removal, "ff0000000300"
    ),
    OpCode.READ_CAPACITY_10: Command(inquiries.read_capacity_10, "ff000000000000000000"),
    OpCode.READ_10: Command(commands.read, _10),
    OpCode.WRITE_10: Command(commands.write, _10, commands.write_length, writes=True),
    OpCode.WRITE_AND_VERIFY_10: Command(
        commands.write_and_verify, _10_CHECK, commands.write_length, writes=True
    ),
    OpCode.VERIFY_10: Command(commands.verify, _10_CHECK, commands.verify_length),
    OpCode.PRE_FETCH_10: Command(commands.pre_fetch, "ff02ffffffff1fffff00"),
    OpCode.SYNCHRONIZE_CACHE_10: Command(
        commands.synchronize_cache, "ff02ffffffff1fffff00", writes=True
    ),
    OpCode.WRITE_SAME_10: Command(
        commands.write_same,
        "fff8ffffffff1fffff00",
        commands.write_same_length,
        writes=True,
        exact=True,
    ),
    OpCode.UNMAP: Command(
        commands.unmap, "ff00000000001fffff00", commands.unmap_length, writes=True
    ),
    OpCode.MODE_SENSE_10: Command(inquiries.mode_sense, "ff18ffff000000ffff00"),
    OpCode.PERSISTENT_RESERVE_IN: Command(
        None,
        "ff1f0000000000ffff00",
        service_actions=tuple(InAction),
        of_nexus=reserving.reserve_in,
    ),
    OpCode.PERSISTENT_RESERVE_OUT: Command(
        None,
        "ff1fff0000ffffffff00",
        reserving.parameters_length,
        service_actions=RESERVE_OUT_ACTIONS,
        of_nexus=reserving.reserve_out,
    ),
    OpCode.READ_16: Command(commands.read, _16),
    OpCode.COMPARE_AND_WRITE: Command(
        commands.compare_and_write,
        "fffaffffffffffffffff000000ff1f00",
        commands.compare_and_write_length,
        writes=True,
        exact=True,
    ),
    OpCode.ORWRITE_16: Command(commands.or_write, _16, commands.write_length, writes=True),
    OpCode.WRITE_16: Command(commands.write, _16, commands.write_length, writes=True),
    OpCode.WRITE_AND_VERIFY_16: Command(
        commands.write_and_verify,
        _16_CHECK,
        commands.write_length,
        writes=True,
    ),
    OpCode.VERIFY_16: Command(commands.verify, _16_CHECK, commands.verify_length),
    OpCode.PRE_FETCH_16: Command(commands.pre_fetch, "ff02ffffffffffffffffffffffff1f00"),
    OpCode.SYNCHRONIZE_CACHE_16: Command(
        commands.synchronize_cache, "ff02ffffffffffffffffffffffff1f00", writes=True
    ),
    OpCode.WRITE_SAME_16: Command(
        commands.write_same,
        "fff9ffffffffffffffffffffffff1f00",
        commands.write_same_length,
        writes=True,
        exact=True,
    ),
    OpCode.SERVICE_ACTION_IN_16: Command(
        inquiries.service_action_in,
        "ff1fffffffffffffffffffffffff0000",
        service_actions=(ServiceAction.READ_CAPACITY_16, ServiceAction.GET_LBA_STATUS),
    ),
    OpCode.REPORT_LUNS: Command(inquiries.report_luns, "ff00ff000000ffffffff0000"),
    OpCode.MAINTENANCE_IN: Command(
        None,
        "ff1f87ffffffffffffff0000",
        service_actions=(alua.SERVICE_ACTION, ServiceAction.REPORT_SUPPORTED_OPERATION_CODES),
        of_nexus=maintenance_in,
        usages={alua.SERVICE_ACTION: "ffff00000000ffffffff0000"},
    ),
    OpCode.MAINTENANCE_OUT: Command(
        None,
        "ff1f00000000ffffffff0000",
        access.wishes_length,
        service_actions=(alua.SERVICE_ACTION,),
        of_nexus=access.set_target_port_groups,
    ),
    OpCode.READ_12: Command(commands.read, _12),
    OpCode.WRITE_12: Command(commands.write, _12, commands.write_length, writes=True),
    OpCode.WRITE_AND_VERIFY_12: Command(
        commands.write_and_verify, _12_CHECK, commands.write_length, writes=True
    ),
    OpCode.VERIFY_12: Command(commands.verify, _12_CHECK, commands.verify_length),
}


def data_out_length(unit: LogicalUnit | None, cdb: bytes, offered: int) -> int | Outcome:
    """How many bytes of Data-Out this command wants, or why it is refused before any came.

    `offered`: the ExpectedDataTransferLength. Where it differs, the residual says so.
    """
    command = COMMANDS.get(cdb[0])
    if command is None or command.data_out is None or unit is None:
        return 0
    try:
        wanted = command.data_out(unit, cdb)
        if command.exact and wanted != offered:
            raise Refused(sense.INVALID_FIELD_IN_CDB)
        return wanted
    except Refused as refusal:
        return check_condition(refusal.reason)


def execute(session: "Session", unit: LogicalUnit, cdb: bytes, data: Buffer) -> Result:
    """Run one command: its outcome, or a coroutine that has it later and raises nothing."""
    command = COMMANDS.get(cdb[0])
    if command is None:
        return check_condition(sense.INVALID_OPCODE)
    try:
        if command.handler is not None:
            result = command.handler(unit, cdb, data)
        else:
            assert command.of_nexus is not None
            result = command.of_nexus(session, unit, cdb, data)
    except Refused as refusal:
        return check_condition(refusal.reason)
    return result if type(result) is Outcome else _settled(result, writing=command.writes)


async def _settled(work: Result, *, writing: bool) -> Outcome:
    assert isinstance(work, Coroutine)
    try:
        return await work
    except OrionError as error:
        return check_condition(sense_of(error, writing=writing))


def execute_without_unit(units: Units, cdb: bytes) -> Outcome:
    """A LUN that has no unit still answers three commands (SPC-4 §6.6.1, SAM-5 §4.7)."""
    try:
        if cdb[0] == OpCode.INQUIRY:
            return inquiries.inquire_nothing(cdb)
        if cdb[0] == OpCode.REPORT_LUNS:
            return inquiries.list_luns(tuple(units.by_number), cdb)
    except Refused as refusal:
        return check_condition(refusal.reason)
    if cdb[0] == OpCode.REQUEST_SENSE:
        return Outcome(data=sense.encode_sense(sense.LUN_NOT_SUPPORTED)[: cdb[4]])
    return check_condition(sense.LUN_NOT_SUPPORTED)
