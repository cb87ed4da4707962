"""The daemon's side of `trim`, over a disk in memory."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.cli.trimming import trim, whole_granules
from orion_iscsifs.errors import DeviceError, NotSupported, OutOfRange, WriteProtected
from orion_iscsifs.testing.memory import MemoryDevice

SIZE = 64 << 10


async def no_progress(_: dict[str, Any]) -> None:
    """Nobody looks."""


async def run(device: MemoryDevice, *, read_only: bool = False, **request: Any) -> dict[str, Any]:
    asked = {"file": "lun1", **request}
    return await trim({"lun1": device}, asked, no_progress, read_only=read_only)


def disk() -> MemoryDevice:
    return MemoryDevice(geometry=Geometry(size_bytes=SIZE, discard_granularity_bytes=4096))


async def test_whole_granules_are_discarded_and_the_rest_is_kept() -> None:
    device = disk()
    await device.write(0, b"x" * SIZE)
    answer = await run(device, offset=512, length=3 * 4096)
    assert answer == {
        "asked_bytes": 3 * 4096,
        "discarded_bytes": 2 * 4096,
        "granularity_bytes": 4096,
    }
    content = bytearray(SIZE)
    await device.read_into(0, memoryview(content))
    assert content[:4096] == b"x" * 4096
    assert content[3 * 4096 :] == b"x" * (SIZE - 3 * 4096)


async def test_everything_by_default() -> None:
    assert (await run(disk()))["discarded_bytes"] == SIZE


@pytest.mark.parametrize(
    "request_", [{"offset": SIZE + 1}, {"offset": 4096, "length": SIZE}, {"length": -1}]
)
async def test_a_range_outside_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(OutOfRange, match="not inside"):
        await run(disk(), **request_)


@pytest.mark.parametrize("request_", [{"offset": "0"}, {"offset": -1}, {"length": 1.5}])
async def test_nonsense_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(OutOfRange, match="byte counts"):
        await run(disk(), **request_)


async def test_refusals_in_words() -> None:
    with pytest.raises(WriteProtected):
        await run(disk(), read_only=True)
    with pytest.raises(DeviceError, match="lun9: no device file"):
        await run(disk(), file="lun9")
    device = disk()
    device.geometry = replace(device.geometry, discard_granularity_bytes=0)
    with pytest.raises(NotSupported, match="takes no UNMAP"):
        await run(device)


@given(st.integers(1, 64), st.integers(0, 63), st.integers(0, 10_000), st.integers(0, 10_000))
def test_whole_granules(unit: int, alignment: int, start: int, length: int) -> None:
    geometry = Geometry(
        size_bytes=512 * 1024,
        discard_granularity_bytes=unit,
        discard_alignment_bytes=alignment % unit,
    )
    first, last = whole_granules(geometry, start, start + length)
    assert start <= first <= last <= start + length
    if first < last:
        assert (first - alignment % unit) % unit == (last - alignment % unit) % unit == 0
        assert first - start < unit
        assert start + length - last < unit
    else:
        assert length < 2 * unit
