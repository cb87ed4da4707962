"""What a path is to the device above it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.scsi.alua import AccessState


@dataclass(frozen=True, slots=True)
class Access:
    """What the target says of the port of a path (ALUA, SPC-4 §5.15)."""

    state: AccessState = AccessState.ACTIVE_OPTIMIZED
    """A target without ALUA serves every path alike."""
    preferred: bool = False
    explicit: bool = False
    """The state can be changed by `Path.activate`."""
    reported: bool = False
    """The target has ALUA at all: its states may change, so they are asked for."""


class Path(Protocol):
    """One session's way to one logical unit, which is known to be the same on every path."""

    @property
    def name(self) -> str:
        """For people: the portal."""

    @property
    def device(self) -> BlockDevice:
        """Its errors come at once: it holds nothing back while the session is down."""

    @property
    def is_up(self) -> bool:
        """The session is logged in. Whatever it has given up before is over at the target."""

    @property
    def is_refused(self) -> bool:
        """What the path leads to is not, or not for certain, the same logical unit."""

    @property
    def epoch(self) -> int:
        """Grows with each login: by then the target has ended the nexus of the login before."""

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change of `is_up`, or when the target speaks of `Access`."""

    async def check(self) -> Access:
        """TEST UNIT READY, and the access state; raises an OrionError."""

    async def activate(self) -> None:
        """Ask the target to serve this path (SET TARGET PORT GROUPS); raises an OrionError."""

    async def refresh(self) -> None:
        """Look at the capacity again; raises an OrionError."""

    async def fence(self, through: Sequence["Path"]) -> bool:
        """Make the target end the nexus of the lost session, asking on paths that work.

        True: nothing that was sent down this path can land any more. Raises an OrionError.
        """
