"""Crashes at every step of a tier: whatever it says afterwards is what the device holds.

The tests of the model itself (`test_the_model_notices`) leave out one rule after the other, and
the model has to find something old within a few seeds.
"""

import random
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trio

from orion_iscsifs.block.ranges import Range
from orion_iscsifs.tier import trust
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.staging import Staging
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.tier import CompressedTier
from tests.tier.crashes import CLEAN, SIZE, Moment, Recorder, Truth, User, content, slow_threads
from tests.tier.tiers import BOOT, KIB, Size, opened, read, settle, tiered

SMALL = Size(segment_bytes=256 * KIB, segments=4)


async def a_life(
    folder: Path, truth: Truth, rng: random.Random, *, share: float, sealed: bool, steps: int = 60
) -> list[Moment]:
    """Use the tier for a while, with several users; moments of it, the last one at its end."""
    recorder = Recorder(folder, truth, lambda: rng.random() < share)
    with recorder.watching(), slow_threads(rng), trio.CancelScope() as killed:
        async with tiered(folder, truth, size=SMALL, sealed=sealed) as tier:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(User(tier, truth, rng).run, steps)
            assert tier.store.state == "ok"
            assert not tier.statistics.bad_records
            recorder.moments.append(recorder.now("the end of its use"))
            if rng.random() < 0.5:
                killed.cancel()
    if not killed.cancelled_caught:
        recorder.moments.append(recorder.now("the end"))
    return recorder.moments


async def show(folder: Path, truth: Truth, *, sealed: bool, boot_id: str = BOOT) -> None:
    """All of the device, through the tier that is in the folder."""
    async with tiered(folder, truth, size=SMALL, sealed=sealed, boot_id=boot_id) as tier:
        for start in range(0, SIZE, 256 * KIB):
            # Not compared in the assertion: to explain so long a difference takes minutes.
            is_same = await read(tier, start, 256 * KIB) == truth.memory.peek(start, 256 * KIB)
            assert is_same, f"something old within 256 KiB of {start}"
        assert not tier.statistics.bad_records


async def check_killed(
    moment: Moment, folder: Path, rng: random.Random, *, sealed: bool, again: bool
) -> None:
    """The process is killed. A mount in the same boot goes on, and perhaps is killed as well."""
    moment.put(folder)
    truth = Truth(moment.device, rng, troubles=0)
    if not again:
        await show(folder, truth, sealed=sealed)
        return
    for number, later in enumerate(
        await a_life(folder, truth, rng, share=0.01, sealed=sealed, steps=15)
    ):
        place = folder.with_name(f"{folder.name}-{number}")
        later.put(place)
        await show(place, Truth(later.device, rng, troubles=0), sealed=sealed)


async def check_powerless(
    moment: Moment, folder: Path, rng: random.Random, *, sealed: bool
) -> None:
    """The host loses power: only what was closed in order is believed, and then all of it."""
    moment.put_after_power_loss(folder, rng)
    store, dropped = opened(folder, SIZE, size=SMALL, sealed=sealed, boot_id="another boot")
    frames, life = store.index.frames, store.superblock.life
    store.close()
    if moment.what != CLEAN:
        assert not frames
        assert dropped or life == 1
        return
    assert not dropped
    another = folder.with_name(f"{folder.name}-shown")
    moment.put_after_power_loss(another, rng)
    truth = Truth(moment.device, rng, troubles=0)
    await show(another, truth, sealed=sealed, boot_id="another boot")


async def run(seed: int, root: Path, *, share: float = 0.004, again: bool = True) -> None:
    rng = random.Random(seed)
    sealed = bool(seed % 3 == 2)
    truth = Truth(content(rng, SIZE), rng)
    moments = await a_life(root / "tier", truth, rng, share=share, sealed=sealed)
    for number, moment in enumerate(moments):
        twice = again and number == len(moments) // 2
        await check_killed(moment, root / f"{number}-killed", rng, sealed=sealed, again=twice)
        await check_powerless(moment, root / f"{number}-power", rng, sealed=sealed)


@pytest.mark.parametrize("seed", range(20))
async def test_never_anything_old(memory_path: Path, seed: int, autojump_clock: object) -> None:
    await run(seed, memory_path)


async def test_a_segment_is_forgotten_after_its_file_is_gone(memory_path: Path) -> None:
    """A change in between is entered: as long as the file is there, a mount would read it."""
    rng = random.Random(1)
    truth = Truth(rng.randbytes(SIZE), rng, troubles=0)
    truth.delays_s = (0,)
    folder, moments = memory_path / "tier", list[Moment]()
    recorder = Recorder(folder, truth, lambda: False)
    remove = SegmentFiles.remove

    async def change_all(tier: CompressedTier) -> None:
        for start in range(0, SIZE, 1 << 16):
            await tier.write(start, rng.randbytes(1 << 16))
        moments.append(recorder.now("all is new, and the segment is there"))

    async with tiered(folder, truth, size=SMALL) as tier:

        def held_remove(files: SegmentFiles, number: int) -> None:
            if not moments:
                trio.from_thread.run(change_all, tier)
            remove(files, number)

        with patch.object(SegmentFiles, "remove", held_remove):
            for start in range(0, SIZE, 1 << 16):
                await read(tier, start, 1 << 16)
                await settle(tier)
    assert tier.statistics.evicted_segments
    for number, moment in enumerate(moments):
        moment.put(memory_path / str(number))
        await show(memory_path / str(number), truth, sealed=False)
    assert moments


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1400, 20))
async def test_never_anything_old_for_long(
    memory_path: Path, first: int, autojump_clock: object
) -> None:
    for seed in range(first, first + 20):
        await run(seed, memory_path / str(seed), share=0.01)
        shutil.rmtree(memory_path / str(seed))


# -- the model itself ----------------------------------------------------------------------------


def without_entries(store: TierStore, span: Range) -> bool:
    """The index forgets what changes, and the journal does not learn of it."""
    del store, span
    return True


def blind_batch(staging: Staging, span: Range) -> None:
    """What a thread is compressing is entered, whatever has happened to it meanwhile."""
    batch, staging.batch = staging.batch, {}
    _begin_change(staging, span)
    staging.batch = batch


def blind_requests(staging: Staging, span: Range) -> dict[int, int]:
    """What was read counts, whatever was written while it was."""
    _unwatch(staging, span)
    return {}


def silent_end(staging: Staging, span: Range) -> None:
    """Who began to read during a change is not told that it has ended."""
    staging._changes.remove(span)


def careless(staging: Staging, frame: int, pages: int) -> int:
    """What is being changed is taken in."""
    del staging, frame
    return pages


def unsynced(path: Path) -> None:
    """Closed in order, but nothing is durable."""
    del path


_begin_change, _unwatch = Staging.begin_change, Staging.unwatch


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [
        (TierStore, "invalidate", without_entries),
        (Staging, "begin_change", blind_batch),
        (Staging, "unwatch", blind_requests),
        (Staging, "end_change", silent_end),
        (Staging, "unchanging", careless),
        (trust, "sync_path", unsynced),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_the_model_notices(
    memory_path: Path, owner: Any, name: str, mutant: Any, autojump_clock: object
) -> None:
    noticed = False
    with patch.object(owner, name, mutant):
        for seed in range(100):
            try:
                await run(seed, memory_path / str(seed), share=0.01, again=False)
            except* AssertionError:
                noticed = True
            if noticed:
                return
    pytest.fail("nothing was noticed")
