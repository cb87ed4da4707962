"""One target of a mount: its session and its LUNs, and how they come and go."""

import logging
from collections.abc import Iterable, Sequence

import trio

from orion_iscsifs.config import MountConfig
from orion_iscsifs.errors import (
    BusyError,
    DeviceError,
    LunNotFound,
    NotADisk,
    OrionError,
    PathInaccessible,
)
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.dial import Portal
from orion_iscsifs.initiator.lun import AnotherDisk, LunDevice
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.probe import report_luns
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.stack.exclusive import open_disk
from orion_iscsifs.stack.follow import SETTLE_S, Follower
from orion_iscsifs.stack.lifetime import House, Inhabitant
from orion_iscsifs.stack.lunpath import Way
from orion_iscsifs.stack.mounted import Stack
from orion_iscsifs.stack.path import SessionPath
from orion_iscsifs.stack.unit import Unit
from orion_iscsifs.stack.ways import Ways

log = logging.getLogger(__name__)


class Target:
    """Its LUNs as files `prefix` + `lunN`: the one numbered `lun`, or all (None)."""

    def __init__(
        self,
        stack: Stack,
        house: House,
        name: str,
        *,
        lun: int | None,
        prefix: str,
        config: MountConfig,
    ) -> None:
        self.name = name
        self._stack = stack
        self._house = house
        self._lun = lun
        self._prefix = prefix
        self._config = config
        self._path: Inhabitant | None = None
        """The only one, unless there are `_ways`."""
        self._only: Session | None = None
        self._ways: Ways | None = None
        self._units: dict[int, tuple[Unit, Inhabitant]] = {}
        self._missing: dict[int, float] = {}
        """LUNs with a file that the target did not list, and since when."""
        self._kept: set[int] = set()
        """Of these, those that keep their file for their unwritten data."""
        self._left_out: dict[int, str] = {}
        """LUNs without a file, and why."""
        self._follower = Follower(name, self.look_again)

    async def open(self, portal: Portal) -> None:
        """Log in at `portal` and open the LUNs; raises an OrionError with nothing left open."""
        path = SessionPath(self.name, portal, self._config.session)
        self._path = await self._house.move_in(path)
        self._only = path.session
        await self._begin([path.session])

    async def open_ways(self, portals: Sequence[Portal]) -> None:
        """As `open`, over every one of the portals that can be reached."""
        self._ways = Ways(self._house, self.name, self._config, self._join_way)
        self._stack.ways.append(self._ways)
        try:
            found = await self._ways.open(portals)
        except OrionError:
            await self._undo()
            raise
        await self._begin([way.session for way in found])
        for unit, _ in list(self._units.values()):
            await self._join_unit(unit)

    async def _begin(self, sessions: Iterable[Session]) -> None:
        try:
            await self._open_luns()
        except OrionError:
            await self._undo()
            raise
        for session in sessions:
            self._add_session(session)
        self._house.nursery.start_soon(self._follower.run)

    def _add_session(self, session: Session) -> None:
        self._stack.sessions.append(session)
        session.lun_listeners.append(self._follower.news)

    async def _join_way(self, way: Way) -> None:
        """A further way is open, later than the first."""
        self._add_session(way.session)
        # Joined by the follower, as everything that changes.
        self._follower.news()

    async def _join_unit(self, unit: Unit) -> None:
        """Over every way that works and is not joined yet."""
        if unit.paths is not None and self._ways is not None:
            for way in self._ways.open_ways:
                await unit.paths.join(way)

    @property
    def _way(self) -> Way | None:
        """One that works, if there is one; None: there is one path, without any choice."""
        if self._ways is None:
            return None
        ways = self._ways.open_ways
        return next((way for way in ways if way.is_up), ways[0])

    @property
    def _session(self) -> Session:
        """Where the target is asked."""
        if (way := self._way) is not None:
            return way.session
        assert self._only is not None
        return self._only

    async def _open_luns(self) -> None:
        """The named LUN, or every disk: controllers and the like are passed over."""
        if self._lun is not None:
            await self._add(self._lun)
            return
        for number in sorted(await report_luns(LogicalUnit(self._session, 0))):
            await self._try_to_add(number, DeviceError)
        if not self._units:
            raise LunNotFound(
                f"{self.name}: the target has no disk LUN",
                advice="check which LUNs the target shows to this initiator name",
            )

    async def _add(self, number: int) -> None:
        way, disk = await self._open_disk(number)
        path = f"{self._prefix}lun{number}"
        unit = Unit(path, number, self.name, disk, self._config, self._stack.mountpoint, way)
        inhabitant = await self._house.move_in(unit)
        self._units[number] = unit, inhabitant
        self._stack.add(unit)

    async def _open_disk(self, number: int) -> tuple[Way | None, LunDevice]:
        """On the first way whose port serves it."""
        if self._ways is None:
            return None, await open_disk(self._session, number, self._config)
        refusal: PathInaccessible | None = None
        for way in self._ways.open_ways:
            if way.is_up:
                try:
                    return way, await open_disk(way.session, number, self._config)
                except PathInaccessible as error:
                    refusal = error
        raise refusal or self._session.verdict()

    async def _try_to_add(self, number: int, *forgiven: type[OrionError]) -> None:
        """A LUN that was listed; one that can't be opened is left out, which is said once."""
        try:
            await self._add(number)
        except forgiven as error:
            if self._left_out.get(number) != str(error):
                self._left_out[number] = str(error)
                level = logging.INFO if isinstance(error, NotADisk) else logging.WARNING
                log.log(level, "%s: LUN %d has no file: %s", self.name, number, error)
        else:
            self._left_out.pop(number, None)

    # -- following the target ----------------------------------------------------------------

    async def look_again(self) -> bool:
        """See `follow`. True: something is missing that may not have gone."""
        session = self._session
        if session.state is not State.LOGGED_IN:
            # The checks after the next login look by themselves.
            return False
        for number in sorted(self._units):
            await self._join_unit(self._units[number][0])
            await self._refresh(number)
        if self._lun is not None:
            return False
        logins = session.counters.logins
        listed = set(await report_luns(LogicalUnit(session, 0)))
        if session.counters.logins != logins:
            return True
        for number in sorted(listed - self._units.keys()):
            await self._try_to_add(number, DeviceError, BusyError)
        return await self._settle(listed)

    async def _refresh(self, number: int) -> None:
        unit, _ = self._units[number]
        try:
            await unit.refresh()
        except AnotherDisk:
            # Refused by now; said by the device. Unwritten data waits for its own disk.
            if self._lun is None and not unit.dirty_bytes:
                await self._drop(number)
        except DeviceError as error:
            log.debug("%s: LUN %d: %s", self.name, number, error)

    async def _settle(self, listed: Iterable[int]) -> bool:
        """Files whose LUN has been missing for long enough go; True if some may yet go."""
        now = trio.current_time()
        missing = self._units.keys() - set(listed)
        self._missing = {number: self._missing.get(number, now) for number in missing}
        for number, since in sorted(self._missing.items()):
            if now - since < SETTLE_S:
                continue
            unit, _ = self._units[number]
            if not unit.dirty_bytes:
                del self._missing[number]
                await self._drop(number)
            elif number not in self._kept:
                self._kept.add(number)
                log.error(
                    "%s: LUN %d has gone with %d bytes that were to be written to it:"
                    " its file stays until it comes back",
                    self.name,
                    number,
                    unit.dirty_bytes,
                )
        self._kept &= missing
        return bool(self._missing.keys() - self._kept)

    async def _drop(self, number: int) -> None:
        """The LUN has gone: its file goes at once, its layers after it."""
        unit, inhabitant = self._units.pop(number)
        log.warning("%s: LUN %d has gone, and its file with it", self.name, number)
        self._stack.remove(unit)
        try:
            await self._house.move_out(inhabitant)
        except OrionError as error:
            log.warning("%s: %s", self.name, error)

    # -- ending ------------------------------------------------------------------------------

    async def close(self) -> None:
        """Flush and close the LUNs, then log out; the first OrionError is raised."""
        await self._follower.stop()
        errors: list[OrionError] = []
        for unit, inhabitant in list(self._units.values()):
            try:
                await self._house.move_out(inhabitant)
            except OrionError as error:
                errors.append(error)
            self._stack.remove(unit)
        self._units.clear()
        try:
            await self._log_out()
        except OrionError as error:
            errors.append(error)
        if errors:
            raise errors[0]

    async def _log_out(self) -> None:
        gone = [self._only] if self._only is not None else []
        if self._ways is not None:
            gone += [way.session for way in self._ways.open_ways]
        for session in gone:
            if session in self._stack.sessions:
                self._stack.sessions.remove(session)
        if self._ways is not None:
            self._stack.ways.remove(self._ways)
            ways, self._ways = self._ways, None
            await ways.close()
        if self._path is not None:
            path, self._path = self._path, None
            await self._house.move_out(path)

    async def _undo(self) -> None:
        try:
            await self.close()
        except OrionError as error:
            log.info("%s: %s", self.name, error)
