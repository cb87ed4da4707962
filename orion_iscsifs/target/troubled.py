"""Disks in trouble, for tests: one whose pool runs full, one whose blocks go bad.

Each stands on a `RamDevice` or a `FileDevice`, or on another of its kind, and changes nothing
until it is told to. Sizes and write protection are changed on the device below.
"""

from collections.abc import Callable
from typing import Final, Protocol

from orion_iscsifs.block.device import (
    BlockDevice,
    Buffer,
    Geometry,
    GeometryListener,
    check_request,
)
from orion_iscsifs.errors import MediumError, ScsiError, WriteProtected
from orion_iscsifs.scsi.sense import (
    SPACE_ALLOCATION_FAILED,
    UNRECOVERED_READ_ERROR,
    WRITE_ERROR,
    Status,
)
from orion_iscsifs.target.backing import ExtentDevice, InlineDevice

FLAWS_MAX: Final = 1 << 16
"""Bad blocks of one `spoil`: more make no better test, and each request looks at every one."""


class Disk(BlockDevice, InlineDevice, ExtentDevice, Protocol):
    """What these classes stand on, and are."""


class _Layer:
    """Everything is done by the device below."""

    def __init__(self, below: Disk) -> None:
        self.below = below

    @property
    def geometry(self) -> Geometry:
        return self.below.geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self.below.on_geometry_change(listener)

    def read_now(self, offset: int, target: memoryview) -> bool:
        return self.below.read_now(offset, target)

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self.below.read_into(offset, target)

    async def flush(self) -> None:
        await self.below.flush()

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self.below.write_zeroes(offset, length, may_unmap=may_unmap)

    def extent(self, offset: int) -> tuple[int, bool]:
        return self.below.extent(offset)

    def _check_write(self, offset: int, length: int) -> None:
        """A request that the device below would refuse takes no space and mends no block."""
        if self.geometry.read_only:
            raise WriteProtected("the device is read-only")
        check_request(self.geometry, offset, length)


