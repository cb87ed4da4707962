"""A log that fails or is full, a device that refuses or is away: I/O goes on, nothing is lost."""

import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry
from orion_iscsifs.cache import writelog
from orion_iscsifs.cache.writelog import WriteLog
from orion_iscsifs.errors import ConnectionLost, DeviceError, OrionError
from orion_iscsifs.localstore import files
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.scan import Place
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.logs import KIB, MIB, Size, logged

SIZE = 2 * MIB
TINY = Size(segment_bytes=64 * KIB, segments=4, dirty_max_bytes=128 * KIB)


@dataclass
class Rig:
    log: WriteLog
    faults: FaultyDevice
    memory: MemoryDevice

    async def write(self, offset: int, fill: int, length: int = 4096) -> None:
        await self.log.write(offset, bytes([fill]) * length)

    async def read(self, offset: int, length: int = 4096) -> bytes:
        target = bytearray(length)
        await self.log.read_into(offset, memoryview(target))
        return bytes(target)


@asynccontextmanager
async def rig(
    folder: Path, *, size: Size = TINY, ordered: bool = True, dirty_age_s: float = 600
) -> AsyncIterator[Rig]:
    memory = MemoryDevice(geometry=Geometry(size_bytes=SIZE), volatile_cache=True, record=True)
    faults = FaultyDevice(memory)
    async with logged(
        folder, faults, size=size, ordered=ordered, dirty_age_s=dirty_age_s
    ) as write_log:
        yield Rig(write_log, faults, memory)


def failing(error: int) -> object:
    def fail(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.mark.parametrize("where", ["fdatasync_all", "pwritev", "prepare"])
async def test_a_log_that_fails_loses_nothing(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with rig(tmp_path / "log") as r:
        for number in range(8):
            await r.write(number * 4096, number + 1)
        owner = os if where == "pwritev" else files
        monkeypatch.setattr(owner, where, failing(5))
        for number in range(8, 60):  # over several segments
            await r.write(number * 4096, number + 1)
        await r.log.flush()
        assert r.log.state == "failed"
        r.memory.crash()  # what was flushed is durable on the device
        for number in range(60):
            assert r.memory.peek(number * 4096, 4096) == bytes([number + 1]) * 4096
        monkeypatch.undo()
        await r.write(0, 99)
        assert r.memory.peek(0, 4096) == bytes([99]) * 4096, "write-through from now on"
        assert await r.read(0) == bytes([99]) * 4096
        await eventually(lambda: bool(r.log.store.superblock.ended))
    store = LogStore.open(tmp_path / "log", shared=True)
    assert "ail" not in store.superblock.lun
    assert store.superblock.ended, "it must not be replayed over what came later"
    store.close()


async def test_a_log_that_cannot_even_be_marked_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: object,
) -> None:
    async with rig(tmp_path / "log") as r:
        await r.write(0, 1)
        monkeypatch.setattr(files, "fdatasync_all", failing(5))
        monkeypatch.setattr(LogStore, "write_superblock", failing(5))
        monkeypatch.setattr(files, "remove_files", failing(30))
        await r.log.flush()
        await eventually(lambda: "remove that folder by hand" in caplog.text)
        monkeypatch.undo()


async def test_writes_wait_for_room_and_the_cap_holds(
    tmp_path: Path, autojump_clock: object
) -> None:
    """The device takes its time; more is written than fits in memory or in the log."""
    model = bytearray(SIZE)
    rng = random.Random(1)
    async with rig(tmp_path / "log") as r:
        r.faults.delay("write", 0.02)
        highest = 0
        for number in range(600):
            offset = rng.randrange(SIZE // 4096) * 4096
            content = bytes([number % 255 + 1]) * 4096
            await r.log.write(offset, content)
            model[offset : offset + 4096] = content
            highest = max(highest, r.log.statistics.dirty_bytes)
            assert r.log.store.used_bytes <= TINY.segment_bytes * TINY.segments
            if number % 50 == 0:
                await r.log.flush()
        assert 64 * KIB < highest <= TINY.dirty_max_bytes
        assert r.log.statistics.throttled_writes > 20
        assert await r.read(0, SIZE) == model
        await r.log.drain()
        assert r.memory.peek(0, SIZE) == model


async def test_large_writes_pass_a_log_that_is_nearly_full(
    tmp_path: Path, autojump_clock: object
) -> None:
    size = Size(segment_bytes=MIB, segments=4, dirty_max_bytes=MIB)
    async with rig(tmp_path / "log", size=size) as r:
        r.faults.hold("write")
        for number in range(200):
            await r.write(number * 4096, 1)
        assert r.log.destager.is_nearly_full
        before = r.log.store.next_seq
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.write, MIB, 2, 512 * KIB)
            await r.faults.wait_held("write", 2)
            assert r.log.store.next_seq == before, "it goes past the log"
            r.faults.release("write")
        r.memory.poke(0, r.memory.peek(0, 1))
        assert await r.read(MIB, 512 * KIB) == b"\x02" * (512 * KIB)
        await r.log.flush()
        r.memory.crash()
        assert r.memory.peek(MIB, 512 * KIB) == b"\x02" * (512 * KIB), "the flush covers it"


async def test_nothing_passes_what_was_flushed_before(
    tmp_path: Path, autojump_clock: object
) -> None:
    size = Size(segment_bytes=MIB, segments=4, dirty_max_bytes=MIB)
    async with rig(tmp_path / "log", size=size) as r:
        r.faults.hold("write")
        for number in range(200):
            await r.write(number * 4096, 1)
        await r.log.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.write, MIB, 2, 512 * KIB)
            await trio.sleep(60)
            assert not any(r.memory.peek(MIB, 512 * KIB))
            r.faults.release("write")
        await r.log.drain()
        writes = [q.offset for q in r.memory.requests if q.kind == "write"]
        assert max(i for i, o in enumerate(writes) if o < MIB) < min(
            i for i, o in enumerate(writes) if o >= MIB
        )


