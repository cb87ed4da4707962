"""The life of one cached page, as a table.

A page (4 KiB) has three facts that the code keeps as one bit each in its frame's masks: `valid`
(the frame holds its content), `dirty` (that content has not been given to a write yet) and
`writing` (a copy of its content, maybe an older one, is on its way to the device). Five of the
eight combinations exist; they are the states below.

`frames.Frame` moves whole masks of pages at once with bit operations; a test holds every one of
them to this table. A row that is absent is illegal, and `frames.Frame` asserts that.
"""

import enum
from collections.abc import Mapping
from typing import Final


class State(enum.Enum):
    """A page's state. The value is its bits: valid, dirty, writing."""

    ABSENT = (False, False, False)
    CLEAN = (True, False, False)
    DIRTY = (True, True, False)
    WRITING = (True, False, True)
    REWRITTEN = (True, True, True)
    """Written again while its older content is in flight."""


class Cause(enum.Enum):
    """What can happen to a page."""

    FETCHED = enum.auto()
    """Its content came from the device, or went there in write-through mode."""
    WRITE = enum.auto()
    """A write was absorbed."""
    WRITEBACK = enum.auto()
    """Its content was picked for a write to the device."""
    DONE = enum.auto()
    """That write has succeeded."""
    FAILED = enum.auto()
    """That write has failed."""
    DROP = enum.auto()
    """Evicted, or the device's content has changed in another way (discard)."""
    SUPERSEDE = enum.auto()
    """The device holds newer content than a dirty page (zeroed), or the page no longer exists."""


NEXT: Final[Mapping[tuple[State, Cause], State]] = {
    (State.ABSENT, Cause.FETCHED): State.CLEAN,
    (State.ABSENT, Cause.WRITE): State.DIRTY,
    (State.CLEAN, Cause.WRITE): State.DIRTY,
    # Only a clean page may go: no row drops a dirty one. FETCHED has no row either for a page that
    # is valid, so what a slow fetch brings late never overwrites what was written meanwhile.
    (State.CLEAN, Cause.DROP): State.ABSENT,
    (State.CLEAN, Cause.SUPERSEDE): State.ABSENT,
    (State.DIRTY, Cause.WRITE): State.DIRTY,
    (State.DIRTY, Cause.WRITEBACK): State.WRITING,
    (State.DIRTY, Cause.SUPERSEDE): State.ABSENT,
    # The write in flight keeps its own copy: the wire sees no torn page, the writer does not wait.
    (State.WRITING, Cause.WRITE): State.REWRITTEN,
    (State.WRITING, Cause.DONE): State.CLEAN,
    (State.WRITING, Cause.FAILED): State.DIRTY,
    # No WRITEBACK here: two writes of one page are never in flight, so they can't swap.
    (State.REWRITTEN, Cause.WRITE): State.REWRITTEN,
    (State.REWRITTEN, Cause.DONE): State.DIRTY,
    (State.REWRITTEN, Cause.FAILED): State.DIRTY,
}


def broken_invariants(*, valid: int, dirty: int, writing: int) -> list[str]:
    """What is wrong with a frame's masks, in words; empty when they make sense.

    That a read from the device is under way (`fetching`) is no part of the state: a page may be
    written, and written back, during its own fetch.
    """
    wrong = []
    if dirty & ~valid:
        wrong.append("a dirty page has no content")
    if writing & ~valid:
        wrong.append("a page in flight has no content")
    return wrong
