"""The states of a path, and what is known of each. Decides, never waits.

    CHECKING --serves--> ACTIVE (or MARGINAL after many losses) <--> STANDBY
       ^                    |
       |                    | lost: the session has no connection
       |                    v
       |  returned        LOST      a write that was sent may be in a buffer on the way
       +---------------     |
       |                    | nexus ended: by another way than its own login
       |  returned          v
       +--------------- FAILED      nothing that was sent can land any more

LOST is the state that keeps data right. A write that was lost with its path may not be sent on
another one, nor may any newer write to a block of the same range, until the target can no longer
carry out the first: else that one, delivered late by a switch or a stalled target, would lie over
newer data. `lost_writes` are the ranges; they are forgotten when the state is left, and only then.
"""

import enum
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from orion_iscsifs.block.ranges import Range, overlap
from orion_iscsifs.multipath.path import Access, Path
from orion_iscsifs.scsi.alua import AccessState

LOSSES_MAX: Final = 3
"""A path that is lost so often within `LOSS_WINDOW_S` is set aside as marginal..."""
LOSS_WINDOW_S: Final = 60.0
"""...until it has held for so long."""
CHECK_FIRST_S: Final = 0.5
CHECK_MAX_S: Final = 30.0
_LATENCIES_KEPT: Final = 1024
_REQUEST_COST_BYTES: Final = 32 << 10
"""What a request costs besides its bytes, as bytes."""
_SMOOTHING: Final = 0.125
_NO_ALUA: Final = Access()


class PathState(enum.Enum):
    CHECKING = "checking"
    """Logged in; whether it serves is not known yet."""
    ACTIVE = "active"
    STANDBY = "standby"
    """Logged in, but the target doesn't serve this logical unit through this port now."""
    MARGINAL = "marginal"
    """It serves, but is lost too often: used when there is nothing else."""
    REFUSED = "refused"
    """It leads to another logical unit."""
    LOST = "lost"
    FAILED = "failed"

    @property
    def shown(self) -> str:
        """In the words of `status --json` (INTERFACE §7): who is asked is ready and not used."""
        return _SHOWN.get(self, "failed")


_SHOWN: Final = {
    PathState.ACTIVE: "active",
    PathState.STANDBY: "standby",
    PathState.CHECKING: "standby",
    PathState.MARGINAL: "marginal",
}
USABLE: Final = frozenset({PathState.ACTIVE, PathState.MARGINAL})
DOWN: Final = frozenset({PathState.LOST, PathState.FAILED})


class PathEvent(enum.Enum):
    LOST = enum.auto()
    """The session has no connection any more."""
    NEXUS_ENDED = enum.auto()
    """The target has ended the lost session, which is proven."""
    RETURNED = enum.auto()
    """The session is logged in again: its own login has ended the one before."""
    SERVES = enum.auto()
    SERVES_NOT = enum.auto()
    SET_ASIDE = enum.auto()
    REFUSED = enum.auto()


_UP: Final = tuple(state for state in PathState if state not in DOWN)

NEXT: Final[dict[tuple[PathState, PathEvent], PathState]] = {
    **{(state, PathEvent.LOST): PathState.LOST for state in _UP},
    **{(state, PathEvent.SERVES): PathState.ACTIVE for state in _UP},
    **{(state, PathEvent.SERVES_NOT): PathState.STANDBY for state in _UP},
    **{(state, PathEvent.SET_ASIDE): PathState.MARGINAL for state in _UP},
    **{(state, PathEvent.REFUSED): PathState.REFUSED for state in _UP},
    (PathState.LOST, PathEvent.NEXUS_ENDED): PathState.FAILED,
    (PathState.LOST, PathEvent.RETURNED): PathState.CHECKING,
    (PathState.FAILED, PathEvent.RETURNED): PathState.CHECKING,
}
"""Any other pair changes nothing: news that came too late."""


