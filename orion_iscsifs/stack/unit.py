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
from orion_iscsifs.crypt.device import LuksDevice
from orion_iscsifs.crypt.opening import Unlocked, open_luks, unlock_luks
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.stack import logs, tiers
from orion_iscsifs.stack.exclusive import Exclusive, hold, wanted
from orion_iscsifs.stack.lunpath import Way
from orion_iscsifs.stack.lunpaths import LunPaths
from orion_iscsifs.tier.tier import CompressedTier


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
        self.luks: LuksDevice | None = None
        """With `luks_key_file`: everything above it is plaintext."""
        self.log: WriteLog | None = None
        """The persistent log, with `cache=log`."""
        self.tier: CompressedTier | None = None
        """The read cache on a local disk, with `tier_dir=`, unless it can't be used."""
        self.top: BlockDevice = disk
        """What the file reads and writes."""
        self.exclusive: Exclusive | None = None
        self.paths: LunPaths | None = None
        """Several, joined; None: `disk` is the only one."""
        self._way = way
        self._config = config
        self._mountpoint = mountpoint
        self._volume = disk.info.name
        """What tells the content from all others."""
        self._known_log: LogStore | None = None
        self._unlocked_tier: Seal | None = None
        self._layers = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """The data path, bottom first. Raises BusyError when somebody else writes to the LUN."""
        async with AsyncExitStack() as layers:
            layers.callback(self.disk.close)
            unlocked = await self._try_keys()
            device = await self._reach(layers)
            if unlocked is not None:
                self.luks = device = await self._decrypt(device, unlocked)
            device = await self._keep_locally(layers, device)
            if self._config.cache.mode is not CacheMode.NONE:
                self.cache = WritebackCache(device, _frames(self._config.cache))
                device = await layers.enter_async_context(self.cache)
            self.top = AlignedDevice(device)
            self._layers = layers.pop_all()
        return self

    async def _try_keys(self) -> Unlocked | None:
        """Before anything changes at the device: a mistake must leave no trace there."""
        config, unlocked = self._config, None
        if config.luks is not None:
            unlocked = await unlock_luks(self.disk, config.luks.passphrase.reveal(), self.path)
        if config.cache.mode is CacheMode.LOG and not self.disk.geometry.read_only:
            self._known_log = await logs.look(self.disk, config.cache)
        self._unlocked_tier = await tiers.look(self.disk, config)
        return unlocked

    async def _reach(self, layers: AsyncExitStack) -> BlockDevice:
        """The LUN, ours alone if it is to be written, over every path."""
        if wanted(self._config) and not self.disk.geometry.read_only:
            self.exclusive = await layers.enter_async_context(
                hold(self.disk, self._config, self._mountpoint)
            )
        if self._way is None:
            return self.disk
        self.paths = LunPaths(self._way, self.disk, self._config, self.exclusive)
        await layers.enter_async_context(self.paths)
        return self.paths.device

    async def _decrypt(self, device: BlockDevice, unlocked: Unlocked) -> LuksDevice:
        assert self._config.luks is not None
        passphrase = self._config.luks.passphrase.reveal()
        luks = await open_luks(device, passphrase, self.path, unlocked)
        self._volume = f"{self._volume} LUKS {luks.uuid}"
        return luks

    async def _keep_locally(self, layers: AsyncExitStack, device: BlockDevice) -> BlockDevice:
        """With the tier and the log in front, as far as they are wanted."""
        config, read_only = self._config, device.geometry.read_only
        if config.tier is not None:
            self.tier = await layers.enter_async_context(
                tiers.open_local_tier(
                    device, self.disk, self._volume, self.exclusive, config, self._unlocked_tier
                )
            )
            device = self.tier or device
        elif not read_only:
            tiers.forget_tier(self.disk)
        if config.cache.mode is CacheMode.LOG and not read_only:
            self.log = await layers.enter_async_context(
                logs.open_log(
                    device, self.disk, self._volume, self.exclusive, config.cache, self._known_log
                )
            )
            return self.log
        if config.cache.mode is CacheMode.LOG:
            logs.check_nothing_left(self.disk, config.cache)
        elif not read_only:
            logs.forget_log(self.disk)
        return device

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
