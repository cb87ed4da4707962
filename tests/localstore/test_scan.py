"""Reading a log back: where it ends, and whether that is an end, a loss of power, or damage."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from orion_iscsifs.localstore import record, segment
from orion_iscsifs.localstore.record import Kind
from orion_iscsifs.localstore.scan import Found, Scan
from orion_iscsifs.localstore.store import LogStore
from tests.cache.logs import KIB, MIB, Size, superblock

SMALL = Size(segment_bytes=64 * KIB, segments=4)
SYNCED, AFTER = 20, 6
"""Records that were committed, and records appended after that: the first of them says so."""


async def write(folder: Path, *, synced: int = SYNCED, after: int = AFTER) -> list[Found]:
    """A log with so many records of 4 KiB, each in an epoch of its own; where they are."""
    store = LogStore.create(folder, superblock(MIB, SMALL))
    places = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.keep_prepared)
        for number in range(synced + after):
            content = bytes([number + 1]) * 4096
            while (
                store.append(Kind.DATA, number + 1, number * 4096, 4096, content, reserve=True)
                is None
            ):
                await store.room.park()
            if number + 1 == synced:
                await store.commit()
        nursery.cancel_scope.cancel()
    with opened(folder) as (_, scan):
        places = list(scan.records)
    store.close()
    assert len(places) == synced + after
    return places


@contextmanager
def opened(folder: Path) -> Iterator[tuple[LogStore, Scan]]:
    store = LogStore.open(folder, shared=True)
    try:
        yield store, store.scan()
    finally:
        store.close()


def read(folder: Path) -> tuple[list[int], Scan]:
    """The sequence numbers that count, and the verdict."""
    with opened(folder) as (_, scan):
        return [found.header.seq for found in scan.records], scan


def spoil(folder: Path, found: Found, at: int, content: bytes) -> None:
    """Overwrite bytes of a record; `at` is counted from its header."""
    path = folder / segment.file_name(found.place.slot)
    with path.open("r+b") as file:
        file.seek(found.place.position - record.HEADER_BYTES + at)
        file.write(content)


def damage(folder: Path, found: Found, at: int) -> None:
    """Turn all bits of one byte."""
    path = folder / segment.file_name(found.place.slot)
    content = path.read_bytes()[found.place.position - record.HEADER_BYTES + at]
    spoil(folder, found, at, bytes([content ^ 0xFF]))


async def test_a_whole_log(tmp_path: Path) -> None:
    await write(tmp_path)
    numbers, scan = read(tmp_path)
    assert numbers == list(range(SYNCED + AFTER))
    assert (scan.damage, scan.torn_bytes, scan.durable) == ("", 0, SYNCED)
    assert scan.last_epoch == SYNCED + AFTER


@pytest.mark.parametrize("at", [0, 5, 20, 40, 62, record.HEADER_BYTES, record.HEADER_BYTES + 4095])
@pytest.mark.parametrize("number", [0, 7, SYNCED - 1])
async def test_damage_of_what_was_synced_is_named(tmp_path: Path, number: int, at: int) -> None:
    places = await write(tmp_path)
    damage(tmp_path, places[number], at)
    numbers, scan = read(tmp_path)
    assert numbers == list(range(number))
    assert f"from number {number} on" in scan.damage


@pytest.mark.parametrize("at", [0, 20, 62, record.HEADER_BYTES + 100])
async def test_an_end_that_was_not_synced_is_torn(tmp_path: Path, at: int) -> None:
    places = await write(tmp_path)
    damage(tmp_path, places[SYNCED + 2], at)
    numbers, scan = read(tmp_path)
    assert numbers == list(range(SYNCED + 2))
    assert not scan.damage
    assert scan.torn_bytes > 0


async def test_what_is_zeroed_at_the_end_was_never_there(tmp_path: Path) -> None:
    places = await write(tmp_path, after=0)
    for found in places[-3:]:
        spoil(tmp_path, found, 0, bytes(found.header.size_bytes))
    numbers, scan = read(tmp_path)
    # Nothing says that they were durable: the last flush leaves no mark of its own.
    assert (numbers, scan.damage) == (list(range(SYNCED - 3)), "")


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_segment_that_is_missing_is_damage(tmp_path: Path, lost: int) -> None:
    places = await write(tmp_path)
    slots = list(dict.fromkeys(found.place.slot for found in places))
    assert len(slots) == 2
    path = tmp_path / segment.file_name(slots[lost])
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    numbers, scan = read(tmp_path)
    first = next(f.header.seq for f in places if f.place.slot == slots[lost])
    assert numbers == list(range(first))
    assert bool(scan.damage) == (first < scan.durable)
    assert lost or scan.damage


async def test_a_truncated_segment_is_damage(tmp_path: Path) -> None:
    places = await write(tmp_path)
    os.truncate(tmp_path / segment.file_name(places[5].place.slot), places[5].place.position + 9)
    numbers, scan = read(tmp_path)
    assert numbers == list(range(5))
    assert scan.damage


async def test_another_stores_records_are_not_taken(tmp_path: Path) -> None:
    """Bytes of an earlier use of the same file, by a store of the same layout."""
    await write(tmp_path / "a")
    await write(tmp_path / "b", synced=3, after=0)
    for slot in range(SMALL.segments):
        name = segment.file_name(slot)
        mine, other = (tmp_path / "b" / name).read_bytes(), (tmp_path / "a" / name).read_bytes()
        used = segment.START_BYTES + 3 * record.record_bytes(4096)
        (tmp_path / "b" / name).write_bytes(mine[:used] + other[used:])
    numbers, scan = read(tmp_path / "b")
    assert (numbers, scan.damage, scan.torn_bytes) == ([0, 1, 2], "", 0)


@pytest.mark.parametrize("seed", range(60))
async def test_any_bit_flip_cuts_or_is_harmless(tmp_path: Path, seed: int) -> None:
    """Never a record with other content than was written; a cut of what was synced is said."""
    rng = random.Random(seed)
    places = await write(tmp_path)
    path = tmp_path / segment.file_name(rng.choice(places).place.slot)
    content = bytearray(path.read_bytes())
    used = max(f.place.position + 4096 for f in places)
    bit = rng.randrange(8 * min(used, len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with opened(tmp_path) as (store, scan):
        found = list(scan.records)
        for header, place in found:
            payload = await store.read(place, header.payload_checksum, header.stored)
            assert payload == bytes([header.seq + 1]) * 4096
    assert [f.header.seq for f in found] == list(range(len(found)))
    assert scan.damage or len(found) >= SYNCED
