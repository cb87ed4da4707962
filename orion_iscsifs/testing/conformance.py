"""The promises of `block/device.py` as tests that any layer or stack can run.

`await check_block_device(factory)` runs all of them, each on a device of its own from `factory()`,
an async context manager. `CHECKS` lists them for a parametrized test. The device may hold anything
at first, must be writable, have at least 1 MiB, and take requests of whole logical blocks.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.errors import Misaligned, OrionError, OutOfRange, WriteProtected

DeviceFactory = Callable[[], AbstractAsyncContextManager[BlockDevice]]
Check = Callable[[BlockDevice, random.Random], Awaitable[None]]

AREA_BYTES = 1 << 20


async def check_block_device(
    factory: DeviceFactory, *, seed: int = 0, checks: Sequence[Check] | None = None
) -> None:
    """Raise AssertionError at the first broken promise of `checks` (default: all, `CHECKS`)."""
    for check in CHECKS if checks is None else checks:
        async with factory() as device:
            await check(device, random.Random(seed))


async def check_read_only_device(factory: DeviceFactory) -> None:
    """The promises of a device whose geometry says `read_only`."""
    async with factory() as device:
        assert device.geometry.read_only
        block = device.geometry.logical_block_bytes
        before = await read(device, 0, block)
        for call in (
            device.write(0, bytes(block)),
            device.write_zeroes(0, block),
            device.discard(0, block),
        ):
            await _must_raise(call, WriteProtected)
        await device.flush()
        assert await read(device, 0, block) == before


async def read(device: BlockDevice, offset: int, length: int) -> bytes:
    """`read_into` as a value."""
    target = bytearray(length)
    await device.read_into(offset, memoryview(target))
    return bytes(target)


# -- single requests -----------------------------------------------------------------------------


async def check_geometry(device: BlockDevice, rng: random.Random) -> None:
    del rng
    geometry = device.geometry
    assert geometry.logical_block_bytes.bit_count() == 1, "the block size is a power of two"
    assert geometry.size_bytes >= AREA_BYTES, "these checks need 1 MiB"
    assert not geometry.read_only


async def check_read_sees_write(device: BlockDevice, rng: random.Random) -> None:
    """Any kind of buffer, at any place and length, and its neighbours stay as they were."""
    block = device.geometry.logical_block_bytes
    model = bytearray(rng.randbytes(AREA_BYTES))
    await device.write(0, model)
    for kind in (bytes, bytearray, memoryview):
        for _ in range(20):
            offset, length = _extent(rng, block)
            content = rng.randbytes(length)
            await device.write(offset, kind(content))
            model[offset : offset + length] = content
            offset, length = _extent(rng, block)
            assert await read(device, offset, length) == model[offset : offset + length]
    assert await read(device, 0, AREA_BYTES) == model


async def check_last_block(device: BlockDevice, rng: random.Random) -> None:
    geometry = device.geometry
    content = rng.randbytes(geometry.logical_block_bytes)
    last = geometry.size_bytes - geometry.logical_block_bytes
    await device.write(last, content)
    await device.flush()
    assert await read(device, last, len(content)) == content


async def check_read_to_the_end(device: BlockDevice, rng: random.Random) -> None:
    start = device.geometry.size_bytes - AREA_BYTES // 2
    content = rng.randbytes(AREA_BYTES // 2)
    await device.write(start, content)
    assert await read(device, start, len(content)) == content


async def check_zero_length(device: BlockDevice, rng: random.Random) -> None:
    del rng
    before = await read(device, 0, AREA_BYTES)
    for offset in (0, device.geometry.logical_block_bytes, device.geometry.size_bytes):
        await device.read_into(offset, memoryview(bytearray()))
        await device.write(offset, b"")
        await device.discard(offset, 0)
        await device.write_zeroes(offset, 0)
    assert await read(device, 0, AREA_BYTES) == before


async def check_out_of_range(device: BlockDevice, rng: random.Random) -> None:
    """Past the end is refused as a whole: not one block is changed."""
    geometry = device.geometry
    block = geometry.logical_block_bytes
    last = geometry.size_bytes - block
    content = rng.randbytes(block)
    await device.write(last, content)
    for offset in (last, geometry.size_bytes, geometry.size_bytes + (1 << 30)):
        length = 2 * block
        await _must_raise(device.read_into(offset, memoryview(bytearray(length))), OutOfRange)
        await _must_raise(device.write(offset, bytes(length)), OutOfRange)
        await _must_raise(device.discard(offset, length), OutOfRange)
        await _must_raise(device.write_zeroes(offset, length), OutOfRange)
    assert await read(device, last, block) == content


async def check_misaligned(device: BlockDevice, rng: random.Random) -> None:
    """Half a block is refused and changes nothing (not for `AlignedDevice`)."""
    block = device.geometry.logical_block_bytes
    content = rng.randbytes(4 * block)
    await device.write(0, content)
    for offset, length in ((1, block), (0, block - 1), (block // 2, 2 * block)):
        await _must_raise(device.read_into(offset, memoryview(bytearray(length))), Misaligned)
        await _must_raise(device.write(offset, bytes(length)), Misaligned)
        await _must_raise(device.discard(offset, length), Misaligned)
        await _must_raise(device.write_zeroes(offset, length), Misaligned)
    assert await read(device, 0, 4 * block) == content


async def check_write_zeroes(device: BlockDevice, rng: random.Random) -> None:
    """Small and large, over written data, exactly the range."""
    block = device.geometry.logical_block_bytes
    model = bytearray(rng.randbytes(AREA_BYTES))
    await device.write(0, model)
    extents = [(0, block), (3 * block, AREA_BYTES // 2), *(_extent(rng, block) for _ in range(12))]
    for number, (offset, length) in enumerate(extents):
        await device.write_zeroes(offset, length, may_unmap=bool(number % 2))
        model[offset : offset + length] = bytes(length)
        assert await read(device, 0, AREA_BYTES) == model
        offset, length = _extent(rng, block)
        content = rng.randbytes(length)
        await device.write(offset, content)
        model[offset : offset + length] = content


async def check_discard(device: BlockDevice, rng: random.Random) -> None:
    """Afterwards every block is what it was, or zero, and it stays that."""
    block = device.geometry.logical_block_bytes
    for flushed in (False, True):
        model = rng.randbytes(AREA_BYTES)
        await device.write(0, model)
        if flushed:
            await device.flush()
        for _ in range(8):
            offset, length = _extent(rng, block)
            before = await read(device, 0, AREA_BYTES)
            await device.discard(offset, length)
            after = await read(device, 0, AREA_BYTES)
            for at in range(0, AREA_BYTES, block):
                old, new = before[at : at + block], after[at : at + block]
                discarded = offset <= at < offset + length
                assert new == old or (discarded and not any(new)), f"block at {at}"
            await device.flush()
            assert await read(device, 0, AREA_BYTES) == after, "the content changed by itself"


async def check_write_after_discard(device: BlockDevice, rng: random.Random) -> None:
    content = rng.randbytes(AREA_BYTES)
    await device.discard(0, AREA_BYTES)
    await device.write(0, content)
    assert await read(device, 0, AREA_BYTES) == content
    await device.flush()
    assert await read(device, 0, AREA_BYTES) == content


async def check_fua_and_flush(device: BlockDevice, rng: random.Random) -> None:
    block = device.geometry.logical_block_bytes
    first, second = rng.randbytes(16 * block), rng.randbytes(block)
    await device.write(0, first)
    await device.write(5 * block, second, fua=True)
    await device.flush()
    await device.flush()
    assert await read(device, 0, 16 * block) == first[: 5 * block] + second + first[6 * block :]


async def check_buffers_are_the_callers(device: BlockDevice, rng: random.Random) -> None:
    """What happens to a buffer after the call has no effect on the device, and vice versa."""
    block = device.geometry.logical_block_bytes
    content = rng.randbytes(32 * block)
    source = bytearray(content)
    await device.write(0, source)
    source[:] = bytes(len(source))
    target = bytearray(len(content))
    await device.read_into(0, memoryview(target))
    assert target == content
    target[:] = bytes(len(target))
    await device.flush()
    assert await read(device, 0, len(content)) == content
    assert not any(target), "the device wrote into a buffer after its call had ended"


# -- requests at the same time -------------------------------------------------------------------


async def check_disjoint_tasks(device: BlockDevice, rng: random.Random) -> None:
    """Tasks that each work in blocks of their own never see one another."""
    block = device.geometry.logical_block_bytes
    tasks = 8

    async def work(number: int, rng: random.Random) -> None:
        model: dict[int, bytes] = {}
        for _ in range(25):
            at = (rng.randrange(AREA_BYTES // block // tasks) * tasks + number) * block
            if at in model and rng.random() < 0.5:
                assert await read(device, at, block) == model[at]
            else:
                model[at] = rng.randbytes(block)
                await device.write(at, model[at], fua=rng.random() < 0.1)
            if rng.random() < 0.05:
                await device.flush()
            await trio.lowlevel.checkpoint()
        for at, content in model.items():
            assert await read(device, at, block) == content

    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(work, number, random.Random(rng.random()))


async def check_blocks_never_mix(device: BlockDevice, rng: random.Random) -> None:
    """Overlapping writers and readers: every block read is one writer's, whole."""
    block = device.geometry.logical_block_bytes
    length = 16 * block
    await device.write(0, bytes(length))
    writers = 4

    async def write(number: int, rng: random.Random) -> None:
        for _ in range(20):
            start = rng.randrange(16) * block
            stop = rng.randrange(start, length, block) + block
            await device.write(start, bytes([number + 1]) * (stop - start))
            await trio.lowlevel.checkpoint()

    async def observe() -> None:
        for _ in range(30):
            seen = await read(device, 0, length)
            for at in range(0, length, block):
                assert seen[at : at + block] == bytes([seen[at]]) * block, "a torn block"
                assert seen[at] <= writers
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(observe)
        for number in range(writers):
            nursery.start_soon(write, number, random.Random(rng.random()))
    settled = await read(device, 0, length)
    await device.flush()
    assert await read(device, 0, length) == settled


