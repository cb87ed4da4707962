"""Mount, use and unmount, on each of the three targets."""

import os
import re
import signal
import stat
import time
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import run, wait_until
from orion_iscsifs.testing.tgt import Tgt
from tests.interop.conftest import LUN_BYTES, MEBIBYTE, TGT_IQN, Disk, MakeEmbedded, TgtDisk
from tests.interop.product import (
    COMMAND,
    Product,
    abandon,
    alive,
    get,
    is_mounted,
    mount_entry,
    pattern,
    put,
    sized_file,
)

pytestmark = pytest.mark.fuse
needs_tgt = pytest.mark.interop("tgtd", "tgtadm")


def test_one_file_with_the_size_of_the_lun(product: Product, disk: Disk) -> None:
    with product.mounted(disk.url) as mountpoint:
        assert [name for name in os.listdir(mountpoint) if name != ".orion"] == [disk.name]
        found = (mountpoint / disk.name).stat()
        assert stat.S_ISREG(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_size == LUN_BYTES
        entry = mount_entry(mountpoint)
        assert entry is not None
        assert entry[2] == "fuse.orion-iscsifs"


def test_what_is_written_is_read_back_and_reaches_the_backing_file(
    product: Product, disk: Disk
) -> None:
    written = pattern(8 * MEBIBYTE + 512)
    offset = 3 * MEBIBYTE + 1024
    with product.mounted(disk.url) as mountpoint:
        put(mountpoint / disk.name, written, offset)
        assert get(mountpoint / disk.name, len(written), offset) == written
    content = disk.backing.read_bytes()
    assert content[offset : offset + len(written)] == written
    assert not any(content[:offset])
    assert not any(content[offset + len(written) :])


def test_content_is_still_there_at_the_next_mount(product: Product, disk: Disk) -> None:
    data = pattern(MEBIBYTE, seed=2)
    with product.mounted(disk.url) as mountpoint:
        put(mountpoint / disk.name, data)
    with product.mounted(disk.url) as mountpoint:
        assert get(mountpoint / disk.name, len(data)) == data


def test_fsync_reaches_the_backing_file(product: Product, disk: Disk) -> None:
    data = pattern(256 * 1024, seed=3)
    with product.mounted(disk.url) as mountpoint:
        put(mountpoint / disk.name, data, sync=True)
        assert disk.backing.read_bytes()[: len(data)] == data


def test_umount_ends_the_daemon_after_the_last_byte(product: Product, disk: Disk) -> None:
    data = pattern(32 * MEBIBYTE, seed=4)
    with product.mounted(disk.url) as mountpoint:
        pid = product.pid(mountpoint)
        assert alive(pid)
        put(mountpoint / disk.name, data)
        product("umount", mountpoint)
        assert not alive(pid)
        assert not is_mounted(mountpoint)
        assert disk.backing.read_bytes()[: len(data)] == data


@needs_tgt
@pytest.mark.parametrize("mode", ["none", "writethrough", "writeback"])
def test_every_cache_mode(product: Product, tgt_disk: TgtDisk, mode: str) -> None:
    data = pattern(4 * MEBIBYTE, seed=5)
    with product.mounted(tgt_disk.url, f"cache={mode}") as mountpoint:
        put(mountpoint / "lun1", data)
        if mode != "writeback":
            # The target has it when write() returns.
            assert tgt_disk.backing.read_bytes()[: len(data)] == data
        assert get(mountpoint / "lun1", len(data)) == data
    assert tgt_disk.backing.read_bytes()[: len(data)] == data


@needs_tgt
def test_daemon_killed_loses_nothing_that_was_fsynced(product: Product, tgt_disk: TgtDisk) -> None:
    data = pattern(MEBIBYTE, seed=6)
    with product.mounted(tgt_disk.url) as mountpoint:
        pid = product.pid(mountpoint)
        put(mountpoint / "lun1", data, sync=True)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), what="end of the daemon")
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            get(mountpoint / "lun1", 512)
        abandon(mountpoint)
    assert tgt_disk.backing.read_bytes()[: len(data)] == data
    with product.mounted(tgt_disk.url) as mountpoint:
        assert get(mountpoint / "lun1", len(data)) == data


@needs_tgt
def test_sigterm_unmounts_and_keeps_everything(product: Product, tgt_disk: TgtDisk) -> None:
    data = pattern(8 * MEBIBYTE, seed=7)
    with product.mounted(tgt_disk.url) as mountpoint:
        pid = product.pid(mountpoint)
        put(mountpoint / "lun1", data)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not alive(pid), what="end of the daemon")
        assert not is_mounted(mountpoint)
    assert tgt_disk.backing.read_bytes()[: len(data)] == data


@needs_tgt
def test_foreground(product: Product, tgt_disk: TgtDisk) -> None:
    mountpoint = product.new_mountpoint()
    data = pattern(MEBIBYTE, seed=8)
    with product.start("mount", tgt_disk.url, mountpoint, "-f") as program:
        try:
            program.wait_until(lambda: (mountpoint / "lun1").exists())
            put(mountpoint / "lun1", data)
            assert product.run("umount", "-i", mountpoint)
            assert program.wait(20) == 0, program.log_tail()
        finally:
            abandon(mountpoint)
    assert tgt_disk.backing.read_bytes()[: len(data)] == data


@needs_tgt
def test_without_the_word_mount(product: Product, tgt_disk: TgtDisk) -> None:
    mountpoint = product.new_mountpoint()
    try:
        product(tgt_disk.url, mountpoint, "-o", "rw,_netdev,x-systemd.automount")
        assert (mountpoint / "lun1").stat().st_size == LUN_BYTES
        product.umount(mountpoint)
    finally:
        abandon(mountpoint)


