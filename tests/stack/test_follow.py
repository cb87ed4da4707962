"""When a target is looked at again: after news, by the clock, soon when something seems gone."""

import logging

import pytest
import trio
import trio.testing

from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.stack.follow import POLL_S, SETTLE_S, Follower


class Looks:
    """Counts looks and says what each ends with."""

    def __init__(self, *results: bool | Exception) -> None:
        self._results = list(results)
        self.at: list[float] = []
        self._begun = trio.current_time()

    async def look(self) -> bool:
        self.at.append(round(trio.current_time() - self._begun))
        result = self._results.pop(0) if self._results else False
        if isinstance(result, Exception):
            raise result
        return result


async def test_it_looks_by_the_clock(autojump_clock: trio.testing.MockClock) -> None:
    looks = Looks()
    follower = Follower("target", looks.look)
    with trio.move_on_after(3.5 * POLL_S):
        await follower.run()
    assert looks.at == [POLL_S, 2 * POLL_S, 3 * POLL_S]


async def test_it_looks_soon_when_something_seems_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    looks = Looks(True, True, False)
    follower = Follower("target", looks.look)
    with trio.move_on_after(2 * POLL_S):
        await follower.run()
    assert looks.at == [POLL_S, POLL_S + SETTLE_S, POLL_S + 2 * SETTLE_S]


async def test_a_swarm_of_news_is_one_look(autojump_clock: trio.testing.MockClock) -> None:
    looks = Looks()
    follower = Follower("target", looks.look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        for _ in range(5):
            await trio.sleep(0.01)
            follower.news()
        await trio.sleep(1)
        await follower.stop()
    assert looks.at == [0]


async def test_news_during_a_look_is_another_look(autojump_clock: trio.testing.MockClock) -> None:
    looked: list[int] = []

    async def look() -> bool:
        looked.append(1)
        if len(looked) == 1:
            follower.news()
        return False

    follower = Follower("target", look)
    follower.news()
    with trio.move_on_after(POLL_S / 2):
        await follower.run()
    assert len(looked) == 2


@pytest.mark.parametrize("error", [ConnectionLost("gone"), ZeroDivisionError("a bug")])
async def test_a_look_that_fails_is_not_the_last(
    error: Exception, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    looks = Looks(error)
    follower = Follower("target", looks.look)
    with trio.move_on_after(2.5 * POLL_S):
        await follower.run()
    assert looks.at == [POLL_S, 2 * POLL_S]
    assert "target" in caplog.text


async def test_stop_waits_for_the_look_that_goes_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    states: list[str] = []

    async def look() -> bool:
        states.append("begun")
        try:
            await trio.sleep_forever()
        finally:
            states.append("ended")
        return False

    follower = Follower("target", look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        follower.news()
        await trio.sleep(1)
        await follower.stop()
        assert states == ["begun", "ended"]


async def test_one_that_never_ran_is_stopped_at_once() -> None:
    with trio.fail_after(5):
        follower = Follower("target", Looks().look)
        await follower.stop()
    assert trio.current_effective_deadline() == float("inf")
