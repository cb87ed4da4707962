"""The cache against a plain model: one task exactly, many tasks with races, and after a crash."""

import random
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.block.guard import GuardedDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.testing.faults import FaultyDevice, Kind
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.helpers import KIB, MIB

BLOCK = 512
SIZE = 2 * MIB + 3 * BLOCK
KINDS: tuple[Kind, ...] = ("read", "write", "flush", "discard", "zero")

extents = st.tuples(
    st.integers(0, SIZE // BLOCK - 1),
    st.one_of(st.integers(1, 20), st.integers(1, 300), st.integers(1, 3000)),
)
operations = st.one_of(
    st.tuples(st.just("write"), extents),
    st.tuples(st.just("read"), extents),
    st.tuples(st.just("fua"), extents),
    st.tuples(st.just("zero"), extents),
    st.tuples(st.just("discard"), extents),
    st.tuples(st.just("flush"), extents),
    st.tuples(st.just("pause"), extents),
)


def jittery(memory: MemoryDevice, rng: random.Random) -> FaultyDevice:
    """Every call takes a random time before it takes effect, and another one afterwards."""
    device = FaultyDevice(FaultyDevice(memory), arrive_first=True)
    for layer in (device, device._device):
        assert isinstance(layer, FaultyDevice)
        for kind in KINDS:
            layer.delay(kind, lambda: rng.choice((0, 0.001, 0.003, 0.01, 0.2)))
    return device


@settings(max_examples=60, deadline=None)
@given(
    st.lists(operations, max_size=60),
    st.sampled_from([CacheMode.WRITEBACK, CacheMode.WRITETHROUGH]),
    st.randoms(use_true_random=False),
)
def test_one_task_sees_exactly_what_it_did(
    todo: list[tuple[str, tuple[int, int]]], mode: CacheMode, rng: random.Random
) -> None:
    geometry = Geometry(size_bytes=SIZE, discard_granularity_bytes=4096)
    memory = MemoryDevice(geometry=geometry)
    model = bytearray(SIZE)

    async def main() -> None:
        below = GuardedDevice(jittery(memory, random.Random(1)), strict=True)
        config = CacheConfig(mode=mode, size_bytes=MIB, dirty_max_bytes=256 * KIB, dirty_age_s=0.5)
        async with WritebackCache(below, config) as cache:
            for step, (name, (block, count)) in enumerate(todo):
                offset = block * BLOCK
                length = min(count * BLOCK, SIZE - offset)
                await one(cache, name, offset, length, step)
                cache.check()

    async def one(cache: WritebackCache, name: str, offset: int, length: int, step: int) -> None:
        end = offset + length
        target = bytearray(length)
        if name in ("write", "fua"):
            model[offset:end] = bytes([step + 1]) * length
            await cache.write(offset, model[offset:end], fua=name == "fua")
            if name == "fua":
                assert memory.peek(offset, length) == model[offset:end]
        elif name == "read":
            await cache.read_into(offset, memoryview(target))
            assert target == model[offset:end]
        elif name == "zero":
            model[offset:end] = bytes(length)
            await cache.write_zeroes(offset, length)
        elif name == "discard":
            await cache.discard(offset, length)
            await cache.read_into(offset, memoryview(target))
            for at in range(0, length, BLOCK):
                new, old = target[at : at + BLOCK], model[offset + at : offset + at + BLOCK]
                assert new == old or not any(new)
            model[offset:end] = target
        elif name == "flush":
            await cache.flush()
            assert memory.peek(0, SIZE) == model
        else:
            await trio.sleep(rng.random())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert memory.peek(0, SIZE) == model


@dataclass
class Owner:
    """One task and the blocks that only it writes.

    `versions`: for each block what a crash may leave: the last one known durable, and later ones.
    """

    blocks: list[int]
    rng: random.Random
    now: dict[int, bytes] = field(default_factory=dict)
    versions: dict[int, list[bytes]] = field(default_factory=dict)

    async def work(self, cache: WritebackCache, steps: int) -> None:
        for _ in range(steps):
            first = self.rng.randrange(len(self.blocks))
            run = self._run(first)
            await self.rng.choices(
                [self._write, self._read, self._zero, self._discard, self._flush, self._fua],
                [40, 40, 4, 3, 3, 2],
            )[0](cache, run)
            await trio.sleep(self.rng.choice((0, 0, 0.001, 0.01)))

    def _run(self, first: int) -> list[int]:
        """Some adjacent blocks of ours from there on."""
        run = [self.blocks[first]]
        for block in self.blocks[first + 1 :]:
            if block != run[-1] + 1 or self.rng.random() < 0.1:
                break
            run.append(block)
        return run

    def _note(self, run: list[int], content: bytes) -> None:
        for index, block in enumerate(run):
            version = content[index * BLOCK : (index + 1) * BLOCK]
            self.versions.setdefault(block, [bytes(BLOCK)]).append(version)
            self.now[block] = version

    def _settle(self, run: list[int]) -> None:
        for block in run:
            self.versions[block] = [self.now.get(block, bytes(BLOCK))]

    async def _write(self, cache: WritebackCache, run: list[int], *, fua: bool = False) -> None:
        content = self.rng.randbytes(8) * (len(run) * BLOCK // 8)
        self._note(run, content)
        await cache.write(run[0] * BLOCK, content, fua=fua)

    async def _fua(self, cache: WritebackCache, run: list[int]) -> None:
        await self._write(cache, run, fua=True)
        self._settle(run)

    async def _zero(self, cache: WritebackCache, run: list[int]) -> None:
        self._note(run, bytes(len(run) * BLOCK))
        await cache.write_zeroes(run[0] * BLOCK, len(run) * BLOCK)

    async def _read(self, cache: WritebackCache, run: list[int]) -> None:
        assert await self._content(cache, run) == b"".join(
            self.now.get(block, bytes(BLOCK)) for block in run
        )

    async def _content(self, cache: WritebackCache, run: list[int]) -> bytes:
        target = bytearray(len(run) * BLOCK)
        await cache.read_into(run[0] * BLOCK, memoryview(target))
        return bytes(target)

    async def _discard(self, cache: WritebackCache, run: list[int]) -> None:
        for block in run:
            self.versions.setdefault(block, [bytes(BLOCK)]).append(bytes(BLOCK))
        await cache.discard(run[0] * BLOCK, len(run) * BLOCK)
        content = await self._content(cache, run)
        for index, block in enumerate(run):
            seen = content[index * BLOCK : (index + 1) * BLOCK]
            assert not any(seen) or seen == self.now.get(block, bytes(BLOCK))
        self._note(run, content)

    async def _flush(self, cache: WritebackCache, run: list[int]) -> None:
        await cache.flush()
        self._settle(list(self.now))


async def look_around(cache: WritebackCache, rng: random.Random, count: int) -> None:
    """Read what others own: it brings fetches everywhere under their writes."""
    for _ in range(count):
        block = rng.randrange(SIZE // BLOCK)
        length = min(rng.choice((1, 8, 128, 1000)), SIZE // BLOCK - block) * BLOCK
        await cache.read_into(block * BLOCK, memoryview(bytearray(length)))
        await trio.sleep(rng.choice((0, 0.001)))


def owners(rng: random.Random, tasks: int) -> list[Owner]:
    """Blocks dealt out in cells of equal length, so that most pages have several owners."""
    cell = rng.choice((1, 3, 8, 40, 200))
    return [
        Owner(
            [block for block in range(SIZE // BLOCK) if block // cell % tasks == number],
            random.Random(rng.random()),
        )
        for number in range(tasks)
    ]


def build(rng: random.Random, mode: CacheMode) -> tuple[MemoryDevice, WritebackCache]:
    geometry = Geometry(size_bytes=SIZE, discard_granularity_bytes=rng.choice((0, 512, 8192)))
    memory = MemoryDevice(geometry=geometry, volatile_cache=True)
    config = CacheConfig(
        mode=mode,
        size_bytes=MIB,
        dirty_max_bytes=rng.choice((64, 256, 1024)) * KIB,
        dirty_age_s=rng.choice((0.0, 0.05, 5.0)),
        readahead=rng.choice(("off", "auto")),
    )
    return memory, WritebackCache(GuardedDevice(jittery(memory, rng), strict=True), config)


@pytest.mark.parametrize("seed", range(40))
def test_tasks_with_blocks_of_their_own(seed: int) -> None:
    rng = random.Random(seed)
    mode = rng.choice((CacheMode.WRITEBACK, CacheMode.WRITEBACK, CacheMode.WRITETHROUGH))
    tasks = owners(rng, 6)

    async def main() -> None:
        memory, cache = build(rng, mode)
        async with cache:
            async with trio.open_nursery() as nursery:
                for owner in tasks:
                    nursery.start_soon(owner.work, cache, 60)
                for _ in range(3):
                    nursery.start_soon(look_around, cache, random.Random(rng.random()), 100)
            cache.check()
        for owner in tasks:
            for block, content in owner.now.items():
                assert memory.peek(block * BLOCK, BLOCK) == content

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", range(40))
def test_a_crash_keeps_what_was_flushed(seed: int) -> None:
    """Afterwards each block is its last durable version or a later one, whole."""
    rng = random.Random(1000 + seed)
    mode = rng.choice((CacheMode.WRITEBACK, CacheMode.WRITEBACK, CacheMode.WRITETHROUGH))
    tasks = owners(rng, 6)
    memory, _ = build(random.Random(0), mode)

    async def main() -> None:
        nonlocal memory
        memory, cache = build(rng, mode)
        with trio.move_on_after(rng.uniform(0.01, 3)):
            async with cache, trio.open_nursery() as nursery:
                for owner in tasks:
                    nursery.start_soon(owner.work, cache, 100000)
                nursery.start_soon(look_around, cache, random.Random(rng.random()), 100000)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    memory.crash(rng.choice)
    for owner in tasks:
        for block, versions in owner.versions.items():
            assert memory.peek(block * BLOCK, BLOCK) in versions, f"block {block}"
