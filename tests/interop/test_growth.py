"""A LUN that grows while a loop device on its file is in use."""

import time
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import run
from tests.interop.conftest import MEBIBYTE, MakeEmbedded
from tests.interop.product import Product, loop_device, pattern, put, sized_file

pytestmark = [pytest.mark.fuse, pytest.mark.loop]

WITHIN_S = 20.0


def wait_for_size(path: Path, size_bytes: int, device: Path) -> None:
    """The target tells with the next command, so there are some."""
    deadline = time.monotonic() + WITHIN_S
    while path.stat().st_size != size_bytes:
        assert time.monotonic() < deadline, path.stat().st_size
        put(device, pattern(4096), 16 * MEBIBYTE, sync=True)
        time.sleep(0.1)


def test_a_loop_device_follows_with_set_capacity(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path
) -> None:
    backing = sized_file(memory_path / "disk.img", 32 * MEBIBYTE)
    target = make_embedded({1: str(backing)})
    with product.mounted(target.lun_url(1)) as mountpoint:
        lun = mountpoint / "lun1"
        with loop_device(lun) as device:
            run(["mkfs.ext4", "-q", str(device)])
            data = pattern(MEBIBYTE)
            put(device, data, 8 * MEBIBYTE, sync=True)
            sized_file_grows(backing, 64 * MEBIBYTE)
            wait_for_size(lun, 64 * MEBIBYTE, device)
            assert int(run(["blockdev", "--getsize64", str(device)])) == 32 * MEBIBYTE
            run(["losetup", "--set-capacity", str(device)])
            assert int(run(["blockdev", "--getsize64", str(device)])) == 64 * MEBIBYTE
            put(device, data, 60 * MEBIBYTE, sync=True)
    assert backing.read_bytes()[60 * MEBIBYTE : 61 * MEBIBYTE] == data


def sized_file_grows(path: Path, size_bytes: int) -> None:
    """Without cutting it to nothing first."""
    with path.open("r+b") as file:
        file.truncate(size_bytes)
