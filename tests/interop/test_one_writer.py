"""One writer, as the commands show it: crashes, remounts and refusals on a real target."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.interop.conftest import Disk, TgtDisk
from tests.interop.product import Product, abandon, alive
from tests.interop.test_inspect import inspected

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

FAILED, USAGE = 32, 2


def reservation(product: Product, mountpoint: Path) -> object:
    """What `status` shows: the state and the key."""
    (lun,) = product.status(mountpoint)["luns"]
    return lun["reservation"]


def test_after_a_crash_the_same_host_goes_on_with_its_key(product: Product, disk: Disk) -> None:
    """And the reservation ends with that mount, although another session has made it."""
    mountpoint = product.new_mountpoint()
    product.mount(disk.url, mountpoint)
    before = reservation(product, mountpoint)
    assert "'state': 'held'" in str(before)
    pid = product.pid(mountpoint)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    abandon(mountpoint)
    with product.mounted(disk.url) as again:
        assert reservation(product, again) == before
    (lun,) = inspected(product, disk.url)["luns"]
    assert lun["reservations"]["holder"] is None


def test_mounting_again_right_after_unmounting(product: Product, tgt_disk: TgtDisk) -> None:
    for content in (b"1", b"2", b"3"):
        with product.mounted(tgt_disk.url) as mountpoint:
            (mountpoint / "lun1").write_bytes(content * 4096)
        assert tgt_disk.backing.read_bytes()[:1] == content


def test_a_second_mount_is_refused_in_one_line(product: Product, tgt_disk: TgtDisk) -> None:
    with product.mounted(tgt_disk.url) as mountpoint:
        second = product.new_mountpoint()
        refused = product.mount(tgt_disk.url, second, code=FAILED)
        (line,) = refused.stderr.strip().splitlines()
        assert f"mounted for writing on {mountpoint}" in line
        assert "-o ro" in line
        product.mount(tgt_disk.url, second, "ro")
        product.umount(second)
        (mountpoint / "lun1").write_bytes(b"x" * 512)


@pytest.mark.parametrize("options", ["preempt,ro", "preempt,reserve=off"])
def test_preempt_without_a_reservation_is_a_mistake(
    product: Product, tgt_disk: TgtDisk, options: str
) -> None:
    outcome = product.mount(tgt_disk.url, product.new_mountpoint(), options, code=USAGE)
    assert "takes no reservation" in outcome.stderr
