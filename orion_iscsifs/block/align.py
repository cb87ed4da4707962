"""`AlignedDevice`: byte requests on top, whole logical blocks below.

A request that is already aligned passes straight down. Any other read fetches the blocks around
it. Any other write reads the block at its head and at its tail, lays its bytes over them and writes
all of it as one request: a read-modify-write (RMW).

An RMW loses bytes if another write reaches its blocks between its read and its write. So it holds
its blocks alone (`RangeLock`), and an aligned write holds its own in the shared way: aligned writes
never wait for one another, and wait for an RMW only when they touch the same blocks. Reads need
no exclusion, because the device below never mixes two writes within one block.
"""

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry, GeometryListener
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.block.ranges import Range, cover, within
from orion_iscsifs.errors import OutOfRange, WriteProtected


class AlignedDevice:
    """A `BlockDevice` whose offsets and lengths may be any number of bytes."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._block_bytes = device.geometry.logical_block_bytes
        self._block_mask = self._block_bytes - 1
        self._lock = RangeLock()

    @property
    def geometry(self) -> Geometry:
        return self._device.geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._device.on_geometry_change(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        length = len(target)
        if not (offset | length) & self._block_mask:
            await self._device.read_into(offset, target)
            return
        wanted = self._checked(offset, length)
        if not length:
            return
        start, end = cover(wanted, self._block_bytes)
        blocks = memoryview(bytearray(end - start))
        await self._device.read_into(start, blocks)
        target[:] = blocks[offset - start : offset - start + length]

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        length = len(source)
        if (offset | length) & self._block_mask:
            await self._modify(offset, source, fua=fua)
            return
        held = (offset, offset + length)
        if self._lock.exclusive:
            await self._lock.wait_until_free(held)
        self._lock.shared.append(held)
        try:
            await self._device.write(offset, source, fua=fua)
        finally:
            self._lock.leave_shared(held)

    async def flush(self) -> None:
        await self._device.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Only the whole blocks inside the range: the rest of a block must keep its content."""
        start, end = within(self._checked(offset, length), self._block_bytes)
        if self.geometry.read_only:
            raise WriteProtected("the device is read-only")
        if start == end:
            return
        async with self._lock.alone((start, end)):
            await self._device.discard(start, end - start)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        wanted = self._checked(offset, length)
        start, end = within(wanted, self._block_bytes)
        if start == end:
            await self.write(offset, bytes(length))
            return
        async with self._lock.alone((start, end)):
            await self._device.write_zeroes(start, end - start, may_unmap=may_unmap)
        await self.write(offset, bytes(start - offset))
        await self.write(end, bytes(wanted[1] - end))

    async def _modify(self, offset: int, source: Buffer, *, fua: bool) -> None:
        """Write bytes whose first or last block is not whole."""
        wanted = self._checked(offset, len(source))
        if self.geometry.read_only:
            raise WriteProtected("the device is read-only")
        if not len(source):
            return
        start, end = cover(wanted, self._block_bytes)
        blocks = memoryview(bytearray(end - start))
        async with self._lock.alone((start, end)):
            for block in self._torn_blocks(wanted):
                at = block - start
                await self._device.read_into(block, blocks[at : at + self._block_bytes])
            blocks[offset - start : offset - start + len(source)] = source
            await self._device.write(start, blocks, fua=fua)

    def _torn_blocks(self, wanted: Range) -> list[int]:
        """Offsets of the blocks that `wanted` covers only in part: none, one or two."""
        ends = {at & -self._block_bytes for at in wanted if at & self._block_mask}
        return sorted(ends)

    def _checked(self, offset: int, length: int) -> Range:
        size = self.geometry.size_bytes
        if offset < 0 or length < 0 or offset + length > size:
            raise OutOfRange(f"range {offset}+{length} reaches past the end ({size})")
        return offset, offset + length
