"""Which path takes a request. Decides, never waits.

The usable paths of the best rank (`paths.rank`) share the requests; with `failover` one path has
them all. When a better rank becomes usable, I/O goes back to it at once, after it has been usable
for so many seconds, or only when nothing of the present rank is left (`failback=`).
"""

from collections.abc import Iterable
from typing import Final

from orion_iscsifs.config import PathPolicy
from orion_iscsifs.multipath.paths import USABLE, PathRecord, rank

_MEASUREMENT_KEPT_S: Final = 5.0
"""A path that has carried nothing for so long is taken to be as good as the best again."""

_Rank = tuple[int, ...]


class Chooser:
    """`review` after every change of a path, `choose` for every request."""

    def __init__(self, policy: PathPolicy, failback_s: float | None) -> None:
        """`failback_s` None: by hand, so never by itself."""
        self._policy = policy
        self._failback_s = failback_s
        self._rank: _Rank | None = None
        self._better_since: float | None = None
        self._turn = 0
        self.candidates: list[PathRecord] = []
        """The paths that share the requests now."""

    def review(self, records: Iterable[PathRecord], now: float) -> float | None:
        """Take the states of the paths as they are now; when to review again without news."""
        usable = [record for record in records if record.state in USABLE]
        ranks = {self._rank_of(record) for record in usable}
        due: float | None = None
        if not ranks:
            # Nothing is better or worse than nothing: the next usable path is taken.
            self._rank = self._better_since = None
        elif self._rank not in ranks:
            self._rank, self._better_since = min(ranks), None
        elif min(ranks) < self._rank:
            due = self._go_back(min(ranks), now)
        else:
            self._better_since = None
        self.candidates = [record for record in usable if self._rank_of(record) == self._rank]
        return due

    def _go_back(self, best: _Rank, now: float) -> float | None:
        if self._failback_s is None:
            return None
        if self._better_since is None:
            self._better_since = now
        due = self._better_since + self._failback_s
        if now < due:
            return due
        self._rank, self._better_since = best, None
        return None

    def _rank_of(self, record: PathRecord) -> _Rank:
        order = record.order if self._policy is PathPolicy.FAILOVER else 0
        return (*rank(record), order)

    def choose(self, now: float) -> PathRecord | None:
        """For one request; None: no path is usable."""
        candidates = self.candidates
        if len(candidates) <= 1:
            return candidates[0] if candidates else None
        if self._policy is PathPolicy.ROUND_ROBIN:
            self._turn = (self._turn + 1) % len(candidates)
            return candidates[self._turn]
        if self._policy is PathPolicy.QUEUE_LENGTH:
            return min(candidates, key=_queue_length)
        return self._soonest(now)

    def _soonest(self, now: float) -> PathRecord:
        """Where a request would be done first, as far as its load and its past tell."""
        fresh = now - _MEASUREMENT_KEPT_S
        costs = [record.cost if record.measured_at > fresh else 0.0 for record in self.candidates]
        best = min(filter(None, costs), default=1.0)
        times = [
            (record.load or 1) * (cost or best)
            for record, cost in zip(self.candidates, costs, strict=True)
        ]
        return self.candidates[times.index(min(times))]


def _queue_length(record: PathRecord) -> int:
    return record.in_flight
