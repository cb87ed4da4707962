from dataclasses import dataclass

from orion_iscsifs.cache.replacement import S3Fifo


@dataclass(eq=False)
class Item:
    number: int
    visited: bool = False
    queued: bool = False
    proven: bool = False
    busy: bool = False


def filled(count: int) -> tuple[S3Fifo[Item], list[Item]]:
    queues: S3Fifo[Item] = S3Fifo(count)
    items = [Item(number) for number in range(count)]
    for item in items:
        queues.admit(item)
    return queues, items


def evict(queues: S3Fifo[Item]) -> int:
    item = queues.evict()
    assert item is not None
    assert not item.queued
    return item.number


def test_unused_entries_leave_in_order() -> None:
    queues, _ = filled(20)
    assert [evict(queues) for _ in range(20)] == list(range(20))
    assert queues.evict() is None


def test_a_used_entry_survives_a_scan() -> None:
    queues, items = filled(20)
    items[3].visited = True
    for number in range(100, 300):
        assert evict(queues) != 3
        queues.admit(Item(number))
    assert items[3].proven


def test_an_entry_that_comes_back_soon_goes_to_main() -> None:
    queues, items = filled(20)
    assert evict(queues) == 0
    back = Item(0)
    queues.admit(back)
    assert back.proven
    assert not items[1].proven


def test_main_gives_a_second_round_to_what_is_used() -> None:
    queues: S3Fifo[Item] = S3Fifo(10)
    first, second = Item(1, proven=True), Item(2, proven=True)
    queues.add(first)
    queues.add(second)
    first.visited = True
    assert evict(queues) == 2
    assert not first.visited
    assert evict(queues) == 1


def test_small_may_exceed_its_share_by_what_is_spared() -> None:
    queues, items = filled(20)
    for number in range(10):
        items[number].visited = True
    for number in range(100, 110):
        evict(queues)
        queues.admit(Item(number))
    # `main` has ten, `small` has ten: eight more than its share.
    spared = queues.evict(spared=8)
    assert spared is not None
    assert spared.number == 0, "from main"
    assert evict(queues) == 100


def test_busy_entries_step_out_and_come_back() -> None:
    queues, items = filled(5)
    for item in items:
        item.busy = True
    assert queues.evict() is None
    assert len(queues) == 0
    items[2].busy = False
    queues.add(items[2])
    assert evict(queues) == 2


def test_the_ghost_list_is_bounded() -> None:
    queues, _ = filled(10)
    for number in range(10, 1000):
        evict(queues)
        queues.admit(Item(number))
    forgotten = Item(5)
    queues.admit(forgotten)
    assert not forgotten.proven
