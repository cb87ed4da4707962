"""Every row of the tables that say where we stand with a reservation."""

import pytest

from orion_iscsifs.initiator.keys import LunKeys
from orion_iscsifs.initiator.standing import Act, Own, Seen, Step, is_lost, next_step
from orion_iscsifs.scsi.reservation import Holder, ReservationType

KEYS = LunKeys(0xABCDEF)
MINE, SECOND, STALE = (KEYS.base << 16 | number for number in (0, 1, 2))
FOREIGN, OTHER = 0x1111, 0x2222
OURS = ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY
ALONE = Own(KEYS, MINE)
PAIR = Own(KEYS, MINE, frozenset({SECOND}))


def seen(*keys: int, holder: int | None = None, kind: int = OURS, generation: int = 7) -> Seen:
    held = None if holder is None else Holder(holder, kind)
    return Seen(keys, held, generation)


@pytest.mark.parametrize(
    ("what", "registered", "step"),
    [
        (seen(), False, Step(Act.REGISTER)),
        (seen(MINE), False, Step(Act.REGISTER)),
        (seen(MINE, holder=MINE), False, Step(Act.REGISTER)),
        (seen(), True, Step(Act.REGISTER)),
        (seen(MINE), True, Step(Act.RESERVE)),
        (seen(MINE, holder=MINE), True, Step(Act.DONE)),
        (seen(MINE, SECOND, holder=SECOND), True, Step(Act.DONE)),
        (seen(MINE, STALE, holder=STALE), True, Step(Act.PREEMPT, STALE)),
        (seen(MINE, STALE, holder=MINE), True, Step(Act.PREEMPT, STALE)),
        (seen(MINE, holder=MINE, kind=1), True, Step(Act.PREEMPT, MINE)),
        (seen(MINE, holder=0, kind=7), True, Step(Act.PREEMPT, 0)),
        (seen(MINE, MINE, holder=MINE), True, Step(Act.PREEMPT, MINE)),
        (seen(FOREIGN), False, Step(Act.REFUSE, FOREIGN)),
        (seen(FOREIGN, holder=FOREIGN), False, Step(Act.REFUSE, FOREIGN)),
        (seen(MINE, FOREIGN, holder=FOREIGN), True, Step(Act.REFUSE, FOREIGN)),
        (seen(MINE, OTHER, FOREIGN, holder=OTHER), True, Step(Act.REFUSE, OTHER)),
        (seen(MINE, FOREIGN), True, Step(Act.RESERVE)),
        (seen(FOREIGN), True, Step(Act.REFUSE, FOREIGN)),
        (seen(MINE, FOREIGN, holder=MINE), True, Step(Act.WAIT, FOREIGN)),
        (seen(MINE, FOREIGN, holder=MINE), False, Step(Act.REFUSE, FOREIGN)),
        (seen(FOREIGN, holder=0, kind=8), False, Step(Act.REFUSE, FOREIGN)),
    ],
)
def test_taking_it(what: Seen, registered: bool, step: Step) -> None:
    assert next_step(what, PAIR, registered=registered) == step


@pytest.mark.parametrize(
    ("what", "registered", "step"),
    [
        (seen(FOREIGN, holder=FOREIGN), False, Step(Act.REGISTER)),
        (seen(MINE, FOREIGN, holder=FOREIGN), True, Step(Act.PREEMPT, FOREIGN)),
        (seen(MINE, FOREIGN), True, Step(Act.RESERVE)),
        (seen(MINE, FOREIGN, holder=MINE), True, Step(Act.PREEMPT, FOREIGN)),
        (seen(MINE, FOREIGN, holder=0, kind=8), True, Step(Act.PREEMPT, 0)),
        (seen(MINE, holder=MINE), True, Step(Act.DONE)),
    ],
)
def test_taking_it_from_others(what: Seen, registered: bool, step: Step) -> None:
    assert next_step(what, ALONE, registered=registered, preempt=True) == step


def test_keeping_it_beside_keys_that_hold_nothing() -> None:
    beside = seen(MINE, FOREIGN, holder=MINE)
    assert next_step(beside, ALONE, registered=False, keep=True) == Step(Act.REGISTER)
    assert next_step(beside, ALONE, registered=True, keep=True) == Step(Act.DONE)
    gone = seen(MINE, FOREIGN, holder=FOREIGN)
    assert next_step(gone, ALONE, registered=True, keep=True) == Step(Act.REFUSE, FOREIGN)


@pytest.mark.parametrize(
    ("what", "lost"),
    [
        (seen(MINE, holder=MINE), False),
        (seen(MINE, FOREIGN, holder=MINE), False),
        (seen(MINE), False),
        (seen(SECOND, holder=SECOND), False),
        (seen(generation=0), False),
        (seen(generation=3), True),
        (seen(STALE, generation=3), True),
        (seen(FOREIGN, holder=FOREIGN), True),
        (seen(MINE, FOREIGN, holder=FOREIGN), True),
        (seen(FOREIGN), True),
        (seen(MINE, FOREIGN), True),
        (seen(FOREIGN, holder=FOREIGN, generation=0), True),
        (seen(holder=0, kind=8, generation=2), True),
    ],
)
def test_losing_it(what: Seen, lost: bool) -> None:
    assert is_lost(what, PAIR) is lost


def test_a_device_that_keeps_registrations_does_not_forget_them() -> None:
    assert is_lost(seen(generation=0), PAIR, persistent=True)
    assert not is_lost(seen(MINE, holder=MINE, generation=0), PAIR, persistent=True)


@pytest.mark.parametrize("start", [seen(), seen(STALE, holder=STALE), seen(MINE, holder=MINE)])
@pytest.mark.parametrize("others", [(), (FOREIGN,), (FOREIGN, OTHER)])
def test_the_steps_lead_to_the_reservation(start: Seen, others: tuple[int, ...]) -> None:
    """Carried out on a small model of a device, they end, and we are the only writer."""
    keys, holder = {*start.keys, *others}, start.holder
    registered = False
    for _ in range(20):
        step = next_step(
            Seen(tuple(keys), holder, 1), ALONE, registered=registered, preempt=bool(others)
        )
        if step.act is Act.DONE:
            break
        if step.act is Act.REGISTER:
            keys.add(MINE)
            registered = True
        elif step.act is Act.RESERVE:
            assert holder is None
            holder = Holder(MINE, OURS)
        else:
            assert step.act is Act.PREEMPT
            keys.discard(step.key)
            if holder is not None and holder.key == step.key:
                holder = Holder(MINE, OURS)
    assert (keys, holder) == ({MINE}, Holder(MINE, OURS))
