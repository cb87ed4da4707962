"""What of a frame goes to the disk: its pages put together, and zeroes left out. Pure.

`content` is always the pages of a mask, one after the other in ascending order.
"""

from typing import Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_BYTES, PAGE_SHIFT, page_runs

_ZEROES: Final = bytes(FRAME_BYTES)


def gather(frame: Buffer, mask: int) -> bytes:
    """The content of `mask`, out of a whole frame."""
    view = memoryview(frame)
    return b"".join([view[start:end] for start, end in page_runs(mask)])


def spread(content: Buffer, mask: int, wanted: int, frame: memoryview) -> None:
    """Lay the pages in `wanted`, all of them in `mask`, out of `content` over a whole frame."""
    view = memoryview(content)
    for start, end in page_runs(wanted):
        at = (mask & ((1 << (start >> PAGE_SHIFT)) - 1)).bit_count() << PAGE_SHIFT
        frame[start:end] = view[at : at + end - start]


def is_zero(content: bytes) -> bool:
    """Whether all of it is zeroes."""
    return _ZEROES.startswith(content)
