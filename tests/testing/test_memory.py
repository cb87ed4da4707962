import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio.testing

from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.testing.conformance import (
    CHECKS,
    Check,
    check_block_device,
    check_read_only_device,
    read,
)
from orion_iscsifs.testing.memory import MemoryDevice, Request


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("volatile", [False, True])
async def test_conformance(check: Check, volatile: bool) -> None:
    await check(MemoryDevice(2 << 20, volatile_cache=volatile), random.Random(7))


async def test_all_checks_in_one_call() -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[BlockDevice]:
        yield MemoryDevice(1 << 20)

    await check_block_device(factory)


async def test_read_only() -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[BlockDevice]:
        yield MemoryDevice(geometry=Geometry(size_bytes=4096, read_only=True))

    await check_read_only_device(factory)


async def test_a_crash_loses_what_was_not_flushed() -> None:
    device = MemoryDevice(4096, volatile_cache=True)
    await device.write(0, b"1" * 1024)
    await device.flush()
    await device.write(0, b"2" * 1024)
    await device.write(512, b"3" * 512, fua=True)
    await device.write_zeroes(1024, 512)
    await device.write(2048, b"4" * 512)
    assert await read(device, 0, 1024) == b"2" * 512 + b"3" * 512
    device.crash()
    assert device.peek(0, 1024) == b"1" * 512 + b"3" * 512
    assert device.peek(2048, 512) == bytes(512)


async def test_a_crash_may_keep_any_version() -> None:
    device = MemoryDevice(4096, volatile_cache=True)
    for version in b"123":
        await device.write(0, bytes([version]) * 512)
    offered: list[bytes] = []

    def second(versions: Sequence[bytes]) -> bytes:
        offered.extend(versions)
        return versions[2]

    device.crash(second)
    assert [v[:1] for v in offered] == [b"\0", b"1", b"2", b"3"]
    assert device.peek(0, 512) == b"2" * 512


async def test_discard_zeroes_whole_granules() -> None:
    device = MemoryDevice(16384)
    await device.write(0, b"x" * 16384)
    await device.discard(512, 8192)
    assert device.peek(0, 16384) == b"x" * 4096 + bytes(4096) + b"x" * 8192


async def test_calls_and_requests_are_listed() -> None:
    device = MemoryDevice(4096, record=True)
    await device.write(512, bytes(1024), fua=True)
    await device.flush()
    assert device.calls == {"write": 1, "flush": 1}
    assert device.requests[0] == Request("write", 512, 1024, fua=True)


async def test_a_huge_device_costs_nothing() -> None:
    device = MemoryDevice(1 << 42)
    await device.write((1 << 42) - 512, b"x" * 512)
    assert await read(device, (1 << 42) - 512, 512) == b"x" * 512


async def test_without_yielding() -> None:
    device = MemoryDevice(4096, yields=False)
    with trio.testing.assert_no_checkpoints():
        await device.write(0, bytes(512))


async def test_a_new_geometry() -> None:
    device = MemoryDevice(4096)
    seen: list[Geometry] = []
    device.on_geometry_change(seen.append)
    await device.write(0, b"x" * 4096)
    device.change_geometry(size_bytes=8192)
    device.change_geometry(read_only=True)
    assert [(g.size_bytes, g.read_only) for g in seen] == [(8192, False), (8192, True)]
    assert device.peek(0, 8192) == b"x" * 4096 + bytes(4096)
