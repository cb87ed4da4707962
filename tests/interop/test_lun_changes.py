"""LUNs of a mounted target that come, go and grow: their files do the same."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.conftest import MakeTgtDisk
from tests.interop.product import Product, abandon, sized_file

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

MEBIBYTE = 1 << 20
PATIENCE_S = 20.0
"""More than what a LUN has to be missing for, and less than a look by the clock takes."""


def wait_for(condition: Callable[[], bool], prod: Callable[[], object]) -> None:
    """Until `condition`; the target tells its news with the answer to a command, so `prod` it."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing has changed"
        prod()
        time.sleep(0.1)


def files_in(mountpoint: Path) -> list[str]:
    return sorted(name for name in os.listdir(mountpoint) if name != ".orion")


def read_some(path: Path) -> bytes:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read(4096)


def test_a_lun_appears_and_vanishes_as_a_file(
    product: Product, make_tgt_disk: MakeTgtDisk, memory_path: Path
) -> None:
    disk = make_tgt_disk()
    second = sized_file(memory_path / "second.img", 8 * MEBIBYTE)
    with product.mounted(disk.target.url, "cache=none") as mountpoint:
        assert files_in(mountpoint) == ["lun1"]

        def prod() -> bytes:
            return read_some(mountpoint / "lun1")

        disk.target.add_lun(2, second)
        wait_for(lambda: "lun2" in os.listdir(mountpoint), prod)
        assert (mountpoint / "lun2").stat().st_size == 8 * MEBIBYTE
        with (mountpoint / "lun2").open("r+b", buffering=0) as file:
            file.write(b"new" * 1000)
            os.fsync(file.fileno())
            assert second.read_bytes()[:3000] == b"new" * 1000
            assert [lun["name"] for lun in product.status(mountpoint)["luns"]] == ["lun1", "lun2"]

            disk.target.remove_lun(2)
            wait_for(lambda: "lun2" not in os.listdir(mountpoint), prod)
            assert not (mountpoint / "lun2").exists()
            with pytest.raises(OSError, match="No such device"):
                os.fsync(file.fileno())
        assert [lun["name"] for lun in product.status(mountpoint)["luns"]] == ["lun1"]

        disk.target.add_lun(2, sized_file(memory_path / "third.img", 4 * MEBIBYTE))
        wait_for(lambda: (mountpoint / "lun2").exists(), prod)
        assert (mountpoint / "lun2").stat().st_size == 4 * MEBIBYTE
        assert read_some(mountpoint / "lun2") == bytes(4096)


def test_unwritten_data_keeps_its_file_until_the_lun_is_back(
    product: Product, make_tgt_disk: MakeTgtDisk, memory_path: Path
) -> None:
    disk = make_tgt_disk()
    second = sized_file(memory_path / "second.img", 8 * MEBIBYTE)
    disk.target.add_lun(2, second)
    mountpoint = product.new_mountpoint()
    daemon = product.start("mount", disk.target.url, mountpoint, "-f", "-o", "dirty_age=600")
    try:
        daemon.wait_until(lambda: (mountpoint / "lun2").exists())

        def prod() -> bytes:
            return read_some(mountpoint / "lun1")

        with (mountpoint / "lun2").open("r+b", buffering=0) as file:
            file.write(b"only copy")
            disk.target.remove_lun(2)
            wait_for(lambda: "LUN 2 has gone with" in daemon.log_tail(), prod)
            with pytest.raises(OSError, match=r"rror|No such device"):
                os.fsync(file.fileno())
            assert files_in(mountpoint) == ["lun1", "lun2"]
        disk.target.add_lun(2, second)
        with (mountpoint / "lun2").open("r+b", buffering=0) as file:
            wait_for(lambda: synced(file.fileno()), prod)
        assert second.read_bytes()[:9] == b"only copy"
        product.umount(mountpoint)
        assert daemon.wait(PATIENCE_S) == 0
    finally:
        abandon(mountpoint)
        daemon.stop()


def synced(descriptor: int) -> bool:
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    return True
