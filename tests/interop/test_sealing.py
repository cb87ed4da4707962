"""cache_key_file= as a user has it: what is on the disk, the `cache` commands, a change of keys."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import wait_until
from tests.interop.conftest import TgtDisk
from tests.interop.product import Outcome, Product, abandon, alive
from tests.interop.test_secrets import process_words
from tests.interop.workers import (
    can_take_over,
    kill_worker,
    supervisor_of,
    takeovers,
    watchdog,
)

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

KEY = "the-key-of-this-mount"
MARKER = b"PLAIN-TEXT-MARKER"
MIB = 1 << 20


def options(folder: Path, key: Path | None) -> list[str]:
    words = ["cache=log", f"log_dir={folder}/log", "log_size=64M", "dirty_age=600"]
    return [*words, "cache_size=64M", *([] if key is None else [f"cache_key_file={key}"])]


def contents() -> dict[int, bytes]:
    """What is written where: small, large, and neither text nor noise."""
    text = (MARKER + b" is what nobody should find. ") * 30_000
    mixed = b"".join(os.urandom(4096 - len(MARKER)) + MARKER for _ in range(256))
    return {0: text[:4096], MIB: text[:MIB], 4 * MIB: mixed}


def kill(worker: int, supervisor: int) -> None:
    """Nobody takes the mount over: the log is left as it is."""
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not alive(worker), what="end of the daemon")


@contextlib.contextmanager
def written(mountpoint: Path, pieces: dict[int, bytes]) -> Iterator[None]:
    """The file stays open for the time of the body: closing it would be a flush."""
    file = os.open(mountpoint / "lun1", os.O_RDWR)
    try:
        for offset, content in pieces.items():
            assert os.pwrite(file, content, offset) == len(content)
        yield
    finally:
        with contextlib.suppress(OSError):  # not connected, by now
            os.close(file)


def found_on_disk(content: bytes, *folders: Path) -> list[Path]:
    """Files of these folders, and of those in them, that hold it anywhere."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if content in path.read_bytes()]


def check_target(disk: TgtDisk, pieces: dict[int, bytes]) -> None:
    with disk.backing.open("rb") as file:
        for offset, content in pieces.items():
            file.seek(offset)
            assert file.read(len(content)) == content


def listed(product: Product, folder: Path, command: str) -> dict[str, object]:
    done = product("cache", command, folder, "--json")
    (log,) = json.loads(done.stdout)["logs"]
    assert isinstance(log, dict)
    return log


def test_a_sealed_log_from_its_first_mount_to_its_last(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path
) -> None:
    key, new, pieces = product.secret_file(KEY), tmp_path / "new-key", contents()
    new.write_bytes(os.urandom(32))
    new.chmod(0o600)
    logs, mountpoint = tmp_path / "log", product.new_mountpoint()
    try:
        assert product.mount(tgt_disk.url, mountpoint, *options(tmp_path, key)).said == ""
        with written(mountpoint, pieces):
            (lun,) = product.status(mountpoint)["luns"]
            assert isinstance(lun["log"], dict)
            assert (lun["log"]["sealed"], lun["log"]["state"]) == (True, "ok")
            control = mountpoint / ".orion"
            shown = [
                process_words(),
                Path("/proc/mounts").read_text(encoding="utf-8"),
                product("status", mountpoint, "--json").stdout,
                *(
                    (control / name).read_text()
                    for name in ("status.json", "config.toml", "metrics")
                ),
            ]
            assert not any(KEY in text for text in shown)
            assert f'cache_key_file = "{key}"' in (control / "config.toml").read_text()
            in_use = rekey(product, logs, key, new, code=1)
            assert "in use" in in_use.stderr
            pids = product.pid(mountpoint), supervisor_of(product, mountpoint)
        # Nothing of these reaches the target before the daemon is gone.
        with tgt_disk.daemon.frozen(), written(mountpoint, pieces):
            kill(*pids)
    finally:
        abandon(mountpoint)
    assert not found_on_disk(MARKER, logs, product.home / "state")
    assert not found_on_disk(KEY.encode(), logs, product.home / "state")

    # Without the key: what it is, and whether it is whole.
    for command in ("list", "check"):
        log = listed(product, logs, command)
        assert (log["sealed"], log["state"], log["damage"]) == (True, "to be replayed", None)
    assert "sealed" in product("cache", "check", logs).stdout

    # With another one, or none: refused, in a line, and nothing lost.
    for words, told in (
        (options(tmp_path, new), "the key does not open it"),
        (options(tmp_path, None), "is sealed, and there is no key"),
    ):
        refused = product.mount(tgt_disk.url, mountpoint, *words, code=32).stderr
        assert told in refused
        assert "cache_key_file=" in refused
        assert len(refused.splitlines()) == 1
    wrong = rekey(product, logs, new, key, code=1).stderr
    assert "the key does not open it" in wrong
    assert "nothing was changed" in wrong

    # Another key, from then on.
    done = rekey(product, logs, key, new, "--json")
    (told_of,) = json.loads(done.stdout)["logs"]
    assert told_of["rekeyed"] is True
    replay = ("cache", "replay", tgt_disk.url, "--json", "-o")
    old_words, new_words = (",".join(options(tmp_path, one)[1:]) for one in (key, new))
    assert "does not open" in product(*replay, old_words, code=1).stderr
    (replayed,) = json.loads(product(*replay, new_words).stdout)["luns"]
    assert replayed["replayed_bytes"] == log["pending_bytes"] == sum(map(len, pieces.values()))
    check_target(tgt_disk, pieces)
    assert not found_on_disk(MARKER, logs, product.home / "state")
    assert "removed" in product("cache", "drop", logs).said


@can_take_over
def test_a_new_worker_has_the_key(product: Product, tgt_disk: TgtDisk, tmp_path: Path) -> None:
    """Although its file is gone by then: it may be on something that was taken away."""
    key, pieces = product.secret_file(KEY), contents()
    with watchdog(product), product.mounted(tgt_disk.url, *options(tmp_path, key)) as mountpoint:
        key.unlink()
        with written(mountpoint, pieces):
            kill_worker(supervisor_of(product, mountpoint))
        with (mountpoint / "lun1").open("rb") as file:
            for offset, content in pieces.items():
                file.seek(offset)
                assert file.read(len(content)) == content
        assert takeovers(product, mountpoint) == 1
    check_target(tgt_disk, pieces)
    assert not found_on_disk(MARKER, tmp_path / "log", product.home / "state")


def rekey(product: Product, logs: Path, old: Path, new: Path, *more: str, code: int = 0) -> Outcome:
    words = ("--key-file", old, "--new-key-file", new)
    return product("cache", "rekey", logs, *words, *more, code=code)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--key-file", "-", "--new-key-file", "-"], "both keys from stdin"),
        (["--key-file", "/nonexistent", "--new-key-file", "-"], "--key-file /nonexistent"),
        (["--key-file", "/dev/null", "--new-key-file", "-"], "is empty"),
        (["--new-key-file", "-"], "--key-file"),
    ],
)
def test_mistakes(product: Product, tmp_path: Path, words: list[str], told: str) -> None:
    refused = product("cache", "rekey", tmp_path, *words, code=2).stderr
    assert told in refused


def test_a_folder_without_a_sealed_log(product: Product, tmp_path: Path) -> None:
    key = product.secret_file(KEY)
    refused = rekey(product, tmp_path, key, key, code=1).stderr
    assert "nothing in it is sealed" in refused
