"""The front door: discard, zeroing, write-through, geometry, settings, beginning and end."""

import os

import pytest
import trio
import trio.testing

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.block.pages import FRAME_BYTES
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.errors import DeviceError, OutOfRange, ScsiError, UsageError, WriteProtected
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.helpers import KIB, MIB, Rig, rig

WRITETHROUGH = CacheMode.WRITETHROUGH


# -- zeroing -------------------------------------------------------------------------------------


async def test_short_zeroes_are_absorbed(autojump_clock: object) -> None:
    async with rig() as r:
        r.memory.poke(0, b"x" * 64 * KIB)
        await r.cache.write_zeroes(4 * KIB, 16 * KIB)
        assert not r.memory.calls
        assert await r.read(4 * KIB, 16 * KIB) == bytes(16 * KIB)
        await r.cache.flush()
        assert r.memory.peek(0, 24 * KIB) == b"x" * 4 * KIB + bytes(16 * KIB) + b"x" * 4 * KIB


async def test_long_zeroes_go_down_and_take_dirty_pages_with_them(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"x" * MIB)
        await r.cache.write_zeroes(512, MIB - 1024)
        assert r.memory.calls["write_zeroes"] == 1
        assert r.cache.statistics.dirty_bytes == 8 * KIB, "only the two ends are left"
        expected = b"x" * 512 + bytes(MIB - 1024) + b"x" * 512
        assert await r.read(0, MIB) == expected
        await r.cache.flush()
        assert r.memory.peek(0, MIB) == expected


async def test_a_flush_that_waits_for_pages_that_are_zeroed(autojump_clock: object) -> None:
    async with rig() as r:
        r.faults.hold("zero")
        r.faults.hold("write")
        await r.cache.write(0, b"x" * 256 * KIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.write_zeroes, 0, 256 * KIB)
            await r.faults.wait_held("zero")
            nursery.start_soon(r.cache.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert r.faults.waiting["write"] == 0, "written back under a zeroing"
            r.faults.release("zero")
            r.faults.release("write")
        assert await r.read(0, 256 * KIB) == bytes(256 * KIB)
        assert r.memory.peek(0, 256 * KIB) == bytes(256 * KIB)


async def test_failed_zeroes_keep_dirty_data_and_forget_clean(autojump_clock: object) -> None:
    async with rig() as r:
        r.memory.poke(0, b"o" * MIB)
        await r.read(0, 64 * KIB)
        await r.cache.write(64 * KIB, b"d" * 64 * KIB)
        r.faults.fail("zero", 1)
        with pytest.raises(ScsiError):
            await r.cache.write_zeroes(0, 512 * KIB)
        r.memory.poke(0, bytes(64 * KIB))  # it did take effect in part
        assert await r.read(0, 64 * KIB) == bytes(64 * KIB)
        assert await r.read(64 * KIB, 64 * KIB) == b"d" * 64 * KIB


async def test_zeroing_waits_for_a_write_back_of_the_range(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(64 * KIB, b"x" * 4 * KIB)
        r.faults.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.flush)
            await r.faults.wait_held("write")
            nursery.start_soon(r.cache.write_zeroes, 0, MIB)
            await trio.testing.wait_all_tasks_blocked()
            assert "write_zeroes" not in r.memory.calls
            r.faults.release("write")
        assert r.memory.peek(0, MIB) == bytes(MIB)


async def test_a_write_waits_for_a_zeroing_of_its_range_only(autojump_clock: object) -> None:
    async with rig() as r:
        r.faults.hold("zero")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.write_zeroes, 0, MIB)
            await r.faults.wait_held("zero")
            await r.cache.write(2 * MIB, b"y" * 4 * KIB)
            nursery.start_soon(r.cache.write, 4 * KIB, b"x" * 4 * KIB)
            nursery.start_soon(r.cache.write, 16 * KIB, b"z" * 512)
            await trio.testing.wait_all_tasks_blocked()
            r.faults.release("zero")
        assert await r.read(4 * KIB, 4 * KIB) == b"x" * 4 * KIB
        await r.cache.flush()
        expected = bytes(4 * KIB) + b"x" * 4 * KIB + bytes(8 * KIB) + b"z" * 512
        assert r.memory.peek(0, len(expected)) == expected


