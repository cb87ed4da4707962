"""What a frame becomes on disk: pages put together, zeroes left out, compressed if it helps. Pure.

`content` is always the pages of a mask, one after the other in ascending order.
"""

from collections.abc import Sequence
from typing import Final, cast

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


def compress_all(
    contents: list[bytes], compressor: zstandard.ZstdCompressor
) -> list[tuple[int, Buffer]]:
    """For each the codec, and what to store.

    All in one call: the interpreter's lock is given up, and waited for, once.
    """
    if not contents:
        return []
    sources: list[Buffer] = list(contents)
    found = compressor.multi_compress_to_buffer(sources)
    packed: list[Buffer] = [_view(found[at]) for at in range(len(contents))]
    return [
        (record.ZSTD, small)
        if len(small) <= len(content) - len(content) // SAVED_SHARE_MIN
        else (record.RAW, content)
        for content, small in zip(contents, packed, strict=True)
    ]


def decompress_all(
    stored: Sequence[tuple[int, Buffer, int]], decompressor: zstandard.ZstdDecompressor
) -> list[Buffer | BadRecord]:
    """As `decompress` for each codec, payload and length, in one call as `compress_all`."""
    together = [at for at, one in enumerate(stored) if _is_as_long_as_it_says(*one)]
    done: dict[int, Buffer] = {}
    if len(together) > 1:
        try:
            found = decompressor.multi_decompress_to_buffer([stored[at][1] for at in together])
        except (zstandard.ZstdError, ValueError):
            pass  # one of them is damaged: which one shows below
        else:
            done = {at: _view(found[number]) for number, at in enumerate(together)}
    return [done[at] if at in done else _tried(*one, decompressor) for at, one in enumerate(stored)]


def _view(segment: object) -> memoryview:
    # A BufferSegment is a buffer; only its stub does not say so.
    return memoryview(cast("bytes", segment))


def _is_as_long_as_it_says(codec: int, payload: Buffer, raw: int) -> bool:
    if codec != record.ZSTD:
        return False
    try:
        return int(zstandard.frame_content_size(payload)) == raw
    except zstandard.ZstdError:
        return False


def _tried(
    codec: int, payload: Buffer, raw: int, decompressor: zstandard.ZstdDecompressor
) -> Buffer | BadRecord:
    try:
        return decompress(codec, payload, raw, decompressor)
    except BadRecord as error:
        return error


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
