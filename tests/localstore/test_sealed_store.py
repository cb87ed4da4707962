"""A sealed log: what is in it, what damage and forgery come to, and that no nonce comes twice."""

import random
import shutil
from pathlib import Path

import msgspec
import pytest

from orion_iscsifs.localstore import record, segment, superblock
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.record import Flag, Kind
from orion_iscsifs.localstore.seal import WrongKey
from orion_iscsifs.localstore.store import LogStore
from tests.localstore.sealed import (
    KEY,
    TEXT,
    changed,
    files_of,
    fill,
    opened,
    verify,
    with_checksums,
    with_segment_checksum,
)

pytestmark = pytest.mark.usefixtures("cheap_keys")


async def test_what_was_written_is_read_and_not_seen(tmp_path: Path) -> None:
    written = await fill(tmp_path, KEY)
    assert await verify(written) == (len(written.contents), "")
    kinds = {found.header.seq: found.header for found in written.places}
    assert all(Flag.SEALED in header.flags for header in kinds.values())
    # Text is compressed from 16 KiB on, what is random is not.
    assert [seq for seq, header in kinds.items() if Flag.COMPRESSED in header.flags] == [2]
    assert kinds[2].stored < kinds[2].length // 8
    for content in files_of(tmp_path).values():
        assert b"SECRET" not in content
        assert KEY not in content


async def test_an_open_log_is_in_plain_text(tmp_path: Path) -> None:
    """So that the test above can fail."""
    written = await fill(tmp_path, None)
    assert await verify(written) == (len(written.contents), "")
    assert any(TEXT in content for content in files_of(tmp_path).values())


async def test_without_the_key_it_can_be_checked_and_not_read(tmp_path: Path) -> None:
    written = await fill(tmp_path, KEY)
    store = LogStore.open(tmp_path, shared=True)
    try:
        scan = store.scan()
        found = list(scan.records)
        assert (found, scan.damage) == (written.places, "")
        with pytest.raises(LogError, match="damaged"):
            await store.read(found[0].place, found[0].header.payload_checksum, 512)
        with pytest.raises(LogError, match="sealed, and there is no key") as refused:
            store.unlock(None)
        assert "cache_key_file" in refused.value.advice
    finally:
        store.close()


async def test_a_wrong_key_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    await fill(tmp_path, KEY)
    before = files_of(tmp_path)
    store = LogStore.open(tmp_path)
    with pytest.raises(WrongKey, match="the key does not open it") as refused:
        store.unlock(KEY + b"\n")
    assert str(tmp_path) in str(refused.value)
    assert "cache_key_file" in refused.value.advice
    store.close()
    assert before == files_of(tmp_path)


# -- damage and forgery --------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "open"])
async def test_every_byte_of_every_record(tmp_path: Path, key: bytes | None) -> None:
    """Damaged by accident: it is never taken for something else."""
    written = await fill(tmp_path, key, small=True)
    rng = random.Random(1)
    for found in written.places:
        path, start = written.path(found), written.start(found)
        image = path.read_bytes()[start : start + record.HEADER_BYTES + found.header.stored]
        for at in range(0, len(image), 1 if found.header.kind is not Kind.DATA else 3):
            with changed(path, start + at, bytes([image[at] ^ 1 << rng.randrange(8)])):
                count, damage = await verify(written)
            assert count == found.header.seq
            assert bool(damage) == (found.header.seq < written.durable)


async def test_every_byte_of_a_record_by_somebody_who_knows_the_format(tmp_path: Path) -> None:
    """With checksums that are right again. It is said, even of what was not synced."""
    written = await fill(tmp_path, KEY, small=True)
    rng = random.Random(2)
    for found in written.places:
        path, start, stored = written.path(found), written.start(found), found.header.stored
        image = path.read_bytes()[start : start + record.HEADER_BYTES + stored]
        for at in (*range(56), *range(64, len(image), 1 if stored < 100 else 7)):
            flipped = bytearray(image)
            flipped[at] ^= 1 << rng.randrange(8)
            with changed(path, start, with_checksums(bytes(flipped), stored)):
                count, damage = await verify(written)
            assert count == found.header.seq
            # One with another owner or number is no record of this place, and one that is longer
            # than it is has a wrong checksum: as after a loss of power, if it was not synced.
            is_elsewhere = at < 4 or 8 <= at < 24 or 52 <= at < 56
            assert damage or (is_elsewhere and found.header.seq >= written.durable)


async def test_the_flags_of_a_record_can_not_be_taken_off(tmp_path: Path) -> None:
    """As of a record in plain text that somebody has put there."""
    written = await fill(tmp_path, KEY, small=True)
    for found in written.places:
        path, start = written.path(found), written.start(found)
        image = bytearray(path.read_bytes()[start : start + found.header.size_bytes])
        image[5] &= ~int(Flag.SEALED)
        with changed(path, start, with_checksums(bytes(image), found.header.stored)):
            count, damage = await verify(written)
        assert (count, "not sealed" in damage) == (found.header.seq, True)


