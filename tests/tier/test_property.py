"""read(tier(x)) == x, for all contents, offsets and partial changes, over several mounts."""

import random
import shutil
import tempfile
from pathlib import Path

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier.tier import CompressedTier
from tests.tier.tiers import KIB, read, settle, tiered

BLOCK = 512
SIZE = 10 * 64 * KIB + 3 * BLOCK
BLOCKS = SIZE // BLOCK

contents = st.one_of(
    st.binary(min_size=1, max_size=64),  # repeated: it compresses
    st.just(b"\0"),
    st.integers(0, 1 << 32).map(lambda seed: random.Random(seed).randbytes(70_001)),
)
Step = tuple[str, int, int, bytes]
steps_of_all_kinds = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "write", "write", "discard", "zero", "settle", "mount"]),
        st.integers(0, BLOCKS - 1),
        st.integers(1, 300),
        contents,
    ),
    max_size=25,
)


class Machine:
    """The tier, the device under it, and what both have to show."""

    def __init__(self) -> None:
        self.memory = MemoryDevice(
            geometry=Geometry(size_bytes=SIZE, discard_granularity_bytes=4096)
        )
        self.model = bytearray(SIZE)

    async def run(self, folder: Path, steps: list[Step], *, sealed: bool) -> None:
        lives: list[list[Step]] = [[]]
        for step in steps:
            lives[-1].append(step)
            if step[0] == "mount":
                lives.append([])
        for life in lives:
            async with tiered(folder, self.memory, sealed=sealed) as tier:
                for step in life:
                    await self._step(tier, *step)
                for _ in range(2):
                    assert await read(tier, 0, SIZE) == self.model
                    await settle(tier)
                assert not tier.statistics.bad_records

    async def _step(
        self, tier: CompressedTier, kind: str, start: int, count: int, seed: bytes
    ) -> None:
        at, length = start * BLOCK, min(count, BLOCKS - start) * BLOCK
        span = slice(at, at + length)
        if kind == "read":
            assert await read(tier, at, length) == self.model[span]
        elif kind == "write":
            content = (seed * (length // len(seed) + 1))[:length]
            await tier.write(at, content)
            self.model[span] = content
        elif kind == "zero":
            await tier.write_zeroes(at, length)
            self.model[span] = bytes(length)
        elif kind == "discard":
            await tier.discard(at, length)
            self.model[span] = self.memory.peek(at, length)
        elif kind == "settle":
            await settle(tier)


@given(steps_of_all_kinds, st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_read_is_what_was_written(steps: list[Step], sealed: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="orion-iscsifs-test-", dir="/dev/shm"))
    try:
        trio.run(lambda: Machine().run(folder / "tier", steps, sealed=sealed))
    finally:
        shutil.rmtree(folder)
