"""The end of a log: what fails in its last moments, who is cancelled, and what waits for it."""

import errno
import os
import time
from pathlib import Path

import pytest
import trio

from orion_iscsifs.block.device import Buffer, Geometry
from orion_iscsifs.cache import logdestage
from orion_iscsifs.cache.writelog import WriteLog
from orion_iscsifs.errors import DeviceError, ReplacementTimedOut
from orion_iscsifs.localstore import files
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.head import Head
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.logs import KIB, MIB, Size, logged, superblock

SIZE = 2 * MIB
TINY = Size(segment_bytes=64 * KIB, segments=4, dirty_max_bytes=128 * KIB)


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ended(folder: Path) -> str:
    store = LogStore.open(folder, shared=True)
    try:
        return store.superblock.ended
    finally:
        store.close()


def faulty() -> tuple[MemoryDevice, FaultyDevice]:
    memory = MemoryDevice(geometry=Geometry(size_bytes=SIZE), volatile_cache=True, record=True)
    return memory, FaultyDevice(memory)


async def test_a_flush_that_was_cancelled_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """Else the next one would take for durable what nobody has synced."""
    _, device = faulty()
    device.hold("write")
    synced: list[int] = []
    sync = files.fdatasync_all

    def counted(descriptors: list[int]) -> None:
        synced.extend(descriptors)
        sync(descriptors)

    async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=600) as write_log:
        await write_log.write(0, b"1" * 4096)
        monkeypatch.setattr(files, "fdatasync_all", counted)
        with trio.CancelScope() as scope:
            scope.cancel()
            await write_log.flush()
        assert scope.cancelled_caught
        assert not synced, "it was cancelled before it had begun"
        await write_log.flush()
        assert synced
        device.release("write")


async def test_a_flush_without_the_log_leaves_nothing_that_could_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """It returns when the data is on the device; older data in the log must not come back."""
    memory, device = faulty()
    async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=600) as write_log:
        await write_log.write(0, b"1" * 4096)
        monkeypatch.setattr(files, "fdatasync_all", no_space)
        update = Head.update

        def slow(head: Head, changes: dict[str, object]) -> None:
            time.sleep(0.2)
            update(head, changes)

        monkeypatch.setattr(Head, "update", slow)
        await write_log.flush()
        assert ended(tmp_path / "log"), "before the flush returns"
        memory.crash()
        assert memory.peek(0, 4096) == b"1" * 4096


async def test_a_log_that_fails_in_the_last_flush_is_not_replayed_at_the_next_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    _, device = faulty()
    async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=600) as write_log:
        await write_log.write(0, b"1" * 4096)
        await write_log.drain()
        monkeypatch.setattr(files, "fdatasync_all", no_space)
        with pytest.raises(LogError):
            await write_log.store.commit()
    assert ended(tmp_path / "log")


