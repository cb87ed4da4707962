"""What an initiator does about a status other than GOOD: one pure table.

`judge()` never decides how often or how long: the caller holds the budget of each class and, when
it is spent, raises `error()`.
"""

import enum
from collections.abc import Mapping
from typing import Final

from orion_iscsifs.errors import (
    DeviceError,
    LunNotFound,
    NotSupported,
    OutOfRange,
    ReservationConflict,
    ScsiError,
    WriteProtected,
)
from orion_iscsifs.scsi.sense import SenseData, SenseKey, Status, status_name


class Action(enum.Enum):
    DONE = enum.auto()
    """Good enough: the command did what it was asked."""
    RETRY = enum.auto()
    """At once: the condition is cleared by having been reported."""
    RETRY_AFTER_DELAY = enum.auto()
    """The device is busy or not ready yet."""
    REREAD_CAPACITY = enum.auto()
    """Ask for size, limits and write protection again, then retry."""
    RESCAN_LUNS = enum.auto()
    """The target's list of LUNs changed; rescan and retry."""
    CHECK_RESERVATION = enum.auto()
    """Reservations or registrations changed: look whether ours still stands, then retry."""
    TRANSPORT_RETRY = enum.auto()
    """The bytes were damaged or lost on the way: counts against the path, then retry."""
    FAIL = enum.auto()


_BY_STATUS: Final[Mapping[int, Action]] = {
    Status.GOOD: Action.DONE,
    Status.CONDITION_MET: Action.DONE,
    Status.BUSY: Action.RETRY_AFTER_DELAY,
    Status.TASK_SET_FULL: Action.RETRY_AFTER_DELAY,
    # Another initiator's reset or abort took our command with it (TAS=1).
    Status.TASK_ABORTED: Action.RETRY,
    Status.ACA_ACTIVE: Action.RETRY_AFTER_DELAY,
}

_BY_SENSE: Final[Mapping[tuple[int, int, int], Action]] = {
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x01): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x09): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x03): Action.CHECK_RESERVATION,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x04): Action.CHECK_RESERVATION,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x05): Action.CHECK_RESERVATION,
    (SenseKey.UNIT_ATTENTION, 0x28, 0x00): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x3F, 0x03): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x3F, 0x0E): Action.RESCAN_LUNS,
    (SenseKey.NOT_READY, 0x04, 0x00): Action.RETRY_AFTER_DELAY,
    (SenseKey.NOT_READY, 0x04, 0x01): Action.RETRY_AFTER_DELAY,
    (SenseKey.NOT_READY, 0x04, 0x04): Action.RETRY_AFTER_DELAY,
    (SenseKey.NOT_READY, 0x04, 0x07): Action.RETRY_AFTER_DELAY,
    (SenseKey.NOT_READY, 0x04, 0x0A): Action.RETRY_AFTER_DELAY,
    # RFC 7143 §11.4.7.2: iSCSI conditions that are the path's fault, not the device's.
    (SenseKey.ABORTED_COMMAND, 0x0C, 0x0C): Action.TRANSPORT_RETRY,
    (SenseKey.ABORTED_COMMAND, 0x0C, 0x0D): Action.TRANSPORT_RETRY,
    (SenseKey.ABORTED_COMMAND, 0x47, 0x05): Action.TRANSPORT_RETRY,
    (SenseKey.ABORTED_COMMAND, 0x11, 0x13): Action.TRANSPORT_RETRY,
}

_BY_KEY: Final[Mapping[int, Action]] = {
    SenseKey.RECOVERED_ERROR: Action.DONE,
    # Every other unit attention is news about the past: read it and go on.
    SenseKey.UNIT_ATTENTION: Action.RETRY,
    SenseKey.ABORTED_COMMAND: Action.RETRY,
}


def judge(status: int, sense: SenseData | None = None) -> Action:
    """What to do about `status`, with the decoded sense of a CHECK CONDITION."""
    if status != Status.CHECK_CONDITION:
        return _BY_STATUS.get(status, Action.FAIL)
    if sense is None:
        # CHECK CONDITION without sense: the target owes us the reason, a retry may bring it.
        return Action.RETRY
    if sense.deferred:
        # The failure is an earlier, acknowledged write's: this command did not even start.
        return Action.FAIL
    exact = _BY_SENSE.get((sense.key, sense.asc, sense.ascq))
    return exact or _BY_KEY.get(sense.key, Action.FAIL)


_ERRORS: Final[Mapping[tuple[int, int], type[DeviceError]]] = {
    (SenseKey.DATA_PROTECT, 0x27): WriteProtected,
    (SenseKey.ILLEGAL_REQUEST, 0x20): NotSupported,
    (SenseKey.ILLEGAL_REQUEST, 0x21): OutOfRange,
    (SenseKey.ILLEGAL_REQUEST, 0x25): LunNotFound,
}
_SPACE_ALLOCATION_FAILED: Final = 0x07


def error(what: str, status: int, sense: SenseData | None = None) -> DeviceError:
    """The exception for a command that failed for good; `what` names it: "READ of lun1"."""
    if status == Status.RESERVATION_CONFLICT:
        return ReservationConflict(
            f"{what}: another initiator has reserved the LUN",
            advice="stop it there, or take the LUN over with -o preempt",
        )
    if status != Status.CHECK_CONDITION or sense is None:
        return ScsiError(f"{what}: {status_name(status)}", status=status)
    message = f"{what}: {sense.describe()}"
    kind = _ERRORS.get((sense.key, sense.asc))
    # 27/07 is a thin pool that ran full, not a write-protected disk: EIO, and it may pass.
    if kind is not None and sense.ascq != _SPACE_ALLOCATION_FAILED:
        return kind(message)
    return ScsiError(message, status=status, sense_key=sense.key, asc=sense.asc, ascq=sense.ascq)