# -- discard -------------------------------------------------------------------------------------


async def test_discard_reaches_the_device_and_empties_the_cache(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"x" * 128 * KIB)
        await r.cache.discard(0, 64 * KIB)
        assert await r.read(0, 64 * KIB) == bytes(64 * KIB)
        assert await r.read(64 * KIB, 64 * KIB) == b"x" * 64 * KIB


async def test_discarded_dirty_data_never_turns_into_what_was_before_it(
    autojump_clock: object,
) -> None:
    """The device ignores part of the discard: what is read must be the last write, not the old."""
    async with rig(discard_granularity_bytes=64 * KIB) as r:
        r.memory.poke(0, b"o" * 128 * KIB)
        await r.cache.write(32 * KIB, b"n" * 64 * KIB)
        await r.cache.discard(32 * KIB, 64 * KIB)
        seen = await r.read(32 * KIB, 64 * KIB)
        for start in range(0, 64 * KIB, 512):
            assert seen[start : start + 512] in (b"n" * 512, bytes(512))
        await r.cache.flush()
        assert r.memory.peek(32 * KIB, 64 * KIB) == seen


async def test_what_is_written_during_a_discard_stays(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"o" * 64 * KIB)
        r.faults.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.discard, 0, 64 * KIB)
            await r.faults.wait_held("write")
            await r.cache.write(8 * KIB, b"n" * 4 * KIB)
            r.faults.release("write")
        assert await r.read(8 * KIB, 4 * KIB) == b"n" * 4 * KIB
        assert await r.read(16 * KIB, 4 * KIB) == bytes(4 * KIB)


async def test_discard_is_nothing_where_the_device_has_none(autojump_clock: object) -> None:
    async with rig(discard_granularity_bytes=0) as r:
        await r.cache.write(0, b"x" * 4 * KIB)
        await r.cache.discard(0, MIB)
        assert not r.memory.calls
        assert await r.read(0, 4 * KIB) == b"x" * 4 * KIB


# -- write-through -------------------------------------------------------------------------------


async def test_write_through_returns_when_the_device_has_it(autojump_clock: object) -> None:
    async with rig(mode=WRITETHROUGH) as r:
        content = os.urandom(64 * KIB)
        await r.cache.write(4 * KIB, content)
        assert r.memory.peek(4 * KIB, 64 * KIB) == content
        assert r.cache.statistics.dirty_bytes == 0
        assert await r.read(4 * KIB, 64 * KIB) == content
        assert not r.reads(), "the write has filled the cache"
        await r.cache.write(8 * KIB, b"f" * 512, fua=True)
        assert r.memory.requests[-1].fua
        assert await r.read(8 * KIB, 4 * KIB) == b"f" * 512 + content[4608 : 8 * KIB]


async def test_a_failed_write_through_is_not_cached(autojump_clock: object) -> None:
    async with rig(mode=WRITETHROUGH) as r:
        await r.cache.write(0, b"o" * 8 * KIB)
        r.faults.fail("write", 1)
        with pytest.raises(ScsiError):
            await r.cache.write(0, b"n" * 4 * KIB)
        r.memory.poke(0, b"t" * 512)  # it did take effect in part
        assert await r.read(0, 4 * KIB) == b"t" * 512 + b"o" * 3584


async def test_overlapping_write_throughs_leave_cache_and_device_the_same(
    autojump_clock: object,
) -> None:
    async with rig(mode=WRITETHROUGH) as r:
        r.faults.delay("write", 0.01)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                content = bytes([number + 1]) * 16 * KIB
                nursery.start_soon(r.cache.write, number * 4 * KIB, content)
        assert await r.read(0, 64 * KIB) == r.memory.peek(0, 64 * KIB)
        await r.cache.flush()
        assert r.memory.calls["flush"] == 1


