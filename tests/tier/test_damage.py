"""A tier that was damaged, mixed up, or written by somebody else: never wrong data."""

import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from unittest.mock import patch

import crc32c
import pytest
import trio

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.localstore.superblock import NAMES
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier import journal, record
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.superblock import TierError, TierSuperblock
from tests.tier.tiers import KIB, MIB, Size, opened, read, settle, tiered

SIZE = 2 * MIB
FRAME = 64 * KIB
SMALL = Size(segments=10)
START = journal.records_start(SMALL.segment_bytes)
KINDS = pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])


def new_device(seed: int = 1) -> MemoryDevice:
    """Half of it compresses."""
    rng = random.Random(seed)
    memory = MemoryDevice(geometry=Geometry(size_bytes=SIZE), record=True)
    memory.poke(0, rng.randbytes(SIZE))
    for start in range(0, SIZE, 2 * FRAME):
        memory.poke(start, rng.randbytes(64) * (FRAME // 64))
    memory.poke(5 * FRAME, bytes(FRAME))
    return memory


async def make(folder: Path, memory: MemoryDevice, *, sealed: bool, seed: int = 1) -> None:
    """A tier with all of the device, in several states: an old version of it is on the disk too."""
    rng = random.Random(seed)
    async with tiered(folder, memory, size=SMALL, sealed=sealed) as tier:
        for start in range(0, SIZE, SIZE // 4):
            await read(tier, start, SIZE // 4)
            await settle(tier)
        for start in range(0, SIZE // 2, FRAME):
            await tier.write(start + 4096, rng.randbytes(3 * 4096))
        await settle(tier)
        for start in range(0, SIZE // 4, FRAME):
            await tier.discard(start + 8 * 4096, 8 * 4096)


async def shows_the_device(folder: Path, memory: MemoryDevice, *, sealed: bool) -> tuple[int, int]:
    """Read it all; how many records were bad, and how many bytes came from the tier."""
    async with tiered(folder, memory, size=SMALL, sealed=sealed) as tier:
        for start in range(0, SIZE, FRAME):
            assert await read(tier, start, FRAME) == memory.peek(start, FRAME), f"frame {start}"
        return tier.statistics.bad_records, tier.statistics.hit_bytes


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("rseg-*"))


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (found,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([found ^ 1 << bit % 8]))


@KINDS
async def test_unharmed(memory_path: Path, sealed: bool) -> None:
    memory, folder = new_device(), memory_path / "tier"
    await make(folder, memory, sealed=sealed)
    assert len(segments(folder)) > 3
    bad, hit = await shows_the_device(folder, memory, sealed=sealed)
    assert not bad
    assert hit > SIZE // 2


@KINDS
@pytest.mark.parametrize("seed", range(3))
async def test_flipped_bits_anywhere(memory_path: Path, sealed: bool, seed: int) -> None:
    memory, whole = new_device(), memory_path / "whole"
    await make(whole, memory, sealed=sealed)
    rng = random.Random(seed)
    for number in range(12):
        folder = memory_path / str(number)
        shutil.copytree(whole, folder)
        path = rng.choice(segments(folder))
        area = rng.choice(((0, 64), (4096, START), (START, START + 64), (START, 256 * KIB)))
        for _ in range(rng.choice((1, 1, 5))):
            flip(path, 8 * rng.randrange(*area) + rng.randrange(8))
        await shows_the_device(folder, memory, sealed=sealed)
        shutil.rmtree(folder)


@KINDS
async def test_every_field_of_an_entry_and_of_a_record(memory_path: Path, sealed: bool) -> None:
    memory, whole = new_device(), memory_path / "whole"
    await make(whole, memory, sealed=sealed)
    for at in (*range(4096, 4096 + 128, 5), *range(START, START + 64, 3), START + 65):
        folder = memory_path / str(at)
        shutil.copytree(whole, folder)
        flip(segments(folder)[0], 8 * at + at % 8)
        await shows_the_device(folder, memory, sealed=sealed)
        shutil.rmtree(folder)


@KINDS
async def test_a_bad_record_is_a_miss_and_counted_once(memory_path: Path, sealed: bool) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory, size=SMALL, sealed=sealed) as tier:
        await read(tier, FRAME, FRAME)
    flip(segments(folder)[0], 8 * (START + 1000))
    memory.requests.clear()
    async with tiered(folder, memory, size=SMALL, sealed=sealed) as tier:
        with trio.fail_after(30):  # there has to be a place to note it
            while tier.store.needs_segment:
                await trio.sleep(0.01)
        for _ in range(3):
            assert await read(tier, FRAME, FRAME) == memory.peek(FRAME, FRAME)
            await settle(tier)
        assert tier.statistics.bad_records == 1
    assert len(memory.requests) == 1
    assert await shows_the_device(folder, memory, sealed=sealed) == (0, FRAME)


async def test_a_bad_record_that_can_not_be_noted_yet(memory_path: Path) -> None:
    """It is left out all the same, and noted when there is room."""
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory, size=SMALL, sealed=True) as tier:
        await read(tier, FRAME, FRAME)
    flip(segments(folder)[0], 8 * (START + 1000))
    make_segment, may_be_made = SegmentFiles.make, threading.Event()

    def held_make(files: SegmentFiles, block: TierSuperblock, number: int, salt: bytes) -> int:
        may_be_made.wait(30)
        return make_segment(files, block, number, salt)

    with patch.object(SegmentFiles, "make", held_make):
        async with tiered(folder, memory, size=SMALL, sealed=True) as tier:
            assert not tier.store.has_room(1)
            for _ in range(3):
                assert await read(tier, FRAME, FRAME) == memory.peek(FRAME, FRAME)
            assert tier.statistics.bad_records == 1
            assert not tier.statistics.invalidations
            may_be_made.set()
            with trio.fail_after(30):
                while not tier.statistics.invalidations:
                    await trio.sleep(0.01)
    _, hit = await shows_the_device(folder, memory, sealed=True)
    assert hit == 0


@KINDS
@pytest.mark.parametrize("cut", ["half", "a page", "all", "the file"])
async def test_truncated_segments(memory_path: Path, sealed: bool, cut: str) -> None:
    """What is older than the damage is not believed: an INVALIDATE may be missing."""
    memory, whole = new_device(), memory_path / "whole"
    await make(whole, memory, sealed=sealed)
    count = len(segments(whole))
    for number in range(count):
        folder = memory_path / str(number)
        shutil.copytree(whole, folder)
        path = segments(folder)[number]
        sizes = {"half": 128 * KIB, "a page": 252 * KIB, "all": 0}
        path.unlink() if cut == "the file" else os.truncate(path, sizes[cut])
        _, hit = await shows_the_device(folder, memory, sealed=sealed)
        if number == count - 1:
            assert hit == 0
        shutil.rmtree(folder)


def swap(folder: Path, first: tuple[int, int], second: tuple[int, int], length: int) -> None:
    """Exchange bytes of two segments."""
    paths = segments(folder)
    contents = [bytearray(path.read_bytes()) for path in paths]
    (a, at), (b, bt) = first, second
    one, two = bytes(contents[a][at : at + length]), bytes(contents[b][bt : bt + length])
    contents[a][at : at + length] = two
    contents[b][bt : bt + length] = one
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)


def places(folder: Path, number: int) -> list[int]:
    """Where the records of a segment are."""
    content = segments(folder)[number].read_bytes()
    return [at for at in range(START, len(content), 512) if content[at : at + 4] == record.MAGIC]


@KINDS
async def test_swapped_records(memory_path: Path, sealed: bool) -> None:
    memory, whole = new_device(), memory_path / "whole"
    await make(whole, memory, sealed=sealed)
    pairs = [(0, 1), (0, 2), (1, 2), (0, 0), (1, 1), (2, 2)]
    for number, (a, b) in enumerate(pairs):
        folder = memory_path / str(number)
        shutil.copytree(whole, folder)
        swap(folder, (a, places(folder, a)[0]), (b, places(folder, b)[-1]), 66048)
        await shows_the_device(folder, memory, sealed=sealed)
        shutil.rmtree(folder)


@KINDS
async def test_swapped_entries_journals_and_segments(memory_path: Path, sealed: bool) -> None:
    memory, whole = new_device(), memory_path / "whole"
    await make(whole, memory, sealed=sealed)
    swaps: list[Callable[[Path], None]] = [
        lambda folder: swap(folder, (0, 4096), (0, 4160), 64),
        lambda folder: swap(folder, (0, 4096), (1, 4096), 64),
        lambda folder: swap(folder, (0, 4096), (1, 4096), START - 4096),
        lambda folder: swap(folder, (0, 0), (1, 0), START),
        lambda folder: swap(folder, (0, 0), (1, 0), 256 * KIB),
        lambda folder: swap(folder, (0, START), (1, START), 256 * KIB - START),
    ]
    for number, change in enumerate(swaps):
        folder = memory_path / str(number)
        shutil.copytree(whole, folder)
        change(folder)
        await shows_the_device(folder, memory, sealed=sealed)
        shutil.rmtree(folder)


@KINDS
async def test_another_luns_segments(memory_path: Path, sealed: bool) -> None:
    """All segments of a tier of the same shape, under this one's superblocks."""
    ours, theirs = memory_path / "ours", memory_path / "theirs"
    memory, other = new_device(1), new_device(2)
    await make(ours, memory, sealed=sealed)
    await make(theirs, other, sealed=sealed, seed=2)
    for path in segments(theirs):
        shutil.copy(path, ours / path.name)
    _, hit = await shows_the_device(ours, memory, sealed=sealed)
    assert hit == 0


@KINDS
async def test_another_luns_records(memory_path: Path, sealed: bool) -> None:
    ours, theirs = memory_path / "ours", memory_path / "theirs"
    memory, other = new_device(1), new_device(2)
    await make(ours, memory, sealed=sealed)
    await make(theirs, other, sealed=sealed)
    for mine, foreign in zip(segments(ours), segments(theirs), strict=False):
        content = mine.read_bytes()[:START] + foreign.read_bytes()[START:]
        mine.write_bytes(content)
    bad, _ = await shows_the_device(ours, memory, sealed=sealed)
    assert bad


async def test_an_older_state_of_a_segment(memory_path: Path) -> None:
    """Somebody puts back a file as it was before something was invalidated."""
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory, size=SMALL) as tier:
        await read(tier, 0, FRAME)
    before = segments(folder)[0].read_bytes()
    async with tiered(folder, memory, size=SMALL) as tier:
        await tier.discard(0, FRAME)
        memory.poke(0, b"n" * FRAME)
    segments(folder)[0].write_bytes(before)
    await shows_the_device(folder, memory, sealed=False)


# -- superblocks -----------------------------------------------------------------------------------


async def test_every_flipped_bit_of_a_superblock(memory_path: Path) -> None:
    memory, folder = new_device(), memory_path / "tier"
    await make(folder, memory, sealed=False)
    pages = [(folder / name).read_bytes() for name in NAMES]
    for bit in (*range(8 * 40), *range(8 * 40, 8 * 500, 31), 8 * 4095):
        for name, page in zip(NAMES, pages, strict=True):
            (folder / name).write_bytes(page)
            flip(folder / name, bit)
        with pytest.raises(TierError, match="can't be opened"):
            TierStore.open(folder)


async def test_the_newer_superblock_is_damaged(memory_path: Path) -> None:
    """The older one says that it was in use: in another boot that is worth nothing."""
    memory, folder = new_device(), memory_path / "tier"
    await make(folder, memory, sealed=False)
    newer = max(NAMES, key=lambda name: (folder / name).read_bytes()[24:32][::-1])
    flip(folder / newer, 8 * 100)
    store, dropped = opened(folder, SIZE, boot_id="another boot")
    store.close()
    assert "went down" in dropped


async def test_an_older_superblock_counts_while_it_is_in_use(memory_path: Path) -> None:
    """It does not know of the segment with the newest changes: these count all the same."""
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory, size=SMALL) as tier:
        for number in range(12):
            start = number * FRAME
            await read(tier, start, FRAME)
            await settle(tier)
        # In the segment made ahead, which the older superblock has never heard of.
        while tier.store.needs_segment:
            await trio.sleep(0.01)
        assert tier.store.begin_segment()
        for number in range(4):
            await tier.discard(number * FRAME, FRAME)
            memory.poke(number * FRAME, b"n" * FRAME)
        shutil.copytree(folder, memory_path / "killed")
    killed = memory_path / "killed"
    newer = max(NAMES, key=lambda name: (killed / name).read_bytes()[24:32][::-1])
    flip(killed / newer, 8 * 100)
    block = TierStore.open(killed, shared=True).superblock
    assert block.newest < tier.store.numbers[-1]
    _, hit = await shows_the_device(killed, memory, sealed=False)
    assert hit


