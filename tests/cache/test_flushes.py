"""Flushes and writes with FUA: what they wait for, what they share, and what it costs."""

import os

import pytest
import trio
import trio.testing

from orion_iscsifs.errors import ScsiError
from tests.cache.helpers import KIB, MIB, Rig, rig

# -- flushes -------------------------------------------------------------------------------------


async def test_a_flush_does_not_wait_for_later_writes(autojump_clock: object) -> None:
    """Two pages of one frame, rewritten all the time, while somebody flushes."""
    async with rig(dirty_age_s=0) as r:
        r.faults.delay("write", 0.01)

        async def hammer(offset: int) -> None:
            while True:
                await r.cache.write(offset, os.urandom(16) * 256)
                await trio.sleep(0.0007)

        async with trio.open_nursery() as nursery:
            for offset in (0, 8 * KIB, MIB):
                nursery.start_soon(hammer, offset)
            await trio.sleep(0.1)
            for _ in range(20):
                with trio.fail_after(0.05):
                    await r.cache.flush()
            nursery.cancel_scope.cancel()


async def test_flushes_share_one_device_flush(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, bytes(4 * KIB))
        r.faults.hold("flush")
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(r.cache.flush)
            await r.faults.wait_held("flush")
            await trio.testing.wait_all_tasks_blocked()
            assert r.faults.waiting["flush"] == 1
            r.faults.release("flush")
        assert r.memory.calls["flush"] == 1


async def test_a_flush_needs_its_own_if_writes_completed_meanwhile(autojump_clock: object) -> None:
    async with rig() as r:
        r.faults.arrive_first = True
        await r.cache.write(0, b"1" * 4 * KIB)
        r.faults.hold("flush")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.flush)
            await r.faults.wait_held("flush")
            await r.cache.write(MIB, b"2" * 4 * KIB)
            nursery.start_soon(r.cache.flush)
            nursery.start_soon(r.cache.flush)
            await trio.testing.wait_all_tasks_blocked()
            r.faults.release("flush")
        assert r.memory.calls["flush"] == 2
        r.memory.crash()
        assert r.memory.peek(MIB, 4 * KIB) == b"2" * 4 * KIB


async def test_a_cancelled_flush_does_not_take_the_others_with_it(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"1" * 4 * KIB)
        r.faults.hold("flush")
        async with trio.open_nursery() as nursery, trio.open_nursery() as doomed:
            doomed.start_soon(r.cache.flush)
            await r.faults.wait_held("flush")
            nursery.start_soon(r.cache.flush)
            await trio.testing.wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
            r.faults.release("flush")
        r.memory.crash()
        assert r.memory.peek(0, 4 * KIB) == b"1" * 4 * KIB


