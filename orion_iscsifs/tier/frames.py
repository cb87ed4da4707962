"""What a frame becomes on disk: pages put together, zeroes left out, compressed if it helps. Pure.

`content` is always the pages of a mask, one after the other in ascending order.
"""

from typing import Final

import zstandard

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_BYTES, PAGE_SHIFT, page_runs
from orion_iscsifs.tier import record
from orion_iscsifs.tier.record import BadRecord

SAVED_SHARE_MIN: Final = 8
"""Less than one such part saved (12.5 %): stored as it is, and read without work."""
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


def compress(content: bytes, compressor: zstandard.ZstdCompressor | None) -> tuple[int, bytes]:
    """The codec, and what to store. None: not compressed."""
    if compressor is not None:
        packed = compressor.compress(content)
        if len(packed) <= len(content) - len(content) // SAVED_SHARE_MIN:
            return record.ZSTD, packed
    return record.RAW, content


def decompress(
    codec: int, payload: Buffer, raw: int, decompressor: zstandard.ZstdDecompressor
) -> Buffer:
    """The content. Raises BadRecord. A decompressor serves one thread at a time."""
    if codec == record.RAW:
        if len(payload) != raw:
            raise BadRecord("a payload of another length than its header says")
        return payload
    try:
        # What the payload itself says decides how much memory is taken: look first.
        if zstandard.frame_content_size(payload) != raw:
            raise BadRecord("a payload of another length than its header says")
        content = decompressor.decompress(payload)
    except zstandard.ZstdError:
        raise BadRecord("a payload that can't be decompressed") from None
    if len(content) != raw:
        raise BadRecord("a payload of another length than its header says")
    return content
