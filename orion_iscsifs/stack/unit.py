"""One LUN of a mount: the layers between its disk and its file."""

from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Self

import msgspec

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.cache.writelog import WriteLog
from orion_iscsifs.config import CacheConfig, CacheMode, MountConfig
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.stack import logs
from orion_iscsifs.stack.exclusive import Exclusive, hold, wanted
from orion_iscsifs.stack.lunpath import Way
from orion_iscsifs.stack.lunpaths import LunPaths


class Unit(AbstractAsyncContextManager[object]):
    """A context manager: the layers live inside, and are flushed when it ends."""

    def __init__(
        self,
        path: str,
        number: int,
        target_name: str,
        disk: LunDevice,
        config: MountConfig,
        mountpoint: str,
        way: Way | None = None,
    ) -> None:
        """`path` of its file in the mount; `disk` is closed with the unit, or if it can't open.

        With `way`, the one that `disk` goes, further paths may be joined.
        """
        self.path = path
        self.number = number
        self.target_name = target_name
        self.disk = disk
        self.cache: WritebackCache | None = None
        self.log: WriteLog | None = None
        """The persistent log, with `cache=log`."""
        self.top: BlockDevice = disk
        """What the file reads and writes."""
        self.exclusive: Exclusive | None = None
        self.paths: LunPaths | None = None
        """Several, joined; None: `disk` is the only one."""
        self._way = way
        self._config = config
        self._mountpoint = mountpoint
        self._layers = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """The data path, bottom first. Raises BusyError when somebody else writes to the LUN."""
        config, known_log = self._config, None
        device: BlockDevice = self.disk
        async with AsyncExitStack() as layers:
            layers.callback(self.disk.close)
            if config.cache.mode is CacheMode.LOG and not device.geometry.read_only:
                known_log = await logs.look(self.disk, config.cache)
            if wanted(config) and not device.geometry.read_only:
                self.exclusive = await layers.enter_async_context(
                    hold(self.disk, config, self._mountpoint)
                )
            if self._way is not None:
                self.paths = LunPaths(self._way, self.disk, config, self.exclusive)
                await layers.enter_async_context(self.paths)
                device = self.paths.device
            top = device
            cache = config.cache
            if cache.mode is CacheMode.LOG and not device.geometry.read_only:
                self.log = await layers.enter_async_context(
                    logs.open_log(device, self.disk, self.exclusive, cache, known_log)
                )
                top = self.log
            elif cache.mode is CacheMode.LOG:
                logs.check_nothing_left(self.disk, cache)
            elif not device.geometry.read_only:
                logs.forget_log(self.disk)
            if cache.mode is not CacheMode.NONE:
                self.cache = WritebackCache(top, _frames(cache))
                top = await layers.enter_async_context(self.cache)
            self.top = AlignedDevice(top)
            self._layers = layers.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._layers.__aexit__(kind, error, traceback)

    async def refresh(self) -> None:
        """Look at the LUN again. Raises AnotherDisk or another DeviceError, of the only path."""
        if self.paths is None:
            await self.disk.refresh()
        else:
            await self.paths.refresh()

    async def drain(self) -> None:
        """Everything that was written is durable on the target when this returns."""
        await self.top.flush()
        if self.log is not None:
            await self.log.drain()

    @property
    def dirty_bytes(self) -> int:
        """What was written and is not on the target yet."""
        written = self.log or self.cache
        return 0 if written is None else written.statistics.dirty_bytes

    @property
    def oldest_dirty_age_s(self) -> float | None:
        written = self.log or self.cache
        return None if written is None else written.oldest_dirty_age_s


def _frames(config: CacheConfig) -> CacheConfig:
    """The cache above a log has nothing to write back: each write is in the log at once."""
    if config.mode is not CacheMode.LOG:
        return config
    size = logs.memory(config)[0]
    return msgspec.structs.replace(
        config, mode=CacheMode.WRITETHROUGH, size_bytes=size, dirty_max_bytes=size
    )
