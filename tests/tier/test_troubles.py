"""A local disk that is full, broken or gone: the tier ends, and nothing else."""

import errno
import functools
import logging
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier import retiring, segments, trust
from orion_iscsifs.tier.batch import BatchWriter
from orion_iscsifs.tier.current import Current
from orion_iscsifs.tier.fetching import Fetcher
from orion_iscsifs.tier.fresh import new_tier_superblock
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.store import TierStore, drop, is_in_use
from orion_iscsifs.tier.superblock import TierError
from orion_iscsifs.tier.tier import CompressedTier, open_tier
from tests.tier import tiers
from tests.tier.tiers import KIB, MIB, Size, opened, read, settle

FRAME = 64 * KIB
SIZE = 4 * MIB
tiered = functools.partial(tiers.tiered, may_fail=True)


def new_device() -> MemoryDevice:
    memory = MemoryDevice(geometry=Geometry(size_bytes=SIZE))
    memory.poke(0, random.Random(1).randbytes(SIZE))
    return memory


def broken(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


async def use(tier: CompressedTier, memory: MemoryDevice) -> None:
    """Everything works, whatever becomes of the tier."""
    rng = random.Random(1)
    for start in range(0, SIZE, 4 * FRAME):
        await tier.write(start + 4096, rng.randbytes(8192))
        assert await read(tier, start, 4 * FRAME) == memory.peek(start, 4 * FRAME)
        with trio.fail_after(30):
            await tier.appender.drain()
        await tier.discard(start, FRAME)
        assert await read(tier, start, 4 * FRAME) == memory.peek(start, 4 * FRAME)
    await tier.flush()


def is_believed(folder: Path) -> bool:
    """Whether a mount of the same boot would find anything in it."""
    try:
        store, _ = opened(folder, SIZE)
    except TierError:
        return False
    found = store.index.frames
    store.close()
    return bool(found)


TROUBLES = {
    "entries": (Current, "add", errno.EIO, "writing"),
    "records": (BatchWriter, "run", errno.ENOSPC, "writing"),
    "a new segment": (SegmentFiles, "make", errno.ENOSPC, "writing"),
    "a segment that goes": (SegmentFiles, "remove", errno.EROFS, "writing"),
    "syncing a segment": (TierStore, "sync_filled", errno.EIO, "writing"),
    "opening a segment": (SegmentFiles, "_opened", errno.EIO, "reading"),
    "reading in a thread": (Fetcher, "_read", errno.EIO, "reading"),
}


@pytest.mark.parametrize("what", TROUBLES)
async def test_an_error_of_the_disk_ends_the_tier(
    memory_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name, number, doing = TROUBLES[what]
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await use(tier, memory)
        assert tier.store.state == "ok"
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken(number))
            await use(tier, memory)
            await use(tier, memory)
        assert tier.store.state == "failed"
        await use(tier, memory)
    warnings = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert [entry.message for entry in warnings] == [
        f"tier {folder}: {doing}: {os.strerror(number)}; going on without it"
    ]
    assert not is_believed(folder)


async def test_a_folder_that_vanishes(memory_path: Path) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await use(tier, memory)
        shutil.rmtree(folder)
        await use(tier, memory)
        await use(tier, memory)
        assert tier.store.state == "failed"
    assert not folder.exists()


async def test_a_disk_that_is_full_for_real(memory_path: Path) -> None:
    """ENOSPC of the kernel: a limit on the size of files does what a full disk does."""
    memory, folder = new_device(), memory_path / "tier"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        async with tiered(folder, memory) as tier:
            await use(tier, memory)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 * KIB, hard))
            await use(tier, memory)
            await use(tier, memory)
            assert tier.store.state == "failed"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not is_believed(folder)


