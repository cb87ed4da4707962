"""File systems on a loop device on the device file, as the manual shows it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import ProgramFailed, run
from tests.interop.conftest import MEBIBYTE, Disk, MakeTgtDisk
from tests.interop.product import Product, loop_device, pattern

pytestmark = [pytest.mark.fuse, pytest.mark.loop]

EXT4 = ("mkfs.ext4", "-q", "-F")
XFS = ("mkfs.xfs", "-q", "-f")
CHECK = {"mkfs.ext4": ("fsck.ext4", "-f", "-n"), "mkfs.xfs": ("xfs_repair", "-n")}
# mkfs.xfs refuses anything smaller than 300 MiB.
BIG_BYTES = 320 * MEBIBYTE


@contextlib.contextmanager
def file_system(device: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run(["mount", device, folder])
    try:
        yield folder
    finally:
        with contextlib.suppress(ProgramFailed):
            run(["umount", folder])


def make_and_fill(device: Path, folder: Path, mkfs: tuple[str, ...]) -> None:
    run([*mkfs, device], timeout_s=60)
    with file_system(device, folder) as top:
        for number in range(20):
            (top / f"folder{number % 4}").mkdir(exist_ok=True)
            content = pattern(number * 50_001, seed=number)
            (top / f"folder{number % 4}" / f"file{number}").write_bytes(content)
        (top / "folder0" / "file0").unlink()


def check_content(device: Path, folder: Path, mkfs: tuple[str, ...]) -> None:
    run([*CHECK[mkfs[0]], device], timeout_s=60)
    with file_system(device, folder) as top:
        for number in range(1, 20):
            content = (top / f"folder{number % 4}" / f"file{number}").read_bytes()
            assert content == pattern(number * 50_001, seed=number)
        shutil.rmtree(top / "folder1")
        (top / "last").write_bytes(b"words")
    run([*CHECK[mkfs[0]], device], timeout_s=60)


@pytest.mark.interop("tgtd", "tgtadm", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize("block_bytes", [512, 4096])
@pytest.mark.parametrize("mkfs", [EXT4, XFS], ids=["ext4", "xfs"])
def test_file_system_survives_a_remount(
    product: Product,
    make_tgt_disk: MakeTgtDisk,
    tmp_path: Path,
    block_bytes: int,
    mkfs: tuple[str, ...],
) -> None:
    disk = make_tgt_disk(size_bytes=BIG_BYTES, block_bytes=block_bytes)
    for work in (make_and_fill, check_content):
        with (
            product.mounted(disk.url) as mountpoint,
            loop_device(mountpoint / "lun1", block_bytes=block_bytes) as device,
        ):
            work(device, tmp_path / "top", mkfs)


@pytest.mark.interop("mkfs.ext4")
def test_ext4_on_every_target(product: Product, disk: Disk, tmp_path: Path) -> None:
    with (
        product.mounted(disk.url) as mountpoint,
        loop_device(mountpoint / disk.name) as device,
    ):
        make_and_fill(device, tmp_path / "top", EXT4)
        check_content(device, tmp_path / "top", EXT4)
    # What the target has kept is a clean file system too, seen without us.
    run(["fsck.ext4", "-f", "-n", disk.backing], timeout_s=60)


@pytest.mark.interop("tgtd", "tgtadm", "mkfs.ext4")
@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_mkfs_and_fsck_on_the_file_itself(
    product: Product, make_tgt_disk: MakeTgtDisk, block_bytes: int
) -> None:
    disk = make_tgt_disk(block_bytes=block_bytes)
    with product.mounted(disk.url) as mountpoint:
        run([*EXT4, "-b", "4096", mountpoint / "lun1"], timeout_s=60)
        run(["fsck.ext4", "-f", "-n", mountpoint / "lun1"], timeout_s=60)
    run(["fsck.ext4", "-f", "-n", disk.backing], timeout_s=60)
