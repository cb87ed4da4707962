"""The conformance checks fail where they should: each on a device with one promise broken."""

import random

import pytest
import trio

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.testing import conformance
from orion_iscsifs.testing.conformance import Check
from orion_iscsifs.testing.memory import MemoryDevice


class Forgetful(MemoryDevice):
    """Loses the second block of a write."""

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await super().write(offset, source, fua=fua)
        if len(source) > 512:
            self.poke(offset + 512, bytes(512))


class Lazy(MemoryDevice):
    """Stores the source after the call, from the caller's buffer."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.late: tuple[int, Buffer] | None = None

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await super().write(offset, source, fua=fua)
        self.late = offset, source

    async def flush(self) -> None:
        if self.late is not None:
            self.poke(*self.late)
        await super().flush()


class Careless(MemoryDevice):
    """Checks nothing."""

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        end = min(offset + len(source), self.geometry.size_bytes)
        self.poke(min(offset, end), bytes(source)[: max(end - offset, 0)])


class Tearing(MemoryDevice):
    """Writes in two steps inside a block."""

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        content = bytes(source)
        for start in range(0, len(content), 256):
            self.poke(offset + start, content[start : start + 256])
            await trio.lowlevel.checkpoint()


class LosesZeroes(MemoryDevice):
    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await super().write_zeroes(offset, length // 1024 * 512, may_unmap=may_unmap)


class DiscardsGarbage(MemoryDevice):
    async def discard(self, offset: int, length: int) -> None:
        await super().discard(offset, length)
        self.poke(offset, b"\1" * length)


@pytest.mark.parametrize(
    ("device", "check"),
    [
        (Forgetful, conformance.check_read_sees_write),
        (Lazy, conformance.check_buffers_are_the_callers),
        (Careless, conformance.check_misaligned),
        (Careless, conformance.check_out_of_range),
        (Tearing, conformance.check_blocks_never_mix),
        (LosesZeroes, conformance.check_write_zeroes),
        (DiscardsGarbage, conformance.check_discard),
    ],
)
async def test_a_broken_promise_is_found(device: type[MemoryDevice], check: Check) -> None:
    with pytest.RaisesGroup(AssertionError, allow_unwrapped=True, flatten_subgroups=True):
        await check(device(2 << 20), random.Random(1))
