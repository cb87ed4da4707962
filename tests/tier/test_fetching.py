"""Reads of many requests together: planned, gathered, and each of them as if it were alone."""

import os
import random
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier import fetching, gathering
from orion_iscsifs.tier.fetching import RUN_MAX_BYTES, Fetcher, Request, runs_of
from orion_iscsifs.tier.index import Row
from orion_iscsifs.tier.reading import Piece, RecordReader
from orion_iscsifs.tier.tier import CompressedTier
from tests.tier.tiers import FRAME, KIB, LARGE, MIB, asked, device, fill, read, tiered


def piece(number: int, place: int, size: int) -> Piece:
    return Piece(place, Row(1, number, place, size, 0xFFFF, 0), 1)


def request(*pieces: Piece) -> Request:
    return Request(list(pieces), (0, 4096), memoryview(bytearray(4096)))


def spans(*requests: Request) -> list[tuple[int, int, int, int]]:
    return [(run.number, run.start, run.end, len(run.wanted)) for run in runs_of(requests)]


# -- what is read together -----------------------------------------------------------------------


def test_neighbours_are_read_together_whoever_wants_them() -> None:
    first = request(piece(1, 4096, 1024), piece(1, 9216, 512))
    second = request(piece(1, 5120, 512), piece(2, 5632, 512))
    third = request(piece(1, 5120, 512))
    assert spans(first, second, third) == [
        (1, 4096, 5632, 3),
        (1, 9216, 9728, 1),
        (2, 5632, 6144, 1),
    ]


def test_what_is_read_together_has_an_end() -> None:
    size = 64 * KIB
    many = [request(piece(1, at, size)) for at in range(0, 3 * RUN_MAX_BYTES, size)]
    random.Random(1).shuffle(many)
    found = spans(*many)
    assert [end - start for _, start, end, _ in found] == [RUN_MAX_BYTES] * 3
    assert found[0][2] == found[1][1]


def test_zeroes_and_what_is_done_need_no_reading() -> None:
    done, bad = piece(1, 0, 512), piece(1, 512, 512)
    done.is_done, bad.problem = True, FileNotFoundError()
    zero = Piece(0, Row(1, 1, 0, 0, 0xFFFF, 1), 1)
    target = bytearray(b"x" * 4096)
    assert runs_of([Request([done, bad, zero], (0, 4096), memoryview(target))]) == []
    assert zero.is_done
    assert target == bytes(4096)


# -- over a real tier ----------------------------------------------------------------------------


