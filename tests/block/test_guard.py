"""The guard catches what it is for, and passes everything else."""

import random

import pytest
import trio
import trio.testing

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.guard import GuardedDevice
from orion_iscsifs.errors import Misaligned, OutOfRange
from orion_iscsifs.testing.conformance import CHECKS, Check
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice


@pytest.mark.parametrize("check", CHECKS)
async def test_conformance(check: Check) -> None:
    await check(GuardedDevice(GuardedDevice(MemoryDevice(2 << 20))), random.Random(6))


async def test_illegal_requests() -> None:
    guarded = GuardedDevice(MemoryDevice(4096))
    with pytest.raises(Misaligned):
        await guarded.write(1, bytes(512))
    with pytest.raises(OutOfRange):
        await guarded.discard(4096, 512)
    strict = GuardedDevice(MemoryDevice(4096), strict=True)
    with pytest.raises(AssertionError, match="illegal request"):
        await strict.write(1, bytes(512))


async def test_a_device_that_carries_out_what_it_should_refuse() -> None:
    class Careless(MemoryDevice):
        async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
            return

    with pytest.raises(AssertionError, match="carried out an illegal request"):
        await GuardedDevice(Careless(4096)).write_zeroes(4096, 512)


async def test_a_device_that_raises_anything_else() -> None:
    class Broken(MemoryDevice):
        async def flush(self) -> None:
            raise OSError("oops")

    with pytest.raises(AssertionError, match="no OrionError"):
        await GuardedDevice(Broken(4096)).flush()


async def test_a_source_that_changes_under_way(autojump_clock: object) -> None:
    faults = FaultyDevice(MemoryDevice(4096))
    guarded = GuardedDevice(faults)
    source = bytearray(512)
    faults.hold("write")

    async def write() -> None:
        with pytest.raises(AssertionError, match="changed while"):
            await guarded.write(0, source)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await faults.wait_held("write")
        source[0] = 1
        faults.release("write")


async def test_overlapping_writes_where_they_are_forbidden(autojump_clock: object) -> None:
    faults = FaultyDevice(MemoryDevice(4096))
    strict = GuardedDevice(faults, strict=True)
    faults.hold("write")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(strict.write, 0, bytes(1024))
        await faults.wait_held("write")
        nursery.start_soon(strict.write, 1024, bytes(512))
        with pytest.raises(AssertionError, match="overlap"):
            await strict.write(512, bytes(512))
        faults.release("write")


async def test_a_device_that_keeps_the_readers_buffer() -> None:
    kept: list[memoryview] = []

    class Keeper(MemoryDevice):
        async def read_into(self, offset: int, target: memoryview) -> None:
            kept.append(target)
            await super().read_into(offset, target)

    await GuardedDevice(Keeper(4096)).read_into(0, memoryview(bytearray(512)))
    with pytest.raises(ValueError, match="released"):
        kept[0][0] = 1


async def test_a_device_that_keeps_the_writers_buffer() -> None:
    kept: list[Buffer] = []

    class Keeper(MemoryDevice):
        async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
            kept.append(source)
            await super().write(offset, source, fua=fua)

    await GuardedDevice(Keeper(4096)).write(0, bytes(512))
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0])
