"""The numbers of open files: each says by itself what it is the handle of. Pure.

The kernel keeps the number, and may come with it to a worker that has not opened the file: the one
that did has died (`cli/supervisor.py`). So the number has all that must be known of it.

    bits 0..27   the inode
    bit  28      opened with O_SYNC or O_DSYNC
    bits 29..62  a serial number, so that each open file has a number of its own
"""

from typing import Final

_INODE_BITS: Final = 28
_FUA: Final = 1 << _INODE_BITS
_SERIAL_AT: Final = _INODE_BITS + 1
_SERIAL_BITS: Final = 34


def handle_number(inode: int, *, fua: bool, serial: int) -> int:
    """`serial` may be any number; only its lowest bits count."""
    assert 0 < inode < _FUA
    return (serial % (1 << _SERIAL_BITS)) << _SERIAL_AT | (_FUA if fua else 0) | inode


def opened_by(number: int) -> tuple[int, bool]:
    """The inode, and whether writes are to be durable when they return."""
    return number & (_FUA - 1), bool(number & _FUA)
