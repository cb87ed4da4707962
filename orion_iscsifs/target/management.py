"""Task management functions (RFC 7143 §11.5, §11.6, §4.2.3).

Whatever a function ends is over before its response goes out: a write that a thread is carrying
out can't be taken back, so the response waits for it. Late Data-Out of ended tasks is dropped; no
Target Transfer Tag is used twice, so it can't be taken for another task's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol.pdu import (
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi.sense import LUN_RESET, POWER_ON, SenseData, SenseKey
from orion_iscsifs.target.tasks import Task

if TYPE_CHECKING:
    from orion_iscsifs.target.session import Session

Code = TmfResponseCode
Waits = list[trio.Event]
_Function = Callable[["Session", TaskManagementRequest, Waits], TmfResponseCode]

_CLEARED_BY_ANOTHER: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2F, 0x00)


def manage(session: "Session", request: TaskManagementRequest) -> None:
    """Carry out one function; its response goes out now or when the last task has ended."""
    waits: Waits = []
    function = _FUNCTIONS.get(request.function)
    if function is None or session.target is None:
        code = TmfResponseCode.FUNCTION_NOT_SUPPORTED
    else:
        code = function(session, request, waits)
    response = TaskManagementResponse(request.initiator_task_tag, code)
    if waits:
        session.later(_respond_after, session, response, waits)
    else:
        session.respond(response)


async def _respond_after(
    session: "Session", response: TaskManagementResponse, waits: Waits
) -> None:
    for finished in waits:
        await finished.wait()
    session.respond(response)
    session.connection.flush()


def _abort(session: "Session", tasks: Iterable[Task], waits: Waits) -> None:
    for task in list(tasks):
        finished = session.abort(task)
        if finished is not None:
            waits.append(finished)


def _on_unit(session: "Session", lun: int) -> list[Task]:
    unit = session.units.find(lun)
    return [task for task in session.tasks.values() if task.unit is unit]


def _abort_task(session: "Session", request: TaskManagementRequest, waits: Waits) -> Code:
    task = session.tasks.get(request.referenced_task_tag)
    if task is not None:
        if task.pdu.lun != request.lun:
            return Code.TASK_DOES_NOT_EXIST
        _abort(session, [task], waits)
        return Code.FUNCTION_COMPLETE
    # A command that never came is taken as received (§11.6.1), which plugs its CmdSN.
    if session.plug(request.ref_cmd_sn, before=request.cmd_sn):
        return Code.FUNCTION_COMPLETE
    return Code.TASK_DOES_NOT_EXIST


def _abort_task_set(session: "Session", request: TaskManagementRequest, waits: Waits) -> Code:
    if session.units.find(request.lun) is None:
        return Code.LUN_DOES_NOT_EXIST
    _abort(session, _on_unit(session, request.lun), waits)
    return Code.FUNCTION_COMPLETE


def _clear_task_set(session: "Session", request: TaskManagementRequest, waits: Waits) -> Code:
    return _end_all(session, request.lun, _CLEARED_BY_ANOTHER, waits, tell_self=False)


def _lun_reset(session: "Session", request: TaskManagementRequest, waits: Waits) -> Code:
    return _end_all(session, request.lun, LUN_RESET, waits, tell_self=True)


def _end_all(
    session: "Session", lun: int, attention: SenseData, waits: Waits, *, tell_self: bool
) -> Code:
    """End every session's tasks on one unit."""
    unit, target = session.units.find(lun), session.target
    if unit is None or target is None:
        return Code.LUN_DOES_NOT_EXIST
    for other in target.sessions.values():
        ended = _on_unit(other, lun)
        _abort(other, ended, waits)
        if tell_self or (other is not session and ended):
            other.add_attention(unit.number, attention)
    return Code.FUNCTION_COMPLETE


def _warm_reset(session: "Session", _: TaskManagementRequest, waits: Waits) -> Code:
    assert session.target is not None
    for other in session.target.sessions.values():
        _abort(other, other.tasks.values(), waits)
        for number in other.units.by_number:
            other.add_attention(number, POWER_ON)
    return Code.FUNCTION_COMPLETE


def _cold_reset(session: "Session", request: TaskManagementRequest, waits: Waits) -> Code:
    """As a warm one, then every session ends, this one included, without a response (§11.5.1)."""
    assert session.target is not None
    _warm_reset(session, request, waits)
    for other in list(session.target.sessions.values()):
        other.drop()
    return Code.FUNCTION_COMPLETE


def _no_reassignment(_s: "Session", _r: TaskManagementRequest, _w: Waits) -> Code:
    return Code.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED


# CLEAR ACA is absent: NACA is never offered. QUERY TASK and its kin need iSCSIProtocolLevel 2.
_FUNCTIONS: Final[Mapping[int, _Function]] = {
    TaskManagementFunction.ABORT_TASK: _abort_task,
    TaskManagementFunction.ABORT_TASK_SET: _abort_task_set,
    TaskManagementFunction.CLEAR_TASK_SET: _clear_task_set,
    TaskManagementFunction.LOGICAL_UNIT_RESET: _lun_reset,
    TaskManagementFunction.TARGET_WARM_RESET: _warm_reset,
    TaskManagementFunction.TARGET_COLD_RESET: _cold_reset,
    TaskManagementFunction.TASK_REASSIGN: _no_reassignment,
}