@dataclass(slots=True, eq=False)
class PathRecord:
    """One path and what is known of it. Times in seconds on the clock of `now`."""

    path: Path
    order: int
    """As the user, or discovery, named them."""
    state: PathState = PathState.CHECKING
    access: Access = _NO_ALUA
    lost_at: float = 0.0
    lost_epoch: int = 0
    lost_writes: list[Range] = field(default_factory=list)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOSSES_MAX))
    failed_checks: int = 0
    checked_at: float = 0.0
    last_error: str = ""
    in_flight: int = 0
    load: int = 0
    """Bytes in flight, and `_REQUEST_COST_BYTES` for each request."""
    cost: float = 0.0
    """Seconds for one byte of load, smoothed; 0: not measured."""
    measured_at: float = 0.0
    wake: Callable[[], None] = lambda: None
    """Have the path checked soon."""
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES_KEPT))

    def apply(self, event: PathEvent, now: float) -> bool:
        """Take a transition; False if it leads nowhere from here."""
        following = NEXT.get((self.state, event))
        if following is None or following is self.state:
            return False
        if self.state is PathState.LOST:
            self.lost_writes.clear()
        self.state = following
        if event is PathEvent.LOST:
            self.lost_at, self.lost_epoch = now, self.path.epoch
            self.losses.append(now)
            # What it was like before tells nothing about the next time.
            self.cost = 0.0
        return True

    def verdict(self, access: Access, now: float) -> PathEvent:
        """What a check that found `access` means."""
        if not access.state.usable:
            return PathEvent.SERVES_NOT
        often = len(self.losses) == LOSSES_MAX and now - self.losses[0] < LOSS_WINDOW_S
        quiet = not self.losses or now - self.losses[-1] >= LOSS_WINDOW_S
        if often or (self.state is PathState.MARGINAL and not quiet):
            return PathEvent.SET_ASIDE
        return PathEvent.SERVES

    def check_pause_s(self) -> float:
        """Until the next check, unless news come earlier; infinite when none is needed."""
        if self.state in DOWN:
            return float("inf")  # The session logs in by itself.
        if self.state is PathState.ACTIVE:
            return CHECK_MAX_S if self.access.reported else float("inf")
        return float(min(CHECK_FIRST_S * 2.0 ** min(self.failed_checks, 16), CHECK_MAX_S))

    def holds_back(self, changed: Range) -> bool:
        """Whether a write lost with this path may still land in `changed`."""
        return any(overlap(lost, changed) for lost in self.lost_writes)

    # -- what it carries ---------------------------------------------------------------------

    def begin(self, length: int) -> int:
        """A request of so many bytes is sent; the load that has to be carried to finish it."""
        self.in_flight += 1
        self.load += length + _REQUEST_COST_BYTES
        return self.load

    def end(self, length: int) -> None:
        self.in_flight -= 1
        self.load -= length + _REQUEST_COST_BYTES

    def measure(self, load: int, lasted_s: float, now: float) -> None:
        """A request that found `load` (with its own) has succeeded after `lasted_s`."""
        self.latencies_s.append(lasted_s)
        cost = lasted_s / load
        self.cost = cost if not self.cost else self.cost + (cost - self.cost) * _SMOOTHING
        self.measured_at = now


def rank(record: PathRecord) -> tuple[bool, bool]:
    """The lower the better: marginal paths after all others, then by access state."""
    optimized = record.access.state is AccessState.ACTIVE_OPTIMIZED
    return record.state is PathState.MARGINAL, not optimized


def path_status(
    portal: str,
    state: str,
    *,
    record: PathRecord | None = None,
    in_use: bool = False,
    last_error: str | None = None,
) -> dict[str, Any]:
    """One of the `paths` of INTERFACE §7, without its LUN. Latencies: of the last requests."""
    found = sorted(record.latencies_s) if record is not None else []
    reported = record is not None and record.access.reported
    return {
        "portal": portal,
        "state": state,
        "alua": record.access.state.words if record is not None and reported else None,
        "in_flight": record.in_flight if record is not None else None,
        "latency_us": {
            f"p{part}": round(1e6 * found[len(found) * part // 100]) if found else None
            for part in (50, 95, 99)
        },
        "in_use": in_use,
        "unproven_writes": len(record.lost_writes) if record is not None else 0,
        "last_error": last_error,
    }


def to_activate(records: list[PathRecord], none_since: float) -> PathRecord | None:
    """Which path to ask for when the target serves none, the preferred one first.

    Only when all have been looked at since then: a target that has just changed its mind may serve
    another one already.
    """
    up = [record for record in records if record.path.is_up]
    if any(record.checked_at < none_since for record in up):
        return None
    standby = [
        record for record in up if record.state is PathState.STANDBY and record.access.explicit
    ]
    return min(standby, key=lambda one: (not one.access.preferred, one.order), default=None)


def holding_back(records: list[PathRecord], changed: Range) -> Iterator[PathRecord]:
    """The lost paths that a write to `changed` has to wait for."""
    return (record for record in records if record.lost_writes and record.holds_back(changed))
