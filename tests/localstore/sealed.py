"""Logs with one record of every kind, and ways to damage them on purpose."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import crc32c
import trio

from orion_iscsifs.localstore import record, segment
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.record import Flag, Kind, UnknownRecord
from orion_iscsifs.localstore.scan import Found, Scan
from orion_iscsifs.localstore.store import LogStore
from tests.cache.logs import KIB, MIB, Size, superblock

KEY = b"a passphrase"
SMALL = Size(segment_bytes=128 * KIB, segments=4)
TEXT = b"SECRET-MARKER of a text that compresses well. "


@dataclass
class Written:
    """A log that was closed; of each record what it says, and where it is."""

    folder: Path
    key: bytes | None
    contents: dict[int, bytes]
    places: list[Found]
    durable: int

    def path(self, found: Found) -> Path:
        return self.folder / segment.file_name(found.place.slot)

    def start(self, found: Found) -> int:
        return found.place.position - record.HEADER_BYTES


async def fill(folder: Path, key: bytes | None, *, small: bool = False, after: int = 3) -> Written:
    """Records of all kinds, each in an epoch of its own; the last few were not synced.

    `small`: all of 512 bytes, so that each of their bytes can be tried.
    """
    rng = random.Random(1)
    store = LogStore.create(folder, superblock(MIB, SMALL), key)
    contents: dict[int, bytes] = {}

    async def add(kind: Kind, content: bytes, offset: int, flags: Flag = Flag.NONE) -> None:
        seq = store.next_seq
        packed = await store.pack(offset, content)
        length = len(content) if kind is Kind.DATA else 4096 * (kind is Kind.ZERO)
        while (
            store.append(
                kind, seq + 1, offset, length, content, packed=packed, flags=flags, reserve=True
            )
            is None
        ):
            await store.room.park()
        contents[seq] = content

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.keep_prepared)
        sizes = [512] * 6 if small else [512, 4096, 40 * KIB, 64 * KIB, 4096, 64 * KIB]
        for number, size in enumerate(sizes):
            content = (TEXT * (size // len(TEXT) + 1))[:size]
            if number % 2:
                content = rng.randbytes(size)
            await add(Kind.DATA, content, number * 128 * KIB)
        await add(Kind.ZERO, b"", 7 * 128 * KIB, Flag.MAY_UNMAP)
        await add(Kind.DESTAGED, b"", 0)
        await add(Kind.DATA, rng.randbytes(512), 512)
        await store.commit()
        durable = store.durable
        for number in range(after):
            await add(Kind.DATA, rng.randbytes(512), 1024 + number * 512)
        nursery.cancel_scope.cancel()
    store.close()
    with opened(folder, key) as (_, scan):
        places = list(scan.records)
        assert not scan.damage
    assert len(places) == len(contents)
    return Written(folder, key, contents, places, durable)


@contextmanager
def opened(folder: Path, key: bytes | None) -> Iterator[tuple[LogStore, Scan]]:
    store = LogStore.open(folder, shared=True)
    try:
        store.unlock(key)
        yield store, store.scan()
    finally:
        store.close()


async def verify(written: Written, folder: Path | None = None) -> tuple[int, str]:
    """Read it as a mount does: how many records there are, and what is wrong, in words.

    Nothing may be there that was not written just there, and no loss of what was synced may go
    unsaid.
    """
    with opened(folder or written.folder, written.key) as (store, scan):
        count, refused = 0, ""
        try:
            for found, original in zip(scan.records, written.places, strict=False):
                assert found == original, "another record than the one that was written"
                if found.header.kind is Kind.DATA:
                    with suppress(LogError):
                        content = await store.read(
                            found.place, found.header.payload_checksum, found.header.length
                        )
                        assert content == written.contents[found.header.seq]
                count += 1
        except UnknownRecord as error:
            refused = str(error)
        damage = scan.damage or refused
        assert damage or count >= written.durable
        return count, damage


@contextmanager
def changed(path: Path, at: int, content: bytes) -> Iterator[None]:
    """Other bytes for the time of the body."""
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        before = file.read(len(content))
        file.seek(at)
        file.write(content)
        try:
            yield
        finally:
            file.seek(at)
            file.write(before)


def with_checksums(image: bytes, stored: int) -> bytes:
    """A record as somebody would write it who knows the format, and not the key."""
    head = image[:56] + crc32c.crc32c(image[64 : 64 + stored]).to_bytes(4, "little")
    return head + crc32c.crc32c(head).to_bytes(4, "little") + image[64:]


def with_segment_checksum(page: bytes, size: int = 96) -> bytes:
    return page[:size] + crc32c.crc32c(page[:size]).to_bytes(4, "little") + page[size + 4 :]


def with_superblock_checksum(page: bytes) -> bytes:
    return page[:4092] + crc32c.crc32c(page[:4092]).to_bytes(4, "little")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
