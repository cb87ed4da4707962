"""A disk of a session as a path of `multipath`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import trio

from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator import access
from orion_iscsifs.initiator.fence import end_nexus
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.reservation import Reservation
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.multipath import Access, Path
from orion_iscsifs.scsi.alua import TPGS_EXPLICIT


class Way:
    """One way to a target: a session that is one of several. It is shared by its LUNs."""

    def __init__(self, name: str, session: Session) -> None:
        self.name: Final = name
        """The portal, and where our end is if that was given."""
        self.session: Final = session
        self._ended_epoch = 0
        self._fencing = trio.Lock()
        session.is_one_of_several = True

    @property
    def is_up(self) -> bool:
        return self.session.state is State.LOGGED_IN

    @property
    def epoch(self) -> int:
        return self.session.counters.logins

    async def end_nexus(self, through: Sequence["Way"]) -> bool:
        """End the session at the target, by a login with its ISID on a way that works.

        True: proven. False: no such way leads to the same portal group.
        """
        async with self._fencing:
            epoch = self.epoch
            if epoch == self._ended_epoch:
                return True
            tag = self.session.parameters.target_portal_group_tag
            for other in through:
                if other.session.parameters.target_portal_group_tag != tag or not other.is_up:
                    continue
                if self.is_up:
                    return True  # Its own login was first.
                nexus = replace(other.session.nexus, isid=self.session.nexus.isid)
                if await end_nexus(other.session.portal, nexus, tag):
                    self._ended_epoch = epoch
                    return True
            return False


class LunPath:
    """See `multipath.path.Path`."""

    def __init__(self, way: Way, disk: LunDevice, reservation: Reservation | None) -> None:
        self.way: Final = way
        self.device: Final = disk
        self._reservation = reservation
        self._tpgs = disk.info.identity.tpgs
        self._group: int | None = None
        self._listeners: list[Callable[[], None]] = []
        way.session.state_listeners.append(self._tell)
        disk.unit.access_news = self._tell

    def close(self) -> None:
        """Hear nothing of the session any more."""
        self.way.session.state_listeners.remove(self._tell)

    @property
    def name(self) -> str:
        return self.way.name

    @property
    def is_up(self) -> bool:
        return self.way.is_up

    @property
    def is_refused(self) -> bool:
        return self.device.is_refused

    @property
    def epoch(self) -> int:
        return self.way.epoch

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    async def check(self) -> Access:
        """The access state first: a port in standby answers hardly anything else."""
        found = await self._access()
        if found.state.usable:
            if self.device.is_refused:
                await self.device.refresh()
            await access.is_ready(self.device.unit)
        return found

    async def _access(self) -> Access:
        if not self._tpgs:
            return Access()
        if self._group is None:
            self._group = await access.own_port_group(self.device.unit)
        if self._group is None:
            return Access()
        group = await access.port_group(self.device.unit, self._group)
        if group is None:
            # The group has gone with the target's configuration: ask anew which one is ours.
            self._group = None
            return Access()
        explicit = bool(self._tpgs & TPGS_EXPLICIT)
        return Access(group.access, group.preferred, explicit, reported=True)

    async def activate(self) -> None:
        if self._group is not None:
            await access.request_active(self.device.unit, self._group)

    async def refresh(self) -> None:
        await self.device.refresh()

    async def fence(self, through: Sequence[Path]) -> bool:
        """By a login in the same portal group, or else by the reservation."""
        paths = [path for path in through if isinstance(path, LunPath)]
        epoch = self.epoch
        failure: OrionError | None = None
        try:
            if await self.way.end_nexus([path.way for path in paths]):
                return True
        except OrionError as error:
            failure = error
        for path in paths:
            if path._reservation is None or self._reservation is None:
                continue
            try:
                if await path._reservation.end_nexus_of(self._reservation, epoch):
                    return True
            except OrionError as error:
                failure = error
        if failure is not None:
            raise failure
        return False
