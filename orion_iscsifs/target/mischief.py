"""How a session misbehaves when `faults` say so.

Each function stands at one place of the ordinary way: the arrival of a command, its turn, its
R2Ts, its answer, a SNACK, a task management function, a ping. Those that end in `_wrongly` and
return a bool say whether the ordinary way is not to be gone any more.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    NopIn,
    NopOut,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    TaskManagementRequest,
    TaskManagementResponse,
)
from orion_iscsifs.target import events
from orion_iscsifs.target.answers import target_failure
from orion_iscsifs.target.faults import Act, Fault, Faults, Occasion
from orion_iscsifs.target.unit import Outcome

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel
    from orion_iscsifs.target.session import Session
    from orion_iscsifs.target.tasks import Task

_POLL_S: Final = 0.005
_UNKNOWN_TAG: Final = 0xDEAD_0000
_SEPARATE: Final = frozenset(
    {
        Act.SEPARATE_STATUS,
        Act.LOSE_STATUS,
        Act.DUPLICATE_STATUS,
        Act.CORRUPT_STATUS,
        Act.WRONG_EXP_DATA_SN,
        Act.DATA_IN_BEYOND_END,
    }
)
"""Acts that need a SCSI Response to act on."""


# -- a command arrives, and begins -----------------------------------------------------------------


def arrive_wrongly(channel: "Channel", pdu: ScsiCommand, faults: Faults) -> bool:
    fault = faults.take(pdu.cdb[0], channel.cid, Occasion.ARRIVAL)
    if fault is None:
        return False
    if fault.act is Act.REJECT:
        channel.reject(pdu, fault.code or RejectReason.PROTOCOL_ERROR)
    return True


def misbehave(session: "Session", task: "Task", fault: Fault) -> None:
    """Act out `fault` when `task` would begin; the rest is done where the command is answered."""
    channel = task.channel
    assert channel is not None
    match fault.act:
        case Act.DROP:
            channel.drop()
            return
        case Act.DROP_SESSION:
            session.drop()
            return
        case Act.SILENCE:
            return
        case Act.ANSWER_AFTER_ABORT:
            session.later(_answer_after_abort, channel, task)
            return
        case Act.DELAY:
            session.later(_delayed, session, task, fault.delay_s)
            return
        case Act.ANSWER:
            task.failure = Outcome(fault.status, fault.sense)
        case Act.CLOSE_WINDOW:
            session.freeze_window()
            if fault.delay_s:
                session.later(_thawed, session, fault.delay_s)
        case _:
            first = _FIRST.get(fault.act)
            if first is not None:
                first(channel, task, fault)
    session.execution.advance(task)


def _drop_others(channel: "Channel", _task: "Task", _fault: Fault) -> None:
    for other in list(channel.session.channels.values()):
        if other is not channel:
            other.drop()


def _ping(channel: "Channel", _task: "Task", _fault: Fault) -> None:
    channel.ping()


def _nop_flood(channel: "Channel", _task: "Task", fault: Fault) -> None:
    for _ in range(fault.number):
        channel.send(NopIn(stat_sn=channel.connection.stat_sn))


def _async_message(channel: "Channel", _task: "Task", fault: Fault) -> None:
    events.act_out(channel, fault.async_event, fault.parameters)


def _async_event(channel: "Channel", _task: "Task", fault: Fault) -> None:
    events.send(channel, fault.async_event, fault.parameters)


def _unknown_tag(channel: "Channel", _task: "Task", _fault: Fault) -> None:
    channel.send_status(ScsiResponse(_UNKNOWN_TAG))


def _stray_reject(channel: "Channel", task: "Task", fault: Fault) -> None:
    channel.reject(task.pdu, fault.code or RejectReason.PROTOCOL_ERROR)


_FIRST: Final[Mapping[Act, Callable[["Channel", "Task", Fault], None]]] = {
    Act.DROP_OTHERS: _drop_others,
    Act.PING: _ping,
    Act.NOP_FLOOD: _nop_flood,
    Act.ASYNC_MESSAGE: _async_message,
    Act.ASYNC_EVENT: _async_event,
    Act.UNKNOWN_TAG: _unknown_tag,
    Act.STRAY_REJECT: _stray_reject,
}


async def _delayed(session: "Session", task: "Task", delay_s: float) -> None:
    await trio.sleep(delay_s)
    session.execution.advance(task)
    session.flush()


async def _thawed(session: "Session", delay_s: float) -> None:
    await trio.sleep(delay_s)
    session.thaw_window()


async def _answer_after_abort(channel: "Channel", task: "Task") -> None:
    while not task.aborted:  # noqa: ASYNC110 - an event would cost every command one
        await trio.sleep(_POLL_S)
    # The response to the function that aborted it is out by then.
    await trio.sleep(_POLL_S)
    channel.send_status(ScsiResponse(task.pdu.initiator_task_tag))
    channel.flush()


# -- R2Ts ------------------------------------------------------------------------------------------


def send_r2t(channel: "Channel", task: "Task", r2t: R2T) -> None:
    """Send one R2T of a command with a fault, as the fault wants it."""
    fault = task.fault
    assert fault is not None
    this = r2t.r2t_sn == fault.number
    end = task.pdu.expected_data_transfer_length
    match fault.act:
        case Act.LOSE_R2T if this:
            return
        case Act.DUPLICATE_R2T if this:
            channel.send(r2t)
        case Act.R2T_EMPTY:
            r2t = replace(r2t, desired_data_transfer_length=0)
        case Act.R2T_TOO_LONG:
            length = channel.parameters.max_burst_length + 4
            r2t = replace(r2t, desired_data_transfer_length=length)
        case Act.R2T_BEYOND_END:
            r2t = replace(r2t, buffer_offset=end, desired_data_transfer_length=512)
        case Act.R2T_RESERVED_TAG:
            r2t = replace(r2t, target_transfer_tag=NO_TAG)
        case Act.R2T_SN_GAP:
            r2t = replace(r2t, r2t_sn=r2t.r2t_sn + 1)
    channel.send(r2t)


# -- the answer ------------------------------------------------------------------------------------


def answer_wrongly(channel: "Channel", task: "Task", outcome: Outcome) -> None:
    """Answer a command with a fault, as the fault wants it."""
    fault = task.fault
    assert fault is not None
    act = fault.act
    if act is Act.DROP_AFTER:
        channel.number(channel.session.retransmission.prepare(channel, task, outcome)[-1], task)
        channel.drop()
        return
    if act is Act.TARGET_FAILURE:
        channel.send_status(target_failure(task))
        return
    if act is Act.STAT_SN_JUMP:
        channel.connection.stat_sn = serial.add(channel.connection.stat_sn, fault.number)
    pdus = channel.session.retransmission.prepare(
        channel, task, outcome, separate_status=act in _SEPARATE
    )
    if act is Act.ASK_DATA_ACK:
        last = next((pdu for pdu in reversed(pdus) if type(pdu) is DataIn), None)
        if last is not None:
            channel.session.retransmission.ask_for_data_ack(task, last)
    for pdu in pdus:
        if type(pdu) is ScsiResponse:
            _send_response(channel, task, pdu, fault)
        else:
            assert type(pdu) is DataIn
            _send_data_in(channel, task, pdu, fault)


def _send_data_in(channel: "Channel", task: "Task", pdu: DataIn, fault: Fault) -> None:
    this = pdu.data_sn == fault.number
    order = channel.session.order
    sent, spoil, times = pdu, None, 1
    # What goes out may differ from what is kept: a SNACK gets the right one.
    match fault.act:
        case Act.CORRUPT_HEADER_DIGEST | Act.CORRUPT_DATA_DIGEST:
            spoil = fault.act
        case Act.CORRUPT_DATA_IN if this:
            spoil = Act.CORRUPT_DATA_DIGEST
        case Act.LOSE_DATA_IN if this:
            times = 0
        case Act.DUPLICATE_DATA_IN if this:
            times = 2
        case Act.DATA_SN_GAP if pdu.data_sn >= fault.number:
            sent = replace(pdu, data_sn=pdu.data_sn + 1)
        case Act.WRONG_BUFFER_OFFSET if this:
            sent = replace(pdu, buffer_offset=pdu.buffer_offset + len(pdu.data))
    if pdu.has_status:
        channel.number(pdu, task)
        sent.stat_sn = pdu.stat_sn
    sent.exp_cmd_sn, sent.max_cmd_sn = order.exp_cmd_sn, order.max_cmd_sn
    _spoil_window(sent, fault)
    for _ in range(times):
        channel.connection.send(sent, spoil)


def _send_response(channel: "Channel", task: "Task", pdu: ScsiResponse, fault: Fault) -> None:
    if fault.act is Act.DATA_IN_BEYOND_END:
        end = task.pdu.expected_data_transfer_length
        tag = task.pdu.initiator_task_tag
        channel.send(DataIn(tag, pdu.exp_data_sn, end, final=True, data=bytes(512)))
    channel.number(pdu, task)
    sent, spoil, times = pdu, None, 1
    match fault.act:
        case Act.CORRUPT_HEADER_DIGEST | Act.CORRUPT_DATA_DIGEST:
            spoil = fault.act
        case Act.CORRUPT_STATUS:
            spoil = Act.CORRUPT_DATA_DIGEST
        case Act.LOSE_STATUS:
            times = 0
        case Act.DUPLICATE_STATUS:
            times = 2
        case Act.WRONG_EXP_DATA_SN:
            sent = replace(pdu, exp_data_sn=pdu.exp_data_sn + 1)
    _spoil_window(sent, fault)
    for _ in range(times):
        channel.connection.send(sent, spoil)


def _spoil_window(pdu: DataIn | ScsiResponse, fault: Fault) -> None:
    if fault.act is Act.STALE_MAX_CMD_SN:
        pdu.max_cmd_sn = serial.add(pdu.max_cmd_sn, -fault.number)
    elif fault.act is Act.INVALID_MAX_CMD_SN:
        pdu.max_cmd_sn = serial.add(pdu.exp_cmd_sn, -2)


# -- other requests --------------------------------------------------------------------------------


def snack_wrongly(channel: "Channel", pdu: SnackRequest, faults: Faults) -> bool:
    fault = faults.take(pdu.type, channel.cid, Occasion.SNACK) if faults else None
    if fault is None:
        return False
    if fault.act is Act.SNACK_REFUSED:
        channel.reject(pdu, fault.code or RejectReason.SNACK_REJECT)
    return True


def manage_wrongly(channel: "Channel", pdu: TaskManagementRequest, faults: Faults) -> bool:
    fault = faults.take(pdu.function, channel.cid, Occasion.TASK_MANAGEMENT) if faults else None
    if fault is None:
        return False
    match fault.act:
        case Act.TMF_ANSWER:
            channel.send_status(TaskManagementResponse(pdu.initiator_task_tag, fault.code))
        case Act.TMF_DELAY:
            channel.session.later(_managed_later, channel, pdu, fault.delay_s)
    return True


async def _managed_later(channel: "Channel", pdu: TaskManagementRequest, delay_s: float) -> None:
    await trio.sleep(delay_s)
    channel.session.carry_out(channel, pdu)
    channel.flush()


def pong_wrongly(channel: "Channel", pdu: NopOut, faults: Faults) -> bool:
    if not faults or pdu.initiator_task_tag == NO_TAG:
        return False
    fault = faults.take(0, channel.cid, Occasion.PING)
    if fault is None:
        return False
    if fault.act is Act.PONG_CHANGED:
        data = bytes(byte ^ 0xFF for byte in bytes(pdu.data)) or b"not what you sent"
        channel.send_status(NopIn(pdu.initiator_task_tag, lun=pdu.lun, data=data))
    return True
