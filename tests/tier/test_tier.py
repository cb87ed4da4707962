"""The tier over a device in memory: what it keeps, for how long, and what it costs."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import trio

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier import journal
from orion_iscsifs.tier.batch import BatchWriter, Job
from orion_iscsifs.tier.reading import Piece
from orion_iscsifs.tier.tier import Level
from tests.tier.tiers import (
    FRAME,
    KIB,
    LARGE,
    MIB,
    asked,
    device,
    fill,
    read,
    same,
    settle,
    tiered,
)

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
