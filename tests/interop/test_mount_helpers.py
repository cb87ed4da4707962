"""mount(8), umount(8) and /etc/fstab through the helpers in /sbin."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import run
from tests.interop.conftest import LUN_BYTES, MEBIBYTE, TgtDisk
from tests.interop.product import Product, abandon, alive, is_mounted, mount_entry, pattern, put

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

HELPERS = (
    "mount.orion-iscsifs",
    "mount.fuse.orion-iscsifs",
    "umount.fuse.orion-iscsifs",
)


@pytest.fixture
def system_helpers(product: Product, tmp_path: Path) -> Iterator[None]:
    """The helpers in /sbin while the test lasts; what was there before comes back."""
    if os.geteuid() != 0:
        pytest.skip("helpers are installed into /sbin: needs root")
    with contextlib.ExitStack() as restored:
        for name in HELPERS:
            present, kept = Path("/sbin") / name, tmp_path / name
            if present.is_symlink() or present.exists():
                shutil.move(present, kept)
                restored.callback(shutil.move, kept, present)
            restored.callback(present.unlink, missing_ok=True)
        product("install-helpers")
        yield


def test_install_helpers_with_a_prefix(product: Product, tmp_path: Path) -> None:
    prefix = tmp_path / "root"
    for _ in range(2):  # again is fine
        product("install-helpers", "--prefix", prefix)
    found = {path.name: path for path in prefix.rglob("*orion-iscsifs")}
    assert set(found) == set(HELPERS)
    assert all(os.access(path, os.X_OK) for path in found.values())


@pytest.mark.usefixtures("system_helpers")
def test_mount_and_umount_of_the_system(product: Product, tgt_disk: TgtDisk) -> None:
    mountpoint = product.new_mountpoint()
    data = pattern(16 * MEBIBYTE)
    options = "rw,nofail,_netdev,noauto,x-systemd.requires=network-online.target,cache_size=64M"
    try:
        product.run("mount", "-t", "fuse.orion-iscsifs", tgt_disk.url, mountpoint, "-o", options)
        entry = mount_entry(mountpoint)
        assert entry is not None
        assert entry[2] == "fuse.orion-iscsifs"
        assert (mountpoint / "lun1").stat().st_size == LUN_BYTES
        put(mountpoint / "lun1", data)
        pid = product.pid(mountpoint)
        product.run("umount", mountpoint)
        # Through the helper, umount(8) waits as `orion-iscsifs umount` does.
        assert not alive(pid)
        assert tgt_disk.backing.read_bytes()[: len(data)] == data
    finally:
        abandon(mountpoint)


@pytest.mark.usefixtures("system_helpers")
def test_fstab(product: Product, tgt_disk: TgtDisk, tmp_path: Path) -> None:
    mountpoint = product.new_mountpoint()
    fstab = tmp_path / "fstab"
    fstab.write_text(
        f"{tgt_disk.url} {mountpoint} fuse.orion-iscsifs defaults,_netdev,user,noauto,ro 0 0\n",
        encoding="ascii",
    )
    try:
        product.run("mount", "--fstab", fstab, mountpoint)
        entry = mount_entry(mountpoint)
        assert entry is not None
        assert "ro" in entry[3].split(",")
        run(["umount", mountpoint])
        assert not is_mounted(mountpoint)
    finally:
        abandon(mountpoint)


@pytest.mark.usefixtures("system_helpers")
def test_mount_of_the_system_passes_errors_on(product: Product, tgt_disk: TgtDisk) -> None:
    mountpoint = product.new_mountpoint()
    source = tgt_disk.url.replace(tgt_disk.iqn, "iqn.2024-01.org.example:nobody")
    failed = product.run("mount", "-t", "fuse.orion-iscsifs", source, mountpoint, code=None)
    assert failed.code == 32
    assert "iqn.2024-01.org.example:nobody" in failed.stderr
    assert not is_mounted(mountpoint)