async def test_a_close_that_fails_is_not_clean(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await use(tier, memory)
        monkeypatch.setattr(trust, "sync_path", broken(errno.EIO))
    monkeypatch.undo()
    assert tier.store.state == "failed"
    assert not is_believed(folder)


async def test_a_device_that_does_not_flush_leaves_it_in_use(
    memory_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was written may be lost yet, with the target's power; the tier would have it."""
    memory, folder = new_device(), memory_path / "tier"
    faults = FaultyDevice(memory)
    store, _ = opened(folder, SIZE)
    async with open_tier(faults, store) as tier:
        await tier.write(0, b"x" * FRAME)
        faults.fail("flush", 1)
    assert not store.superblock.clean
    store.close()
    assert "left as in use: the device failed" in caplog.text
    store, dropped = opened(folder, SIZE, boot_id="another boot")
    assert "went down" in dropped
    store.close()


# -- never again -----------------------------------------------------------------------------------


class Disk:
    """Breaks, and takes the ways to mark the tier as ended with it."""

    def __init__(self, patch: pytest.MonkeyPatch, *ways: str) -> None:
        self._patch = patch
        patch.setattr(Current, "add", broken(errno.EIO))
        owners: dict[str, Any] = {
            "write_superblock": TierStore, "remove_all": segments, "truncate_all": segments
        }  # fmt: skip
        for way in ways:
            patch.setattr(owners[way], way, broken(errno.EROFS))

    def mend(self) -> None:
        self._patch.undo()


@pytest.mark.parametrize(
    "ways",
    [(), ("write_superblock",), ("write_superblock", "remove_all")],
    ids=["superblock", "removing", "truncating"],
)
async def test_what_is_on_the_disk_is_not_believed_again(
    memory_path: Path, ways: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await use(tier, memory)
        disk = Disk(monkeypatch, *ways)
        await use(tier, memory)
        disk.mend()
        assert tier.store.state == "failed"
    assert not is_believed(folder)


async def test_the_device_waits_until_it_is_certain(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first change without an entry comes after the owner has been told."""
    memory, folder = new_device(), memory_path / "tier"
    told, may_return = threading.Event(), threading.Event()

    def on_failure() -> None:
        told.set()
        assert may_return.wait(30)

    async with tiered(folder, memory) as tier:
        await read(tier, 0, FRAME)
        await settle(tier)
        tier.store.on_failure = on_failure
        before = memory.peek(0, FRAME)
        disk = Disk(monkeypatch, "write_superblock", "remove_all", "truncate_all")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.write, 0, b"n" * FRAME)
            with trio.fail_after(30):
                while not told.is_set():
                    await trio.sleep(0.01)
            await trio.sleep(0.05)
            assert memory.peek(0, FRAME) == before
            assert await read(tier, 0, FRAME) == before
            may_return.set()
        assert memory.peek(0, FRAME) == b"n" * FRAME
        disk.mend()


async def test_when_nothing_works_it_is_said_and_tried_again(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory, folder = new_device(), memory_path / "tier"
    monkeypatch.setattr(retiring, "AGAIN_S", 0.01)
    async with tiered(folder, memory) as tier:
        await use(tier, memory)
        tier.store.on_failure = broken(errno.EROFS)
        with monkeypatch.context() as patch:
            Disk(patch, "write_superblock", "remove_all", "truncate_all")
            await use(tier, memory)
            assert "remove that folder by hand" in caplog.text
            assert caplog.text.count("remove that folder by hand") == 1
        with trio.fail_after(30):
            while not tier.store.superblock.ended:
                await trio.sleep(0.01)
    assert not is_believed(folder)


# -- the store as a whole --------------------------------------------------------------------------


def test_too_small() -> None:
    with pytest.raises(TierError, match="tier_size: 1048576 bytes are less than"):
        new_tier_superblock("x", size_bytes=1, block_bytes=1, tier_bytes=MIB, boot_id="b")


async def test_drop(memory_path: Path) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory):
        assert is_in_use(folder)
        with pytest.raises(Exception, match="in use by another mount"):
            drop(folder)
    assert not is_in_use(folder)
    drop(folder)
    assert not folder.exists()


def test_a_folder_that_can_not_be_made(memory_path: Path) -> None:
    (memory_path / "file").write_text("")
    with pytest.raises(TierError, match="can't be made"):
        opened(memory_path / "file" / "tier", SIZE)


async def test_restart_forgets_everything(memory_path: Path) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await use(tier, memory)
    store = TierStore.open(folder)
    block = new_tier_superblock(
        "naa.other", size_bytes=SIZE, block_bytes=512, tier_bytes=8 * MIB, boot_id="b"
    )
    store.restart(block)
    assert not store.resume(boot_id="b")
    assert not store.index.frames
    assert store.superblock.lun == "naa.other"
    store.close()


async def test_fields_of_the_superblock_last(memory_path: Path) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory, size=Size(segments=5)) as tier:
        await tier.update(key=7, generation=3)
        await use(tier, memory)
    store = TierStore.open(folder, shared=True)
    assert (store.superblock.key, store.superblock.generation) == (7, 3)
    assert store.superblock.life == 1
    store.close()


async def test_a_superblock_that_can_not_be_written_ends_the_tier(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, folder = new_device(), memory_path / "tier"
    async with tiered(folder, memory) as tier:
        await use(tier, memory)
        with monkeypatch.context() as patch:
            patch.setattr(TierStore, "write_superblock", broken(errno.EIO))
            with pytest.raises(TierError, match="writing the superblock"):
                await tier.update(key=7)
            await use(tier, memory)
        assert tier.store.state == "failed"
    assert not is_believed(folder)
