"""The tier over a device in memory: what it keeps, for how long, and what it costs."""

import errno
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier import journal
from orion_iscsifs.tier.batch import BatchWriter, Job
from orion_iscsifs.tier.reading import Piece
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.tier import CompressedTier, Level
from tests.tier.tiers import KIB, MIB, Size, opened, read, settle, tiered

FRAME = 64 * KIB
LARGE = Size(segments=64)
WIDE = Size(segment_bytes=MIB, segments=8)
"""Its segments have room for some frames of noise."""


def device(size_bytes: int = 16 * MIB, *, seed: int = 1) -> MemoryDevice:
    """Of noise, with a record of what it is asked for."""
    geometry = Geometry(size_bytes=size_bytes, discard_granularity_bytes=4096)
    memory = MemoryDevice(geometry=geometry, record=True)
    memory.poke(0, random.Random(seed).randbytes(size_bytes))
    return memory


def asked(memory: MemoryDevice) -> list[tuple[int, int]]:
    """The reads that reached the device since the last time."""
    found = [(r.offset, r.length) for r in memory.requests if r.kind == "read_into"]
    memory.requests.clear()
    return found


async def same(tier: CompressedTier, memory: MemoryDevice, offset: int, length: int) -> bool:
    return await read(tier, offset, length) == memory.peek(offset, length)


async def fill(tier: CompressedTier, start: int, end: int) -> None:
    """Read all of it, no faster than the tier can take it in."""
    for at in range(start, end, MIB):
        await read(tier, at, min(MIB, end - at))
        await settle(tier)


# -- reads -----------------------------------------------------------------------------------------


async def test_what_was_read_once_is_local(memory_path: Path) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await fill(tier, 0, 4 * MIB)
        assert asked(memory) == [(start, MIB) for start in range(0, 4 * MIB, MIB)]
        assert await same(tier, memory, 0, 4 * MIB)
        assert await same(tier, memory, 3 * FRAME + 512, 1024)
        assert asked(memory) == []
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        assert await same(tier, memory, 0, 4 * MIB)
        assert asked(memory) == []
        assert tier.statistics.hits == 1


async def test_a_miss_asks_for_exactly_what_was_wanted(memory_path: Path) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        for offset, length in ((4096, 4096), (512, 1024), (10 * FRAME - 512, 2 * 512)):
            assert await same(tier, memory, offset, length)
            assert asked(memory) == [(offset, length)]


async def test_parts_of_a_request_that_are_here_are_not_asked_for(memory_path: Path) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await read(tier, 4 * FRAME, 4 * FRAME)
        await settle(tier)
        asked(memory)
        assert await same(tier, memory, 0, 16 * FRAME)
        assert sorted(asked(memory)) == [(0, 4 * FRAME), (8 * FRAME, 8 * FRAME)]


async def test_a_small_gap_is_not_worth_a_request(memory_path: Path) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await read(tier, 4096, 4096)
        asked(memory)
        assert await same(tier, memory, 0, FRAME)
        assert asked(memory) == [(0, FRAME)]


async def test_pages_of_a_frame_come_together(memory_path: Path) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        for page in (3, 0, 9):
            await read(tier, page * 4096, 4096)
            await settle(tier)
        row = tier.store.index.find(0)
        assert row is not None
        assert row.valid == 1 << 3 | 1 << 0 | 1 << 9
        asked(memory)
        for page in (0, 3, 9):
            assert await same(tier, memory, page * 4096, 4096)
        assert asked(memory) == []


async def test_what_is_staged_is_a_hit(memory_path: Path, autojump_clock: object) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await read(tier, 0, FRAME)
        asked(memory)
        assert await same(tier, memory, 512, 512)
        assert asked(memory) == []


async def test_zeroes_take_no_room(memory_path: Path) -> None:
    memory = MemoryDevice(32 * MIB, record=True)
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await fill(tier, 0, 4 * MIB)
        assert tier.statistics.stored_bytes == 0
        asked(memory)
        assert await same(tier, memory, 0, 4 * MIB)
        assert asked(memory) == []


