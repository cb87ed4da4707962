"""When a worker that died is replaced, and when no longer. Pure."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

LIMIT: Final = 5
WINDOW_S: Final = 60.0
PAUSE_FIRST_S: Final = 0.25
PAUSE_MAX_S: Final = 4.0


@dataclass(slots=True)
class Restarts:
    """At most `LIMIT` in `WINDOW_S` seconds: the first at once, the others after longer pauses."""

    _when: deque[float] = field(default_factory=deque)

    def next_pause_s(self, now: float) -> float | None:
        """How long to wait before the next worker; None: give up. `now` in seconds."""
        while self._when and self._when[0] <= now - WINDOW_S:
            self._when.popleft()
        earlier = len(self._when)
        if earlier >= LIMIT:
            return None
        self._when.append(now)
        return min(PAUSE_FIRST_S * 2.0 ** (earlier - 1), PAUSE_MAX_S) if earlier else 0.0
