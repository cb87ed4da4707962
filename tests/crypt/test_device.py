"""The layer: the contract, a model, and that nothing readable gets below."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry, GeometryListener
from orion_iscsifs.block.guard import GuardedDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig
from orion_iscsifs.crypt.device import PIECE_BYTES, LuksDevice
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.volume import Payload
from orion_iscsifs.testing.conformance import (
    BYTE_GRANULAR_CHECKS,
    CHECKS,
    Check,
    check_blocks_never_mix,
    check_read_only_device,
    read,
)
from orion_iscsifs.testing.memory import MemoryDevice
from tests.crypt.helpers import MIB, PLAIN

KEY = bytes(range(64))
START = MIB
SIZES = [(512, 512), (512, 4096), (4096, 512), (4096, 4096)]
"""Blocks of the device and sectors of the encryption."""


def below(
    block_bytes: int = 512, *, payload_bytes: int = 2 * MIB, record: bool = False
) -> MemoryDevice:
    geometry = Geometry(
        size_bytes=START + payload_bytes,
        logical_block_bytes=block_bytes,
        discard_granularity_bytes=4096,
        zeroes_after_discard=True,
    )
    return MemoryDevice(geometry=geometry, record=record)


def payload(
    sector_bytes: int = 512, *, size_bytes: int | None = None, iv_first: int = 0
) -> Payload:
    return Payload(
        offset_bytes=START, size_bytes=size_bytes, sector_bytes=sector_bytes, iv_first=iv_first
    )


@pytest.mark.parametrize(("block_bytes", "sector_bytes"), SIZES)
@pytest.mark.parametrize("check", CHECKS)
async def test_contract(check: Check, block_bytes: int, sector_bytes: int) -> None:
    device = LuksDevice(GuardedDevice(below(block_bytes)), payload(sector_bytes), KEY)
    assert device.geometry.logical_block_bytes == max(block_bytes, sector_bytes)
    await check(GuardedDevice(device), random.Random(0))


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("check", BYTE_GRANULAR_CHECKS)
async def test_contract_under_the_cache(check: Check, sector_bytes: int) -> None:
    device = LuksDevice(GuardedDevice(below(), strict=True), payload(sector_bytes), KEY)
    config = CacheConfig(size_bytes=MIB, dirty_max_bytes=MIB // 4)
    async with WritebackCache(GuardedDevice(device, strict=True), config) as cache:
        await check(AlignedDevice(cache), random.Random(0))


async def test_read_only() -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[BlockDevice]:
        device = below()
        device.change_geometry(read_only=True)
        yield LuksDevice(device, payload(), KEY)

    await check_read_only_device(factory)


@pytest.mark.parametrize(("block_bytes", "sector_bytes"), SIZES)
async def test_nothing_readable_gets_below(block_bytes: int, sector_bytes: int) -> None:
    """Writes of every length, zeroes, discards: each sector there is noise, or was not touched."""
    disk = below(block_bytes)
    device = LuksDevice(disk, payload(sector_bytes), KEY)
    size = device.geometry.size_bytes
    content = (PLAIN * (size // len(PLAIN) + 1))[:size]
    await device.write(0, content)
    await device.write(0, content[: 64 << 10], fua=True)
    await device.write_zeroes(size // 2, size // 4)
    await device.discard(0, size // 2)
    stored = disk.peek(START, size)
    assert PLAIN[:16] not in stored
    assert bytes(16) not in stored
    for at in range(0, size, 4096):
        assert len(set(stored[at : at + 4096])) > 200, "this looks like no ciphertext"
    assert disk.calls["discard"] == disk.calls["write_zeroes"] == 0
    assert await read(device, 0, size // 2) == content[: size // 2]
    assert not any(await read(device, size // 2, size // 4))


async def test_the_callers_buffer_stays_as_it_is() -> None:
    device = LuksDevice(below(), payload(), KEY)
    for length in (512, 64 << 10, MIB):
        source = bytearray(random.Random(length).randbytes(length))
        kept = bytes(source)
        await device.write(0, source)
        assert source == kept


async def test_staging_is_bounded() -> None:
    disk = below(payload_bytes=8 * MIB, record=True)
    device = LuksDevice(disk, payload(4096), KEY)
    content = random.Random(0).randbytes(5 * MIB + 4096)
    await device.write(0, content, fua=True)
    await device.write_zeroes(6 * MIB, 2 * MIB)
    assert max(request.length for request in disk.requests) == PIECE_BYTES
    assert all(request.fua for request in disk.requests[:6])
    assert await read(device, 0, len(content)) == content


async def test_others_have_a_turn_during_a_long_request() -> None:
    disk = below(payload_bytes=2 * MIB)
    device = LuksDevice(disk, payload(512), KEY)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await device.write(0, bytes(MIB))
        assert turns >= 20
        turns = 0
        await device.read_into(0, memoryview(bytearray(MIB)))
        assert turns >= 20
        nursery.cancel_scope.cancel()


class Splitting:
    """Carries a request out block by block in any order, with a turn for others in between."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._rng = random.Random(1)

    def _order(self, length: int) -> list[int]:
        return self._rng.sample(range(0, length, 512), length // 512)

    @property
    def geometry(self) -> Geometry:
        return self._device.geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._device.on_geometry_change(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        for at in self._order(len(target)):
            await self._device.read_into(offset + at, target[at : at + 512])

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        view = memoryview(source)
        for at in self._order(len(view)):
            await self._device.write(offset + at, view[at : at + 512], fua=fua)

    async def flush(self) -> None:
        await self._device.flush()

    async def discard(self, offset: int, length: int) -> None:
        await self._device.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self._device.write_zeroes(offset, length, may_unmap=may_unmap)


async def test_a_sector_of_several_blocks_is_never_seen_half_written() -> None:
    """The device below keeps its word for its own blocks of 512 bytes, and no more."""
    device = LuksDevice(Splitting(below()), payload(4096), KEY)
    await check_blocks_never_mix(device, random.Random(0))


async def test_geometry_grows_with_the_lun() -> None:
    disk = below()
    device = LuksDevice(disk, payload(4096), KEY)
    heard: list[Geometry] = []
    device.on_geometry_change(heard.append)
    assert device.geometry.size_bytes == 2 * MIB
    disk.change_geometry(size_bytes=START + 4 * MIB + 512)
    assert device.geometry.size_bytes == 4 * MIB
    disk.change_geometry(read_only=True)
    assert [(one.size_bytes, one.read_only) for one in heard] == [
        (4 * MIB, False),
        (4 * MIB, True),
    ]
    assert not device.geometry.zeroes_after_discard
    assert device.geometry.discard_granularity_bytes == 0


async def test_a_payload_of_fixed_size_does_not_grow() -> None:
    disk = below()
    device = LuksDevice(disk, payload(size_bytes=MIB), KEY)
    disk.change_geometry(size_bytes=START + 4 * MIB)
    assert device.geometry.size_bytes == MIB
    disk.change_geometry(size_bytes=START // 2)
    assert device.geometry.size_bytes == 0


async def test_alignment_of_physical_blocks_is_seen_from_the_payload() -> None:
    disk = below()
    disk.geometry = replace(disk.geometry, alignment_bytes=1024)
    moved = Payload(offset_bytes=START + 512, size_bytes=MIB, sector_bytes=512)
    assert LuksDevice(disk, moved, KEY).geometry.alignment_bytes == 512


@pytest.mark.parametrize(
    ("where", "block_bytes", "why"),
    [
        (payload(size_bytes=8 * MIB), 512, "has shrunk|has .* bytes"),
        (Payload(offset_bytes=64 * MIB, size_bytes=None, sector_bytes=512), 512, "payload ends"),
        (Payload(offset_bytes=START + 512, size_bytes=None, sector_bytes=512), 4096, "block"),
    ],
)
def test_a_payload_that_does_not_fit_is_refused(where: Payload, block_bytes: int, why: str) -> None:
    with pytest.raises(LuksError, match=why):
        LuksDevice(below(block_bytes), where, KEY)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "discard", "flush"]),
        st.integers(0, 511),
        st.integers(0, 300),
        st.integers(0, 255),
    ),
    max_size=12,
)


@given(OPERATIONS, st.sampled_from(SIZES), st.integers(0, 1 << 40))
@settings(max_examples=40, deadline=None)
def test_model(
    operations: list[tuple[str, int, int, int]], sizes: tuple[int, int], iv_first: int
) -> None:
    """Whatever is done, what is read is what was written, also by another instance."""

    async def run() -> None:
        disk = below(sizes[0])
        where = payload(sizes[1], iv_first=iv_first)
        device = LuksDevice(disk, where, KEY)
        block = device.geometry.logical_block_bytes
        size = 512 * 512
        model = bytearray(size)
        await device.write_zeroes(0, size)
        for kind, start, length, fill in operations:
            offset = start * 512 // block * block
            count = min(length * 512 // block * block, size - offset)
            if kind == "write":
                content = random.Random(fill).randbytes(count)
                await device.write(offset, content)
                model[offset : offset + count] = content
            elif kind == "zero":
                await device.write_zeroes(offset, count)
                model[offset : offset + count] = bytes(count)
            elif kind == "discard":
                await device.discard(offset, count)
            else:
                await device.flush()
            assert await read(device, offset, count) == model[offset : offset + count]
        assert await read(LuksDevice(disk, where, KEY), 0, size) == model

    trio.run(run)
