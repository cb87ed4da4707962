"""Connections that go, and the commands that belonged to them (RFC 7143 §6.3.4, §7.2.2, §7.5).

A command belongs to the connection that it came on. When that connection is lost it stays so for
Time2Wait and Time2Retain: nothing is sent for it, and what it still does goes on. Then

    logout "close the connection"        its commands are terminated
    logout "remove for recovery"         they wait for TASK REASSIGN on another connection
    login with the same TSIH and CID     the one or the other, by ErrorRecoveryLevel
    neither in time                      they are terminated

and a terminated command leaves a unit attention (§11.14.5). What the connection brought and nobody
has acknowledged is discarded in every case (§7.11).
"""

from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol.pdu import (
    AsyncEvent,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    RejectReason,
    ScsiCommand,
    TaskManagementRequest,
    TmfResponseCode,
)
from orion_iscsifs.protocol.states import ConnectionEvent
from orion_iscsifs.scsi.sense import SenseData, SenseKey
from orion_iscsifs.target import events
from orion_iscsifs.target.tasks import Task

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel
    from orion_iscsifs.target.session import Session

CLEARED_BY_ISCSI: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x47, 0x7F)
_RECOVERY: Final = 2
Code = LogoutResponseCode


# -- loss ------------------------------------------------------------------------------------------


def lost(session: "Session", channel: "Channel") -> None:
    """The transport connection broke; `channel` waits for its cleanup (§8.2)."""
    wait_s, retain_s = channel.times_s
    others = session.live
    recovering = session.parameters.error_recovery_level == _RECOVERY
    if not others and not session.joining and (not recovering or not retain_s):
        session.kill()
        return
    for other in others:
        parameters = (channel.cid, wait_s, retain_s)
        events.send(other, AsyncEvent.TARGET_DROPS_CONNECTION, parameters)
    if not retain_s:
        terminate(session, channel)
        del session.channels[channel.cid]
        return
    session.later(_expire, session, channel, wait_s + retain_s)
    if not others:
        session.fail(wait_s + retain_s)


async def _expire(session: "Session", channel: "Channel", delay_s: float) -> None:
    """Nobody came for the connection in time: its commands end (M1 of §8.2)."""
    await trio.sleep(delay_s)
    if session.channels.get(channel.cid) is channel:
        terminate(session, channel)
        del session.channels[channel.cid]
        session.settle()


def terminate(session: "Session", channel: "Channel") -> list[trio.Event]:
    """End the commands of one connection; events for those that still run (§7.6)."""
    discard_unacknowledged(session, channel)
    waits = []
    for task in [task for task in session.tasks.values() if task.channel is channel]:
        waits += _terminate_task(session, task)
    channel.forget_answers()
    if waits:
        session.ending.setdefault(channel.cid, []).extend(waits)
    return waits


def _terminate_task(session: "Session", task: Task) -> list[trio.Event]:
    if task.unit is not None:
        session.add_attention(task.unit.number, CLEARED_BY_ISCSI)
    finished = session.execution.abort(task)
    return [] if finished is None else [finished]


def discard_unacknowledged(session: "Session", channel: "Channel") -> None:
    """Requests that wait for a predecessor are as if they had never come (§11.14)."""
    for pdu in session.order.discard(channel):
        if isinstance(pdu, ScsiCommand):
            task = session.tasks.get(pdu.initiator_task_tag)
            if task is not None and task.pdu is pdu:
                session.execution.abort(task)


def set_free(session: "Session", channel: "Channel") -> None:
    """The commands of a connection that was removed for recovery may be reassigned.

    Among them those whose answer was sent and not acknowledged: the initiator may not have it.
    """
    discard_unacknowledged(session, channel)
    freed: list[Task] = []
    for task in session.tasks.values():
        if task.channel is channel:
            task.channel = None
            task.suspend()
            freed.append(task)
    for tag, task in list(channel.finished.items()):
        if session.tasks.setdefault(tag, task) is task:
            task.channel = None
            freed.append(task)
    channel.forget_answers()
    for task in freed:
        task.recovery.freed += 1
    delay_s = sum(channel.times_s)
    session.later(_give_up, session, [(task, task.recovery.freed) for task in freed], delay_s)


async def _give_up(session: "Session", tasks: list[tuple[Task, int]], delay_s: float) -> None:
    """Commands that nobody reassigned in time are terminated (§7.6 c)."""
    await trio.sleep(delay_s)
    for task, freed in tasks:
        # One that was reassigned and set free again has a new deadline.
        if (
            task.channel is None
            and task.recovery.freed == freed
            and session.tasks.get(task.pdu.initiator_task_tag) is task
        ):
            _terminate_task(session, task)
    session.settle()


# -- logout and reinstatement ----------------------------------------------------------------------


