import trio
import trio.testing

from orion_iscsifs.block.rangelock import RangeLock


async def test_free_ranges_need_no_checkpoint() -> None:
    lock = RangeLock()
    with trio.testing.assert_no_checkpoints():
        async with lock.alone((0, 10)), lock.alone((10, 20)):
            assert lock.is_excluded((9, 11))
            assert not lock.is_excluded((20, 21))
            await lock.wait_until_free((20, 30))
    assert not lock.exclusive


async def test_holders_of_one_range_follow_each_other(autojump_clock: object) -> None:
    lock = RangeLock()
    inside = 0

    async def hold(start: int) -> None:
        nonlocal inside
        async with lock.alone((start, start + 10)):
            inside += 1
            assert inside == 1
            await trio.sleep(1)
            inside -= 1

    async with trio.open_nursery() as nursery:
        for start in (0, 5, 9, 0):
            nursery.start_soon(hold, start)


async def test_shared_holders_are_waited_for_and_newcomers_kept_out(
    autojump_clock: object,
) -> None:
    lock = RangeLock()
    entered = trio.Event()
    lock.shared.append((0, 10))
    lock.shared.append((100, 110))

    async def alone() -> None:
        async with lock.alone((5, 15)):
            entered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(alone)
        await trio.testing.wait_all_tasks_blocked()
        assert lock.is_excluded((0, 6)), "announced, so that newcomers wait"
        assert not entered.is_set()
        lock.leave_shared((100, 110))
        await trio.testing.wait_all_tasks_blocked()
        assert not entered.is_set()
        lock.leave_shared((0, 10))


async def test_a_cancelled_wait_leaves_nothing_behind(autojump_clock: object) -> None:
    lock = RangeLock()
    lock.shared.append((0, 10))
    with trio.move_on_after(1):
        async with lock.alone((0, 10)):
            raise AssertionError("not alone")
    assert not lock.exclusive


async def test_a_wide_range_is_not_starved_by_two_narrow_ones(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lock = RangeLock()

    async def narrow(at: int, phase_s: float) -> None:
        await trio.sleep(phase_s)
        while True:
            async with lock.alone((at, at + 1)):
                await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(narrow, 1, 0)
        nursery.start_soon(narrow, 2, 0.5)
        await trio.sleep(2)
        with trio.fail_after(100):
            async with lock.alone((0, 10)):
                pass
        nursery.cancel_scope.cancel()