class ThinDevice(_Layer):
    """Thin provisioning: writes take space from a pool, and fail when it is empty (SBC-3 §4.7.3).

    The full pool is SPACE ALLOCATION FAILED WRITE PROTECT (27/07), until something is unmapped or
    `pool_bytes` grows. When `soft_threshold_bytes` are in use, listeners are told once, and again
    after use has been below that.
    """

    def __init__(
        self, below: Disk, pool_bytes: int, *, soft_threshold_bytes: int | None = None
    ) -> None:
        super().__init__(below)
        self.pool_bytes = pool_bytes
        self.soft_threshold_bytes = soft_threshold_bytes
        self._chunk_bytes = below.geometry.discard_granularity_bytes
        self._taken: set[int] = set()
        self._listeners: list[Callable[[], None]] = []
        self._above_threshold = False

    @property
    def used_bytes(self) -> int:
        return len(self._taken) * self._chunk_bytes

    def on_threshold(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def write_now(self, offset: int, source: Buffer) -> bool:
        return self._take(offset, len(source)) and self.below.write_now(offset, source)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self._check_write(offset, len(source))
        self._take_or_fail(offset, len(source))
        await self.below.write(offset, source, fua=fua)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._check_write(offset, length)
        if may_unmap:
            # Before the wait: a write that comes meanwhile takes its space again.
            self._give_back(offset, length)
        else:
            self._take_or_fail(offset, length)
        await self.below.write_zeroes(offset, length, may_unmap=may_unmap)

    def _take_or_fail(self, offset: int, length: int) -> None:
        if not self._take(offset, length):
            reason = SPACE_ALLOCATION_FAILED
            raise ScsiError(
                "the pool of the thin device is full",
                status=Status.CHECK_CONDITION,
                sense_key=reason.key,
                asc=reason.asc,
                ascq=reason.ascq,
            )

    def _take(self, offset: int, length: int) -> bool:
        """All that the range needs, or nothing."""
        chunk = self._chunk_bytes
        wanted = set(range(offset // chunk, -(-(offset + length) // chunk))) - self._taken
        if wanted and self.used_bytes + len(wanted) * chunk > self.pool_bytes:
            return False
        self._taken |= wanted
        self._look_at_threshold()
        return True

    def _give_back(self, offset: int, length: int) -> None:
        """Chunks that lie inside the range; their neighbours keep what is theirs."""
        chunk = self._chunk_bytes
        self._taken -= set(range(-(-offset // chunk), (offset + length) // chunk))
        self._look_at_threshold()

    def _look_at_threshold(self) -> None:
        limit = self.soft_threshold_bytes
        above = limit is not None and self.used_bytes >= limit
        if above and not self._above_threshold:
            for listener in self._listeners:
                listener()
        self._above_threshold = above


class FlawedDevice(_Layer):
    """Blocks go bad on request: MEDIUM ERROR, with the first bad LBA as INFORMATION (SPC-4 §4.5).

    A block that can't be read is good again once it has been written; one that can't be written
    stays bad until `mend`. A command that meets a bad block does nothing at all.
    """

    def __init__(self, below: Disk) -> None:
        super().__init__(below)
        self._unreadable: set[int] = set()
        self._unwritable: set[int] = set()

    def spoil(self, lba: int, blocks: int = 1, *, reads: bool = True, writes: bool = False) -> None:
        """Blocks from `lba` on go bad for reads, for writes, or for both."""
        assert blocks <= FLAWS_MAX
        if reads:
            self._unreadable.update(range(lba, lba + blocks))
        if writes:
            self._unwritable.update(range(lba, lba + blocks))

    def mend(self) -> None:
        """Every block is good again; what it held is still there."""
        self._unreadable.clear()
        self._unwritable.clear()

    @property
    def flaws(self) -> frozenset[int]:
        """LBAs that are bad in one way or the other."""
        return frozenset(self._unreadable | self._unwritable)

    def read_now(self, offset: int, target: memoryview) -> bool:
        if self._unreadable and self._first(self._unreadable, offset, len(target)) is not None:
            return False
        return self.below.read_now(offset, target)

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self.geometry, offset, len(target))
        self._meet(self._unreadable, offset, len(target), writing=False)
        await self.below.read_into(offset, target)

    def write_now(self, offset: int, source: Buffer) -> bool:
        if self._unwritable and self._first(self._unwritable, offset, len(source)) is not None:
            return False
        done = self.below.write_now(offset, source)
        if done:
            self._rewritten(offset, len(source))
        return done

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self._check_write(offset, len(source))
        self._meet(self._unwritable, offset, len(source), writing=True)
        await self.below.write(offset, source, fua=fua)
        self._rewritten(offset, len(source))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._check_write(offset, length)
        self._meet(self._unwritable, offset, length, writing=True)
        await self.below.write_zeroes(offset, length, may_unmap=may_unmap)
        self._rewritten(offset, length)

    def _blocks(self, offset: int, length: int) -> range:
        block = self.geometry.logical_block_bytes
        return range(offset // block, (offset + length) // block)

    def _first(self, bad: set[int], offset: int, length: int) -> int | None:
        reached = self._blocks(offset, length)
        return min((lba for lba in bad if lba in reached), default=None)

    def _meet(self, bad: set[int], offset: int, length: int, *, writing: bool) -> None:
        lba = self._first(bad, offset, length)
        if lba is None:
            return
        reason = WRITE_ERROR if writing else UNRECOVERED_READ_ERROR
        error = MediumError(
            f"block {lba} is bad",
            status=Status.CHECK_CONDITION,
            sense_key=reason.key,
            asc=reason.asc,
            ascq=reason.ascq,
        )
        error.lba = lba
        raise error

    def _rewritten(self, offset: int, length: int) -> None:
        if self._unreadable:
            self._unreadable.difference_update(self._blocks(offset, length))
