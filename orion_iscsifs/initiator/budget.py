"""How often and how soon a failed login is tried again: a pure table (RFC 7143 §11.13.5).

    what failed                        pauses        given up
    transport: no connection, reset    0.1 .. 5 s    never by itself
    Status-Class 1: endless redirects  0.5 .. 5 s    never by itself
    Status-Class 3: target error       0.5 .. 5 s    never by itself
    authentication (0201, 0202)        5 s           after one more try
    rest of class 2, certificates      0.5 .. 5 s    after 30 s

This is for a session that worked before; a mount's first login is not tried again at all. "Never by
itself": `replacement_timeout` ends the wait. What depends on configuration can be refused by a
target that has just been restarted and has not read all of it, so class 2, which "should not be
tried again", gets a short grace. After that I/O fails, with the target's reason in words, and a
login a minute finds out whether an administrator has mended it. That verdict stands until a login
succeeds (`reset`), whatever else goes wrong in the meantime. One more try of a wrong secret, not
many: targets lock accounts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.errors import (
    AuthenticationFailed,
    CertificateRefused,
    LoginError,
    OrionError,
    TargetUnavailable,
    TransportError,
    UsageError,
)

SLOW_RETRY_S: Final = 60.0
"""Between logins once the session is given up."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Pauses double from `first_s` to `longest_s`; the end comes `patience_s` after the first."""

    first_s: float
    longest_s: float
    patience_s: float = float("inf")

    def wait_s(self, earlier: int) -> float:
        """The pause after `earlier` errors of this kind and one more."""
        return min(self.first_s * 2.0 ** min(earlier, 16), self.longest_s)


TRANSPORT: Final = Rule(0.1, 5.0)
BUSY: Final = Rule(0.5, 5.0)
REFUSED: Final = Rule(0.5, 5.0, patience_s=30.0)
CREDENTIALS: Final = Rule(5.0, 5.0, patience_s=5.0)

_BY_CLASS: Final[Mapping[int | None, Rule]] = {
    None: REFUSED,  # refused by us: a negotiation whose outcome can't be accepted
    1: BUSY,
    2: REFUSED,
    3: BUSY,
}


def rule_for(error: OrionError) -> Rule:
    """The row of the table that `error` belongs to."""
    match error:
        case AuthenticationFailed():
            return CREDENTIALS
        case TargetUnavailable():
            return BUSY
        case LoginError():
            return _BY_CLASS.get(error.status_class, REFUSED)
        case CertificateRefused() | UsageError():
            return REFUSED
        case TransportError():
            return TRANSPORT
        case _:
            return BUSY  # a violation, or a check after the login that failed


@dataclass(frozen=True, slots=True)
class Decision:
    """Log in again after `wait_s`; `give_up`: until then, and from now on, I/O fails."""

    wait_s: float
    give_up: bool


class LoginPolicy:
    """What one session knows about its logins that failed in a row. Times are the caller's."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A login has succeeded."""
        self._rule: Rule | None = None
        self._errors = 0
        self._since = 0.0
        self.verdict: OrionError | None = None
        """Why the session was given up."""

    def after(self, error: OrionError, now: float) -> Decision:
        """A login has failed with `error` at `now` (seconds, of any clock that never goes back)."""
        rule = rule_for(error)
        if rule is not self._rule:
            # Something has changed over there: a target that went away may come back half ready.
            self._rule, self._errors, self._since = rule, 0, now
        wait_s = rule.wait_s(self._errors)
        self._errors += 1
        if now + wait_s > self._since + rule.patience_s:
            self.verdict = error
            return Decision(SLOW_RETRY_S, give_up=True)
        if self.verdict is None:
            return Decision(wait_s, give_up=False)
        # No new grace after a verdict: only that somebody answers is waited for with short pauses.
        is_final = rule.patience_s != float("inf")
        return Decision(SLOW_RETRY_S if is_final else wait_s, give_up=True)
