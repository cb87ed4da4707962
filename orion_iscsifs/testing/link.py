"""What a network link does to bytes: how fast it takes them, how long they travel. Decides only.

A rate is kept by a debt: taking bytes makes the link busy for as long as they would need on the
wire. A link that was idle, or whose owner woke up late, may catch up at most `CATCH_UP_S`; so the
rate comes out right although no timer is exact. The rate is that of the link: the connections that
go through it share it.
"""

import random
from dataclasses import dataclass
from typing import Final

CHUNK_BYTES: Final = 256 * 1024
IN_FLIGHT_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of one connection and direction, on a link with a delay; a full link takes no more."""
CATCH_UP_S: Final = 0.02
_QUANTUM_S: Final = 0.005
_QUANTUM_BYTES_MIN: Final = 512


@dataclass(slots=True)
class Link:
    """One direction. `bytes_per_s` None: as fast as it goes; times in seconds, one way."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """At most so much is added to the delay, at random; bytes never overtake each other."""
    bytes_per_s: float | None = None
    busy_until: float = 0.0

    @property
    def room_bytes(self) -> int:
        """While less than this is in flight, more is taken. Without a delay nothing is kept."""
        return IN_FLIGHT_BYTES_MAX if self.delay_s or self.jitter_s else 1

    def take_max(self, now: float) -> int:
        """How many bytes may enter now; 0: not before `busy_until`."""
        if self.bytes_per_s is None:
            return CHUNK_BYTES
        if self.busy_until > now:
            return 0
        quantum = int(self.bytes_per_s * _QUANTUM_S)
        return max(_QUANTUM_BYTES_MIN, min(quantum, CHUNK_BYTES))

    def took(self, length: int, now: float) -> None:
        """`length` bytes have entered."""
        if self.bytes_per_s is not None:
            begun = max(self.busy_until, now - CATCH_UP_S)
            self.busy_until = begun + length / self.bytes_per_s

    def arrival(self, now: float, previous: float, chance: random.Random) -> float:
        """When bytes that enter now come out; `previous`: when those before them do."""
        if not self.delay_s and not self.jitter_s:
            return max(now, previous)
        return max(previous, now + self.delay_s + self.jitter_s * chance.random())
