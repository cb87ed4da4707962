"""Before and after a mount: what is mounted where, and what is said when it can't be."""

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from orion_iscsifs.errors import MountError
from orion_iscsifs.fuse import kernel, mountpoint
from orion_iscsifs.fuse.mountpoint import Mounted, check, parse_mountinfo

LINE = (
    r"36 35 0:98 / /mnt/with\040space\134 rw,nosuid shared:1 master:2 - "
    "fuse.orion-iscsifs iscsi://h/iqn.a.b:c/1 rw,user_id=0"
)


def test_mountinfo() -> None:
    assert parse_mountinfo(LINE) == Mounted(
        "/mnt/with space\\", "0:98", "fuse.orion-iscsifs", "iscsi://h/iqn.a.b:c/1"
    )
    assert parse_mountinfo("1 0 8:1 / / rw - ext4 /dev/sda1 rw").mountpoint == "/"
    assert mountpoint.topmost("/") is not None
    assert mountpoint.find("/") is None


def test_a_folder_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "_check_device", lambda: None)
    (tmp_path / "link").symlink_to(tmp_path)
    assert check(str(tmp_path / "link")) == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "does not exist (mkdir"), ("file", "is not a directory")]
)
def test_no_folder(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountError) as caught:
        check(str(tmp_path / name))
    assert message in caught.value.line


def test_no_dev_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "FUSE_DEVICE", tmp_path / "fuse")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    with pytest.raises(MountError) as caught:
        check(str(tmp_path))
    assert "has no FUSE" in str(caught.value)
    assert "modprobe fuse" in caught.value.advice


def test_dev_fuse_not_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MountError, match="/dev/fuse: Permission denied"):
        check(str(tmp_path))


def test_an_ordinary_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "_check_device", lambda: None)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(MountError, match="fusermount3: not found"):
        check(str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(mountpoint, "_FUSE_CONF", conf)
    with pytest.raises(MountError, match="allow_other"):
        check(str(tmp_path), allow_other=True)
    conf.write_text("# user_allow_other\nuser_allow_other\n")
    assert check(str(tmp_path), allow_other=True) == str(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MountError, match="not yours"):
        check(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="umount2(2) is for root")
def test_unmounting_what_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="Invalid argument"):
        mountpoint.unmount(str(tmp_path))


def test_fusermount_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fusermount3"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _name: str(script))
    for text, message in (("Device or resource busy", "in use"), ("not found", "not found")):
        script.write_text(f"#!/bin/sh\necho '{text}' >&2; exit 1\n")
        script.chmod(0o755)
        with pytest.raises(Exception, match=message):
            mountpoint.unmount("/mnt/x")
    script.write_text("#!/bin/sh\nexit 0\n")
    mountpoint.unmount("/mnt/x", lazy=True)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/sys of a mount 0:98, with the kernel's defaults."""
    values = {
        "connections/98/max_background": 12,
        "connections/98/congestion_threshold": 9,
        "bdi/0:98/read_ahead_kb": 128,
    }
    for name, value in values.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    monkeypatch.setattr(kernel, "_CONNECTIONS", tmp_path / "connections")
    monkeypatch.setattr(kernel, "_BDI", tmp_path / "bdi")
    return tmp_path


def test_kernel_limits_are_raised_and_never_lowered(
    sysfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sysfs / "connections/98/congestion_threshold").write_text("1000\n")
    with caplog.at_level(logging.INFO):
        limits = kernel.raise_limits("0:98")
    assert limits.as_dict() == {
        "max_background": kernel.MAX_BACKGROUND,
        "congestion_threshold": 1000,
        "read_ahead_kb": kernel.READ_AHEAD_KB,
        "not_raised": {},
    }
    assert not caplog.records


@pytest.mark.parametrize(
    ("code", "user", "reason"),
    [
        (errno.EACCES, 1000, "needs root"),
        (errno.EPERM, 0, "in a container"),
        (errno.EROFS, 0, "read-only"),
        (errno.EINVAL, 1000, "max_user_"),
        (errno.EIO, 0, "Input/output error"),
    ],
)
def test_a_limit_that_could_not_be_raised_is_reported_with_its_reason(
    code: int,
    user: int,
    reason: str,
    sysfs: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(path: Path, _text: str) -> int:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(Path, "write_text", refuse)
    with caplog.at_level(logging.INFO):
        limits = kernel.raise_limits("0:98")
    assert (limits.max_background, limits.read_ahead_kb) == (12, 128)
    assert set(limits.not_raised) == {"max_background", "congestion_threshold", "read_ahead_kb"}
    assert limits.not_raised["read_ahead_kb"].startswith("128 instead of 512, ")
    assert all(reason in shown for shown in limits.not_raised.values())
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert reason in record.message


def test_limits_that_are_not_to_be_seen(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for folder in ("connections/98", "bdi/0:98"):
        shutil.rmtree(sysfs / folder)
    limits = kernel.raise_limits("0:98")
    assert limits.max_background is limits.read_ahead_kb is None
    assert "connections is not mounted" in limits.not_raised["max_background"]
    assert limits.not_raised["read_ahead_kb"] == "unknown instead of 512, not in /sys"


def test_a_value_that_the_kernel_did_not_take(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", lambda _path, text: len(text))
    assert "keeps it lower" in kernel.raise_limits("0:98").not_raised["max_background"]
