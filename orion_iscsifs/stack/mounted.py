"""Every device of a mount, as the file system and the monitoring see it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import MountConfig
from orion_iscsifs.custody import custody
from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.stack import status
from orion_iscsifs.stack.describe import describe
from orion_iscsifs.stack.inherited import EarlierSessions, path_of
from orion_iscsifs.stack.unit import Unit
from orion_iscsifs.stack.ways import Ways

FileListener = Callable[[str, BlockDevice | None], None]
"""Told the path of a device file that has appeared, and its device; or None: it has vanished."""


class Stack:
    """What is mounted. LUNs and sessions come and go while it lasts."""

    def __init__(self, config: MountConfig, mountpoint: str) -> None:
        self.config: Final = config
        self.mountpoint: Final = mountpoint
        self.units: list[Unit] = []
        self.sessions: list[Session] = []
        self.ways: list[Ways] = []
        """Of each target with several paths."""
        self._listeners: list[FileListener] = []
        self._earlier = EarlierSessions(custody)

    @property
    def files(self) -> dict[str, BlockDevice]:
        """Relative path of each device file (INTERFACE §3) and its top layer."""
        return {unit.path: unit.top for unit in self.units}

    def on_files_change(self, listener: FileListener) -> None:
        self._listeners.append(listener)

    def add(self, unit: Unit) -> None:
        self.units.append(unit)
        for listener in self._listeners:
            listener(unit.path, unit.top)

    def remove(self, unit: Unit) -> None:
        self.units.remove(unit)
        for listener in self._listeners:
            listener(unit.path, None)

    async def end_earlier(self) -> list[str]:
        """Try to end what a dead worker has left; the paths whose sessions may still live."""
        living = self._earlier.living(self.sessions)
        if living and self.sessions:
            await self._earlier.end(self.sessions)
            living = self._earlier.living(self.sessions)
        return [path_of(name) for name in living]

    async def drain(self) -> None:
        """Everything that was written is durable on the targets.

        Every LUN is tried; the first OrionError is raised.
        """
        errors: list[OrionError] = []

        async def drain(unit: Unit) -> None:
            try:
                await unit.drain()
            except OrionError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for unit in self.units:
                nursery.start_soon(drain, unit)
        if errors:
            raise errors[0]

    def unmounting(self) -> None:
        """The end has begun: a new mount of the same LUNs may wait for it."""
        for unit in self.units:
            if unit.exclusive is not None:
                unit.exclusive.unmounting()

    def give_back(self) -> None:
        """No reservation is to outlast this mount."""
        for unit in self.units:
            if unit.exclusive is not None:
                unit.exclusive.give_back()

    def describe(self, path: str) -> Mapping[str, str]:
        """The extended attributes of a device file; none for one that has gone."""
        unit = next((unit for unit in self.units if unit.path == path), None)
        return {} if unit is None else describe(unit, self.config.cache.mode)

    def status(self) -> dict[str, Any]:
        """The parts of INTERFACE §7 that the data path knows."""
        mode = self.config.cache.mode
        return {
            "state": status.state(self.units, self.sessions, self.ways),
            "luns": [status.lun(unit, mode) for unit in self.units],
            "sessions": [status.session(session) for session in self.sessions],
            "paths": [path for unit in self.units for path in status.paths(unit, self.ways)],
        }
