"""Threads for short calls: every call ends with its `done` in the trio thread, whatever happens."""

import threading

import pytest
import trio

from orion_iscsifs.background import background
from orion_iscsifs.workers import Workers


async def until(ended: list[object], count: int) -> None:
    with trio.fail_after(30):
        while len(ended) < count:
            await trio.sleep(0.001)


async def test_calls_run_in_threads_and_end_in_the_trio_thread() -> None:
    workers, here = Workers(2, "test"), threading.current_thread()
    ran: list[object] = []
    ended: list[object] = []
    async with background(workers.run):
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(100):
            workers.submit(
                lambda: ran.append(threading.current_thread()),
                lambda error: ended.append((error, threading.current_thread())),
            )
        await until(ended, 100)
    assert here not in ran
    assert len(set(map(id, ran))) <= 2
    assert ended == [(None, here)] * 100


async def test_an_exception_is_handed_on_and_harms_no_other_call() -> None:
    workers, ended = Workers(1, "test"), list[object]()

    def fail() -> None:
        raise OSError(5, "broken")

    async with background(workers.run):
        await trio.testing.wait_all_tasks_blocked()
        workers.submit(fail, ended.append)
        workers.submit(lambda: None, ended.append)
        await until(ended, 2)
    assert isinstance(ended[0], OSError)
    assert ended[1] is None


async def test_the_end_waits_for_what_was_submitted() -> None:
    workers, may_go = Workers(1, "test"), threading.Event()
    ended = list[object]()
    threads_before = threading.active_count()

    def wait() -> None:
        assert may_go.wait(30)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            workers.submit(wait, ended.append)
        nursery.cancel_scope.cancel()
        timer = threading.Timer(0.05, may_go.set)
        timer.start()
    timer.join()
    assert ended == [None] * 3
    assert not workers.is_open
    assert threading.active_count() <= threads_before + 1  # trio keeps one for the next call


async def test_nothing_is_taken_when_it_does_not_run() -> None:
    workers = Workers(1, "test")
    with pytest.raises(AssertionError):
        workers.submit(lambda: None, lambda _: None)
