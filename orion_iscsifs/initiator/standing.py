"""Where we stand with a LUN's persistent reservation, and what to do next: it only decides.

`seen` is what the device tells; `own` is what is ours. Ours are keys of this host: `own.key` of
this path, `own.living` of the other paths of this mount; all others are left from an earlier life.

Taking it, step by step, looking again after each (`next_step`):

| seen                                                       | step                              |
| ---------------------------------------------------------- | --------------------------------- |
| a foreign key, without `preempt`, and we hold nothing       | REFUSE                            |
| the same, but we are registered and nobody holds it         | RESERVE: the device decides       |
| a foreign key, without `preempt`, and we hold it            | WAIT: a loser of the race may go  |
| this session has not registered our key yet                | REGISTER                          |
| nobody holds it                                            | RESERVE                           |
| held by a key of an earlier life, or by the wrong type      | PREEMPT that key                  |
| held by a foreign key, with `preempt`                       | PREEMPT that key                  |
| other keys that are foreign or of an earlier life          | PREEMPT them                      |
| our key more than once: some targets (tgt) keep what an    | PREEMPT it: the others go, ours   |
| ended session has registered, as another nexus's           | stays (SPC-4 §5.13.11.2)          |
| else                                                       | DONE                              |

A key that is registered already does not show that this session may write, for the same reason.
When it is only *kept*, foreign keys that hold nothing do not matter: anybody may register.

Keeping it, after a new login or a word of the target (`is_lost`): it is lost when a foreign key
holds it, or our registration has gone and anybody can have done that. Nobody can if PRGENERATION is
zero, since every change of a registration counts there (SPC-4 §5.13.1): then the target was
restarted and has forgotten, unless registrations persist there (`persistent`, APTPL). A key of
ours that another path has just registered proves the same.

A lost reservation is not taken again: whoever took it may have written, and what we hold unwritten
would be laid over that.
"""

import enum
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.initiator.keys import LunKeys
from orion_iscsifs.scsi.reservation import Holder, ReservationType

OUR_TYPE: Final = ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY
"""Every path of ours may write, others may read: a read-only mount beside a writer works."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Registered keys, each as often as it is registered, the holder, and PRGENERATION."""

    keys: tuple[int, ...] = ()
    holder: Holder | None = None
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Own:
    keys: LunKeys
    key: int
    living: frozenset[int] = frozenset()

    def is_stale(self, key: int) -> bool:
        """Of this host, of an earlier life."""
        return self.keys.is_ours(key) and key != self.key and key not in self.living


class Act(enum.Enum):
    REGISTER = enum.auto()
    RESERVE = enum.auto()
    PREEMPT = enum.auto()
    WAIT = enum.auto()
    REFUSE = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Step:
    act: Act
    key: int = 0
    """Of whom, for PREEMPT and REFUSE. Zero: all registrants hold it."""


def next_step(
    seen: Seen, own: Own, *, registered: bool, preempt: bool = False, keep: bool = False
) -> Step:
    """The table above. `registered`: by this session, since its login."""
    foreign = foreign_key(seen, own)
    held = _holds(seen.holder, own)
    if keep and held:
        foreign = None
    if foreign is not None and not preempt:
        if registered and not keep and own.key in seen.keys and seen.holder is None:
            # Two hosts at once: the device decides, and the loser withdraws.
            return Step(Act.RESERVE)
        return Step(Act.WAIT if held and registered else Act.REFUSE, foreign)
    if not registered or own.key not in seen.keys:
        return Step(Act.REGISTER)
    if seen.holder is None:
        return Step(Act.RESERVE)
    if not held:
        return Step(Act.PREEMPT, 0 if _all_registrants(seen.holder) else seen.holder.key)
    if foreign is not None:
        return Step(Act.PREEMPT, foreign)
    stale = min((key for key in seen.keys if own.is_stale(key)), default=None)
    if stale is None and seen.keys.count(own.key) > 1:
        stale = own.key
    return Step(Act.DONE) if stale is None else Step(Act.PREEMPT, stale)


def foreign_key(seen: Seen, own: Own) -> int | None:
    """A key that is not ours, the holder's first."""
    holder = seen.holder
    if holder is not None and not _all_registrants(holder) and not own.keys.is_ours(holder.key):
        return holder.key
    return min((key for key in seen.keys if not own.keys.is_ours(key)), default=None)


def is_lost(seen: Seen, own: Own, *, persistent: bool = False) -> bool:
    """Whether somebody else has, or may have had, the right to write since we had it."""
    registered = own.key in seen.keys or not own.living.isdisjoint(seen.keys)
    if foreign_key(seen, own) is not None:
        return not (registered and _holds(seen.holder, own))
    return not registered and (persistent or seen.generation != 0)


def _holds(holder: Holder | None, own: Own) -> bool:
    """Whether a path of this mount holds it, in the type that is wanted."""
    if holder is None or holder.kind != OUR_TYPE:
        return False
    return holder.key == own.key or holder.key in own.living


def _all_registrants(holder: Holder) -> bool:
    return holder.kind in {
        ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS,
        ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
    }
