"""Task management functions (RFC 7143 §11.5, §11.6, §4.2.3; RFC 7144's with protocol level 2).

Whatever a function ends is over before its response goes out: a write that a thread is carrying
out can't be taken back, so the response waits for it. Functions that end many tasks wait before
that too (§4.2.3.3): for commands with a lower CmdSN that are still on their way, and, unless
TaskReporting is FastAbort, for the Data-Out that valid Target Transfer Tags were given for.
Initiators that abort fast without having agreed on it exist, so these waits end after
`Limits.abort_wait_s`. On several connections the response passes a fence.

Late Data-Out of ended tasks is dropped; no Target Transfer Tag is used twice, so it can't be taken
for another task's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.pdu import (
    AsyncEvent,
    RejectReason,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi.lun import encode_lun
from orion_iscsifs.scsi.sense import LUN_RESET, POWER_ON, SenseData, SenseKey
from orion_iscsifs.target import allegiance, events
from orion_iscsifs.target.fences import CLEARED_BY_ANOTHER
from orion_iscsifs.target.mischief import manage_wrongly
from orion_iscsifs.target.tasks import Task

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel
    from orion_iscsifs.target.session import Session

Code = TmfResponseCode
Function = TaskManagementFunction
Waits = list[trio.Event]

_NEXUS_LOSS: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x29, 0x07)
_FAST_ABORT: Final = "FastAbort"
_WAITING_MAX: Final = 32
"""Functions of one session that wait for something."""
_WITH_QUERIES: Final = 2
"""The iSCSIProtocolLevel that brings RFC 7144's functions."""


def manage(session: "Session", channel: "Channel", request: TaskManagementRequest) -> None:
    """Carry out one function; its response goes out now or when everything it ends has ended."""
    if session.target is None:
        _respond(channel, request, Code.FUNCTION_NOT_SUPPORTED)
    elif request.initiator_task_tag in session.managing:
        channel.reject(request, RejectReason.TASK_IN_PROGRESS)
    elif len(session.managing) >= _WAITING_MAX:
        channel.reject(request, RejectReason.IMMEDIATE_COMMAND_REJECT)
    elif not manage_wrongly(channel, request, session.target.faults):
        carry_out(session, channel, request)


def carry_out(session: "Session", channel: "Channel", request: TaskManagementRequest) -> None:
    """As `manage`, whatever faults say."""
    if request.function == Function.TASK_REASSIGN:
        code = allegiance.may_reassign(session, request)
        # The response precedes whatever the command sends on its new connection (§7.2.2).
        _respond(channel, request, code)
        if code is Code.FUNCTION_COMPLETE:
            allegiance.resume(session, channel, request)
    elif request.function in _SINGLE:
        waits: Waits = []
        code = _SINGLE[request.function](session, channel, request, waits)
        if waits:
            session.managing.add(request.initiator_task_tag)
            session.later(_respond_after, session, channel, request, code, waits)
        else:
            _respond(channel, request, code)
    elif request.function in _MULTIPLE:
        _start_multiple(session, channel, request)
    else:
        # CLEAR ACA among them: NACA is never offered.
        _respond(channel, request, Code.FUNCTION_NOT_SUPPORTED)


def _respond(channel: "Channel", request: TaskManagementRequest, code: Code) -> None:
    channel.send_status(TaskManagementResponse(request.initiator_task_tag, code))


async def _respond_after(
    session: "Session",
    channel: "Channel",
    request: TaskManagementRequest,
    code: Code,
    waits: Waits,
) -> None:
    for finished in waits:
        await finished.wait()
    session.managing.discard(request.initiator_task_tag)
    _respond(channel, request, code)
    channel.flush()


def _abort(session: "Session", tasks: Iterable[Task], waits: Waits) -> None:
    for task in list(tasks):
        finished = session.execution.abort(task)
        if finished is not None:
            waits.append(finished)


# -- one task --------------------------------------------------------------------------------------

_Single = Callable[["Session", "Channel", TaskManagementRequest, Waits], TmfResponseCode]


def _abort_task(
    session: "Session", channel: "Channel", request: TaskManagementRequest, waits: Waits
) -> Code:
    tag = request.referenced_task_tag
    if tag in session.managing:
        return Code.FUNCTION_REJECTED
    task = session.tasks.get(tag)
    if task is None:
        # A command that never came is taken as received (§11.6.1), which plugs its CmdSN.
        before = serial.less(request.ref_cmd_sn, request.cmd_sn)
        if before and session.order.plug(channel, request.ref_cmd_sn):
            return Code.FUNCTION_COMPLETE
        return Code.TASK_DOES_NOT_EXIST
    if task.pdu.lun != request.lun:
        return Code.TASK_DOES_NOT_EXIST
    if task.channel is not None and task.channel is not channel and task.channel.live:
        # It has to come on the connection that the command belongs to (§11.5.1).
        return Code.FUNCTION_REJECTED
    if task.channel is None and task.recovery.outcome is not None:
        # Its status is sent again instead, before this response (§11.5.1).
        task.channel = channel
        session.execution.retire(task)
        session.retransmission.answer_again(channel, task, 0)
        return Code.TASK_DOES_NOT_EXIST
    _abort(session, [task], waits)
    return Code.FUNCTION_COMPLETE


