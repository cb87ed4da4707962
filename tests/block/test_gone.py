"""What a device answers whose LUN the target has removed."""

from collections.abc import Awaitable, Callable

import pytest

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.block.gone import GoneDevice
from orion_iscsifs.errors import LunNotFound

GEOMETRY = Geometry(size_bytes=1 << 20)


@pytest.mark.parametrize(
    "request_",
    [
        lambda device: device.read_into(0, memoryview(bytearray(512))),
        lambda device: device.write(0, bytes(512)),
        lambda device: device.flush(),
        lambda device: device.discard(0, 512),
        lambda device: device.write_zeroes(0, 512),
    ],
    ids=["read", "write", "flush", "discard", "write zeroes"],
)
async def test_every_request_fails_and_names_the_file(
    request_: Callable[[GoneDevice], Awaitable[None]],
) -> None:
    with pytest.raises(LunNotFound, match=r"lun3.*removed") as caught:
        await request_(GoneDevice("lun3", GEOMETRY))
    assert caught.value.advice


def test_it_keeps_its_last_geometry() -> None:
    device = GoneDevice("lun3", GEOMETRY)
    device.on_geometry_change(lambda _: pytest.fail("nothing changes any more"))
    assert device.geometry is GEOMETRY