async def test_without_the_log_a_write_is_held_no_longer_than_the_device_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    _, device = faulty()
    device.fail("write", 1 << 30, lambda: ReplacementTimedOut("no path for 120 s"))
    with trio.CancelScope() as killed:
        async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=600) as write_log:
            await write_log.write(0, b"1" * 4096)
            monkeypatch.setattr(os, "pwritev", no_space)
            with trio.fail_after(600), pytest.raises(ReplacementTimedOut):
                await write_log.write(MIB, b"2" * 4096)
            device.fail("write", 0)
            await write_log.write(MIB, b"2" * 4096)
            assert ended(tmp_path / "log")
            killed.cancel()


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other closely. In real time: room comes from a thread."""
    monkeypatch.setattr(logdestage, "RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(logdestage, "RETRY_DELAY_MAX_S", 0.05)


async def test_a_write_that_finds_no_room_is_held_no_longer_than_the_device_holds_it(
    tmp_path: Path, prompt: None
) -> None:
    memory, device = faulty()
    device.fail("write", 1 << 30, lambda: ReplacementTimedOut("no path for 120 s"))
    taken = 0

    async def write_many() -> None:
        nonlocal taken
        for number in range(100):
            await write_log.write(number * 4096, bytes([number + 1]) * 4096)
            taken = number + 1

    async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=600) as write_log:
        with trio.fail_after(60), pytest.raises(ReplacementTimedOut):
            await write_many()
        device.fail("write", 0)
        with trio.fail_after(60):
            await _drain(write_log)
            await write_log.write(taken * 4096, bytes([taken + 1]) * 4096)
    for number in range(taken + 1):
        assert memory.peek(number * 4096, 4096) == bytes([number + 1]) * 4096


class Refusing(MemoryDevice):
    """Takes nothing."""

    refuses = True

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        if self.refuses:
            await trio.lowlevel.checkpoint()
            raise DeviceError("write-protected")
        await super().write(offset, source, fua=fua)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fast"])
async def test_more_than_the_log_can_take_again_is_refused_and_then_taken(
    tmp_path: Path, ordered: bool, prompt: None
) -> None:
    """All of a full log: what was refused is logged again, and there is no room for that."""
    device = Refusing(geometry=Geometry(size_bytes=SIZE))
    size = Size(segment_bytes=64 * KIB, segments=4, dirty_max_bytes=MIB)
    async with logged(
        tmp_path / "log", device, size=size, ordered=ordered, dirty_age_s=600
    ) as write_log:
        with trio.fail_after(60):
            taken = await _fill(write_log)
        with trio.fail_after(60), pytest.raises(DeviceError):
            await write_log.drain()
        device.refuses = False
        with trio.fail_after(60):
            await _drain(write_log)
    for number in range(taken):
        assert device.peek(number * 4096, 4096) == bytes([number + 1]) * 4096


async def _fill(write_log: WriteLog) -> int:
    """Write pages until the log is full to the last segment; how many."""
    store, taken = write_log.store, 0

    async def write() -> None:
        nonlocal taken
        for number in range(200):
            await write_log.write(number * 4096, bytes([number + 1]) * 4096)
            taken = number + 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        slots = store._slots
        while slots._prepared or slots.to_prepare(store.destaged) is not None:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    return taken


async def _drain(write_log: WriteLog) -> None:
    """What was refused or failed before may still be told."""
    while True:
        try:
            await write_log.drain()
        except (DeviceError, ReplacementTimedOut):
            await trio.sleep(0.01)
        else:
            return


async def test_what_may_come_again_is_not_kept_in_mind_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """A byte that changes again costs a sync of the log; so do many that never do."""
    monkeypatch.setattr(logdestage, "UNSURE_EXTENTS_MAX", 8)
    _, device = faulty()
    async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=0.1) as write_log:
        for number in range(8):
            await write_log.write(number * 4096, b"1" * 4096)
            await write_log.destager.drain()
        assert write_log.store.durable == 0, "nothing has changed twice"
        await write_log.write(MIB, b"1" * 4096)
        await write_log.destager.drain()
        before = write_log.store.durable
        assert before > 0
        await write_log.write(MIB, b"2" * 4096)
        await write_log.destager.drain()
        assert write_log.store.durable > before


async def test_what_a_disk_has_no_room_for_is_taken_away_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, asked = os.posix_fallocate, []

    def twice(descriptor: int, offset: int, length: int) -> None:
        asked.append(length)
        if len(asked) > 2:
            no_space()
        reserve(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", twice)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LogError, match="No space left"):
        LogStore.create(tmp_path / "log", superblock(SIZE, TINY))
    assert not list((tmp_path / "log").iterdir())
    assert len(os.listdir("/proc/self/fd")) == before


def test_whoever_writes_the_superblock_later_does_not_bring_a_log_back(tmp_path: Path) -> None:
    """The keeper's write may be under way when the log is given up."""
    store = LogStore.create(tmp_path / "log", superblock(SIZE, TINY))
    keeper = Head(store.folder, 10, store.superblock)
    store._head = keeper
    store.retire("it has failed")
    keeper.update({"generation": 7})
    store.close()
    assert ended(tmp_path / "log") == "it has failed"


def test_a_long_reason_for_an_end_fits_the_superblock(tmp_path: Path) -> None:
    """It names a file, perhaps deep in folders."""
    store = LogStore.create(tmp_path / "log", superblock(SIZE, TINY))
    store.retire("log /" + "deep/" * 1000 + "log: it has failed")
    store.close()
    assert ended(tmp_path / "log").endswith("it has failed")