async def test_separate_write_throughs_run_in_parallel(autojump_clock: object) -> None:
    async with rig(mode=WRITETHROUGH) as r:
        r.faults.delay("write", 1)
        with trio.fail_after(1.5):
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(r.cache.write, number * 4 * KIB, bytes(4 * KIB))


# -- geometry ------------------------------------------------------------------------------------


async def test_growth_travels_up_and_drops_nothing(autojump_clock: object) -> None:
    async with rig(size_bytes=MIB + 512) as r:
        seen: list[Geometry] = []
        r.cache.on_geometry_change(seen.append)
        await r.cache.write(0, b"x" * 4 * KIB)
        await r.cache.write(MIB, b"t" * 512)
        with pytest.raises(OutOfRange):
            await r.cache.write(2 * MIB - 4 * KIB, bytes(4 * KIB))
        r.memory.change_geometry(size_bytes=2 * MIB)
        assert [geometry.size_bytes for geometry in seen] == [2 * MIB]
        assert r.cache.geometry.size_bytes == 2 * MIB
        assert r.cache.statistics.dirty_bytes == 4 * KIB
        await r.cache.write(2 * MIB - 4 * KIB, b"y" * 4 * KIB)
        assert await r.read(MIB, 4 * KIB) == b"t" * 512 + bytes(3584)
        await r.cache.flush()
        assert r.memory.peek(2 * MIB - 4 * KIB, 4 * KIB) == b"y" * 4 * KIB


