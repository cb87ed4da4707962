import random

import pytest
import trio
import trio.testing

from orion_iscsifs.errors import ConnectionLost, ScsiError
from orion_iscsifs.testing.conformance import CHECKS, Check, read
from orion_iscsifs.testing.faults import FaultyDevice, Kind
from orion_iscsifs.testing.memory import MemoryDevice


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("arrive_first", [False, True])
async def test_conformance(check: Check, arrive_first: bool, autojump_clock: object) -> None:
    rng = random.Random(8)
    device = FaultyDevice(MemoryDevice(1 << 20), arrive_first=arrive_first)
    kinds: tuple[Kind, ...] = ("read", "write", "flush", "discard", "zero")
    for kind in kinds:
        device.delay(kind, lambda: rng.choice((0, 0.001)))
    await check(device, random.Random(9))


async def test_failures_are_counted_down() -> None:
    device = FaultyDevice(MemoryDevice(4096))
    device.fail("write", 2)
    for _ in range(2):
        with pytest.raises(ScsiError):
            await device.write(0, bytes(512))
    await device.write(0, bytes(512))
    device.fail("flush", 1, lambda: ConnectionLost("gone"))
    await read(device, 0, 512)
    with pytest.raises(ConnectionLost):
        await device.flush()


async def test_delays(autojump_clock: object) -> None:
    device = FaultyDevice(MemoryDevice(4096))
    device.delay("read", 3)
    began = trio.current_time()
    await read(device, 0, 512)
    await device.write(0, bytes(512))
    assert trio.current_time() - began == pytest.approx(3)


@pytest.mark.parametrize("arrive_first", [False, True])
async def test_a_gate_holds_before_or_after(arrive_first: bool) -> None:
    memory = MemoryDevice(4096)
    device = FaultyDevice(memory, arrive_first=arrive_first)
    device.hold("write")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.write, 0, b"x" * 512)
        await device.wait_held("write")
        assert memory.peek(0, 1) == (b"x" if arrive_first else b"\0")
        assert device.waiting["write"] == 1
        device.release("write")
    assert device.waiting["write"] == 0
    assert memory.peek(0, 1) == b"x"
