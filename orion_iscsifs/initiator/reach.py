"""Trying the portals of one target in turn, so that a dead one costs little.

The portal that was dialled comes first: it has answered a moment ago. Only if the login there
fails are the others looked at, all at once and for a bounded time, and only those that accept a
connection are logged in to, in their order. Logins themselves are never made in parallel: two of
one initiator port to one portal group would end each other (session reinstatement, RFC 7143
§6.3.5).

    attempts = Attempts(target, dialled, config)
    while (portal := await attempts.next()) is not None:
        try: ...log in at `portal`; return
        except OrionError as error: attempts.failed(portal, error)
    raise attempts.verdict()
"""

from typing import Final

import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import AuthenticationFailed, ConnectFailed, OrionError
from orion_iscsifs.initiator.addresses import Portal, resolve
from orion_iscsifs.initiator.portals import DiscoveredTarget, login_order

_LOOK_TIMEOUT_S: Final = 4.0
"""How long a portal may take to accept a connection when others were listed too."""
_LOOKED_AT_ONCE_MAX: Final = 16
_NAMED_MAX: Final = 4


class Attempts:
    """The logins of one target, one portal after the other."""

    def __init__(self, target: DiscoveredTarget, dialled: Portal, config: SessionConfig) -> None:
        self._name = target.name
        self._bind = config.bind
        self._timeout_s = min(_LOOK_TIMEOUT_S, config.login_timeout_s)
        first, *others = login_order(target, dialled)
        self._next: list[Portal] = [first]
        self._unseen = others
        self._order = [first, *others]
        self._errors: dict[Portal, OrionError] = {}

    async def next(self) -> Portal | None:
        """Where to log in next; None when no portal is left."""
        if not self._next and self._unseen:
            unseen, self._unseen = self._unseen, []
            self._next = await self._that_accept(unseen)
        return self._next.pop(0) if self._next else None

    def failed(self, portal: Portal, error: OrionError) -> None:
        """The login at `portal` failed; raises `error` again if no other portal can help."""
        if isinstance(error, AuthenticationFailed) or not error.other_path_may_help:
            raise error
        self._errors[portal] = error

    def verdict(self) -> OrionError:
        """What to raise once `next` has returned None: why nothing worked."""
        assert self._errors
        answers = [error for error in self._errors.values() if not isinstance(error, ConnectFailed)]
        if answers or len(self._errors) == 1:
            # What a target said tells more than an address that is not ours to reach.
            return next(iter(answers or self._errors.values()))
        told = [str(self._errors[portal]) for portal in self._order if portal in self._errors]
        more = len(told) - _NAMED_MAX
        what = "; ".join(told[:_NAMED_MAX]) + (f"; and {more} more" if more > 0 else "")
        return ConnectFailed(
            f"{self._name}: none of its portals can be reached: {what}",
            advice="behind address translation, forward the port that the target lists",
        )

    async def _that_accept(self, portals: list[Portal]) -> list[Portal]:
        accepting: set[Portal] = set()
        limit = trio.CapacityLimiter(_LOOKED_AT_ONCE_MAX)

        async def look(portal: Portal) -> None:
            async with limit:
                try:
                    await _knock(portal, self._timeout_s, self._bind)
                except OrionError as error:
                    self._errors[portal] = error
                else:
                    accepting.add(portal)

        async with trio.open_nursery() as nursery:
            for portal in portals:
                nursery.start_soon(look, portal)
        return [portal for portal in portals if portal in accepting]


async def _knock(portal: Portal, timeout_s: float, bind: str | None) -> None:
    """Raises ConnectFailed if nobody accepts a connection there in time."""
    try:
        with trio.fail_after(timeout_s):
            candidates = await resolve(portal, bind)
            (await candidates.connect()).close()
    except trio.TooSlowError:
        raise ConnectFailed(f"{portal}: no answer within {timeout_s:g} s") from None