@pytest.mark.parametrize("version", [0, 2, 99])
async def test_other_versions_are_refused(memory_path: Path, version: int) -> None:
    memory, folder = new_device(), memory_path / "tier"
    await make(folder, memory, sealed=False)
    for name in NAMES:
        rewrite(folder / name, 8, version)
    with pytest.raises(TierError, match=f"format version {version}") as caught:
        TierStore.open(folder)
    assert "cache drop" in caught.value.line


async def test_unknown_features_are_refused(memory_path: Path) -> None:
    memory, folder = new_device(), memory_path / "tier"
    await make(folder, memory, sealed=False)
    for name in NAMES:
        rewrite(folder / name, 20, 1 << 30)
    with pytest.raises(TierError, match="not known to this version"):
        TierStore.open(folder)


async def test_segments_of_another_version_are_dropped(memory_path: Path) -> None:
    memory, folder = new_device(), memory_path / "tier"
    await make(folder, memory, sealed=False)
    for path in segments(folder):
        content = bytearray(path.read_bytes())
        content[8] = 7
        content[64:68] = crc32c.crc32c(bytes(content[:64])).to_bytes(4, "little")
        path.write_bytes(content)
    assert (await shows_the_device(folder, memory, sealed=False))[1] == 0


def rewrite(path: Path, at: int, value: int) -> None:
    """A field of a superblock, with a checksum that fits."""
    page = bytearray(path.read_bytes())
    Struct("<I").pack_into(page, at, value)
    Struct("<I").pack_into(page, 4092, crc32c.crc32c(bytes(page[:4092])))
    path.write_bytes(page)


async def test_a_wrong_key_opens_nothing(memory_path: Path) -> None:
    """The superblock's own check refuses it earlier; should it ever not, it is all misses."""
    memory, folder = new_device(), memory_path / "tier"
    await make(folder, memory, sealed=True)
    store = TierStore.open(folder)
    store.seal = Seal(bytes(32))
    assert store.resume(boot_id="any")
    assert not store.index.frames
    store.close()


async def test_two_mounts_of_one_tier(memory_path: Path) -> None:
    memory = new_device()
    async with tiered(memory_path / "tier", memory, size=SMALL):
        with pytest.raises(OrionError, match=r"tier .*in use by another mount"):
            TierStore.open(memory_path / "tier")
        TierStore.open(memory_path / "tier", shared=True).close()
