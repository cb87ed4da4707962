"""The PDUs that answer a SCSI command: Data-In, status, residuals (RFC 7143 §11.4, §11.7).

Pure. Sequence numbers are filled in when a PDU is queued.
"""

from collections.abc import Iterable, Iterator

from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import DataIn, ScsiResponse, ServiceResponse
from orion_iscsifs.scsi.sense import Status, response_segment
from orion_iscsifs.target.tasks import Task
from orion_iscsifs.target.unit import Outcome


def answers(task: Task, outcome: Outcome, limits: Parameters) -> Iterable[DataIn | ScsiResponse]:
    """Data-In PDUs, the status on the last one if it is GOOD, else a SCSI Response."""
    pdu = task.pdu
    data, expected = outcome.data, pdu.expected_data_transfer_length
    if not pdu.read or not data:
        return (_response(task, outcome, len(data) if pdu.read else task.wanted_bytes, 0),)
    length = min(len(data), expected)
    segment, burst = limits.max_send_data_segment_length, limits.max_burst_length
    if length <= segment and length <= burst and length:
        piece = data if length == len(data) else memoryview(data)[:length]
        return (_last(task, piece, 0, 0, outcome),)
    return resumed_answers(task, outcome, limits, data_sn=0, offset=0)


def resumed_answers(
    task: Task,
    outcome: Outcome,
    limits: Parameters,
    *,
    data_sn: int,
    offset: int,
    separate_status: bool = False,
) -> Iterator[DataIn | ScsiResponse]:
    """The answer from `offset` on, whose Data-In has `data_sn` (§7.2.2, §11.16.3)."""
    data, expected = outcome.data, task.pdu.expected_data_transfer_length
    length = min(len(data), expected) if task.pdu.read else 0
    segment, burst = limits.max_send_data_segment_length, limits.max_burst_length
    view = memoryview(data)
    status_apart = separate_status or offset >= length
    while offset < length:
        # F marks the end of a sequence, none of which is longer than MaxBurstLength.
        burst_end = min(offset - offset % burst + burst, length)
        end = min(offset + segment, burst_end)
        piece = view[offset:end]
        if end == length and not status_apart:
            yield _last(task, piece, data_sn, offset, outcome)
        else:
            yield DataIn(
                task.pdu.initiator_task_tag, data_sn, offset, final=end == burst_end, data=piece
            )
        offset, data_sn = end, data_sn + 1
    if status_apart:
        total = len(data) if task.pdu.read else task.wanted_bytes
        yield _response(task, outcome, total, data_sn)


def _last(
    task: Task, piece: bytes | bytearray | memoryview, data_sn: int, offset: int, outcome: Outcome
) -> DataIn:
    """The last Data-In, which also carries GOOD and the residual (phase collapse)."""
    pdu = task.pdu
    total, expected = len(outcome.data), pdu.expected_data_transfer_length
    return DataIn(
        pdu.initiator_task_tag,
        data_sn,
        offset,
        True,
        False,
        total > expected,
        total < expected,
        True,
        outcome.status,
        residual_count=abs(total - expected),
        data=piece,
    )


def _response(task: Task, outcome: Outcome, total: int, data_pdus: int) -> ScsiResponse:
    """`total`: what the command would have moved, for the residual."""
    pdu = task.pdu
    expected = pdu.expected_data_transfer_length
    if outcome.status == Status.CHECK_CONDITION and pdu.write:
        total = min(task.solicited_to, expected)
    return ScsiResponse(
        pdu.initiator_task_tag,
        status=outcome.status,
        overflow=total > expected,
        underflow=total < expected,
        snack_tag=0 if task.memory is None else task.memory.snack_tag,
        exp_data_sn=data_pdus,
        residual_count=abs(total - expected),
        data=response_segment(outcome.sense) if outcome.sense is not None else b"",
    )


def target_failure(task: Task) -> ScsiResponse:
    """Response 01h: nothing else in it counts (RFC 7143 §11.4.3)."""
    return ScsiResponse(task.pdu.initiator_task_tag, response=ServiceResponse.TARGET_FAILURE)