@pytest.mark.parametrize("level", [0, 1, 19, "adaptive"])
async def test_every_level(memory_path: Path, level: Level) -> None:
    memory = device()
    memory.poke(0, b"so much of the same " * (MIB // 20))
    async with tiered(memory_path / "tier", memory, size=LARGE, level=level) as tier:
        assert await same(tier, memory, 0, 2 * MIB)
        await settle(tier)
        assert await same(tier, memory, 0, 2 * MIB)
        assert asked(memory) == [(0, 2 * MIB)]
        assert (tier.statistics.ratio > 1.5) == (level != 0)


async def test_a_device_that_fails_is_not_hidden(memory_path: Path) -> None:
    memory = device()
    faults = FaultyDevice(memory)
    async with tiered(memory_path / "tier", faults, size=LARGE) as tier:
        await read(tier, 4 * FRAME, FRAME)
        faults.fail("read", 2)
        with pytest.raises(Exception, match="the device failed"):
            await read(tier, 0, 16 * FRAME)
        faults.fail("read", 0)
        assert await same(tier, memory, 0, 16 * FRAME)


# -- changes ---------------------------------------------------------------------------------------


async def test_what_is_written_is_local_too(memory_path: Path) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await tier.write(4096, bytes(range(256)) * 512)
        await settle(tier)
        asked(memory)
        assert await same(tier, memory, 4096, 128 * KIB)
        assert asked(memory) == []


@pytest.mark.parametrize("kind", ["discard", "write_zeroes"])
async def test_what_is_discarded_is_asked_for(memory_path: Path, kind: str) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await read(tier, 0, 4 * FRAME)
        await settle(tier)
        await getattr(tier, kind)(FRAME + 4096, FRAME)
        asked(memory)
        assert await same(tier, memory, 0, 4 * FRAME)
        assert asked(memory) == [(FRAME + 4096, FRAME)]


async def test_a_discard_of_everything_is_one_entry(memory_path: Path) -> None:
    memory = MemoryDevice(geometry=Geometry(size_bytes=1 << 40))
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        for start in range(0, 1 << 40, 1 << 36):
            await read(tier, start, FRAME)
        await settle(tier)
        assert tier.store.index.frames == 16
        before = tier.statistics.invalidations
        await tier.discard(FRAME, (1 << 40) - 2 * FRAME)
        assert tier.store.index.frames == 1
        assert tier.statistics.invalidations == before + 1


async def test_only_what_is_known_is_invalidated(memory_path: Path) -> None:
    memory = device()
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await tier.discard(0, MIB)
        await tier.write_zeroes(0, MIB)
        assert tier.statistics.invalidations == 0


async def test_invalidations_do_not_run_out_of_room(memory_path: Path) -> None:
    """More of them than a journal can have, on a few frames, while others are at it too."""
    memory = device(2 * MIB)
    async with tiered(memory_path / "tier", memory) as tier:

        async def work(base: int) -> None:
            for number in range(60):
                start = base + number % 4 * FRAME
                await read(tier, start, FRAME)
                await settle(tier)
                for page in range(16):
                    await tier.discard(start + page * 4096, 4096)

        async with trio.open_nursery() as nursery:
            for base in (0, MIB):
                nursery.start_soon(work, base)
        assert tier.statistics.invalidations > 1000
        assert tier.store.state == "ok"
        assert await same(tier, memory, 0, 2 * MIB)


async def test_changes_fill_the_journal_while_a_batch_is_written(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is no room for what the batch brings, and it is given up."""
    memory, run = device(2 * MIB), BatchWriter.run
    async with tiered(memory_path / "tier", memory) as tier:
        store = tier.store

        def fill_journal() -> None:
            while store.has_room(1):
                assert store.invalidate((MIB, MIB + 4096))

        def run_meanwhile(writer: BatchWriter, job: Job) -> None:
            run(writer, job)
            trio.from_thread.run_sync(fill_journal)

        monkeypatch.setattr(BatchWriter, "run", run_meanwhile)
        for start in range(0, MIB, MIB // 8):
            assert await same(tier, memory, start, MIB // 8)
            await settle(tier)
        monkeypatch.undo()
        assert tier.store.state == "ok"
        assert not store.index.frames
    async with tiered(memory_path / "tier", memory) as tier:
        assert await same(tier, memory, 0, MIB)
        await settle(tier)
        assert tier.store.index.frames


async def test_a_cancelled_write_leaves_nothing_old(memory_path: Path) -> None:
    memory = device()
    faults = FaultyDevice(memory)
    async with tiered(memory_path / "tier", faults, size=LARGE) as tier:
        await read(tier, 0, FRAME)
        await settle(tier)
        faults.arrive_first = True
        faults.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.write, 0, b"n" * FRAME)
            await faults.wait_held("write")
            nursery.cancel_scope.cancel()
        assert await same(tier, memory, 0, FRAME)


# -- a full tier -----------------------------------------------------------------------------------


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a thread removes segments
            total += path.stat().st_size
    return total


async def test_the_size_is_never_exceeded(memory_path: Path) -> None:
    memory, folder, most = device(8 * MIB), memory_path / "tier", 0
    rng = random.Random(1)
    async with tiered(folder, memory) as tier:
        for _ in range(400):
            await read(tier, rng.randrange(128) * FRAME, FRAME)
            most = max(most, disk_bytes(folder))
            if rng.random() < 0.2:
                await settle(tier)
        assert tier.statistics.evicted_segments > 3
        assert most <= tier.store.size_bytes
        assert tier.store.used_bytes <= tier.store.size_bytes
    looked_at = TierStore.open(folder, shared=True)
    assert looked_at.used_bytes == disk_bytes(folder)
    looked_at.close()
    assert disk_bytes(folder) <= tier.store.size_bytes


async def test_what_is_used_stays(memory_path: Path) -> None:
    """A few frames that are read now and then, and a crowd of others."""
    memory = device(32 * MIB)
    async with tiered(memory_path / "tier", memory, size=WIDE) as tier:
        for number in range(4):
            await read(tier, number * FRAME, FRAME)
        await settle(tier)
        rng, asked_for = random.Random(1), 0
        for number in range(400):
            other = rng.randrange(16, 512)
            await read(tier, other * FRAME, FRAME)
            await read(tier, other * FRAME, FRAME)
            asked(memory)
            await read(tier, number % 4 * FRAME, FRAME)
            asked_for += len(asked(memory))
            await settle(tier)
        statistics = tier.statistics
        assert statistics.evicted_segments > 8
        assert asked_for < 20  # of 400
        assert statistics.reappended_bytes
        assert statistics.reappended_bytes <= (statistics.stored_bytes + MIB) / 3


async def test_a_flood_passes_by(memory_path: Path) -> None:
    memory = device(64 * MIB)
    async with tiered(memory_path / "tier", memory, size=WIDE) as tier:
        await fill(tier, 0, 8 * MIB)  # until it is full
        kept = [number for number in range(128) if tier.store.index.find(number)]
        assert len(kept) > 64
        before = tier.statistics.appended_records
        await fill(tier, 16 * MIB, 64 * MIB)
        assert tier.statistics.passed_by_bytes > 36 * MIB
        # A tenth of what came before it was known for a flood.
        assert tier.statistics.appended_records - before < 24
        assert sum(tier.store.index.find(number) is not None for number in kept) > len(kept) // 2


async def test_a_smaller_size_drops_the_oldest(memory_path: Path) -> None:
    memory, folder = device(), memory_path / "tier"
    async with tiered(folder, memory, size=Size(segment_bytes=MIB, segments=16)) as tier:
        await fill(tier, 0, 10 * MIB)
        frames, segment = tier.store.index.frames, tier.store.superblock.segment_bytes
    tier_bytes = 5 * segment + 8192
    store, dropped = opened(folder, 16 * MIB, tier_bytes=tier_bytes)
    assert not dropped
    assert 0 < store.index.frames < frames
    assert store.index.find(0) is None
    assert store.index.find((10 * MIB >> 16) - 1) is not None
    assert disk_bytes(folder) <= tier_bytes == store.size_bytes
    store.close()


async def test_a_very_different_size_is_a_new_tier(memory_path: Path) -> None:
    memory, folder = device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await read(tier, 0, MIB)
    store, dropped = opened(folder, 16 * MIB, tier_bytes=1 << 30)
    assert "size" in dropped
    assert store.superblock.segment_bytes == 32 * MIB
    assert not store.index.frames
    store.close()
    async with tiered(folder, memory) as tier:
        assert await same(tier, memory, 0, MIB)
        await settle(tier)
        assert tier.store.index.frames


# -- geometry --------------------------------------------------------------------------------------


async def test_what_lay_beyond_the_end_is_forgotten(memory_path: Path) -> None:
    memory = device(4 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        seen: list[int] = []
        tier.on_geometry_change(lambda geometry: seen.append(geometry.size_bytes))
        await fill(tier, 0, 4 * MIB)
        memory.change_geometry(size_bytes=2 * MIB + 512)
        memory.change_geometry(size_bytes=4 * MIB)
        memory.poke(2 * MIB, bytes(2 * MIB))
        assert seen == [2 * MIB + 512, 4 * MIB]
        assert await same(tier, memory, 0, 4 * MIB)
        with trio.fail_after(30):
            while tier.store.index.find(40) is not None:
                await trio.sleep(0.01)
        await fill(tier, 0, 4 * MIB)
        asked(memory)
        assert await same(tier, memory, 0, 4 * MIB)
        assert asked(memory) == []


async def test_a_device_that_shrank_between_two_mounts(memory_path: Path) -> None:
    memory = device(4 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        await fill(tier, 0, 4 * MIB)
    memory.change_geometry(size_bytes=2 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE):
        pass
    memory.change_geometry(size_bytes=4 * MIB)
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        assert await same(tier, memory, 0, 4 * MIB)
        assert tier.statistics.hit_bytes == 2 * MIB


async def test_the_last_page_may_be_a_part(memory_path: Path) -> None:
    geometry = Geometry(size_bytes=MIB + 1536)
    memory = MemoryDevice(geometry=geometry, record=True)
    memory.poke(0, random.Random(1).randbytes(geometry.size_bytes))
    async with tiered(memory_path / "tier", memory, size=LARGE) as tier:
        for _ in range(2):
            assert await same(tier, memory, 0, MIB + 1536)
            await settle(tier)
        assert asked(memory) == [(0, MIB + 1536), (MIB, 1536)]


# -- speed -----------------------------------------------------------------------------------------


def can_read_without_waiting(path: Path) -> bool:
    path.write_bytes(bytes(4096))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(4096)], 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
    return True


async def test_a_hit_in_the_page_cache_needs_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = device()
    if not can_read_without_waiting(tmp_path / "probe"):
        pytest.skip("the file system here has no RWF_NOWAIT")
    async with tiered(tmp_path / "tier", memory, size=LARGE) as tier:
        await read(tier, 0, FRAME)
        await settle(tier)
        asked(memory)
        with trio.fail_after(30):  # the kernel may want it back, but not for ever
            while True:
                row = tier.store.index.find(0)
                assert row is not None
                piece = Piece(0, row, 1)
                if tier._reader.try_now(piece, (0, 4096), memoryview(bytearray(4096))):
                    break
                await trio.sleep(0.01)
        monkeypatch.delattr(trio.to_thread, "run_sync")
        with trio.CancelScope() as scope:
            scope.cancel()  # a checkpoint would raise
            assert await same(tier, memory, 0, FRAME)
        monkeypatch.undo()
        assert asked(memory) == []


# -- sealed ----------------------------------------------------------------------------------------


async def test_nothing_is_in_plain_text(memory_path: Path) -> None:
    memory, folder = device(), memory_path / "tier"
    memory.poke(0, b"a secret of one kind" * 200)
    async with tiered(folder, memory, sealed=True, level=0) as tier:
        await fill(tier, 0, MIB)
    assert not any(b"a secret of one kind" in path.read_bytes() for path in folder.iterdir())


async def test_an_older_state_put_back_seals_with_other_keys(memory_path: Path) -> None:
    """Its life and its sequence numbers come again, and so would the nonces with one key."""
    memory, folder, older = device(), memory_path / "tier", memory_path / "older"
    async with tiered(folder, memory, sealed=True) as tier:
        await fill(tier, 0, MIB)
    shutil.copytree(folder, older)
    salts = []
    for place in (folder, older):
        async with tiered(place, memory, sealed=True) as tier:
            known = set(tier.store.numbers)
            await fill(tier, MIB, 2 * MIB)
            assert tier.store.superblock.life == 2
            assert tier.statistics.appended_records
            begun = set(tier.store.numbers) - known
        for number in begun:
            page = (place / journal.file_name(number)).read_bytes()[: journal.PAGE_BYTES]
            header = journal.decode_header(tier.store.superblock.store, page)
            assert header is not None
            salts.append(header.salt)
        assert await same_after_a_mount(place, memory)
    assert len(salts) == len(set(salts)) >= 2


async def same_after_a_mount(folder: Path, memory: MemoryDevice) -> bool:
    async with tiered(folder, memory, sealed=True) as tier:
        return await same(tier, memory, 0, 2 * MIB) and not tier.statistics.bad_records


async def test_a_number_that_comes_again_has_its_own_key(memory_path: Path) -> None:
    """Of a segment made ahead, when the process was killed before anything got into it."""
    memory, folder, killed = device(), memory_path / "tier", memory_path / "killed"
    async with tiered(folder, memory, sealed=True) as tier:
        await fill(tier, 0, MIB)
        with trio.fail_after(30):
            while tier.store.needs_segment:
                await trio.sleep(0.01)
        shutil.copytree(folder, killed)
        ahead = tier.store.superblock.newest
    async with tiered(killed, memory, sealed=True) as tier:
        await fill(tier, MIB, 2 * MIB)
        assert ahead in tier.store.numbers
    assert await same_after_a_mount(killed, memory)


async def test_mounts_that_add_nothing_cost_no_segment(memory_path: Path) -> None:
    memory, folder = device(), memory_path / "tier"
    async with tiered(folder, memory, sealed=True) as tier:
        await fill(tier, 0, MIB)
        numbers = list(tier.store.numbers)
    for _ in range(8):
        async with tiered(folder, memory, sealed=True) as tier:
            await read(tier, 0, FRAME)
    assert list(tier.store.numbers) == numbers
