"""fallocate(2) on a device file: what a block device node does with it. Pure.

A loop device maps its discards to PUNCH_HOLE and its write-zeroes to ZERO_RANGE or PUNCH_HOLE, both
with KEEP_SIZE; `blkdiscard`, `fstrim`, `mkfs` and `fallocate` end up here.

* PUNCH_HOLE gives the blocks back and leaves zeroes. A LUN that can't unmap answers EOPNOTSUPP:
  a loop device then switches its discards off, where we would otherwise write terabytes of zeroes.
* ZERO_RANGE leaves zeroes and keeps the blocks (BLKZEROOUT, FALLOC_FL_ZERO_RANGE).
* Everything else, preallocation included, is EOPNOTSUPP: a LUN has neither size nor holes of ours.
"""

import errno
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.block.device import Geometry

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10

STATFS_BLOCK_BYTES_MIN: Final = 4096
STATFS_BLOCK_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Zeroing:
    """The range that has to read as zeroes."""

    offset: int
    length: int
    may_unmap: bool


def plan(mode: int, offset: int, length: int, geometry: Geometry) -> Zeroing | int:
    """What to do, or the errno of the refusal. The kernel has checked that nothing is negative."""
    if geometry.read_only:
        return errno.EROFS
    if offset < 0 or length <= 0:
        return errno.EINVAL
    if mode == PUNCH_HOLE | KEEP_SIZE:
        if not geometry.discard_granularity_bytes:
            return errno.EOPNOTSUPP
    elif mode & ~KEEP_SIZE != ZERO_RANGE:
        return errno.EOPNOTSUPP
    room = geometry.size_bytes - offset
    # Without KEEP_SIZE the file would have to grow.
    if room <= 0 or (length > room and not mode & KEEP_SIZE):
        return errno.ENOSPC
    return Zeroing(offset, min(length, room), may_unmap=bool(mode & PUNCH_HOLE))


def statfs_block_bytes(discard_granularity_bytes: int) -> int:
    """f_bsize, which a loop device takes for its discard granularity: a power of two.

    A granularity beyond 1 MiB is not passed on: programs use f_bsize as a buffer size as well.
    """
    wanted = max(discard_granularity_bytes, STATFS_BLOCK_BYTES_MIN)
    return min(1 << (wanted - 1).bit_length(), STATFS_BLOCK_BYTES_MAX)
