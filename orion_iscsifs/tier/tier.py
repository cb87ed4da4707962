"""`CompressedTier`: a read cache on a local disk, as a device over a device."""

from contextlib import AbstractAsyncContextManager
from typing import Literal

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry, GeometryListener
from orion_iscsifs.tier.statistics import TierStatistics
from orion_iscsifs.tier.store import TierStore

Level = int | Literal["adaptive"]


class CompressedTier:
    """See the module's docstring. Made by `open_tier`."""

    statistics: TierStatistics
    store: TierStore

    @property
    def geometry(self) -> Geometry:
        raise NotImplementedError

    def on_geometry_change(self, listener: GeometryListener) -> None:
        raise NotImplementedError

    async def read_into(self, offset: int, target: memoryview) -> None:
        raise NotImplementedError

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        raise NotImplementedError

    async def flush(self) -> None:
        raise NotImplementedError

    async def discard(self, offset: int, length: int) -> None:
        raise NotImplementedError

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        raise NotImplementedError


def open_tier(
    device: BlockDevice, store: TierStore, *, level: Level = 1
) -> AbstractAsyncContextManager[CompressedTier]:
    """The device for the time of the body. `store` has been resumed; its owner closes it.

    If the body ends in order, the tier is marked clean: all of it is durable.
    """
    raise NotImplementedError
