"""Questions to mounts, asked by a process that can be left behind."""

import errno
import os
import time
from pathlib import Path

import pytest

from orion_iscsifs.fuse import apart


def test_answers(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"with \xff and \n")
    file.write_text("text")
    (tmp_path / "link").symlink_to(file)
    assert apart.ask("realpath", str(tmp_path / "link")) == str(file)
    assert apart.ask("read", str(file)) == "text"
    assert apart.ask("alive", str(tmp_path)) == ""
    assert apart.ask("sync", str(tmp_path)) == ""


def test_errors_come_back_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        apart.ask("read", str(tmp_path / "missing"))
    assert caught.value.filename == str(tmp_path / "missing")
    for question in ("umount", "detach"):
        with pytest.raises(OSError, match=r".") as refused:
            apart.ask(question, str(tmp_path))
        assert refused.value.errno in {errno.EINVAL, errno.EPERM}
    with pytest.raises(OSError, match="KeyError"):
        apart.ask("nothing", "/")


def test_who_never_answers_is_left_behind() -> None:
    started = time.monotonic()
    with pytest.raises(apart.NoAnswer):
        apart.run(["/bin/sleep", "60"], timeout_s=0.1)
    assert time.monotonic() - started < 5


def test_programs() -> None:
    assert apart.run(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=10) == (
        3,
        b"out\nerr\n",
    )
    with pytest.raises(FileNotFoundError):
        apart.run(["/nonexistent"], timeout_s=1)