@needs_tgt
def test_mount_lets_go_of_its_callers_pipes(product: Product, tgt_disk: TgtDisk) -> None:
    """`out=$(orion-iscsifs mount ...)` must not wait for the daemon's end."""
    mountpoint = product.new_mountpoint()
    try:
        product.run(
            "sh",
            "-c",
            f'out=$("{COMMAND}" mount "{tgt_disk.url}" "{mountpoint}" 2>&1)',
            timeout_s=30,
        )
        product.umount(mountpoint)
    finally:
        abandon(mountpoint)


@needs_tgt
def test_every_disk_of_a_target(product: Product, tgt: Tgt, tmp_path: Path) -> None:
    target = tgt.add_target(TGT_IQN)
    for lun in (1, 2, 5):
        backing = sized_file(tmp_path / f"{lun}.img", lun * MEBIBYTE)
        target.add_lun(lun, backing, block_bytes=4096 if lun == 2 else 512)
    with product.mounted(target.url, "hide_control") as mountpoint:
        # tgt's LUN 0 is a controller: no file.
        assert sorted(os.listdir(mountpoint)) == ["lun1", "lun2", "lun5"]
        for lun in (1, 2, 5):
            assert (mountpoint / f"lun{lun}").stat().st_size == lun * MEBIBYTE
            put(mountpoint / f"lun{lun}", pattern(MEBIBYTE, seed=lun))
    for lun in (1, 2, 5):
        assert (tmp_path / f"{lun}.img").read_bytes()[:MEBIBYTE] == pattern(MEBIBYTE, seed=lun)


@needs_tgt
def test_every_target_of_a_portal(product: Product, tgt: Tgt, tmp_path: Path) -> None:
    names = ["iqn.2024-01.org.example:a", "iqn.2024-01.org.example:b"]
    for name in names:
        backing = sized_file(tmp_path / f"{name[-1]}.img", MEBIBYTE)
        tgt.add_target(name).add_lun(1, backing)
    with product.mounted(f"{tgt.portal_url}/", "hide_control") as mountpoint:
        assert sorted(os.listdir(mountpoint)) == names
        for name in names:
            put(mountpoint / name / "lun1", name.encode().ljust(512))
    for name in names:
        assert (tmp_path / f"{name[-1]}.img").read_bytes()[:512] == name.encode().ljust(512)


def test_several_luns_of_the_embedded_target(product: Product, make_embedded: MakeEmbedded) -> None:
    target = make_embedded({0: "ram:8M", 3: "ram:16M"})
    with product.mounted(target.url, "hide_control") as mountpoint:
        sizes = {name: (mountpoint / name).stat().st_size for name in os.listdir(mountpoint)}
        assert sizes == {"lun0": 8 * MEBIBYTE, "lun3": 16 * MEBIBYTE}


@needs_tgt
def test_owner_and_mode(product: Product, tgt_disk: TgtDisk) -> None:
    with product.mounted(tgt_disk.url, "uid=12", "gid=34", "mode=640") as mountpoint:
        found = (mountpoint / "lun1").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12, 34, 0o640)


@needs_tgt
def test_read_only_by_option(product: Product, tgt_disk: TgtDisk) -> None:
    with product.mounted(tgt_disk.url, "ro") as mountpoint:
        entry = mount_entry(mountpoint)
        assert entry is not None
        assert "ro" in entry[3].split(",")
        with pytest.raises(OSError, match="Read-only"):
            (mountpoint / "lun1").open("r+b")
        assert get(mountpoint / "lun1", 512) == bytes(512)


@needs_tgt
def test_read_only_because_the_target_says_so(product: Product, tgt_disk: TgtDisk) -> None:
    tgt_disk.target.set_read_only(1)
    with product.mounted(tgt_disk.url) as mountpoint:
        with pytest.raises(OSError, match=r"Read-only|not permitted|denied"):
            put(mountpoint / "lun1", bytes(512), sync=True)
        assert get(mountpoint / "lun1", 512) == bytes(512)


@needs_tgt
def test_plain_umount_of_the_system(product: Product, tgt_disk: TgtDisk) -> None:
    """umount(8) without our helper returns early; the daemon still writes everything and ends."""
    data = pattern(16 * MEBIBYTE, seed=9)
    with product.mounted(tgt_disk.url) as mountpoint:
        pid = product.pid(mountpoint)
        put(mountpoint / "lun1", data)
        run(["umount", "-i", mountpoint])
        wait_until(lambda: not alive(pid), what="end of the daemon", timeout_s=20)
    assert tgt_disk.backing.read_bytes()[: len(data)] == data


@needs_tgt
def test_umount_of_a_mount_in_use(product: Product, tgt_disk: TgtDisk) -> None:
    with product.mounted(tgt_disk.url) as mountpoint:
        with (mountpoint / "lun1").open("rb"):
            refused = product("umount", mountpoint, "--timeout", "2", code=None)
            assert refused.code != 0
            assert re.search(r"busy|in use", refused.stderr)
            assert is_mounted(mountpoint)
        assert get(mountpoint / "lun1", 512) == bytes(512)


@needs_tgt
def test_mounting_again_and_again(product: Product, tgt_disk: TgtDisk) -> None:
    """Sessions are logged out: tgt keeps none, and none of our daemons stays."""
    for turn in range(3):
        with product.mounted(tgt_disk.url) as mountpoint:
            put(mountpoint / "lun1", pattern(4096, seed=turn))
    time.sleep(0.1)
    assert tgt_disk.target.drop_connections() == 0
    assert tgt_disk.backing.read_bytes()[:4096] == pattern(4096, seed=2)