async def test_records_that_change_places(tmp_path: Path) -> None:
    """As they are; with each other's header; with the other's place, and checksums to match."""
    written = await fill(tmp_path, KEY, small=True)
    one, other = written.places[1], written.places[3]
    path = written.path(one)
    size = one.header.size_bytes
    images = [path.read_bytes()[written.start(f) : written.start(f) + size] for f in (one, other)]
    assert len({f.header.stored for f in (one, other)}) == 1
    stored = one.header.stored
    swaps = [
        images[1],
        images[0][:64] + images[1][64:],
        with_checksums(images[0][:64] + images[1][64:], stored),
        with_checksums(images[1][:16] + images[0][16:24] + images[1][24:], stored),
        with_checksums(images[0][:40] + images[1][40:48] + images[0][48:], stored),
    ]
    for image in swaps:
        with changed(path, written.start(one), image):
            count, damage = await verify(written)
        assert count == one.header.seq
        assert damage


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "open"])
async def test_every_byte_of_a_segments_header(tmp_path: Path, key: bytes | None) -> None:
    written = await fill(tmp_path, key, small=True)
    path = written.path(written.places[0])
    page = path.read_bytes()[: segment.START_BYTES]
    for at in range(100):
        flipped = page[:at] + bytes([page[at] ^ 0x10]) + page[at + 1 :]
        with changed(path, 0, flipped):
            count, damage = await verify(written)
            assert (count, bool(damage)) == (0, True)
        # As another store's, it is a segment that is not in use.
        if key is None or at in range(16, 32) or at >= 96:
            continue
        with changed(path, 0, with_segment_checksum(flipped)):
            count, damage = await verify(written)
            assert (count, bool(damage)) == (0, True)


async def test_a_segments_header_of_the_first_version_is_not_believed(tmp_path: Path) -> None:
    """It has no tag. Records of life 0 it would have to bring along."""
    written = await fill(tmp_path, KEY, small=True)
    path = written.path(written.places[0])
    page = bytearray(path.read_bytes()[: segment.START_BYTES])
    page[8:16] = (1).to_bytes(4, "little") + bytes(4)
    with changed(path, 0, with_segment_checksum(bytes(page), 64)):
        count, damage = await verify(written)
    assert count == 0
    assert "header of wlog-00000000 is not what was sealed" in damage


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "open"])
async def test_every_byte_of_a_superblock(tmp_path: Path, key: bytes | None) -> None:
    """The other copy takes its place; without one the log is refused."""
    written = await fill(tmp_path, key, small=True)
    newest, other = (tmp_path / name for name in superblock.NAMES)
    page = newest.read_bytes()
    length = 36 + int.from_bytes(page[32:36], "little")
    for at in (*range(length + 8), 4092, 4095):
        with changed(newest, at, bytes([page[at] ^ 0x04])):
            assert await verify(written) == (len(written.contents), "")
            if at % 16 == 0:
                with (
                    changed(other, at, bytes([other.read_bytes()[at] ^ 0x04])),
                    pytest.raises(LogError, match="neither of its superblocks"),
                ):
                    await verify(written)


@pytest.mark.parametrize(
    "changes",
    [{"sealing": None}, {"lun": "naa.other"}, {"store": bytes(16)}],
    ids=["no sealing", "another LUN", "another store"],
)
async def test_a_superblock_by_somebody_who_knows_the_format(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    written = await fill(tmp_path, KEY, small=True)
    for name in superblock.NAMES:
        found = superblock.decode((tmp_path / name).read_bytes())
        assert found is not None
        block = msgspec.structs.replace(found[1], **changes)
        (tmp_path / name).write_bytes(superblock.encode(found[0], block, incompat=block.incompat))
    if "store" in changes:
        with pytest.raises(WrongKey):
            await verify(written)
        return
    count, damage = await verify(written)
    assert count == 0
    assert "not what was sealed" in damage or "not sealed as the others" in damage


async def test_another_logs_segment(tmp_path: Path) -> None:
    """As it is, and with its names changed to ours; both logs have the same passphrase."""
    written = await fill(tmp_path / "mine", KEY)
    other = await fill(tmp_path / "other", KEY)
    name = segment.file_name(0)
    foreign = (tmp_path / "other" / name).read_bytes()
    shutil.copy(tmp_path / "other" / name, tmp_path / "mine" / name)
    count, damage = await verify(written)
    assert count == 0
    assert "damaged or missing" in damage
    with opened(tmp_path / "mine", KEY) as (store, _), opened(tmp_path / "other", KEY) as (o, _s):
        mine, theirs = store.superblock.store, o.superblock.store
    owners = record.owner(theirs, 1), record.owner(mine, 1)
    image = bytearray(with_segment_checksum(foreign.replace(theirs, mine)))
    for found in (found for found in other.places if found.place.slot == 0):
        start, size = other.start(found), found.header.size_bytes
        one = bytes(image[start : start + size]).replace(
            owners[0].to_bytes(8, "little"), owners[1].to_bytes(8, "little")
        )
        image[start : start + size] = with_checksums(one, found.header.stored)
    (tmp_path / "mine" / name).write_bytes(image)
    count, damage = await verify(written)
    assert count == 0
    assert "header of wlog-00000000 is not what was sealed" in damage