def log_out(session: "Session", channel: "Channel", pdu: LogoutRequest) -> None:
    """RFC 7143 §11.14, on any connection of the session for any other."""
    recovering = session.parameters.error_recovery_level == _RECOVERY
    match pdu.reason:
        case LogoutReason.CLOSE_SESSION:
            _close(session, channel, pdu, list(session.channels.values()))
        case LogoutReason.CLOSE_CONNECTION | LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY:
            gone = session.channels.get(pdu.cid)
            if pdu.reason == LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY and not recovering:
                _respond(channel, pdu, Code.RECOVERY_NOT_SUPPORTED)
            elif gone is None:
                _respond(channel, pdu, Code.CID_NOT_FOUND)
            elif pdu.reason == LogoutReason.CLOSE_CONNECTION:
                gone.acknowledge(pdu.exp_stat_sn)
                _close(session, channel, pdu, [gone])
            else:
                gone.acknowledge(pdu.exp_stat_sn)
                _remove(session, channel, pdu, gone)
        case _:
            channel.reject(pdu, RejectReason.INVALID_PDU_FIELD)


def _respond(channel: "Channel", pdu: LogoutRequest, code: Code) -> None:
    wait_s, retain_s = channel.times_s
    response = LogoutResponse(
        pdu.initiator_task_tag, code, time2wait_s=wait_s, time2retain_s=retain_s
    )
    channel.send_status(response)


def _close(
    session: "Session", channel: "Channel", pdu: LogoutRequest, going: list["Channel"]
) -> None:
    """Terminate the commands of `going`; the response tells that the last one has ended."""
    waits: list[trio.Event] = []
    for gone in going:
        gone.happened(ConnectionEvent.LOGOUT_STARTED)
        waits += terminate(session, gone)
    if pdu.reason == LogoutReason.CLOSE_SESSION:
        # What waits for a reassignment must not outlive the session either.
        for task in list(session.tasks.values()):
            waits += _terminate_task(session, task)
    if waits:
        session.later(_close_after, session, channel, pdu, going, waits)
    else:
        _take_leave(session, channel, pdu, going)


async def _close_after(
    session: "Session",
    channel: "Channel",
    pdu: LogoutRequest,
    going: list["Channel"],
    waits: list[trio.Event],
) -> None:
    for finished in waits:
        await finished.wait()
    _take_leave(session, channel, pdu, going)


def _take_leave(
    session: "Session", channel: "Channel", pdu: LogoutRequest, going: list["Channel"]
) -> None:
    _respond(channel, pdu, Code.CLOSED)
    channel.flush()
    for gone in going:
        if session.channels.get(gone.cid) is gone:
            del session.channels[gone.cid]
        if gone is channel:
            gone.log_out()
        else:
            gone.happened(ConnectionEvent.LOGOUT_SUCCEEDED)
            gone.drop()


def _remove(session: "Session", channel: "Channel", pdu: LogoutRequest, gone: "Channel") -> None:
    """Remove a connection for recovery: nothing is sent any more for its commands."""
    gone.happened(ConnectionEvent.LOGOUT_STARTED)
    set_free(session, gone)
    if not session.live:
        session.fail(sum(gone.times_s))
    _take_leave(session, channel, pdu, [gone])


def replace(session: "Session", old: "Channel") -> None:
    """A login with the CID of `old` logs it out implicitly (§6.3.4).

    Commands of it that still run are in `session.ending`.
    """
    old.happened(ConnectionEvent.LOGOUT_STARTED)
    if session.parameters.error_recovery_level == _RECOVERY:
        set_free(session, old)
    else:
        terminate(session, old)
    old.happened(ConnectionEvent.LOGOUT_SUCCEEDED)
    if session.channels.get(old.cid) is old:
        del session.channels[old.cid]
    old.drop()


# -- reassignment ----------------------------------------------------------------------------------


def may_reassign(session: "Session", request: TaskManagementRequest) -> TmfResponseCode:
    """What TASK REASSIGN is answered; `resume` follows a complete one (§7.2.2, §11.5.1)."""
    tag = request.referenced_task_tag
    if session.parameters.error_recovery_level < _RECOVERY:
        return TmfResponseCode.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED
    if tag in session.managing:
        return TmfResponseCode.FUNCTION_REJECTED
    task = session.tasks.get(tag)
    if task is None:
        if any(tag in channel.finished for channel in session.channels.values()):
            return TmfResponseCode.TASK_STILL_ALLEGIANT
        return TmfResponseCode.TASK_DOES_NOT_EXIST
    if task.channel is not None:
        return TmfResponseCode.TASK_STILL_ALLEGIANT
    return TmfResponseCode.FUNCTION_COMPLETE


def resume(session: "Session", channel: "Channel", request: TaskManagementRequest) -> None:
    """Go on with a command on the connection that asked for it."""
    task = session.tasks[request.referenced_task_tag]
    session.stats.reassigned += 1
    task.channel = channel
    task.recovery.snack_tag = 0
    if task.recovery.outcome is not None:
        session.execution.retire(task)
        session.retransmission.answer_again(channel, task, request.exp_data_sn)
    elif not task.started:
        # What the initiator has had of the R2Ts: it says so, or their data does (§11.5.6).
        if 0 < request.exp_data_sn <= task.r2t_sn:
            task.r2t_sn = request.exp_data_sn
        else:
            task.r2t_sn -= task.recovery.unanswered_r2ts
        del task.recovery.r2ts[task.r2t_sn :]
        session.execution.advance(task)
