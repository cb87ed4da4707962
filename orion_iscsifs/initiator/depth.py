"""How many commands a logical unit takes at once, learned from its answers. Decides, never waits.

`queue_depth=` is the ceiling. TASK SET FULL says that the unit's queue is shorter: what was in
flight when it came is too much (SAM-5 §5.3.1). BUSY says that it is overloaded: a quarter less. The
limit grows again by one for each round of commands that went well, but not at once: a limit that
was just found is kept for `HOLD_S`, so that a queue that stays short is not overrun every second.
"""

from typing import Final

HOLD_S: Final = 5.0
"""After a decrease, so long no increase; seconds."""


class QueueDepth:
    """The limit of one logical unit. `now` in seconds."""

    __slots__ = ("_grow_at", "_successes", "ceiling", "limit")

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self.limit = ceiling
        self._successes = 0
        self._grow_at = 0.0

    def task_set_full(self, in_flight: int, now: float) -> None:
        """`in_flight`: how many others were out when the unit took no more."""
        self._reduce(min(self.limit, in_flight), now)

    def busy(self, now: float) -> None:
        # One decrease answers all commands that met the same overload.
        if now >= self._grow_at:
            self._reduce(self.limit * 3 // 4, now)

    def _reduce(self, limit: int, now: float) -> None:
        self.limit = max(1, limit)
        self._successes = 0
        self._grow_at = now + HOLD_S

    def succeeded(self, now: float) -> None:
        """A command went well. Need not be called while `limit` is the ceiling."""
        if now < self._grow_at or self.limit >= self.ceiling:
            return
        self._successes += 1
        if self._successes >= self.limit:
            self._successes = 0
            self.limit += 1
