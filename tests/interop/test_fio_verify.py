"""fio writes, reads back and checks checksums, with many requests in flight."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import Program, run, wait_until
from tests.interop.conftest import Disk, TgtDisk
from tests.interop.product import Product, abandon, alive
from tests.interop.workers import can_take_over, kill_worker, supervisor_of, takeovers, watchdog

pytestmark = [pytest.mark.fuse, pytest.mark.interop("fio", "tgtd", "tgtadm")]

VERIFY = ["--name=verify", "--verify=crc32c", "--verify_fatal=1", "--ioengine=libaio"]
VERIFY += ["--verify_state_save=0"]  # it would be left in the current folder


def fio(file: Path, *options: str) -> None:
    run(["fio", *VERIFY, f"--filename={file}", "--output-format=terse", *options], timeout_s=90)


MODES = ["none", "writethrough", "writeback", "log"]


def ended(pid: int) -> bool:
    return not alive(pid)


def options(cache: str, folder: Path) -> list[str]:
    """A cache of a quarter of the working set: blocks are written back and evicted all the time."""
    size = [] if cache == "none" else ["cache_size=8M"]
    size += [f"log_dir={folder}/log", "log_size=16M"] if cache == "log" else []
    return [f"cache={cache}", *size]


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
    with product.mounted(tgt_disk.url, *options(cache, tmp_path)) as mountpoint:
        fio(mountpoint / "lun1", "--size=32M", "--do_verify=1", *job)
    # Once more on what the target has kept.
    fio(tgt_disk.backing, "--size=32M", "--verify_only=1", *job, "--direct=0")


@can_take_over
@pytest.mark.parametrize("cache", [mode for mode in MODES if mode != "writeback"])
def test_verify_while_workers_die(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path, cache: str
) -> None:
    job = ["--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--direct=1", "--size=32M"]
    with product.mounted(tgt_disk.url, *options(cache, tmp_path)) as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        words = ["fio", *VERIFY, f"--filename={mountpoint / 'lun1'}", "--do_verify=1", *job]
        with (
            watchdog(product),
            Program([*words, "--rate=24m"], log=tmp_path / "fio.log") as program,
        ):
            for _ in range(3):
                time.sleep(0.3)
                assert program.running(), "fio was done before it met a dead worker"
                kill_worker(supervisor)
            assert program.wait(90) == 0, program.log_tail()
        assert takeovers(product, mountpoint) == 3
    fio(tgt_disk.backing, "--verify_only=1", *job, "--direct=0")


@pytest.mark.parametrize("cache", MODES)
def test_what_was_synced_verifies_after_the_daemon_has_died(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path, cache: str
) -> None:
    for seed in (1, 2):
        job = ["--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--direct=1", "--size=32M"]
        job += [f"--randseed={seed}", "--end_fsync=1"]
        mountpoint = product.new_mountpoint()
        product.mount(tgt_disk.url, mountpoint, *options(cache, tmp_path))
        fio(mountpoint / "lun1", "--do_verify=0", *job)
        worker, supervisor = product.pid(mountpoint), supervisor_of(product, mountpoint)
        os.kill(supervisor, signal.SIGKILL)
        wait_until(partial(ended, worker), what="end of the daemon")
        abandon(mountpoint)
        with product.mounted(tgt_disk.url, *options(cache, tmp_path)) as mountpoint:
            fio(mountpoint / "lun1", "--verify_only=1", *job)
        fio(tgt_disk.backing, "--verify_only=1", *job, "--direct=0")


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