async def test_a_device_that_is_away_holds_up_neither_writes_nor_flushes(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with rig(tmp_path / "log", dirty_age_s=0.1) as r:
        r.faults.fail("write", 1 << 30, lambda: ConnectionLost("the target is gone"))
        for number in range(20):
            await r.write(number * 4096, number + 1)
            await r.log.flush()
        with pytest.raises(ConnectionLost):
            await r.log.drain()
        assert r.log.statistics.dirty_bytes == 20 * 4096
        r.faults.fail("write", 0)
        await r.log.drain()
        assert r.log.statistics.dirty_bytes == 0
        for number in range(20):
            assert r.memory.peek(number * 4096, 1) == bytes([number + 1])


class BadPage(MemoryDevice):
    """Refuses every write that touches one page, as long as it is bad."""

    bad = True

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        if self.bad and offset < 3 * 4096 and offset + len(source) > 2 * 4096:
            await trio.lowlevel.checkpoint()
            raise DeviceError("MEDIUM ERROR at page 2")
        await super().write(offset, source, fua=fua)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fast"])
async def test_a_page_that_is_refused_keeps_only_itself_from_the_device(
    tmp_path: Path, ordered: bool, autojump_clock: object
) -> None:
    device = BadPage(geometry=Geometry(size_bytes=SIZE))
    async with logged(
        tmp_path / "log", device, size=TINY, ordered=ordered, dirty_age_s=0.1
    ) as write_log:
        await write_log.write(0, b"1" * (8 * 4096))
        await trio.sleep(20)
        assert device.peek(0, 2 * 4096) == b"1" * (2 * 4096)
        assert device.peek(3 * 4096, 5 * 4096) == b"1" * (5 * 4096)
        with pytest.raises(DeviceError, match="MEDIUM ERROR"):
            await write_log.flush()
        await write_log.flush()  # once
        # It holds up nothing: more than the log holds goes through.
        for number in range(100):
            await write_log.write(MIB + number % 64 * 4096, bytes([number + 1]) * 4096)
            await write_log.flush()
        assert await read(write_log, 2 * 4096) == b"1" * 4096
        with pytest.raises(DeviceError, match="MEDIUM ERROR"):
            await write_log.drain()
        device.bad = False
        await write_log.drain()
        assert device.peek(0, 8 * 4096) == b"1" * (8 * 4096)


async def test_what_is_refused_is_still_there_after_a_crash(
    tmp_path: Path, autojump_clock: object
) -> None:
    device = BadPage(geometry=Geometry(size_bytes=SIZE))
    with trio.CancelScope() as killed:
        async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=0.1) as write_log:
            await write_log.write(2 * 4096, b"1" * 4096)
            for number in range(100):
                await write_log.write(MIB, bytes([number + 1]) * 8192)
                await trio.sleep(1)
            killed.cancel()
    device.bad = False
    async with logged(tmp_path / "log", device, size=TINY) as write_log:
        assert await read(write_log, 2 * 4096) == b"1" * 4096
    assert device.peek(2 * 4096, 4096) == b"1" * 4096


