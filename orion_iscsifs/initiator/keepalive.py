"""When to ping a silent target and when to give it up: a decision that never sleeps.

Anything received proves the peer alive (a busy target may answer a NOP-Out late), so a ping is
sent only after `interval_s` of silence, and the connection is dropped only when `timeout_s` more
pass without a single byte.
"""

import enum
from dataclasses import dataclass


class Action(enum.Enum):
    WAIT = enum.auto()
    SEND_PING = enum.auto()
    DROP_CONNECTION = enum.auto()


@dataclass(slots=True)
class Keepalive:
    """Times in seconds, on the clock of the caller's `now`. A 0 in either turns it off."""

    interval_s: float
    timeout_s: float
    last_received: float
    pinged_at: float | None = None

    @property
    def deadline(self) -> float:
        """When `check` has to be asked next at the latest."""
        if not self.interval_s or not self.timeout_s:
            return float("inf")
        if self.pinged_at is not None and self.pinged_at > self.last_received:
            return self.pinged_at + self.timeout_s
        return self.last_received + self.interval_s

    def check(self, now: float) -> Action:
        if now < self.deadline:
            return Action.WAIT
        if self.pinged_at is not None and self.pinged_at > self.last_received:
            return Action.DROP_CONNECTION
        self.pinged_at = now
        return Action.SEND_PING
