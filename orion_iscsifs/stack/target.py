"""One target of a mount: its session and its LUNs, and what changes in both.

A target that is mounted as a whole shows every disk that it has. `follow` looks again whenever the
target says that its LUNs have changed (unit attention 3F/0E), and now and then by itself: what is
new becomes a file, what has gone loses its file, unless something of it is still unwritten. It also
asks each disk for its size, for targets that say nothing when it grows.
"""

import logging

from orion_iscsifs.config import MountConfig
from orion_iscsifs.errors import DeviceError, LunNotFound, NotADisk, OrionError
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.dial import Portal
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.probe import report_luns
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.stack.lifetime import House, Inhabitant
from orion_iscsifs.stack.mounted import Stack
from orion_iscsifs.stack.path import SessionPath
from orion_iscsifs.stack.unit import Unit

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
        self._session: Session | None = None
        self._units: dict[int, tuple[Unit, Inhabitant]] = {}

    async def open(self, portal: Portal) -> None:
        """Log in at `portal` and open the LUNs; raises an OrionError with nothing left open."""
        path = SessionPath(self.name, portal, self._config.session)
        self._path = await self._house.move_in(path)
        self._session = path.session
        try:
            disks = await self._open_disks(path.session)
            self._stack.sessions.append(path.session)
            for number, disk in disks.items():
                await self._add(number, disk)
        except OrionError:
            await self._undo()
            raise

    async def _add(self, number: int, disk: LunDevice) -> None:
        unit = Unit(f"{self._prefix}lun{number}", number, self.name, disk, self._config)
        inhabitant = await self._house.move_in(unit)
        self._units[number] = unit, inhabitant
        self._stack.add(unit)

    async def _open_disks(self, session: Session) -> dict[int, LunDevice]:
        """The named LUN, or every disk: controllers and the like are passed over."""
        read_only = self._config.fuse.read_only
        if self._lun is not None:
            return {self._lun: await LunDevice.open(session, self._lun, read_only=read_only)}
        disks: dict[int, LunDevice] = {}
        for number in sorted(await report_luns(LogicalUnit(session, 0))):
            try:
                disks[number] = await LunDevice.open(session, number, read_only=read_only)
            except NotADisk as error:
                log.info("%s", error)
            except DeviceError as error:
                log.warning("LUN %d is left out: %s", number, error)
        if not disks:
            raise LunNotFound(
                f"{self.name}: the target has no disk LUN",
                advice="check which LUNs the target shows to this initiator name",
            )
        return disks

    async def close(self) -> None:
        """Flush and close the LUNs, then log out; the first OrionError is raised."""
        errors: list[OrionError] = []
        for unit, inhabitant in list(self._units.values()):
            try:
                await self._house.move_out(inhabitant)
            except OrionError as error:
                errors.append(error)
            self._stack.remove(unit)
        self._units.clear()
        if self._path is not None:
            if self._session in self._stack.sessions:
                self._stack.sessions.remove(self._session)
            path, self._path = self._path, None
            await self._house.move_out(path)
        if errors:
            raise errors[0]

    async def _undo(self) -> None:
        try:
            await self.close()
        except OrionError as error:
            log.info("%s: %s", self.name, error)
