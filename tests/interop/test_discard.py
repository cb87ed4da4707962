"""Discards through a loop device on the mount: blkdiscard, mkfs and fstrim give space back."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop.conftest import MEBIBYTE, MakeEmbedded
from tests.interop.product import Product, get, loop_device, pattern, put, sized_file

pytestmark = [pytest.mark.fuse, pytest.mark.loop]

SIZE = 64 * MEBIBYTE


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=60)


def used(path: Path) -> int:
    """Bytes that the file takes on its own file system."""
    return path.stat().st_blocks * 512


@contextmanager
def mounted_file_system(device: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run("mount", device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_discards_reach_the_target(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path, tmp_path: Path, cache: str
) -> None:
    backing = sized_file(memory_path / "thin.img", SIZE)
    target = make_embedded({1: str(backing)})
    with product.mounted(target.lun_url(1), f"cache={cache}") as mountpoint:
        lun = mountpoint / "lun1"
        put(lun, pattern(SIZE), sync=True)
        assert used(backing) == SIZE
        with loop_device(lun) as device:
            run("blkdiscard", device)
            assert used(backing) == 0
            assert get(lun, SIZE) == bytes(SIZE), "also for who had it cached"
            run("mkfs.ext4", "-q", device)
            with mounted_file_system(device, tmp_path / "fs") as folder:
                put_file(folder / "file", pattern(24 * MEBIBYTE))
                full = used(backing)
                assert full > 24 * MEBIBYTE
                (folder / "file").unlink()
                run("sync", "-f", folder)
                run("fstrim", folder)
                assert used(backing) < full - 20 * MEBIBYTE
                put_file(folder / "again", pattern(MEBIBYTE, seed=7))
                assert (folder / "again").read_bytes() == pattern(MEBIBYTE, seed=7)
            run("e2fsck", "-fn", device)


def put_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def test_zeroing_keeps_the_space_where_it_is_asked_to(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path
) -> None:
    backing = sized_file(memory_path / "thin.img", SIZE)
    target = make_embedded({1: str(backing)})
    with product.mounted(target.lun_url(1)) as mountpoint:
        lun = mountpoint / "lun1"
        data = pattern(8 * MEBIBYTE)
        put(lun, data, sync=True)
        run("fallocate", "--zero-range", "--offset", "1MiB", "--length", "1MiB", lun)
        run("fallocate", "--punch-hole", "--offset", "4MiB", "--length", "1MiB", lun)
        expected = bytearray(data)
        for at in (1 << 20, 4 << 20):
            expected[at : at + (1 << 20)] = bytes(1 << 20)
        assert get(lun, len(data)) == expected
    assert backing.read_bytes()[: len(data)] == expected


def test_a_read_only_mount_punches_nothing(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path
) -> None:
    backing = sized_file(memory_path / "disk.img", SIZE)
    target = make_embedded({1: f"{backing},ro"})
    with product.mounted(target.lun_url(1), "ro") as mountpoint:
        done = subprocess.run(
            ["fallocate", "--punch-hole", "--length", "4096", str(mountpoint / "lun1")],
            check=False,
            capture_output=True,
        )
        assert done.returncode != 0
        assert get(mountpoint / "lun1", 4096) == bytes(4096)