def _query_task(
    session: "Session", _c: "Channel", request: TaskManagementRequest, _w: Waits
) -> Code:
    if session.parameters.iscsi_protocol_level < _WITH_QUERIES:
        return Code.FUNCTION_NOT_SUPPORTED
    task = session.tasks.get(request.referenced_task_tag)
    if task is not None and task.pdu.lun == request.lun:
        return Code.FUNCTION_SUCCEEDED
    return Code.FUNCTION_COMPLETE


def _query_task_set(
    session: "Session", _c: "Channel", request: TaskManagementRequest, _w: Waits
) -> Code:
    if session.parameters.iscsi_protocol_level < _WITH_QUERIES:
        return Code.FUNCTION_NOT_SUPPORTED
    if session.units.find(request.lun) is None:
        return Code.LUN_DOES_NOT_EXIST
    present = _on_unit(session, request.lun)
    return Code.FUNCTION_SUCCEEDED if present else Code.FUNCTION_COMPLETE


def _query_async_event(
    session: "Session", _c: "Channel", request: TaskManagementRequest, _w: Waits
) -> Code:
    """Is a unit attention condition pending?"""
    if session.parameters.iscsi_protocol_level < _WITH_QUERIES:
        return Code.FUNCTION_NOT_SUPPORTED
    unit = session.units.find(request.lun)
    if unit is None:
        return Code.LUN_DOES_NOT_EXIST
    pending = session.execution.attentions.get(unit.number)
    return Code.FUNCTION_SUCCEEDED if pending else Code.FUNCTION_COMPLETE


def _nexus_reset(
    session: "Session", _c: "Channel", _request: TaskManagementRequest, waits: Waits
) -> Code:
    """Every task of the session ends, as if the session had been closed and opened again."""
    if session.parameters.iscsi_protocol_level < _WITH_QUERIES:
        return Code.FUNCTION_NOT_SUPPORTED
    _abort(session, session.tasks.values(), waits)
    for number in session.units.by_number:
        session.add_attention(number, _NEXUS_LOSS)
    return Code.FUNCTION_COMPLETE


_SINGLE: Final[Mapping[int, _Single]] = {
    Function.ABORT_TASK: _abort_task,
    Function.QUERY_TASK: _query_task,
    Function.QUERY_TASK_SET: _query_task_set,
    Function.I_T_NEXUS_RESET: _nexus_reset,
    Function.QUERY_ASYNC_EVENT: _query_async_event,
}


# -- many tasks ------------------------------------------------------------------------------------


def _on_unit(session: "Session", lun: int) -> list[Task]:
    unit = session.units.find(lun)
    return [task for task in session.tasks.values() if task.unit is unit]


def _in_scope(session: "Session", request: TaskManagementRequest) -> list[Task]:
    """The issuing session's affected tasks (§4.2.3.2): not those sent after the request."""
    if request.function in _TARGET_WIDE:
        return list(session.tasks.values())
    tasks = _on_unit(session, request.lun)
    if request.function == Function.LOGICAL_UNIT_RESET:
        return tasks
    return [t for t in tasks if t.pdu.immediate or serial.less(t.pdu.cmd_sn, request.cmd_sn)]


def _start_multiple(session: "Session", channel: "Channel", request: TaskManagementRequest) -> None:
    if request.function not in _TARGET_WIDE and session.units.find(request.lun) is None:
        _respond(channel, request, Code.LUN_DOES_NOT_EXIST)
        return
    if request.function in _TARGET_WIDE:
        session.order.plug_up_to(channel, request.cmd_sn)
    gap = session.order.reached(request.cmd_sn) if request.immediate else None
    if gap is None and not _doom(session, request) and not _fenced(session, request):
        waits: Waits = []
        _MULTIPLE[request.function](session, channel, request, waits)
        if not waits:
            _conclude(session, channel, request)
            return
        session.later(_finish_multiple, session, channel, request, waits)
    else:
        session.later(_wait_and_end, session, channel, request, gap)
    session.managing.add(request.initiator_task_tag)


def _doom(session: "Session", request: TaskManagementRequest) -> Waits:
    """Stop the affected tasks; events for the ends of the bursts that they still expect."""
    if session.parameters.task_reporting == _FAST_ABORT:
        return []
    doomed = [task for task in _in_scope(session, request) if task.bursts and not task.aborted]
    for task in doomed:
        task.started = True
        task.doomed = trio.Event() if task.doomed is None else task.doomed
    return [task.doomed for task in doomed if task.doomed is not None]


