"""What a record has for content: parts of 16 KiB, each compressed by itself. Pure.

A read of 4 KiB out of a record of 64 need not decompress all of it. The payload of codec `ZSTD` is

    for each part its length as stored (2 bytes), then the parts, one after the other

and a part that is as long as what it holds is stored as it is. The payload of codec `RAW` is the
content itself. Damage shows when a part is decompressed: a checksum over all of it has been good
before, so it is rare, and a miss then.
"""

from collections.abc import Iterable
from struct import Struct
from typing import Final, cast

import zstandard

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_BYTES
from orion_iscsifs.tier import record
from orion_iscsifs.tier.record import BadRecord

PART_BYTES: Final = 16 << 10
"""16 KiB compress to 3 % more than 64 KiB do (of programs), and cost a third to read from."""
SAVED_SHARE_MIN: Final = 8
"""Less than one such part saved (12.5 %): stored as it is, and read without work."""
MANY_PARTS: Final = 32
"""So many are worth the start of threads."""
_LENGTHS: Final = tuple(Struct(f"<{count}H") for count in range(FRAME_BYTES // PART_BYTES + 1))


class Packed:
    """A record's content as stored, taken apart as far as it was asked for.

    Raises BadRecord from everything: a length that can't be.
    """

    __slots__ = ("_contents", "_parts", "raw")

    def __init__(self, codec: int, payload: Buffer, raw: int) -> None:
        """`raw`: bytes of content."""
        self.raw: Final = raw
        self._parts = [payload] if codec == record.RAW else _parts(payload, raw)
        self._contents: list[Buffer | None] = [None] * len(self._parts)
        if codec == record.RAW:
            if len(payload) != raw:
                raise BadRecord("a payload of another length than its header says")
            self._contents[0] = payload
            return
        for number, part in enumerate(self._parts):
            if len(part) == _part_raw(raw, number):
                self._contents[number] = part

    def lacking(self, start: int, end: int) -> list[int]:
        """The parts with a byte of `[start, end)` of the content that are still to be unpacked."""
        if len(self._parts) == 1:
            return [] if self._contents[0] is not None else [0]
        numbers = range(start // PART_BYTES, (end - 1) // PART_BYTES + 1)
        return [number for number in numbers if self._contents[number] is None]

    def stored(self, number: int) -> Buffer:
        """A part to decompress. Raises BadRecord if it says that it becomes something else.

        What it says itself decides how much memory is taken, so it is looked at first.
        """
        part = self._parts[number]
        try:
            length = zstandard.frame_content_size(part)
        except zstandard.ZstdError:
            raise BadRecord("a payload that can't be decompressed") from None
        if length != _part_raw(self.raw, number):
            raise BadRecord("a payload of another length than its header says")
        return part

    def unpacked(self, number: int, content: Buffer) -> None:
        """A part's content. Raises BadRecord if it is not as long as it should be."""
        if len(content) != _part_raw(self.raw, number):
            raise BadRecord("a payload of another length than its header says")
        self._contents[number] = content

    def copy(self, start: int, end: int, target: memoryview) -> None:
        """These bytes of the content, none of which is `lacking`."""
        whole = self._contents[0]
        if len(self._parts) == 1:
            assert whole is not None
            target[:] = memoryview(whole)[start:end]
            return
        at = start
        while at < end:
            number, skipped = divmod(at, PART_BYTES)
            content = self._contents[number]
            assert content is not None
            until = min(end, (number + 1) * PART_BYTES)
            target[at - start : until - start] = memoryview(content)[skipped : skipped + until - at]
            at = until


def pack_all(
    contents: list[bytes], compressor: zstandard.ZstdCompressor, *, threads: int = 1
) -> list[tuple[int, Buffer]]:
    """For each the codec, and what to store.

    All in one call: the interpreter's lock is given up, and waited for, once. `threads`: that share
    the work.
    """
    if not contents:
        return []
    sources: list[Buffer] = [
        memoryview(content)[at : at + PART_BYTES]
        for content in contents
        for at in range(0, len(content), PART_BYTES)
    ]
    found = compressor.multi_compress_to_buffer(sources, threads=threads if threads > 1 else 0)
    parts = [
        source if len(found[at]) >= len(source) else _view(found[at])
        for at, source in enumerate(sources)
    ]
    packed: list[tuple[int, Buffer]] = []
    first = 0
    for content in contents:
        count = -(-len(content) // PART_BYTES)
        packed.append(_joined(content, parts[first : first + count]))
        first += count
    return packed


def _joined(content: bytes, parts: list[Buffer]) -> tuple[int, Buffer]:
    lengths = _LENGTHS[len(parts)]
    stored = lengths.size + sum(map(len, parts))
    if stored > len(content) - len(content) // SAVED_SHARE_MIN:
        return record.RAW, content
    return record.ZSTD, b"".join((lengths.pack(*map(len, parts)), *parts))


def unpack_all(
    wanted: Iterable[tuple[Packed, int]],
    decompressor: zstandard.ZstdDecompressor,
    *,
    threads: int = 1,
) -> list[Packed]:
    """Unpack these parts, all in one call; those records that are damaged.

    A decompressor serves one thread at a time. `threads`: that share the work, if it is much.
    """
    bad: list[Packed] = []
    good: list[tuple[Packed, int, Buffer]] = []
    for packed, number in wanted:
        try:
            good.append((packed, number, packed.stored(number)))
        except BadRecord:
            bad.append(packed)
    contents = _decompressed([part for _, _, part in good], decompressor, threads)
    for (packed, number, _), content in zip(good, contents, strict=True):
        try:
            packed.unpacked(number, content)
        except BadRecord:
            bad.append(packed)
    return bad


def _decompressed(
    parts: list[Buffer], decompressor: zstandard.ZstdDecompressor, threads: int
) -> list[Buffer]:
    """Nothing for a part that is damaged."""
    if len(parts) > 1:
        sharing = threads if threads > 1 and len(parts) >= MANY_PARTS else 0
        try:
            found = decompressor.multi_decompress_to_buffer(parts, threads=sharing)
        except (zstandard.ZstdError, ValueError):
            pass  # one of them is damaged: which one shows below
        else:
            return [_view(found[at]) for at in range(len(parts))]
    return [_tried(part, decompressor) for part in parts]


def _tried(part: Buffer, decompressor: zstandard.ZstdDecompressor) -> Buffer:
    try:
        return decompressor.decompress(part)
    except zstandard.ZstdError:
        return b""


def unpack(packed: Packed, decompressor: zstandard.ZstdDecompressor) -> bytes:
    """The whole content. Raises BadRecord."""
    lacking = [(packed, number) for number in packed.lacking(0, packed.raw)]
    if unpack_all(lacking, decompressor):
        raise BadRecord("a payload that can't be decompressed")
    content = bytearray(packed.raw)
    packed.copy(0, packed.raw, memoryview(content))
    return bytes(content)


def _parts(payload: Buffer, raw: int) -> list[Buffer]:
    lengths = _LENGTHS[-(-raw // PART_BYTES)]
    if len(payload) < lengths.size:
        raise BadRecord("a payload that is too short")
    view, at = memoryview(payload), lengths.size
    parts: list[Buffer] = []
    for length in lengths.unpack_from(payload):
        parts.append(view[at : at + length])
        at += length
    if at != len(payload):
        raise BadRecord("a payload whose parts are not as long as they say")
    return parts


def _part_raw(raw: int, number: int) -> int:
    return min(raw - number * PART_BYTES, PART_BYTES)


def _view(segment: object) -> memoryview:
    # A BufferSegment is a buffer; only its stub does not say so.
    return memoryview(cast("bytes", segment))
