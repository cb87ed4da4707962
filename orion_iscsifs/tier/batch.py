"""The work of the thread that appends: frames become records, and records are written.

It gets copies of all that may change meanwhile, and a place on the disk that nothing else uses.
What it has written counts only when entries say so; the trio thread decides that afterwards.
"""

import os
import time
from dataclasses import dataclass
from typing import Final

import zstandard

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_BYTES
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import OVERHEAD_BYTES
from orion_iscsifs.tier import frames, record
from orion_iscsifs.tier.index import Row
from orion_iscsifs.tier.packed import pack_all
from orion_iscsifs.tier.reading import RecordReader
from orion_iscsifs.tier.record import Header
from orion_iscsifs.tier.seals import SegmentSeals
from orion_iscsifs.workers import threads_to_share

_PAD: Final = bytes(record.ALIGN_BYTES)


@dataclass(slots=True, eq=False)
class Item:
    """A frame to append."""

    frame: int
    mask: int
    """The pages in `buffer`."""
    buffer: memoryview | None
    """None: only what is on disk is written again."""
    old: Row | None = None
    """Where other pages of it are on disk; `valid` as it was when the batch began."""
    compress: bool = True
    # What has become of it:
    valid: int = 0
    """The pages in the record; 0: nothing was written."""
    is_zero: bool = False
    """The pages are zeroes, and there is no record."""
    place: int = 0
    raw: int = 0
    stored: int = 0
    seq: int = 0
    saved: bool = False
    """Compression was worth it."""


@dataclass(slots=True)
class Job:
    """A batch, and where it goes. There is room for all of it."""

    items: list[Item]
    descriptor: int
    number: int
    position: int
    store_id: int
    life: int
    seq: int
    """Of the first item; the others have the next ones."""
    level: int
    """0: not compressed."""
    # What it took:
    end: int = 0
    """Where the next record goes."""
    compress_s: float = 0.0
    write_s: float = 0.0


class BatchWriter:
    """Carries out jobs, one at a time."""

    def __init__(self, reader: RecordReader, seals: SegmentSeals) -> None:
        self._reader = reader
        self._seals = seals
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}
        self._threads = threads_to_share()

    def run(self, job: Job) -> None:
        """Blocks; raises OSError."""
        began = time.perf_counter()
        parts: list[Buffer] = []
        position = job.position
        for item, packed in zip(job.items, self._pack(job), strict=True):
            if packed is None:
                continue
            codec, content = packed
            item.place = position
            position += self._encode(job, item, codec, content, parts)
        job.end = position
        written = time.perf_counter()
        job.compress_s = written - began
        if parts:
            length = position - job.position
            if os.pwritev(job.descriptor, parts, job.position) != length:
                raise OSError(28, os.strerror(28))
        job.write_s = time.perf_counter() - written

    def _pack(self, job: Job) -> list[tuple[int, Buffer] | None]:
        """Codec and content of each record; None: there is none."""
        packed: list[tuple[int, Buffer] | None] = []
        to_compress: list[tuple[int, bytes]] = []
        for number, item in enumerate(job.items):
            item.seq = job.seq + number
            if item.buffer is None:
                packed.append(self._again(item))
                continue
            content = self._content(item)
            packed.append(None if item.is_zero else (record.RAW, content))
            if item.compress and job.level and not item.is_zero:
                to_compress.append((number, content))
        if to_compress:
            contents = [content for _, content in to_compress]
            done = pack_all(contents, self._compressor(job.level), threads=self._threads)
            for (number, _), result in zip(to_compress, done, strict=True):
                packed[number] = result
                job.items[number].saved = result[0] != record.RAW
        return packed

    def _content(self, item: Item) -> bytes:
        """Of a record; sets `valid`, and `raw` or `is_zero`."""
        content, item.valid = self._merged(item)
        item.is_zero = frames.is_zero(content)
        item.raw = 0 if item.is_zero else len(content)
        return content

    def _merged(self, item: Item) -> tuple[bytes, int]:
        """The new pages, and what the disk has besides them; with the mask of both."""
        assert item.buffer is not None
        old = item.old
        rest = 0 if old is None else old.valid & ~item.mask
        if old is None or not rest:
            return frames.gather(item.buffer, item.mask), item.mask
        whole = memoryview(bytearray(FRAME_BYTES))
        if old.size_bytes:
            try:
                header, content = self._reader.check(item.frame, old, self._reader.raw(old))
            except (FileNotFoundError, OrionError):
                # A hit would find it out as well: then it is counted.
                return frames.gather(item.buffer, item.mask), item.mask
            frames.spread(content, header.valid, rest, whole)
        frames.spread(frames.gather(item.buffer, item.mask), item.mask, item.mask, whole)
        return frames.gather(whole, item.mask | rest), item.mask | rest

    def _again(self, item: Item) -> tuple[int, Buffer] | None:
        """A record that is written once more, compressed as it is."""
        old = item.old
        assert old is not None
        if not old.size_bytes:
            item.valid, item.is_zero = old.valid, True
            return None
        try:
            header, payload = self._reader.open(item.frame, old, self._reader.raw(old))
        except (FileNotFoundError, OrionError):
            return None
        item.valid, item.raw = header.valid, header.raw
        return header.codec, payload

    def _encode(
        self, job: Job, item: Item, codec: int, content: Buffer, parts: list[Buffer]
    ) -> int:
        """Add the record to the parts; its size."""
        seal = self._seals.of(job.number)
        item.stored = len(content) + (OVERHEAD_BYTES if seal is not None else 0)
        header = Header(
            store_id=job.store_id,
            number=job.number,
            place=item.place,
            frame=item.frame,
            valid=item.valid,
            codec=codec,
            raw=item.raw,
            stored=item.stored,
            life=job.life,
            seq=item.seq,
        )
        head, payload = record.encode(header, content, seal)
        size = header.size_bytes
        parts += head, payload, _PAD[: size - len(head) - len(payload)]
        return size

    def _compressor(self, level: int) -> zstandard.ZstdCompressor:
        found = self._compressors.get(level)
        if found is None:
            found = self._compressors[level] = zstandard.ZstdCompressor(level=level)
        return found
