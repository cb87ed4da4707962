"""The reader's lock and the polling wait, without a kernel: nobody is forgotten, nobody starves."""

import os
import random
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
import trio.testing

from orion_iscsifs.fuse import readers


@pytest.fixture
def facade() -> Iterator[readers._Facade]:
    readers.install(lambda: None)
    yield pyfuse3.trio  # type: ignore[attr-defined]
    readers.uninstall()


async def test_an_uncontended_lock_never_yields(facade: readers._Facade) -> None:
    with trio.testing.assert_no_checkpoints():
        async with facade.Lock():
            pass
        async with facade.Lock():
            pass


async def test_waking_is_only_for_a_free_lock(facade: readers._Facade) -> None:
    lock, entered = facade.lock, []

    async def reader(name: str) -> None:
        async with lock:
            entered.append(name)
            await trio.sleep(0.02)
        lock.wake()

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(reader, "a")
            nursery.start_soon(reader, "b")
            await trio.testing.wait_all_tasks_blocked()
            lock.wake()  # held: nobody is woken in vain
            await trio.testing.wait_all_tasks_blocked()
            assert entered == []
        await trio.testing.wait_all_tasks_blocked()
        assert entered == []  # released, but nobody woke: the releasing task will come back
        lock.wake()
        lock.wake()  # one is on its way already
        await trio.testing.wait_all_tasks_blocked()
        assert len(entered) == 1
    assert sorted(entered) == ["a", "b"]


async def test_a_woken_task_that_finds_it_taken_parks_again(facade: readers._Facade) -> None:
    lock, entered = facade.lock, trio.Event()

    async def reader() -> None:
        async with lock:
            entered.set()

    async with trio.open_nursery() as nursery:
        await lock.__aenter__()
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        await lock.__aexit__(None, None, None)
        lock.wake()
        await lock.__aenter__()  # barging in, before the woken task has run
        await trio.testing.wait_all_tasks_blocked()
        assert not entered.is_set()
        await lock.__aexit__(None, None, None)
        lock.wake()
        await trio.testing.wait_all_tasks_blocked()
        assert entered.is_set()


async def test_a_cancelled_waiter_is_not_woken(facade: readers._Facade) -> None:
    lock = facade.lock
    async with lock:
        with trio.move_on_after(0.01):
            await lock.__aenter__()
    lock.wake()
    assert lock._parked == []
    async with lock:
        pass


async def test_the_wait_yields_only_now_and_then(facade: readers._Facade) -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"x")
        for _ in range(3):
            for _ in range(readers.REQUESTS_PER_CHECKPOINT - 1):
                with trio.testing.assert_no_checkpoints():
                    await facade.lowlevel.wait_readable(read_end)
            with trio.testing.assert_checkpoints():
                await facade.lowlevel.wait_readable(read_end)
        os.read(read_end, 1)
        with trio.move_on_after(0.01) as scope:
            await facade.lowlevel.wait_readable(read_end)
        assert scope.cancelled_caught
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("seed", range(12))
async def test_a_loop_like_pyfuse3s_answers_everything_and_ends(
    facade: readers._Facade, seed: int
) -> None:
    """The shape of pyfuse3's loop, with requests that block, fail to block, and a session's end."""
    choose = random.Random(seed)
    lock = facade.Lock()
    pending = list(range(200))
    answered: list[int] = []
    exited = False

    async def wait_readable() -> bool:
        async with lock:
            if exited:
                return False
            await trio.sleep(0 if choose.random() < 0.3 else 0.001)
            return True

    async def loop() -> None:
        nonlocal exited
        while not exited:
            if not await wait_readable():
                break
            if not pending:
                exited = True
                break
            request = pending.pop()
            if choose.random() < 0.5:
                facade.lock.wake()  # as the handler does when it blocks
                await trio.sleep(choose.choice((0, 0, 0.002)))
            answered.append(request)
            if choose.random() < 0.02:
                nursery.start_soon(loop)
                break  # too many idle tasks

    with trio.fail_after(10):
        async with facade.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(loop)
    assert sorted(answered) == list(range(200))


def test_an_unknown_pyfuse3_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(pyfuse3, "_wait_fuse_readable")
    readers.install(lambda: None)()
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]
    assert "unknown inside" in caplog.text


async def test_a_withdrawn_request_ends_no_reader(facade: readers._Facade) -> None:
    """pyfuse3 takes EAGAIN for the end of the mount."""
    calls = []

    async def loop(name: str) -> None:
        calls.append(name)
        if len(calls) < 3:
            raise BlockingIOError
        await trio.lowlevel.checkpoint()

    async with facade.open_nursery() as nursery:
        nursery.start_soon(loop, "a")
    assert calls == ["a", "a", "a"]
