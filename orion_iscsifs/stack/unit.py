"""One LUN of a mount: the layers between its disk and its file."""

from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Self

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheMode, MountConfig
from orion_iscsifs.initiator.lun import LunDevice


class Unit(AbstractAsyncContextManager[object]):
    """A context manager: the layers live inside, and are flushed when it ends."""

    def __init__(
        self, path: str, number: int, target_name: str, disk: LunDevice, config: MountConfig
    ) -> None:
        """`path` of its file in the mount; `disk` is closed with the unit."""
        self.path = path
        self.number = number
        self.target_name = target_name
        self.disk = disk
        self.cache: WritebackCache | None = None
        self.top: BlockDevice = disk
        """What the file reads and writes."""
        self._config = config
        self._layers = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """The data path, bottom first."""
        device: BlockDevice = self.disk
        if self._config.cache.mode is not CacheMode.NONE:
            self.cache = WritebackCache(device, self._config.cache)
            device = await self._layers.enter_async_context(self.cache)
        self.top = AlignedDevice(device)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._layers.__aexit__(kind, error, traceback)
        finally:
            self.disk.close()

    @property
    def dirty_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.statistics.dirty_bytes
