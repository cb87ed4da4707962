"""cache=log as a user has it: kills, remounts, the `cache` commands, on tgt."""

import contextlib
import json
import mmap
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from orion_iscsifs.testing.programs import wait_until
from tests.interop.conftest import TgtDisk
from tests.interop.product import Product, abandon, alive
from tests.interop.workers import supervisor_of

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

BLOCK = 4096
AREA = 16 << 20


def options(folder: Path) -> list[str]:
    return ["cache=log", f"log_dir={folder}/log", "log_size=32M", "dirty_age=60", "cache_size=64M"]


def logs(product: Product, folder: Path, command: str = "list", code: int = 0) -> list[Any]:
    done = product("cache", command, f"{folder}/log", "--json", code=code)
    found: list[Any] = json.loads(done.stdout)["logs"]
    return found


def write_until_killed(product: Product, mountpoint: Path, rng: random.Random) -> dict[int, bytes]:
    """Write blocks at random and kill the daemon in the middle of it: what was acknowledged.

    The supervisor is killed, and its worker dies with it: nobody takes the mount over.
    """
    written: dict[int, bytes] = {}
    worker, supervisor = product.pid(mountpoint), supervisor_of(product, mountpoint)
    file = os.open(mountpoint / "lun1", os.O_RDWR | os.O_DIRECT)
    try:
        for number in range(rng.randrange(50, 800)):
            block = rng.randrange(AREA // BLOCK)
            content = rng.randbytes(64) * (BLOCK // 64)
            _write(file, block * BLOCK, content)
            written[block] = content
            if number % 40 == 0:
                os.fsync(file)
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not alive(worker), what="end of the daemon")
    finally:
        with contextlib.suppress(OSError):  # not connected, by now
            os.close(file)
    abandon(mountpoint)
    return written


def _write(file: int, offset: int, content: bytes) -> None:
    """Aligned memory, as O_DIRECT wants it."""
    buffer = mmap.mmap(-1, len(content))
    buffer[:] = content
    assert os.pwritev(file, [buffer], offset) == len(content)


def test_nothing_acknowledged_is_lost_with_the_daemon(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path
) -> None:
    rng = random.Random(1)
    known: dict[int, bytes] = {}
    for _ in range(4):
        mountpoint = product.new_mountpoint()
        product.mount(tgt_disk.url, mountpoint, *options(tmp_path))
        with (mountpoint / "lun1").open("rb") as file:
            for block, content in known.items():
                file.seek(block * BLOCK)
                assert file.read(BLOCK) == content
        known |= write_until_killed(product, mountpoint, rng)
    with product.mounted(tgt_disk.url, *options(tmp_path)):
        pass
    with tgt_disk.backing.open("rb") as file:
        for block, content in known.items():
            file.seek(block * BLOCK)
            assert file.read(BLOCK) == content


def test_the_commands(product: Product, tgt_disk: TgtDisk, tmp_path: Path) -> None:
    mountpoint = product.new_mountpoint()
    product.mount(tgt_disk.url, mountpoint, *options(tmp_path))
    (log,) = logs(product, tmp_path)
    assert log["state"] == "in use"
    assert "in use" in product("cache", "drop", f"{tmp_path}/log", code=1).stderr
    known = write_until_killed(product, mountpoint, random.Random(2))
    (log,) = logs(product, tmp_path, "check")
    assert (log["state"], log["damage"]) == ("to be replayed", None)
    assert 0 < log["pending_bytes"] <= len(known) * BLOCK
    refused = product("cache", "drop", f"{tmp_path}/log", code=1).stderr
    assert "cache replay" in refused
    assert len(refused.splitlines()) == 1
    words = ",".join(options(tmp_path)[1:])
    done = product("cache", "replay", tgt_disk.url, "-o", words, "--json")
    (lun,) = json.loads(done.stdout)["luns"]
    assert lun == {"name": "lun1", "replayed_bytes": log["pending_bytes"]}
    with tgt_disk.backing.open("rb") as file:
        for block, content in known.items():
            file.seek(block * BLOCK)
            assert file.read(BLOCK) == content
    (log,) = logs(product, tmp_path)
    assert log["state"] == "clean"
    product("cache", "drop", f"{tmp_path}/log")
    assert logs(product, tmp_path) == []


def test_a_damaged_log_is_told(product: Product, tgt_disk: TgtDisk, tmp_path: Path) -> None:
    mountpoint = product.new_mountpoint()
    product.mount(tgt_disk.url, mountpoint, *options(tmp_path))
    write_until_killed(product, mountpoint, random.Random(3))
    (path, *_) = sorted((tmp_path / "log").glob("*/wlog-*"))
    with path.open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"damage")
    (log,) = logs(product, tmp_path, "check", code=1)
    assert log["state"] == "damaged"
    refused = product.mount(tgt_disk.url, mountpoint, *options(tmp_path), code=32).stderr
    assert "damaged or missing" in refused
    assert "cache replay --force" in refused
    assert len(refused.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cache", "list", "/no/such/folder"], "no such folder"),
        (["cache", "replay", "iscsi://127.0.0.1/iqn.x:y/1"], "add -o log_dir=DIR"),
        (["cache", "bogus"], "cache"),
    ],
)
def test_mistakes(product: Product, words: list[str], told: str) -> None:
    refused = product(*words, code=2).stderr
    assert told in refused
    assert len(refused.splitlines()) == 1
