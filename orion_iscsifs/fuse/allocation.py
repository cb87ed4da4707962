"""What `fallocate` on a device file does: what it does on a block device (block/fops.c's rules).

| mode                              | becomes                                                      |
| --------------------------------- | ------------------------------------------------------------ |
| PUNCH_HOLE (with KEEP_SIZE)       | `write_zeroes(may_unmap=True)`, where that gives space back  |
| ZERO_RANGE, with or without it    | `write_zeroes(may_unmap=False)`: the blocks stay allocated   |
| anything else                     | EOPNOTSUPP                                                   |

A loop device sends its discards as PUNCH_HOLE, and whoever punches a hole may read it back: so it
is EOPNOTSUPP where the device can't give blocks back that read as zeroes, instead of terabytes of
written zeroes. The loop device then has no discard.
"""

import errno
from typing import Final

from pyfuse3 import FUSEError

from orion_iscsifs.block.device import BlockDevice

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10
STEP_BYTES: Final = 1 << 30
"""Done at a time: nothing else may use that range meanwhile."""


async def allocate(device: BlockDevice, mode: int, offset: int, length: int) -> None:
    """Raises FUSEError, or what the device raises."""
    geometry = device.geometry
    punches = mode == PUNCH_HOLE | KEEP_SIZE
    if not punches and mode & ~KEEP_SIZE != ZERO_RANGE:
        raise FUSEError(errno.EOPNOTSUPP)
    if punches and not (geometry.discard_granularity_bytes and geometry.zeroes_after_discard):
        raise FUSEError(errno.EOPNOTSUPP)
    if offset < 0 or length <= 0:
        raise FUSEError(errno.EINVAL)
    if geometry.read_only:
        raise FUSEError(errno.EROFS)
    end = offset + length
    if end > geometry.size_bytes and not mode & KEEP_SIZE:
        raise FUSEError(errno.ENOSPC)
    for start in range(offset, min(end, geometry.size_bytes), STEP_BYTES):
        part = min(STEP_BYTES, min(end, geometry.size_bytes) - start)
        await device.write_zeroes(start, part, may_unmap=punches)