async def check_reads_never_go_back(device: BlockDevice, rng: random.Random) -> None:
    """A read that begins after a write returned sees it, whatever else is under way."""
    block = device.geometry.logical_block_bytes
    del rng
    returned = 0
    await device.write(0, bytes(block))

    async def observe() -> None:
        while returned < 60:
            least = returned
            seen = await read(device, 0, block)
            assert seen[0] >= least, f"read {seen[0]} after {least} had been written"
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(observe)
        for version in range(1, 61):
            await device.write(0, bytes([version]) * block)
            returned = version
            if version % 10 == 0:
                await device.flush()
            await trio.lowlevel.checkpoint()


async def check_flushes_together(device: BlockDevice, rng: random.Random) -> None:
    block = device.geometry.logical_block_bytes
    content = rng.randbytes(64 * block)
    async with trio.open_nursery() as nursery:
        for at in range(0, len(content), 8 * block):
            await device.write(at, content[at : at + 8 * block])
            nursery.start_soon(device.flush)
            await trio.lowlevel.checkpoint()
    assert await read(device, 0, len(content)) == content


async def check_cancelled_requests(device: BlockDevice, rng: random.Random) -> None:
    """A cancelled write tears its own range at most; the device goes on working."""
    block = device.geometry.logical_block_bytes
    old, new = rng.randbytes(64 * block), rng.randbytes(16 * block)
    await device.write(0, old)
    for start in range(0, 64 * block, 16 * block):
        with trio.CancelScope() as scope:
            scope.cancel()
            await device.write(start, new)
        with trio.CancelScope() as scope:
            scope.cancel()
            await device.read_into(start, memoryview(bytearray(16 * block)))
    seen = await read(device, 0, 64 * block)
    for start in range(0, 64 * block, block):
        versions = old[start : start + block], new[start % len(new) : start % len(new) + block]
        assert seen[start : start + block] in versions, f"block at {start}"
    await device.write(0, old)
    await device.flush()
    assert await read(device, 0, 64 * block) == old


BYTE_GRANULAR_CHECKS: tuple[Check, ...] = (
    check_geometry,
    check_read_sees_write,
    check_last_block,
    check_read_to_the_end,
    check_zero_length,
    check_out_of_range,
    check_write_zeroes,
    check_discard,
    check_write_after_discard,
    check_fua_and_flush,
    check_buffers_are_the_callers,
    check_disjoint_tasks,
    check_blocks_never_mix,
    check_reads_never_go_back,
    check_flushes_together,
    check_cancelled_requests,
)
"""What holds for an `AlignedDevice` too, which takes any offset and length."""

CHECKS: tuple[Check, ...] = (*BYTE_GRANULAR_CHECKS, check_misaligned)


def _extent(rng: random.Random, block: int) -> tuple[int, int]:
    """A random range of whole blocks in the area; mostly short, sometimes long."""
    blocks = AREA_BYTES // block
    length = min(blocks, int(rng.paretovariate(0.6)))
    return rng.randrange(blocks - length + 1) * block, length * block


async def _must_raise(call: Awaitable[None], error: type[OrionError]) -> None:
    try:
        await call
    except error:
        return
    raise AssertionError(f"no {error.__name__}")