async def test_a_flush_with_nothing_new_costs_nothing(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.flush()
        await r.cache.write(0, bytes(512))
        await r.cache.flush()
        await r.cache.flush()
        assert r.memory.calls["flush"] == 1


# -- FUA -----------------------------------------------------------------------------------------


async def test_fua_is_one_write_and_no_flush(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(4 * KIB, b"x" * 8 * KIB, fua=True)
        assert r.writes() == [(4 * KIB, 8 * KIB)]
        assert "flush" not in r.memory.calls
        r.memory.crash()
        assert r.memory.peek(4 * KIB, 8 * KIB) == b"x" * 8 * KIB


async def test_fua_during_a_write_back_of_the_same_page(autojump_clock: object) -> None:
    async with rig() as r:
        await r.cache.write(0, b"1" * 4 * KIB)
        r.faults.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.cache.flush)
            await r.faults.wait_held("write")
            nursery.start_soon(_durable_write, r)
            await trio.testing.wait_all_tasks_blocked()
            r.faults.release("write")


async def _durable_write(r: Rig) -> None:
    await r.cache.write(0, b"2" * 4 * KIB, fua=True)
    r.memory.crash()
    assert r.memory.peek(0, 4 * KIB) == b"2" * 4 * KIB


async def test_a_large_fua_write_is_cut_to_the_optimal_transfer(autojump_clock: object) -> None:
    async with rig(cache_bytes=8 * MIB, dirty_max_bytes=4 * MIB) as r:
        content = os.urandom(3 * MIB)
        await r.cache.write(0, content, fua=True)
        assert sorted(r.writes()) == [(0, MIB), (MIB, MIB), (2 * MIB, MIB)]
        r.memory.crash()
        assert r.memory.peek(0, 3 * MIB) == content


async def test_a_failed_fua_write_raises_and_its_data_stays(autojump_clock: object) -> None:
    async with rig() as r:
        r.faults.fail("write", 1)
        with pytest.raises(ScsiError):
            await r.cache.write(0, b"x" * 4 * KIB, fua=True)
        await r.cache.flush()
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB


async def test_a_small_flush_is_one_wave_with_fua(autojump_clock: object) -> None:
    """One round trip instead of two."""
    async with rig(fua=True) as r:
        for number in (0, 5, 40):
            await r.cache.write(number * 64 * KIB, b"x" * 4 * KIB)
        await r.cache.flush()
        assert sorted(r.writes()) == [(n * 64 * KIB, 4 * KIB) for n in (0, 5, 40)]
        assert all(q.fua for q in r.memory.requests if q.kind == "write")
        assert "flush" not in r.memory.calls
        r.memory.crash()
        assert r.memory.peek(5 * 64 * KIB, 4 * KIB) == b"x" * 4 * KIB


async def test_a_large_flush_is_followed_by_one_of_the_device(autojump_clock: object) -> None:
    async with rig(fua=True) as r:
        for number in range(40):
            await r.cache.write(number * 128 * KIB, b"x" * 4 * KIB)
        await r.cache.flush()
        assert r.memory.calls["flush"] == 1
        r.memory.crash()
        assert r.memory.peek(39 * 128 * KIB, 4 * KIB) == b"x" * 4 * KIB


async def test_fua_is_no_help_when_something_was_written_without(autojump_clock: object) -> None:
    async with rig(dirty_age_s=0.5, fua=True) as r:
        await r.cache.write(0, b"x" * 4 * KIB)
        await trio.sleep(5)
        await r.cache.write(64 * KIB, b"y" * 4 * KIB)
        await r.cache.flush()
        assert r.memory.calls["flush"] == 1
        r.memory.crash()
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB
        assert r.memory.peek(64 * KIB, 4 * KIB) == b"y" * 4 * KIB


async def test_a_wave_with_fua_that_fails_is_raised_by_every_flush_that_waits(
    autojump_clock: object,
) -> None:
    async with rig(fua=True) as r:
        await r.cache.write(0, b"x" * 4 * KIB)
        r.faults.hold("write")
        r.faults.fail("write", 1)
        raised = 0

        async def flush() -> None:
            nonlocal raised
            with pytest.raises(ScsiError):
                await r.cache.flush()
            raised += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(flush)
            await r.faults.wait_held("write")
            r.faults.release("write")
        assert raised == 3
        await r.cache.flush()
        r.memory.crash()
        assert r.memory.peek(0, 4 * KIB) == b"x" * 4 * KIB


async def test_a_wave_with_fua_whose_flush_is_cancelled_still_counts(
    autojump_clock: object,
) -> None:
    async with rig(fua=True) as r:
        await r.cache.write(0, b"1" * 4 * KIB)
        r.faults.hold("write")
        async with trio.open_nursery() as nursery, trio.open_nursery() as doomed:
            doomed.start_soon(r.cache.flush)
            await r.faults.wait_held("write")
            nursery.start_soon(r.cache.flush)
            await trio.testing.wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
            r.faults.release("write")
        r.memory.crash()
        assert r.memory.peek(0, 4 * KIB) == b"1" * 4 * KIB


async def test_without_a_volatile_cache_there_is_no_fua(autojump_clock: object) -> None:
    """Nor SYNCHRONIZE CACHE: `flush` of such a LUN sends nothing (tests/initiator/test_lun.py)."""
    async with rig(fua=True, write_cache=False) as r:
        for number in range(3):
            await r.cache.write(number * MIB, b"x" * 4 * KIB)
        await r.cache.flush()
        assert len(r.writes()) == 3
        assert not any(request.fua for request in r.memory.requests)
