"""`Gauge`: reads from the device, timed where that tells something about the way to it."""

from typing import Final

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cache.bandwidth import BULK_BYTES_MIN, Link
from orion_iscsifs.config import CacheConfig

WINDOW_AUTO_MIN_BYTES: Final = 4 << 20
WINDOW_AUTO_MAX_BYTES: Final = 32 << 20
CACHE_SHARE: Final = 8
"""Readahead may have one such part of the cache."""


class Gauge:
    """The cache's way to read from its device. `link` is what was learned from it."""

    def __init__(self, device: BlockDevice, link: Link) -> None:
        self._device = device
        self.link = link

    async def read_into(self, offset: int, target: memoryview) -> None:
        """Of the device; see `block.device.BlockDevice`."""
        link, length = self.link, len(target)
        if length < BULK_BYTES_MIN and (link.in_flight or not link.samples_small()):
            link.in_flight += 1
            try:
                await self._device.read_into(offset, target)
            finally:
                link.in_flight -= 1
            return
        flight = link.depart(length, trio.current_time())
        try:
            await self._device.read_into(offset, target)
        except BaseException:
            link.lose(length)
            raise
        link.arrive(flight, length, trio.current_time())


def link_for(config: CacheConfig) -> Link:
    """With the bounds of the readahead window that `readahead=` asks for; 0: none."""
    most = config.size_bytes // CACHE_SHARE
    if config.readahead == "off":
        return Link(0, 0)
    if config.readahead == "auto":
        return Link(min(WINDOW_AUTO_MIN_BYTES, most), min(WINDOW_AUTO_MAX_BYTES, most))
    return Link(min(config.readahead, most), min(config.readahead, most))