async def test_a_record_that_rots_is_an_error_and_not_old_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """Between the check at the mount and the write-back."""
    device = MemoryDevice(geometry=Geometry(size_bytes=SIZE))
    faults = FaultyDevice(device)
    faults.hold("write")
    with trio.CancelScope() as killed:
        async with logged(tmp_path / "log", faults, size=TINY) as write_log:
            await write_log.write(0, b"1" * 4096)
            await write_log.write(8192, b"2" * 4096)
            await write_log.flush()
            killed.cancel()
    healthy = LogStore.read

    async def rotten(store: LogStore, place: Place, checksum: int, length: int) -> bytes:
        content = await healthy(store, place, checksum, length)
        if content[0] == ord("1"):
            raise LogError("a record has been damaged since it was written")
        return content

    monkeypatch.setattr(LogStore, "read", rotten)
    async with logged(tmp_path / "log", device, size=TINY) as write_log:
        await eventually(lambda: not write_log.statistics.dirty_bytes)
        with pytest.raises(OrionError, match="lost"):
            await read(write_log, 0)
        with pytest.raises(OrionError, match="lost"):
            await write_log.flush()
        assert await read(write_log, 8192) == b"2" * 4096
        await write_log.write(0, b"3" * 4096)
        assert await read(write_log, 0) == b"3" * 4096, "until it is written again"
    assert device.peek(8192, 4096) == b"2" * 4096


async def test_a_log_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(28))
    with pytest.raises(LogError, match="No space left"):
        async with rig(tmp_path / "log"):
            pass
    assert not list((tmp_path / "log").glob("super.*")), "nothing that looks like a log is left"


async def eventually(condition: Callable[[], bool]) -> None:
    """In real time: the clock of these tests jumps ahead while a thread works."""
    for _ in range(2000):
        if condition():
            return
        await trio.to_thread.run_sync(time.sleep, 0.002)
    pytest.fail("it has not happened within 4 s")


async def read(device: BlockDevice, offset: int, length: int = 4096) -> bytes:
    target = bytearray(length)
    await device.read_into(offset, memoryview(target))
    return bytes(target)


async def test_a_refused_page_does_not_come_back_over_what_is_newer(
    tmp_path: Path, autojump_clock: object
) -> None:
    """It is logged again when there is room; meanwhile the same page has been written anew."""
    device = BadPage(geometry=Geometry(size_bytes=SIZE))
    rng = random.Random(5)
    async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=0.1) as write_log:
        newest = b""
        for number in range(400):
            newest = bytes([number % 255 + 1]) * 4096
            await write_log.write(2 * 4096, newest)
            assert await read(write_log, 2 * 4096) == newest
            for _ in range(rng.randrange(4)):
                await write_log.write(MIB, rng.randbytes(16 * KIB))
            if rng.random() < 0.3:
                with suppress(DeviceError):
                    await write_log.flush()
            assert await read(write_log, 2 * 4096) == newest
        device.bad = False
        with suppress(DeviceError):
            await write_log.drain()
        await write_log.drain()
    assert device.peek(2 * 4096, 4096) == newest


class Healing(BadPage):
    """The page is replaced when zeroes are asked for."""

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self.bad = False
        await super().write_zeroes(offset, length, may_unmap=may_unmap)

    async def discard(self, offset: int, length: int) -> None:
        self.bad = False
        await super().discard(offset, length)


@pytest.mark.parametrize("how", ["zeroes", "discard"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fast"])
async def test_what_goes_past_the_log_over_a_refused_page_survives_a_crash(
    tmp_path: Path, ordered: bool, how: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """The log still holds what was refused, and it is older."""
    monkeypatch.setattr(writelog, "LOGGED_ZEROES_MAX_BYTES", 64 * KIB)
    device = Healing(geometry=Geometry(size_bytes=SIZE, discard_granularity_bytes=512))
    with trio.CancelScope() as killed:
        async with logged(
            tmp_path / "log", device, size=TINY, ordered=ordered, dirty_age_s=0.1
        ) as write_log:
            await write_log.write(0, b"1" * (8 * 4096))
            await trio.sleep(20)
            with pytest.raises(DeviceError, match="MEDIUM ERROR"):
                await write_log.flush()
            if how == "zeroes":
                await write_log.write_zeroes(0, MIB)
            else:
                await write_log.discard(0, MIB)
            await write_log.flush()
            assert await read(write_log, 2 * 4096) == bytes(4096)
            killed.cancel()
    async with logged(tmp_path / "log", device, size=TINY) as write_log:
        assert await read(write_log, 2 * 4096) == bytes(4096)
        await write_log.drain()
    assert device.peek(2 * 4096, 4096) == bytes(4096)


async def test_a_failed_log_is_given_up_although_a_page_is_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """Else it would be replayed after a crash, over all that is written without it."""
    device = BadPage(geometry=Geometry(size_bytes=SIZE))
    with trio.CancelScope() as killed:
        async with logged(tmp_path / "log", device, size=TINY, dirty_age_s=0.1) as write_log:
            await write_log.write(0, b"1" * (8 * 4096))
            await trio.sleep(20)
            monkeypatch.setattr(os, "pwritev", failing(5))
            await write_log.write(MIB, b"2" * 4096)
            assert write_log.store.superblock.ended, "before the first write without it is done"
            assert device.peek(MIB, 4096) == b"2" * 4096
            assert await read(write_log, 2 * 4096) == b"1" * 4096
            killed.cancel()
