"""All ways to one target: a session for each portal and each end of ours, kept trying.

A mount begins when one way is open. The others are joined when they are: a portal that is down at
that time is tried again for as long as the mount lasts.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import trio

from orion_iscsifs.config import MountConfig
from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator.dial import Portal
from orion_iscsifs.stack.lifetime import House, Inhabitant
from orion_iscsifs.stack.lunpath import Way
from orion_iscsifs.stack.path import SessionPath

log = logging.getLogger(__name__)

_GRACE_S: Final = 2.0
"""How long a mount waits for the other ways when the first is open."""
_PAUSE_FIRST_S: Final = 1.0
_PAUSE_MAX_S: Final = 30.0


@dataclass(eq=False, slots=True)
class _Attempt:
    """One way as it was asked for."""

    portal: Portal
    bind: str | None
    way: Way | None = None
    inhabitant: Inhabitant | None = None
    error: OrionError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def name(self) -> str:
        return f"{self.portal}" if self.bind is None else f"{self.portal} from {self.bind}"


class Ways:
    """Of one target. `open` them, `close` them."""

    def __init__(
        self,
        house: House,
        target_name: str,
        config: MountConfig,
        opened: Callable[[Way], Awaitable[None]],
    ) -> None:
        """`opened` is awaited with each way that is logged in to after `open` has returned."""
        self._house = house
        self.target_name: Final = target_name
        self._config = config
        self._opened = opened
        self._attempts: list[_Attempt] = []
        self._progress = trio.Event()
        self._is_open = False

    @property
    def open_ways(self) -> list[Way]:
        """Those that have been logged in to, working or not, in the order of the user."""
        return [attempt.way for attempt in self._attempts if attempt.way is not None]

    @property
    def missing(self) -> dict[str, str | None]:
        """The names of the ways that have never been open, and why not as far as known."""
        return {
            attempt.name: str(attempt.error) if attempt.error else None
            for attempt in self._attempts
            if attempt.way is None
        }

    async def open(self, portals: Iterable[Portal]) -> list[Way]:
        """Log in everywhere; the ways that are open soon. Raises the first error if none is."""
        binds = self._config.multipath.binds or (self._config.session.bind,)
        self._attempts = [_Attempt(portal, bind) for portal in portals for bind in binds]
        for attempt in self._attempts:
            self._house.nursery.start_soon(self._keep_trying, attempt)
        while not self.open_ways:
            if all(attempt.error is not None for attempt in self._attempts):
                self._stop_trying()
                raise next(attempt.error for attempt in self._attempts if attempt.error)
            await self._progress.wait()
        with trio.move_on_after(_GRACE_S):
            while any(attempt.way is None and attempt.error is None for attempt in self._attempts):
                await self._progress.wait()
        self._is_open = True
        return self.open_ways

    def _stop_trying(self) -> None:
        for attempt in self._attempts:
            attempt.scope.cancel()

    async def _keep_trying(self, attempt: _Attempt) -> None:
        with attempt.scope:
            pause_s = _PAUSE_FIRST_S
            while attempt.way is None:
                await self._try(attempt)
                if attempt.way is None:
                    await trio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _PAUSE_MAX_S)
            if self._is_open:
                await self._opened(attempt.way)

    async def _try(self, attempt: _Attempt) -> None:
        config = msgspec.structs.replace(
            self._config.session, bind=attempt.bind, replacement_timeout_s=0.0
        )
        path = SessionPath(self.target_name, attempt.portal, config)
        try:
            attempt.inhabitant = await self._house.move_in(path)
        except OrionError as error:
            if str(error) != str(attempt.error):
                log.warning("path %s: %s", attempt.name, error.line)
            attempt.error = error
        else:
            attempt.way = Way(attempt.name, path.session)
        self._progress.set()
        self._progress = trio.Event()

    async def close(self) -> None:
        """Log out everywhere; what fails is raised at the end."""
        self._stop_trying()
        errors: list[OrionError] = []
        for attempt in self._attempts:
            if attempt.inhabitant is not None:
                try:
                    await self._house.move_out(attempt.inhabitant)
                except OrionError as error:
                    errors.append(error)
        self._attempts = []
        if errors:
            raise errors[0]
