"""Going on with a mount only where nothing can be wrong: several LUNs, paths and hosts."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.programs import free_port, wait_until
from tests.interop.conftest import MEBIBYTE, MakeEmbedded, MakeTgtDisk, TgtDisk
from tests.interop.product import Product, alive, get, pattern, put, sized_file
from tests.interop.test_outages import Traffic, timed
from tests.interop.workers import (
    can_take_over,
    kill_worker,
    log_of,
    supervisor_of,
    takeovers,
    watchdog,
)

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm"), can_take_over]
IMPATIENT = ("noop_interval=1", "noop_timeout=1", "command_timeout=3", "login_timeout=3")


@pytest.fixture(autouse=True)
def nothing_hangs(product: Product) -> Iterator[None]:
    with watchdog(product):
        yield


def test_luns_that_came_and_went(
    product: Product, make_tgt_disk: MakeTgtDisk, memory_path: Path
) -> None:
    """An inode is the same file for every worker, in whatever order the files appeared."""
    disk = make_tgt_disk()
    for lun in (5, 7):
        disk.target.add_lun(lun, sized_file(memory_path / f"{lun}.img", 8 * MEBIBYTE))
    with product.mounted(disk.target.url, "cache=none") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        disk.target.remove_lun(5)
        disk.target.add_lun(2, sized_file(memory_path / "2.img", 8 * MEBIBYTE))

        def told() -> bool:
            get(mountpoint / "lun1", 512)
            names = os.listdir(mountpoint)
            return "lun2" in names and "lun5" not in names

        wait_until(told, what="the change of the files", timeout_s=60)
        inodes = {name: (mountpoint / name).stat().st_ino for name in ("lun1", "lun2", "lun7")}
        opened = {name: os.open(mountpoint / name, os.O_RDWR) for name in inodes}
        try:
            kill_worker(supervisor)
            for seed, (name, file) in enumerate(opened.items()):
                assert os.pwrite(file, pattern(4096, seed=seed), 0) == 4096
                assert os.fstat(file).st_ino == inodes[name]
            assert takeovers(product, mountpoint) == 1
        finally:
            for file in opened.values():
                os.close(file)
    found = [disk.backing, memory_path / "2.img", memory_path / "7.img"]
    for seed, backing in enumerate(found):
        assert backing.read_bytes()[:4096] == pattern(4096, seed=seed)


def test_every_target_of_a_portal(product: Product, make_embedded: MakeEmbedded) -> None:
    """Discovery finds the targets again, and the files are where they were."""
    target = make_embedded({1: "ram:8M", 2: "ram:8M"})
    with product.mounted(f"{target.portal_url}/", "cache=none") as mountpoint:
        file = mountpoint / target.iqn / "lun2"
        put(file, pattern(4096))
        kill_worker(supervisor_of(product, mountpoint))
        put(file, pattern(4096, seed=2), 4096, sync=True)
        assert get(file, 8192) == pattern(4096) + pattern(4096, seed=2)


def test_several_paths(product: Product, tgt_disk: TgtDisk) -> None:
    """Each path has its own ISID back, and so every earlier session is ended before anything."""
    with (
        TcpProxy("127.0.0.1", tgt_disk.port) as first,
        TcpProxy("127.0.0.1", tgt_disk.port) as second,
    ):
        url = first.url(tgt_disk.iqn, tgt_disk.lun)
        options = ("cache=none", f"portals={second.portal}", *IMPATIENT)
        with product.mounted(url, *options) as mountpoint:
            supervisor = supervisor_of(product, mountpoint)

            def isids() -> dict[str, str]:
                sessions = product.status(mountpoint)["sessions"]
                return {
                    str(session["connections"][0]["portal"]): str(session["isid"])  # type: ignore[index]
                    for session in sessions
                }

            wait_until(lambda: len(isids()) == 2, what="both paths")
            before = isids()
            with Traffic(mountpoint / tgt_disk.name) as traffic:
                for _ in range(3):
                    traffic.wait_for_requests(50)
                    kill_worker(supervisor)
                traffic.wait_for_requests(50)
            assert isids() == before
            # The session of a path that is down is ended through the other one.
            second.refuse()
            time.sleep(0.5)
            kill_worker(supervisor)
            put(mountpoint / tgt_disk.name, pattern(4096), 16 * MEBIBYTE, sync=True)
            assert "is ended through another" in log_of(product)
            second.accept()
            wait_until(lambda: isids() == before, what="both paths again", timeout_s=60)


def test_a_path_of_another_portal_group_that_stays_down(
    product: Product, make_embedded: MakeEmbedded
) -> None:
    """What its earlier session still does can't be known here: nothing is answered."""
    port = free_port()
    target = make_embedded({1: "ram:16M"}, "--listen", f"127.0.0.1:{port},2")
    with TcpProxy("127.0.0.1", port) as second:
        options = ("cache=none", f"portals={second.portal}", "replacement_timeout=1", *IMPATIENT)
        with product.mounted(target.lun_url(1), *options) as mountpoint:
            supervisor = supervisor_of(product, mountpoint)
            wait_until(lambda: len(product.status(mountpoint)["sessions"]) == 2, what="both paths")
            second.refuse()
            os.kill(product.pid(mountpoint), signal.SIGKILL)
            error, seconds = timed(lambda: put(mountpoint / "lun1", pattern(4096), sync=True))
            assert error is not None
            assert seconds > 5
            wait_until(lambda: not alive(supervisor), what="giving up", timeout_s=40)
            assert "is not ended yet" in log_of(product)


def test_another_host_that_took_the_lun_meanwhile(
    product: Product, proxied_disk: tuple[TgtDisk, TcpProxy, str], tmp_path: Path
) -> None:
    """Whatever the kernel still has to write is not laid over the other host's data."""
    disk, proxy, url = proxied_disk
    (tmp_path / "other").mkdir()
    other = Product(tmp_path / "other")
    theirs = pattern(4096, seed=61)
    with product.mounted(url, "cache=none", "reserve=require", *IMPATIENT) as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        proxy.refuse()
        os.kill(product.pid(mountpoint), signal.SIGKILL)
        with other.mounted(disk.url, "preempt") as elsewhere:
            put(elsewhere / disk.name, theirs, sync=True)
        # It has left again, and everything looks free.
        proxy.accept()
        error, _ = timed(lambda: put(mountpoint / disk.name, pattern(4096), sync=True))
        assert error is not None
        wait_until(lambda: not alive(supervisor), what="giving up", timeout_s=40)
        assert "the reservation was taken by" in log_of(product)
    assert disk.backing.read_bytes()[:4096] == theirs


def test_a_new_size(product: Product, make_tgt_disk: MakeTgtDisk) -> None:
    disk = make_tgt_disk()
    with product.mounted(disk.url, "cache=none") as mountpoint:
        assert (mountpoint / disk.name).stat().st_size == disk.size_bytes
        os.truncate(disk.backing, 2 * disk.size_bytes)
        disk.target.remove_lun(1)
        disk.target.add_lun(1, disk.backing)
        kill_worker(supervisor_of(product, mountpoint))
        wait_until(
            lambda: (mountpoint / disk.name).stat().st_size == disk.size_bytes, what="the new size"
        )
