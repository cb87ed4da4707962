"""No late duplicate ever lies over newer data: random losses, logins, fences and cancellations."""

import random

import pytest
import trio
from trio.testing import MockClock

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.errors import OrionError
from orion_iscsifs.multipath.device import MultipathDevice, open_multipath
from orion_iscsifs.multipath.paths import PathRecord
from orion_iscsifs.testing.memory import MemoryDevice
from tests.multipath.fakes import SIZE_BYTES, FakePath

BLOCK = 512
CLIENTS = 4
WRITES = 40


class Client:
    """Writes one stamp after the other to its own two blocks, and knows what may be there."""

    def __init__(self, device: MultipathDevice, number: int, rng: random.Random) -> None:
        self._device = device
        self._rng = rng
        self._base = number * 2 * BLOCK
        self._stamp = 0
        self.allowed: dict[int, set[int]] = {self._base: {0}, self._base + BLOCK: {0}}

    async def run(self) -> None:
        for _ in range(WRITES):
            await self._write()
            await trio.sleep(self._rng.uniform(0, 0.02))

    async def _write(self) -> None:
        self._stamp += 1
        blocks = self._rng.choice([[0], [1], [0, 1]])
        offset = self._base + blocks[0] * BLOCK
        touched = [self._base + block * BLOCK for block in blocks]
        data = self._stamp.to_bytes(8, "big") * (BLOCK // 8 * len(blocks))
        for block in touched:
            self.allowed[block].add(self._stamp)
        limit_s = self._rng.choice([0.05, 1.0, float("inf")])
        try:
            with trio.move_on_after(limit_s) as scope:
                await self._device.write(offset, data)
        except OrionError:
            return
        if not scope.cancelled_caught:
            for block in touched:
                self.allowed[block] = {self._stamp}


async def target(paths: list[FakePath], rng: random.Random) -> None:
    """Delivers what was sent, in any order; loses paths and lets them return."""
    while True:
        await trio.sleep(rng.uniform(0, 0.05))
        path = rng.choice(paths)
        deed = rng.random()
        if path.sent and deed < (0.8 if path.is_up else 0.1):
            # What a lost path has left on the way takes its time.
            path.deliver(rng.choice(path.sent))
        elif path.is_up and deed > 0.85:
            path.lose()
        elif not path.is_up and deed > 0.9:
            path.log_in()


async def play(seed: int) -> list[str]:
    """One random history; the blocks that hold what they must not."""
    rng = random.Random(seed)
    disk = MemoryDevice(geometry=Geometry(size_bytes=SIZE_BYTES))
    paths = [FakePath(f"path{number}", disk) for number in range(rng.choice([2, 3]))]
    for path in paths:
        path.fences = rng.random() < 0.5
    hold_s = rng.choice([2.0, 60.0])
    async with open_multipath("lun", paths[0], hold_s=hold_s) as device:
        for path in paths[1:]:
            device.add(path)
        clients = [Client(device, number, rng) for number in range(CLIENTS)]
        async with trio.open_nursery() as world:
            world.start_soon(target, paths, rng)
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(client.run)
            world.cancel_scope.cancel()
        # Everything that can still arrive arrives.
        for path in paths:
            for sent in list(path.sent):
                path.deliver(sent)
        wrong = []
        for client in clients:
            for at, allowed in client.allowed.items():
                found = int.from_bytes(disk.peek(at, 8), "big")
                if found not in allowed or disk.peek(at, BLOCK) != found.to_bytes(8, "big") * 64:
                    wrong.append(f"seed {seed}, block {at}: {found}, not one of {sorted(allowed)}")
    return wrong


@pytest.mark.parametrize("seeds", [range(n, n + 50) for n in range(0, 200, 50)])
async def test_a_late_write_never_lies_over_a_newer_one(
    autojump_clock: MockClock, seeds: range
) -> None:
    for seed in seeds:
        assert await play(seed) == []


async def test_without_the_proof_it_would(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: when LOST holds nothing back, newer data is overwritten."""
    monkeypatch.setattr(PathRecord, "holds_back", lambda self, changed: False)
    for seed in range(500):
        if await play(seed):
            return
    pytest.fail("500 histories, and no write was overtaken")
