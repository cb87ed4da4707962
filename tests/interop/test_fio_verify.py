"""fio writes, reads back and checks checksums, with many requests in flight."""

from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import run
from tests.interop.conftest import Disk, TgtDisk
from tests.interop.product import Product

pytestmark = [pytest.mark.fuse, pytest.mark.interop("fio", "tgtd", "tgtadm")]

VERIFY = ["--name=verify", "--verify=crc32c", "--verify_fatal=1", "--ioengine=libaio"]
VERIFY += ["--verify_state_save=0"]  # it would be left in the current folder


def fio(file: Path, *options: str) -> None:
    run(["fio", *VERIFY, f"--filename={file}", "--output-format=terse", *options], timeout_s=90)


@pytest.mark.parametrize(
    "cache", ["none", pytest.param("writethrough", marks=pytest.mark.slow), "writeback", "log"]
)
@pytest.mark.parametrize(
    "job",
    [
        ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1"],
        ["--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0", "--iodepth=16", "--direct=1"],
        ["--rw=write", "--bs=1M", "--iodepth=4", "--direct=1"],
        ["--rw=randwrite", "--bsrange=1k-48k", "--direct=0"],
    ],
    ids=["4k direct", "mixed direct", "1M direct", "mixed buffered"],
)
def test_verify(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path, job: list[str], cache: str
) -> None:
    # A cache of a quarter of the working set: blocks are written back and evicted all the time.
    size = [] if cache == "none" else ["cache_size=8M"]
    size += [f"log_dir={tmp_path}/log", "log_size=16M"] if cache == "log" else []
    with product.mounted(tgt_disk.url, f"cache={cache}", *size) as mountpoint:
        fio(mountpoint / "lun1", "--size=32M", "--do_verify=1", *job)
    # Once more on what the target has kept.
    fio(tgt_disk.backing, "--size=32M", "--verify_only=1", *job, "--direct=0")


def test_verify_on_every_target(product: Product, disk: Disk) -> None:
    job = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1", "--size=16M"]
    with product.mounted(disk.url, "cache_size=8M") as mountpoint:
        fio(mountpoint / disk.name, "--do_verify=1", *job)
    with product.mounted(disk.url) as mountpoint:
        fio(mountpoint / disk.name, "--verify_only=1", *job)


@pytest.mark.slow
def test_verify_for_long(product: Product, tgt_disk: TgtDisk) -> None:
    job = ["--rw=randrw", "--bsrange=512-128k", "--iodepth=64", "--direct=1", "--loops=8"]
    with product.mounted(tgt_disk.url, "cache_size=16M") as mountpoint:
        fio(mountpoint / "lun1", "--size=60M", "--do_verify=1", *job)
