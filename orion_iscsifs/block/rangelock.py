"""`RangeLock`: exclusion by byte range that costs nothing while nobody collides.

Two ways to hold a range. *Shared* holders don't mind each other; an *exclusive* holder is alone
with its range. An exclusive holder announces itself first and then waits for the shared ones to
leave, so a steady stream of shared holders can't starve it. Those who wait for a range stand in
line: nobody passes an earlier one who wants a byte of the same range, so one task that takes a
range over and over can't starve another.

Taking a free range has no checkpoint: it is a look at a list that is nearly always empty. A hot
path may look at `exclusive` itself and skip the call. Only a collision waits.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import takewhile

import trio

from orion_iscsifs.block.ranges import Range, overlap


@dataclass(slots=True, eq=False)
class _Ticket:
    """A place in the line."""

    wanted: Range


class RangeLock:
    """See the module's docstring. Ranges are `(start, end)`, never empty."""

    __slots__ = ("_changed", "_line", "exclusive", "shared")

    def __init__(self) -> None:
        self.exclusive: list[Range] = []
        self.shared: list[Range] = []
        self._line: list[_Ticket] = []
        self._changed = trio.lowlevel.ParkingLot()

    def is_excluded(self, wanted: Range) -> bool:
        """Whether an exclusive holder has a byte of `wanted`."""
        return any(overlap(held, wanted) for held in self.exclusive)

    async def wait_until_free(self, wanted: Range) -> None:
        """Return once no exclusive holder has a byte of it; nothing is held afterwards."""
        if not (self._line or self.is_excluded(wanted)):
            return
        ticket = _Ticket(wanted)
        self._line.append(ticket)
        try:
            while self.is_excluded(wanted) or self._is_behind(ticket):
                await self._changed.park()
        finally:
            self._line.remove(ticket)
            self._changed.unpark_all()

    def _is_behind(self, ticket: "_Ticket") -> bool:
        """Whether somebody who came earlier wants a byte of the same range."""
        earlier = takewhile(lambda other: other is not ticket, self._line)
        return any(overlap(other.wanted, ticket.wanted) for other in earlier)

    def leave_shared(self, held: Range) -> None:
        """Undo one `shared.append(held)`."""
        self.shared.remove(held)
        if self.exclusive:
            self._changed.unpark_all()

    @asynccontextmanager
    async def alone(self, wanted: Range) -> AsyncIterator[None]:
        """Hold `wanted` against every other holder, shared or exclusive."""
        await self.wait_until_free(wanted)
        self.exclusive.append(wanted)  # no await since the check
        try:
            while any(overlap(held, wanted) for held in self.shared):
                await self._changed.park()
            yield
        finally:
            self.exclusive.remove(wanted)
            self._changed.unpark_all()
