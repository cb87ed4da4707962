"""Things that live in a task of their own, so that they can be closed in any order.

A trio nursery, and so every layer that has one, must be left by the task that entered it, the last
one first. LUNs come and go as the target pleases, and paths too; each is therefore an `Inhabitant`
of a `House`: a task that opens it, waits, and closes it again.

Once open they are shielded: whoever is cancelled above may still have to flush, and does so on
living caches and sessions. They end when they are closed, or all at once with the house.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.errors import OrionError

Opened = AbstractAsyncContextManager[object]
"""What an inhabitant is: open inside, closed at the end."""


class Inhabitant:
    """One thing of a house. `error` is what closing it failed with."""

    def __init__(self, thing: Opened) -> None:
        self._thing = thing
        self._scope = trio.CancelScope()
        self._leave = trio.Event()
        self._left = trio.Event()
        self.error: OrionError | None = None

    async def close(self) -> None:
        """Close it, and return when that is done; its OrionError is raised."""
        self._leave.set()
        await self._left.wait()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """End it at once: nothing is flushed."""
        self._scope.cancel()

    async def live(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The task: an error before it is open is the opener's, one at the end is `close`'s."""
        is_open = False
        try:
            with self._scope:
                async with self._thing:
                    # Not before: a cancelled opener does not wait for the opening.
                    self._scope.shield = is_open = True
                    task_status.started()
                    await self._leave.wait()
        except OrionError as error:
            if not is_open:
                raise
            self.error = error
        finally:
            self._left.set()


class House:
    """Where inhabitants live; see `open_house`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery: Final = nursery
        """For tasks that end with the house, or with whoever is cancelled above."""
        self._inhabitants: list[Inhabitant] = []

    async def move_in(self, thing: Opened) -> Inhabitant:
        """Open `thing` in a task of its own; its errors are raised here."""
        inhabitant = Inhabitant(thing)
        self._inhabitants.append(inhabitant)
        try:
            await self.nursery.start(inhabitant.live)
        except BaseException:
            self._inhabitants.remove(inhabitant)
            raise
        return inhabitant

    async def move_out(self, inhabitant: Inhabitant) -> None:
        """Close one; its OrionError is raised."""
        self._inhabitants.remove(inhabitant)
        await inhabitant.close()

    def demolish(self) -> None:
        """End everything that is still there at once."""
        for inhabitant in self._inhabitants:
            inhabitant.cancel()


@asynccontextmanager
async def open_house() -> AsyncIterator[House]:
    """A house for the time of the body. Who is still in it then is cancelled."""
    async with background() as nursery:
        house = House(nursery)
        try:
            yield house
        finally:
            house.demolish()
