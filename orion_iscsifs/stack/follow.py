"""Keeping the files of a target in step with its LUNs.

The target says that its LUNs have changed (unit attention 3F/0E, with a command or as an event), or
it says nothing: so it is also asked now and then, and each disk for its size. One look:

* every LUN that has a file is probed again: a new size reaches its file;
* a disk that is new in REPORT LUNS gets a file;
* a LUN that is no longer there loses its file, once it has been missing for `SETTLE_S` (a target
  that is starting lists its LUNs one by one) and as long as nothing of it is unwritten: unwritten
  data keeps its file, and goes to the LUN when that comes back.

A mount of one LUN by its number keeps its one file whatever happens.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from orion_iscsifs.errors import OrionError

log = logging.getLogger(__name__)

POLL_S: Final = 30.0
"""Between two looks at a target that has said nothing."""
SETTLE_S: Final = 5.0
"""How long a LUN has to be missing before it is believed gone."""
_SWARM_S: Final = 0.1
"""A change is told to every LUN of a session, one after the other: one look is enough."""

Look = Callable[[], Awaitable[bool]]
"""One look at the target. True: something seems to have gone, look again after `SETTLE_S`."""


class Follower:
    """Calls `look` after news and by the clock, from `run` until `stop`."""

    def __init__(self, name: str, look: Look) -> None:
        self._name = name
        self._look = look
        self._news = trio.Event()
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._stopped.set()

    def news(self) -> None:
        """The target said that something has changed."""
        self._news.set()

    async def run(self) -> None:
        """Until `stop`, or until cancelled from above."""
        self._stopped = trio.Event()
        try:
            with self._scope:
                await self._follow()
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """Return when no look goes on any more."""
        self._scope.cancel()
        await self._stopped.wait()

    async def _follow(self) -> None:
        pause_s = POLL_S
        while True:
            with trio.move_on_after(pause_s):
                await self._news.wait()
            await trio.sleep(_SWARM_S)
            self._news = trio.Event()
            pause_s = POLL_S
            try:
                if await self._look():
                    pause_s = SETTLE_S
            except OrionError as error:
                log.info("%s: its LUNs can't be looked at: %s", self._name, error)
            except Exception:
                # A bug, perhaps woken by the target's bytes: the mount has to outlive it.
                log.exception("%s: looking at its LUNs failed", self._name)