@asynccontextmanager
async def filled(path: Path, size_bytes: int) -> AsyncIterator[tuple[CompressedTier, MemoryDevice]]:
    """A tier that has all of the device, and reads nothing without a thread."""
    memory = device(size_bytes)
    rng = random.Random(2)
    for start in range(0, size_bytes, 2 * FRAME):
        memory.poke(start, rng.randbytes(64) * (FRAME // 64))
    async with tiered(path / "tier", memory, size=LARGE) as tier:
        await fill(tier, 0, size_bytes)
        asked(memory)
        yield tier, memory


def no_short_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordReader, "try_now", lambda *_: False)


def pieces_for(tier: CompressedTier, span: tuple[int, int]) -> list[Piece]:
    return tier._find(span, memoryview(bytearray(span[1] - span[0])))[0]


async def test_a_batch_is_what_each_asked_for(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any ranges, some twice, more than an arena holds at once."""
    size = 6 * MIB
    monkeypatch.setattr(fetching, "ARENA_BYTES", RUN_MAX_BYTES + 100 * KIB)
    async with filled(memory_path, size) as (tier, memory):
        rng = random.Random(3)
        requests = []
        for _ in range(150):
            start = rng.randrange(size // 512) * 512
            end = min(start + rng.choice((512, 4096, 20 * 512, 200 * KIB, MIB)), size)
            target = memoryview(bytearray(end - start))
            requests.append(Request(pieces_for(tier, (start, end)), (start, end), target))
        held = {n: tier.store.files.hold(n) for n in tier.store.index.numbers}
        descriptors = {number: one.descriptor for number, one in held.items()}
        await trio.to_thread.run_sync(Fetcher(tier._reader).fetch, requests, descriptors)
        for one in held.values():
            one.release()
        for found in requests:
            assert all(piece.is_done for piece in found.pieces)
            assert found.target == memory.peek(found.span[0], len(found.target))


class Watched:
    """`Fetcher.fetch`, held up until it may go; what each call was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go = threading.Event()
        self.batches: list[int] = []
        real = Fetcher.fetch

        def fetch(fetcher: Any, requests: list[Request], descriptors: Mapping[int, int]) -> None:
            self.batches.append(len(requests))
            assert self.may_go.wait(30)
            real(fetcher, requests, descriptors)

        monkeypatch.setattr(Fetcher, "fetch", fetch)


async def waiting(tier: CompressedTier, count: int) -> None:
    with trio.fail_after(30):
        while len(tier.gatherer._queue) != count:
            await trio.sleep(0.001)


async def test_what_waits_for_a_thread_goes_together(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with filled(memory_path, 4 * MIB) as (tier, memory):
        no_short_cut(monkeypatch)
        watched = Watched(monkeypatch)
        found: dict[int, bytes] = {}

        async def reader(start: int) -> None:
            found[start] = await read(tier, start, 4096)

        async with trio.open_nursery() as nursery:
            for number in range(gathering.THREADS + 50):
                nursery.start_soon(reader, number * FRAME)
            await waiting(tier, 50)
            watched.may_go.set()
        assert watched.batches[: gathering.THREADS] == [1] * gathering.THREADS
        assert sorted(watched.batches[gathering.THREADS :]) == [50 - gathering.BATCH_PIECES, 32]
        assert all(found[at] == memory.peek(at, 4096) for at in found)
        assert len(found) == gathering.THREADS + 50
        assert asked(memory) == []


async def test_who_is_cancelled_leaves_the_queue_but_not_a_thread(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with filled(memory_path, MIB) as (tier, memory):
        no_short_cut(monkeypatch)
        watched = Watched(monkeypatch)
        scopes, over, targets = dict[int, trio.CancelScope](), list[int](), dict[int, bytearray]()

        async def reader(number: int) -> None:
            scopes[number], targets[number] = trio.CancelScope(), bytearray(4096)
            with scopes[number]:
                await tier.read_into(number * FRAME, memoryview(targets[number]))
            over.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(reader, number)
                await trio.testing.wait_all_tasks_blocked()
            scopes[0].cancel()  # a thread has it
            scopes[2].cancel()  # it waits for one
            with trio.fail_after(30):
                while over != [2]:
                    await trio.sleep(0.001)
            await trio.sleep(0.02)
            assert over == [2]
            watched.may_go.set()
        assert sorted(over) == [0, 1, 2, 3]
        assert targets[3] == memory.peek(3 * FRAME, 4096)
        assert targets[2] == bytes(4096)


async def test_a_segment_that_goes_while_it_is_read(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor stays open for the thread, and no longer."""
    async with filled(memory_path, MIB) as (tier, memory):
        no_short_cut(monkeypatch)
        watched = Watched(monkeypatch)
        number = tier.store.index.find(0)
        assert number is not None
        found = bytearray(FRAME)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.read_into, 0, memoryview(found))
            with trio.fail_after(30):
                while not watched.batches:
                    await trio.sleep(0.001)
            path = tier.store.files.path(number.number)
            path.rename(path.with_name("gone"))
            tier.store.files.close(number.number)
            assert opened_files(memory_path, "gone")
            watched.may_go.set()
        assert found == memory.peek(0, FRAME)
        assert opened_files(memory_path, "gone") == (
            1
            if tier.store.current is not None and tier.store.current.number == number.number
            else 0
        )
        path.with_name("gone").rename(path)


def opened_files(folder: Path, name: str) -> int:
    """How many descriptors of this process are of a file with that name."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = Path(os.readlink(link))
        except FileNotFoundError:
            continue
        found += target.name == name and folder in target.parents
    return found


async def test_a_missing_segment_is_a_problem_of_its_pieces_alone(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with filled(memory_path, 4 * MIB) as (tier, memory):
        pieces = [*pieces_for(tier, (0, 4096)), *pieces_for(tier, (3 * MIB, 3 * MIB + 4096))]
        missing, there = (one.row.number for one in pieces)
        assert missing != there
        path = tier.store.files.path(missing)
        tier.store.files.close_all()
        path.rename(path.with_name("gone"))
        targets = [memoryview(bytearray(4096)) for _ in pieces]
        async with trio.open_nursery() as nursery:
            for one, start, target in zip(pieces, (0, 3 * MIB), targets, strict=True):
                nursery.start_soon(tier.gatherer.fetch, [one], (start, start + 4096), target)
        path.with_name("gone").rename(path)
        assert isinstance(pieces[0].problem, FileNotFoundError)
        assert pieces[1].is_done
        assert targets[1] == memory.peek(3 * MIB, 4096)


async def test_before_and_after_its_time_it_does_nothing(memory_path: Path) -> None:
    async with filled(memory_path, MIB) as (tier, _):
        late = pieces_for(tier, (0, 4096))
    assert len(late) == 1
    await tier.gatherer.fetch(late, (0, 4096), memoryview(bytearray(4096)))
    assert not late[0].is_done
    assert late[0].problem is None