def _fenced(session: "Session", request: TaskManagementRequest) -> bool:
    """Whether acknowledgments must be waited for (§4.2.2.3.4 b; §11.6.1 for the two)."""
    if not session.fence.several:
        return False
    return session.fence.agreed or request.function in _ACKNOWLEDGED


async def _wait_and_end(
    session: "Session",
    channel: "Channel",
    request: TaskManagementRequest,
    gap: trio.Event | None,
) -> None:
    with trio.move_on_after(session.limits.abort_wait_s):
        if gap is not None:
            await gap.wait()
        for ended in _doom(session, request):
            await ended.wait()
    if gap is not None:
        session.order.no_longer(gap)
    waits: Waits = []
    _MULTIPLE[request.function](session, channel, request, waits)
    await _finish_multiple(session, channel, request, waits)


async def _finish_multiple(
    session: "Session", channel: "Channel", request: TaskManagementRequest, waits: Waits
) -> None:
    for finished in waits:
        await finished.wait()
    session.managing.discard(request.initiator_task_tag)
    if _fenced(session, request):
        response = TaskManagementResponse(request.initiator_task_tag)
        await session.fence.respond(channel, response)
        if request.function == Function.TARGET_COLD_RESET:
            _power_off(session)
    else:
        _conclude(session, channel, request)
        channel.flush()


def _conclude(session: "Session", channel: "Channel", request: TaskManagementRequest) -> None:
    _respond(channel, request, Code.FUNCTION_COMPLETE)
    if request.function == Function.TARGET_COLD_RESET:
        channel.flush()
        _power_off(session)


def _power_off(session: "Session") -> None:
    """Every session ends, this one included (§11.5.1)."""
    assert session.target is not None
    for other in list(session.target.sessions.values()):
        other.kill()


_Multiple = Callable[["Session", "Channel", TaskManagementRequest, Waits], None]


def _end(other: "Session", tasks: list[Task], channel: "Channel", waits: Waits) -> None:
    """End tasks and tell the connections that agreed on FastAbort (§4.2.3.4 d, §4.2.3.5)."""
    if other.parameters.task_reporting == _FAST_ABORT:
        told = {
            (task.channel, task.unit.number)
            for task in tasks
            if task.channel is not None and task.unit is not None and task.channel is not channel
        }
        for owner, number in told:
            if owner.live:
                events.send(owner, AsyncEvent.TASKS_TERMINATED, lun=encode_lun(number))
    _abort(other, tasks, waits)


def _abort_task_set(
    session: "Session", channel: "Channel", request: TaskManagementRequest, waits: Waits
) -> None:
    _end(session, _in_scope(session, request), channel, waits)


def _clear_task_set(
    session: "Session", channel: "Channel", request: TaskManagementRequest, waits: Waits
) -> None:
    _end_all(session, channel, request, CLEARED_BY_ANOTHER, waits)


def _lun_reset(
    session: "Session", channel: "Channel", request: TaskManagementRequest, waits: Waits
) -> None:
    _end_all(session, channel, request, LUN_RESET, waits)


def _end_all(
    session: "Session",
    channel: "Channel",
    request: TaskManagementRequest,
    attention: SenseData,
    waits: Waits,
) -> None:
    """End every session's tasks on one unit."""
    unit, target = session.units.find(request.lun), session.target
    assert unit is not None
    assert target is not None
    for other in target.sessions.values():
        own = other is session
        tasks = _in_scope(session, request) if own else _on_unit(other, request.lun)
        _end(other, tasks, channel, waits)
        if attention is LUN_RESET or (not own and tasks):
            other.add_attention(unit.number, attention)


def _reset(
    session: "Session", channel: "Channel", _request: TaskManagementRequest, waits: Waits
) -> None:
    assert session.target is not None
    for other in session.target.sessions.values():
        _end(other, list(other.tasks.values()), channel, waits)
        for number in other.units.by_number:
            other.add_attention(number, POWER_ON)


_MULTIPLE: Final[Mapping[int, _Multiple]] = {
    Function.ABORT_TASK_SET: _abort_task_set,
    Function.CLEAR_TASK_SET: _clear_task_set,
    Function.LOGICAL_UNIT_RESET: _lun_reset,
    Function.TARGET_WARM_RESET: _reset,
    Function.TARGET_COLD_RESET: _reset,
}
_TARGET_WIDE: Final = frozenset({Function.TARGET_WARM_RESET, Function.TARGET_COLD_RESET})
_ACKNOWLEDGED: Final = frozenset({Function.ABORT_TASK_SET, Function.CLEAR_TASK_SET})
"""Answered only after every response so far is acknowledged, whatever TaskReporting says."""
