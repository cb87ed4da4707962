"""All paths to one LUN: which ways lead there, and the device that joins them."""

import logging
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

import trio

from orion_iscsifs.config import MountConfig
from orion_iscsifs.errors import DeviceError, OrionError
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.lun import AnotherDisk, LunDevice
from orion_iscsifs.initiator.probe import identify
from orion_iscsifs.multipath.device import MultipathDevice, open_multipath
from orion_iscsifs.multipath.paths import path_status
from orion_iscsifs.stack.exclusive import Exclusive
from orion_iscsifs.stack.lunpath import LunPath, Way

log = logging.getLogger(__name__)


class LunPaths(AbstractAsyncContextManager[object]):
    """A context manager: the paths are joined inside. `disk` is the caller's, and goes by `way`."""

    device: MultipathDevice

    def __init__(
        self, way: Way, disk: LunDevice, config: MountConfig, exclusive: Exclusive | None
    ) -> None:
        self._first: Final = way, disk
        self._config = config
        self._exclusive = exclusive
        self._paths: dict[Way, LunPath] = {}
        self._joined: list[LunDevice] = []
        self._refused: dict[Way, str] = {}
        self._joining = trio.Lock()
        self._layers = AsyncExitStack()

    async def __aenter__(self) -> Self:
        way, disk = self._first
        reservation = None if self._exclusive is None else self._exclusive.first
        path = self._paths[way] = LunPath(way, disk, reservation)
        multipath = self._config.multipath
        async with AsyncExitStack() as layers:
            layers.callback(self._close_paths)
            self.device = await layers.enter_async_context(
                open_multipath(
                    f"LUN {disk.number}",
                    path,
                    policy=multipath.policy,
                    failback_s=multipath.failback_s,
                    hold_s=self._config.session.replacement_timeout_s,
                )
            )
            self._layers = layers.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._layers.__aexit__(kind, error, traceback)

    def _close_paths(self) -> None:
        for path in self._paths.values():
            path.close()
        for disk in self._joined:
            disk.close()

    async def join(self, way: Way) -> None:
        """Add the path that goes this way, if there is one; why not is logged, once."""
        async with self._joining:
            if way in self._paths or not way.is_up:
                return
            try:
                await self._join(way)
            except OrionError as error:
                if self._refused.get(way) != str(error):
                    self._refused[way] = str(error)
                    log.warning("path %s: %s", way.name, error.line)
            else:
                self._refused.pop(way, None)

    async def _join(self, way: Way) -> None:
        """Raises AnotherDisk, another DeviceError, or BusyError."""
        first = self._first[1]
        unit = LogicalUnit(way.session, first.number)
        name = await identify(unit)
        _prove_same(first, name)
        # Not probed: a port in standby does not tell what it is not asked to serve.
        disk = LunDevice(unit, first.info, read_only=self._config.fuse.read_only)
        try:
            reservation = None
            if self._exclusive is not None:
                reservation = await self._exclusive.join(disk)
            path = LunPath(way, disk, reservation)
        except BaseException:
            disk.close()
            raise
        # No await from here on: whoever ends the paths finds this one.
        self._paths[way] = path
        self._joined.append(disk)
        self.device.add(path)

    async def refresh(self) -> None:
        """Look at the LUN again on every path."""
        await self.device.refresh()

    def status(self) -> list[dict[str, Any]]:
        """What `MultipathDevice.status` knows, and the ways that lead to something else."""
        refused = [
            path_status(way.name, "failed", last_error=text) for way, text in self._refused.items()
        ]
        return [*self.device.status(), *refused]


def _prove_same(first: LunDevice, name: str) -> None:
    """A path is used only if it is certain where it leads (VPD page 83h)."""
    known = first.info.name
    if known and name == known:
        return
    if known and name:
        raise AnotherDisk(
            f"LUN {first.number} is another disk there: {name}; it is {known} on the first path",
            advice="take that portal out of portals=, or map the same LUN there",
        )
    raise DeviceError(
        f"LUN {first.number}: the device has no name (VPD page 83h) that would prove it the same",
        advice="use one path for it: without portals= and paths=",
    )
