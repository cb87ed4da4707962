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
    MediumError,
    NotSupported,
    OutOfRange,
    PathInaccessible,
    ReservationConflict,
    ScsiError,
    SpaceExhausted,
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
    START = enum.auto()
    """The unit is stopped: START STOP UNIT once, then wait for it."""
    OTHER_PATH = enum.auto()
    """Not through this target port now: another path may do; alone, wait for a change."""
    CHECK_ACCESS = enum.auto()
    """Access states of target ports changed: ask for them again, and retry."""
    ABSENT = enum.auto()
    """No such logical unit. One in use may be on the move from one port to another: wait a bit."""
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

_PASSING: Final = (0x00, 0x01, 0x04, 0x05, 0x06, 0x07, 0x09, 0x11, 0x14, 0x1A, 0x1B, 0x1C, 0x1D)
"""NOT READY, LOGICAL UNIT NOT READY for a reason that ends by itself: 04h with these qualifiers."""
_INACCESSIBLE: Final = (0x0A, 0x0B, 0x0C)
"""The same for the state of the target port: transition, standby, unavailable."""

_BY_SENSE: Final[Mapping[tuple[int, int, int], Action]] = {
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x01): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x09): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x03): Action.CHECK_RESERVATION,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x04): Action.CHECK_RESERVATION,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x05): Action.CHECK_RESERVATION,
    (SenseKey.UNIT_ATTENTION, 0x28, 0x00): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x3F, 0x03): Action.REREAD_CAPACITY,
    (SenseKey.UNIT_ATTENTION, 0x3F, 0x0E): Action.RESCAN_LUNS,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x06): Action.CHECK_ACCESS,
    (SenseKey.UNIT_ATTENTION, 0x2A, 0x07): Action.CHECK_ACCESS,
    **{(SenseKey.NOT_READY, 0x04, ascq): Action.RETRY_AFTER_DELAY for ascq in _PASSING},
    (SenseKey.NOT_READY, 0x04, 0x02): Action.START,
    **{(SenseKey.NOT_READY, 0x04, ascq): Action.OTHER_PATH for ascq in _INACCESSIBLE},
    (SenseKey.ILLEGAL_REQUEST, 0x25, 0x00): Action.ABSENT,
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
_EXACT_ERRORS: Final[Mapping[tuple[int, int, int], type[ScsiError]]] = {
    # A thin pool that ran full is not write-protected: it may get more room.
    (SenseKey.DATA_PROTECT, 0x27, 0x07): SpaceExhausted,
    **{(SenseKey.NOT_READY, 0x04, ascq): PathInaccessible for ascq in _INACCESSIBLE},
}
_ADVICE: Final[Mapping[tuple[int, int, int], str]] = {
    (SenseKey.DATA_PROTECT, 0x27, 0x07): "give the target's thin pool more room",
    (SenseKey.NOT_READY, 0x04, 0x03): "the storage system needs its administrator",
    (SenseKey.NOT_READY, 0x04, 0x0B): "use a portal of the active controller, or portals=",
    (SenseKey.NOT_READY, 0x04, 0x0C): "use a portal of the active controller, or portals=",
    (SenseKey.NOT_READY, 0x3A, 0x00): "the storage system shows a unit without a medium",
}


def error(what: str, status: int, sense: SenseData | None = None) -> DeviceError:
    """The exception for a command that failed for good; `what` names it: "READ of lun1"."""
    if status == Status.RESERVATION_CONFLICT:
        return ReservationConflict(
            f"{what}: another initiator has reserved the LUN",
            advice="`orion-iscsifs inspect` shows who; -o preempt takes the LUN over",
        )
    if status != Status.CHECK_CONDITION or sense is None:
        return ScsiError(f"{what}: {status_name(status)}", status=status)
    message = f"{what}: {sense.describe()}"
    code = sense.key, sense.asc, sense.ascq
    if code not in _EXACT_ERRORS and (sense.key, sense.asc) in _ERRORS:
        return _ERRORS[sense.key, sense.asc](message)
    kind = _EXACT_ERRORS.get(code, ScsiError)
    if sense.key == SenseKey.MEDIUM_ERROR:
        kind = MediumError
        where = "" if sense.information is None else f" at LBA {sense.information}"
        message += where
    made = kind(
        message,
        status=status,
        sense_key=sense.key,
        asc=sense.asc,
        ascq=sense.ascq,
        advice=_ADVICE.get(code, ""),
    )
    if isinstance(made, MediumError):
        made.lba = sense.information
    return made
