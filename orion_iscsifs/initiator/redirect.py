"""Where a target's redirections lead (RFC 7143 §11.13.5, Status-Class 1).

A portal may answer a login with "moved temporarily" (0101) or "moved permanently" (0102) and
another address; arrays with one virtual address do so at every login. A `Chain` is one login's way
from address to address: bounded, and never twice to the same one. A `Route` outlives logins: every
login starts at the configured portal, or at the one to which the target has moved permanently. That
is remembered for the session only, and given up as soon as nobody logs in there any more: an
administrator must be able to move the target back.
"""

from typing import Final

from orion_iscsifs.errors import LoginError, LoginRedirected, OrionError
from orion_iscsifs.initiator.addresses import Portal, parse_target_address
from orion_iscsifs.protocol.pdu import LoginResponse

REDIRECTIONS_MAX: Final = 8
"""For one login. Real targets use one, seldom two."""


class Route:
    """Where the logins of one session start."""

    def __init__(self, configured: Portal) -> None:
        self.configured = configured
        self._moved: Portal | None = None

    @property
    def current(self) -> Portal:
        return self._moved or self.configured

    def remember(self, portal: Portal) -> None:
        """The target has moved there permanently."""
        self._moved = portal if portal != self.configured else None

    def forget(self) -> bool:
        """Back to the configured portal; False: that is where we are."""
        moved, self._moved = self._moved, None
        return moved is not None

    def __str__(self) -> str:
        return str(self.current)


class Chain:
    """The portals of one login, the last of which is to be asked next."""

    def __init__(self, first: Portal) -> None:
        self._portals = [first]
        self._permanent = True
        self.lasting: Portal | None = None
        """Where "moved permanently" alone has led: a temporary move says nothing about later."""

    @property
    def portal(self) -> Portal:
        return self._portals[-1]

    def follow(self, redirection: LoginRedirected) -> None:
        """The next portal; raises LoginError for a circle or too many, ProtocolViolation for no
        address."""
        following = parse_target_address(redirection.portal, LoginResponse.name)
        seen = {_place(portal) for portal in self._portals}
        self._portals.append(following)
        if _place(following) in seen:
            raise self._refusal("the target redirects in a circle")
        if len(self._portals) > REDIRECTIONS_MAX + 1:
            raise self._refusal(f"the target redirects more than {REDIRECTIONS_MAX} times")
        self._permanent = self._permanent and redirection.permanent
        if self._permanent:
            self.lasting = following

    def explain(self, error: OrionError) -> None:
        """Add to an error of a later portal how we came to be there."""
        if len(self._portals) > 1:
            error.args = (f"{error}; redirected: {self}", *error.args[1:])

    def __str__(self) -> str:
        return " -> ".join(map(str, self._portals))

    def _refusal(self, problem: str) -> LoginError:
        return LoginError(
            f"{problem}: {self}",
            advice="check the portal addresses in the target's configuration",
            status_class=1,
        )


def _place(portal: Portal) -> tuple[str, int]:
    return portal.host.lower(), portal.port