async def test_what_is_unwritten_beyond_a_new_end_is_kept_until_it_can_be_written(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(size_bytes=4 * MIB) as r:
        await r.cache.write(MIB - 8 * KIB, b"x" * 16 * KIB)
        await r.cache.write(3 * MIB, b"y" * 4 * KIB)
        await r.read(2 * MIB, 4 * KIB)
        r.memory.change_geometry(size_bytes=MIB)
        assert "12288 unwritten bytes lie beyond its end" in caplog.text
        with pytest.raises(OutOfRange):
            await r.read(MIB, 4 * KIB)
        with pytest.raises(OutOfRange):
            await r.cache.write(MIB, bytes(512))
        for _ in range(2):
            with pytest.raises(OutOfRange):
                await r.cache.flush()
        assert r.memory.peek(MIB - 8 * KIB, 8 * KIB) == b"x" * 8 * KIB, "what is inside is written"
        assert r.cache.statistics.dirty_bytes == 12 * KIB
        r.cache.check()
        r.memory.change_geometry(size_bytes=2 * MIB)
        assert await r.read(MIB, 8 * KIB) == b"x" * 8 * KIB
        r.memory.change_geometry(size_bytes=4 * MIB)
        await r.cache.flush()
        assert r.memory.peek(MIB, 8 * KIB) == b"x" * 8 * KIB
        assert r.memory.peek(3 * MIB, 4 * KIB) == b"y" * 4 * KIB
        assert r.cache.statistics.dirty_bytes == 0
        r.cache.check()


@pytest.mark.parametrize("first", ["read", "write", "flush"])
async def test_a_page_that_the_new_end_cuts_through(
    autojump_clock: object, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    """Its inner part is on the device before anything else touches those blocks."""
    async with rig(size_bytes=4 * MIB) as r:
        await r.cache.write(MIB, b"x" * 4 * KIB)
        r.memory.change_geometry(size_bytes=MIB + 1024)
        if first == "read":
            assert await r.read(MIB, 1024) == b"x" * 1024
        elif first == "write":
            await r.cache.write(MIB + 512, b"z" * 512)
            assert await r.read(MIB, 1024) == b"x" * 512 + b"z" * 512
        with pytest.raises(DeviceError, match="up to 3072 bytes beyond its end are lost"):
            await r.cache.flush()
        await r.cache.flush()
        after = b"z" if first == "write" else b"x"
        assert r.memory.peek(MIB, 1024) == b"x" * 512 + after * 512
        assert r.cache.statistics.dirty_bytes == 0
        r.memory.change_geometry(size_bytes=2 * MIB)
        await r.cache.flush()
        assert await r.read(MIB, 4 * KIB) == b"x" * 512 + after * 512 + bytes(3 * KIB)
        r.cache.check()


async def test_shrinking_during_a_write_back_and_a_fetch(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    memory = MemoryDevice(4 * MIB)
    faults = FaultyDevice(memory)
    config = CacheConfig(size_bytes=MIB, dirty_max_bytes=MIB, readahead="off")
    async with WritebackCache(faults, config) as cache:
        await cache.write(3 * MIB, b"y" * 4 * KIB)
        faults.hold("write")
        faults.hold("read")

        async def flush() -> None:
            with pytest.raises(OutOfRange):
                await cache.flush()

        async def read() -> None:
            with pytest.raises(OutOfRange):
                await cache.read_into(3 * MIB, memoryview(bytearray(8 * KIB)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush)
            nursery.start_soon(read)
            await faults.wait_held("write")
            await faults.wait_held("read")
            memory.change_geometry(size_bytes=MIB)
            faults.release("write")
            faults.release("read")
        cache.check()
        assert cache.statistics.dirty_bytes == 4 * KIB
        memory.change_geometry(size_bytes=4 * MIB)
        await cache.flush()
        assert memory.peek(3 * MIB, 4 * KIB) == b"y" * 4 * KIB
        assert cache.statistics.dirty_bytes == 0
        cache.check()
    assert "unwritten bytes" in caplog.text


async def test_write_protection_that_comes_later(autojump_clock: object) -> None:
    async with rig() as r:
        await r.read(0, 4 * KIB)
        r.memory.change_geometry(read_only=True)
        with pytest.raises(WriteProtected):
            await r.cache.write(0, bytes(4 * KIB))
        r.memory.change_geometry(read_only=False)
        await r.cache.write(0, bytes(4 * KIB))


# -- beginning and end ---------------------------------------------------------------------------


async def test_leaving_flushes(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"x" * 4 * KIB)
    r.memory.crash()
    assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB


async def test_leaving_raises_what_the_flush_raises(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    memory = MemoryDevice(MIB)
    faults = FaultyDevice(memory)

    async def use() -> None:
        async with WritebackCache(faults, CacheConfig()) as cache:
            await cache.write(0, b"x" * 4 * KIB)
            faults.fail("write", 5)

    with pytest.raises(ScsiError):
        await use()
    assert "4096 bytes unwritten" in caplog.text


async def test_an_error_inside_leaves_as_it_is_and_the_data_is_written(
    autojump_clock: object,
) -> None:
    memory = MemoryDevice(MIB)

    async def use() -> None:
        async with WritebackCache(memory, CacheConfig()) as cache:
            await cache.write(0, b"x" * 4 * KIB)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await use()
    assert memory.peek(0, 4 * KIB) == b"x" * 4 * KIB


async def test_cancelling_ends_it_without_a_flush(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    memory = MemoryDevice(MIB)
    with trio.move_on_after(1):
        async with WritebackCache(memory, CacheConfig()) as cache:
            await cache.write(0, b"x" * 4 * KIB)
            await trio.sleep_forever()
    assert "unwritten" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(size_bytes=512 * KIB),
        CacheConfig(size_bytes=MIB, dirty_max_bytes=2 * MIB),
        CacheConfig(size_bytes=MIB, dirty_max_bytes=FRAME_BYTES - 1),
    ],
)
def test_settings_that_can_not_work(config: CacheConfig) -> None:
    with pytest.raises(UsageError):
        WritebackCache(MemoryDevice(MIB), config)


async def test_the_memory_is_bounded(autojump_clock: object) -> None:
    async with rig(size_bytes=64 * MIB, cache_bytes=MIB, dirty_max_bytes=512 * KIB) as r:
        for offset in range(0, 32 * MIB, 100 * KIB):
            await r.cache.write(offset, bytes(4 * KIB))
            await _read_somewhere(r, offset)
            r.cache.check()
        assert len(r.cache._table.frames) <= 16


async def _read_somewhere(r: Rig, offset: int) -> None:
    await r.read(32 * MIB + offset, 8 * KIB)
