import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.block.guard import GuardedDevice
from orion_iscsifs.errors import OutOfRange, WriteProtected
from orion_iscsifs.testing.conformance import (
    BYTE_GRANULAR_CHECKS,
    Check,
    check_read_only_device,
    read,
)
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice

SIZE = 64 << 10


def aligned(block: int = 512) -> tuple[AlignedDevice, FaultyDevice, MemoryDevice]:
    geometry = Geometry(size_bytes=SIZE, logical_block_bytes=block, discard_granularity_bytes=block)
    memory = MemoryDevice(geometry=geometry, record=True)
    faults = FaultyDevice(memory)
    return AlignedDevice(GuardedDevice(faults)), faults, memory


@pytest.mark.parametrize("check", BYTE_GRANULAR_CHECKS)
@pytest.mark.parametrize("block", [512, 4096])
async def test_conformance(check: Check, block: int) -> None:
    geometry = Geometry(
        size_bytes=2 << 20, logical_block_bytes=block, discard_granularity_bytes=4096
    )
    device = AlignedDevice(GuardedDevice(MemoryDevice(geometry=geometry)))
    await check(device, random.Random(4))


async def test_read_only() -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[BlockDevice]:
        yield AlignedDevice(MemoryDevice(geometry=Geometry(size_bytes=SIZE, read_only=True)))

    await check_read_only_device(factory)
    async with factory() as device:
        with pytest.raises(WriteProtected):
            await device.write(1, b"x")
        with pytest.raises(WriteProtected):
            await device.write_zeroes(1, 3)
        with pytest.raises(WriteProtected):
            await device.discard(1, 3)


@pytest.mark.parametrize("block", [512, 4096])
async def test_any_bytes_against_a_model(block: int) -> None:
    device, _, memory = aligned(block)
    rng = random.Random(5)
    model = bytearray(os.urandom(SIZE))
    memory.poke(0, model)
    for _ in range(400):
        offset = rng.randrange(SIZE)
        length = rng.randrange(min(SIZE - offset, 3 * block) + 1)
        action = rng.choice(("write", "write", "zero", "read"))
        if action == "write":
            content = rng.randbytes(length)
            await device.write(offset, content, fua=rng.random() < 0.5)
            model[offset : offset + length] = content
        elif action == "zero":
            await device.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            assert await read(device, offset, length) == model[offset : offset + length]
    assert memory.peek(0, SIZE) == model


async def test_aligned_requests_pass_as_they_are() -> None:
    device, _, memory = aligned()
    await device.write(512, bytes(1024), fua=True)
    await read(device, 0, 4096)
    assert [(r.kind, r.offset, r.length, r.fua) for r in memory.requests] == [
        ("write", 512, 1024, True),
        ("read_into", 0, 4096, False),
    ]


@pytest.mark.parametrize(
    ("offset", "length", "reads"),
    [(100, 10, [0]), (100, 1000, [0, 1024]), (512, 600, [1024]), (100, 412, [0])],
)
async def test_only_torn_blocks_are_read(offset: int, length: int, reads: list[int]) -> None:
    device, _, memory = aligned()
    await device.write(offset, b"x" * length)
    kinds = [r.kind for r in memory.requests]
    assert kinds == ["read_into"] * len(reads) + ["write"]
    assert [r.offset for r in memory.requests if r.kind == "read_into"] == reads


async def test_discard_takes_whole_blocks_only() -> None:
    device, _, memory = aligned()
    await device.write(0, b"x" * 4096)
    await device.discard(100, 1500)
    await device.discard(2050, 100)
    assert memory.peek(0, 4096) == b"x" * 512 + bytes(1024 - 0)[:1024] + b"x" * 2560


async def test_two_writes_into_one_block_at_the_same_time(autojump_clock: object) -> None:
    device, faults, memory = aligned()
    faults.delay("read", 0.01)
    faults.delay("write", 0.01)
    async with trio.open_nursery() as nursery:
        for number in range(32):
            nursery.start_soon(device.write, number * 16, bytes([number + 1]) * 16)
    assert memory.peek(0, 512) == b"".join(bytes([n + 1]) * 16 for n in range(32))


async def test_an_aligned_write_waits_for_an_rmw_of_its_blocks_only(
    autojump_clock: object,
) -> None:
    device, faults, memory = aligned()
    faults.hold("read")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.write, 100, b"new")
        await faults.wait_held("read")
        await device.write(512, b"y" * 512)
        nursery.start_soon(device.write, 0, b"x" * 512)
        await trio.testing.wait_all_tasks_blocked()
        assert memory.peek(0, 1) == b"\0"
        faults.release("read")
    assert memory.peek(0, 512) == b"x" * 512, "the RMW undid a write that came after it"


async def test_an_rmw_waits_for_an_aligned_write_of_its_blocks(autojump_clock: object) -> None:
    device, faults, memory = aligned()
    faults.hold("write")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.write, 0, b"x" * 512)
        await faults.wait_held("write")
        nursery.start_soon(device.write, 100, b"new")
        await trio.testing.wait_all_tasks_blocked()
        assert "read_into" not in memory.calls, "read before the write in flight had arrived"
        faults.release("write")
    assert memory.peek(0, 512) == b"x" * 100 + b"new" + b"x" * 409


async def test_a_cancelled_rmw_frees_its_blocks(autojump_clock: object) -> None:
    device, faults, _ = aligned()
    faults.hold("read")
    with trio.move_on_after(1):
        await device.write(100, b"new")
    await device.write(0, b"x" * 512)


@pytest.mark.parametrize(("offset", "length"), [(SIZE - 1, 2), (SIZE + 5, 1), (-1, 3)])
async def test_past_the_end(offset: int, length: int) -> None:
    device, _, memory = aligned()
    with pytest.raises(OutOfRange):
        await read(device, offset, length)
    with pytest.raises(OutOfRange):
        await device.write(offset, bytes(length))
    with pytest.raises(OutOfRange):
        await device.write_zeroes(offset, length)
    with pytest.raises(OutOfRange):
        await device.discard(offset, length)
    assert not memory.calls


async def test_geometry_changes_pass_up() -> None:
    device, _, memory = aligned()
    seen: list[int] = []
    device.on_geometry_change(lambda geometry: seen.append(geometry.size_bytes))
    memory.change_geometry(size_bytes=2 * SIZE)
    assert seen == [2 * SIZE] == [device.geometry.size_bytes]


async def test_a_partial_write_is_not_starved_by_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    faults = FaultyDevice(MemoryDevice(1 << 20))
    faults.delay("write", 0.01)
    device = AlignedDevice(faults)

    async def writes() -> None:
        while True:
            await device.write(1, b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writes)
        await trio.sleep(1)
        with trio.fail_after(100):
            await device.write(3, b"y")
        nursery.cancel_scope.cancel()
