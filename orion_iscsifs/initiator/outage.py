"""What a session shows of itself, and the clock of its outages. Decides, never waits.

An outage begins when the last connection is lost and ends with the first command that is answered
after a new login: logging in to a target that then answers nothing is no recovery.
"""

import enum
from dataclasses import dataclass
from typing import Final

TIME2WAIT_MAX_S: Final = 60.0
"""No target needs a longer rest, and commands are held meanwhile."""
_BACKOFF_FIRST_S: Final = 0.1
_QUICK_LOSS_S: Final = 0.02
_QUICK_PAUSE_MAX_S: Final = 1.0
_QUICK_LOSSES_MAX: Final = 4
"""Sessions in a row that may end at once before the next login has to wait."""


class State(enum.StrEnum):
    """As `status --json` shows it."""

    CLOSED = "closed"
    LOGGED_IN = "logged-in"
    RECOVERING = "recovering"
    FAILED = "failed"


@dataclass(slots=True)
class Counters:
    """Since the session was opened."""

    logins: int = 0
    """Sessions: a number that changes when the target may be another one."""
    connections_lost: int = 0
    connections_added: int = 0
    connections_recovered: int = 0
    commands: int = 0
    commands_retried: int = 0
    commands_reassigned: int = 0
    task_management: int = 0


@dataclass(slots=True)
class Outage:
    """Times in seconds, on the clock of the caller's `now`."""

    replacement_timeout_s: float
    """How long commands are held; negative: for ever."""
    since: float | None = None
    """When the outage that goes on has begun."""
    not_before: float = 0.0
    """No login before this (Time2Wait, RFC 7143 §7.5)."""
    _entered_at: float = 0.0
    _quick_losses: int = 0

    def entered(self, now: float) -> None:
        """A login has succeeded."""
        self._entered_at = now

    def lost(self, now: float, time2wait_s: float) -> None:
        """The last connection is gone."""
        quick = now - self._entered_at < _QUICK_LOSS_S
        self._quick_losses = self._quick_losses + 1 if quick else 0
        self.not_before = max(self.not_before, now + min(time2wait_s, TIME2WAIT_MAX_S))
        if self.since is None:
            self.since = now

    def over(self) -> bool:
        """A command is answered; True if that ended an outage."""
        lasted, self.since = self.since is not None, None
        return lasted

    @property
    def deadline(self) -> float:
        """When what is held has to fail."""
        if self.since is None or self.replacement_timeout_s < 0:
            return float("inf")
        return self.since + self.replacement_timeout_s

    def pause_s(self, now: float) -> float:
        """How long to wait before the first login of this outage."""
        again = self._quick_losses - _QUICK_LOSSES_MAX
        backoff_s = min(_BACKOFF_FIRST_S * 2.0**again, _QUICK_PAUSE_MAX_S) if again >= 0 else 0.0
        return max(backoff_s, self.not_before - now)
