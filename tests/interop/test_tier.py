"""The local read tier as a user has it: remounts, other hosts, crashes, encryption, mistakes.

A test changes the file behind the target, and what a read returns tells whether it came from the
tier.
"""

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import wait_until
from tests.interop.conftest import MEBIBYTE, Disk, TgtDisk
from tests.interop.luks import CHEAP_PBKDF2
from tests.interop.product import Product, abandon, alive, pattern, put
from tests.interop.test_sealing import found_on_disk
from tests.interop.tiered import (
    options,
    read,
    read_and_keep,
    small_disk,
    tier_of,
)
from tests.interop.workers import (
    can_take_over,
    kill_worker,
    log_of,
    supervisor_of,
    takeovers,
    watchdog,
)

pytestmark = pytest.mark.fuse

SPAN = 4 * MEBIBYTE
OLD, NEW = pattern(SPAN, seed=1), pattern(SPAN, seed=2)
KEY = "the key of this mount"
MARKER = b"MARKER that nobody may find on a disk. "


def as_another_host(product: Product) -> Product:
    """With a state of its own, so with other keys of reservations; the same targets."""
    home = product.home / "elsewhere"
    home.mkdir(exist_ok=True)
    other = Product(home)
    return other


def assert_from_the_tier(product: Product, mountpoint: Path) -> None:
    tier = tier_of(product, mountpoint)
    assert tier["hits"] > 0
    assert tier["misses"] == 0
    assert tier["state"] == "ok"


# -- remounts, and other hosts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "disk",
    [
        pytest.param("tgt", marks=pytest.mark.interop("tgtd", "tgtadm")),
        pytest.param("istgt", marks=[pytest.mark.interop("istgt"), pytest.mark.slow]),
        "embedded",
    ],
    indirect=True,
)
def test_it_is_used_again_for_as_long_as_nobody_else_can_have_written(
    product: Product, disk: Disk, tmp_path: Path
) -> None:
    put(disk.backing, OLD)
    words, other = options(tmp_path / "tier"), as_another_host(product)
    with product.mounted(disk.url, *words) as mountpoint:
        assert read_and_keep(product, mountpoint, disk.name, SPAN) == OLD
    put(disk.backing, NEW)

    # The reservation has stayed: nobody else mounts, and who does not ask for one can't write.
    mountpoint = other.new_mountpoint()
    refused = other.mount(disk.url, mountpoint, code=32).stderr
    assert "reserved by another initiator" in refused
    assert len(refused.splitlines()) == 1
    with unmounted_in_the_end(mountpoint):
        other.mount(disk.url, mountpoint, "reserve=off", "cache=none")
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            put(mountpoint / disk.name, b"!" * 4096)
        assert read(mountpoint / disk.name, 4096) == NEW[:4096]
        other("umount", mountpoint, "--force", "--timeout", "0")

    mountpoint = product.new_mountpoint()
    with unmounted_in_the_end(mountpoint):
        product.mount(disk.url, mountpoint, *words)
        assert read(mountpoint / disk.name, SPAN) == OLD
        assert_from_the_tier(product, mountpoint)
        product("umount", mountpoint, "--release")
    assert "what is in it is not used" not in log_of(product)

    with other.mounted(disk.url) as mountpoint:
        put(mountpoint / disk.name, b"elsewhere" * 1000)
    with product.mounted(disk.url, *words) as mountpoint:
        assert read(mountpoint / disk.name, SPAN) == b"elsewhere" * 1000 + NEW[9000:]
        assert tier_of(product, mountpoint)["hits"] == 0
    (why,) = [line for line in log_of(product).splitlines() if "what is in it is not used" in line]
    assert "WARNING" in why


@pytest.mark.interop("tgtd", "tgtadm")
def test_a_target_that_was_restarted_has_forgotten_the_reservation(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path
) -> None:
    put(tgt_disk.backing, OLD)
    words = options(tmp_path / "tier")
    with product.mounted(tgt_disk.url, *words) as mountpoint:
        assert read_and_keep(product, mountpoint, tgt_disk.name, SPAN) == OLD
    tgt_disk.daemon.stop()
    tgt_disk.daemon.resume()
    put(tgt_disk.backing, NEW)
    with product.mounted(tgt_disk.url, *words) as mountpoint:
        assert read(mountpoint / tgt_disk.name, SPAN) == NEW
    assert "is not used: the reservation has not been held since" in log_of(product)


@contextlib.contextmanager
def unmounted_in_the_end(mountpoint: Path) -> Iterator[None]:
    try:
        yield
    finally:
        abandon(mountpoint)


# -- crashes ---------------------------------------------------------------------------------------


@can_take_over
@pytest.mark.interop("tgtd", "tgtadm")
@pytest.mark.parametrize("cache", ["writethrough", "log"])
def test_a_new_worker_goes_on_with_it(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path, cache: str
) -> None:
    put(tgt_disk.backing, OLD)
    words = options(tmp_path / "tier", f"cache={cache}")
    words += [f"log_dir={tmp_path}/log", "log_size=32M"] if cache == "log" else []
    with watchdog(product), product.mounted(tgt_disk.url, *words) as mountpoint:
        path = mountpoint / tgt_disk.name
        assert read_and_keep(product, mountpoint, tgt_disk.name, SPAN) == OLD
        put(path, NEW[:MEBIBYTE], sync=True)
        put(tgt_disk.backing, NEW[MEBIBYTE : 2 * MEBIBYTE], MEBIBYTE)
        kill_worker(supervisor_of(product, mountpoint))
        assert read(path, SPAN - MEBIBYTE, MEBIBYTE) == OLD[MEBIBYTE:]
        assert_from_the_tier(product, mountpoint)
        assert read(path, MEBIBYTE) == NEW[:MEBIBYTE]
        assert takeovers(product, mountpoint) == 1
    assert read(tgt_disk.backing, 2 * MEBIBYTE) == NEW[: 2 * MEBIBYTE]
    assert "what is in it is not used" not in log_of(product)


@pytest.mark.interop("tgtd", "tgtadm")
def test_a_mount_that_died_has_left_it(product: Product, tgt_disk: TgtDisk, tmp_path: Path) -> None:
    put(tgt_disk.backing, OLD)
    words, mountpoint = options(tmp_path / "tier", "cache=writeback"), product.new_mountpoint()
    with unmounted_in_the_end(mountpoint):
        product.mount(tgt_disk.url, mountpoint, *words)
        assert read_and_keep(product, mountpoint, tgt_disk.name, SPAN) == OLD
        put(mountpoint / tgt_disk.name, NEW[:MEBIBYTE], sync=True)
        worker, supervisor = product.pid(mountpoint), supervisor_of(product, mountpoint)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not (alive(worker) or alive(supervisor)), what="end of the daemon")
    put(tgt_disk.backing, NEW[MEBIBYTE : 2 * MEBIBYTE], MEBIBYTE)
    with product.mounted(tgt_disk.url, *words) as mountpoint:
        path = mountpoint / tgt_disk.name
        assert read(path, SPAN - MEBIBYTE, MEBIBYTE) == OLD[MEBIBYTE:]
        assert_from_the_tier(product, mountpoint)
        assert read(path, MEBIBYTE) == NEW[:MEBIBYTE]
    assert "what is in it is not used" not in log_of(product)


# -- encryption ------------------------------------------------------------------------------------


@pytest.mark.interop("tgtd", "tgtadm")
def test_of_an_encrypted_lun_it_has_to_be_sealed(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path
) -> None:
    passphrase, key = product.secret_file("the passphrase of the LUN"), product.secret_file(KEY)
    text = (MARKER * (MEBIBYTE // len(MARKER) + 1))[:MEBIBYTE]
    # Not compressed: a marker that is there is found, as in this tier that is not sealed.
    plain = options(tmp_path / "plain", "tier_level=0")
    put(tgt_disk.backing, text)
    with product.mounted(tgt_disk.url, *plain) as mountpoint:
        assert read_and_keep(product, mountpoint, tgt_disk.name, MEBIBYTE) == text
    assert found_on_disk(MARKER, tmp_path / "plain")
    assert found_on_disk(MARKER, tgt_disk.backing.parent)

    put(tgt_disk.backing, bytes(MEBIBYTE))
    luks: list[str | Path] = ["--key-file", passphrase, "--force", *CHEAP_PBKDF2]
    product("luks", "format", tgt_disk.backing, *luks)
    encrypted = options(tmp_path / "tier", "tier_level=0", f"luks_key_file={passphrase}")
    mountpoint = product.new_mountpoint()
    refused = product.mount(tgt_disk.url, mountpoint, *encrypted, code=2).stderr
    assert "the tier would hold the plaintext" in refused
    assert "cache_key_file=" in refused
    assert len(refused.splitlines()) == 1
    sealed = [*encrypted, f"cache_key_file={key}"]
    with product.mounted(tgt_disk.url, *sealed) as mountpoint:
        put(mountpoint / tgt_disk.name, text, sync=True)
        assert read_and_keep(product, mountpoint, tgt_disk.name, MEBIBYTE) == text
    with product.mounted(tgt_disk.url, *sealed) as mountpoint:
        assert read(mountpoint / tgt_disk.name, MEBIBYTE) == text
        assert_from_the_tier(product, mountpoint)
    for secret in (MARKER, KEY.encode(), b"the passphrase of the LUN"):
        assert not found_on_disk(secret, tmp_path / "tier", tgt_disk.backing.parent)


# -- folders that can't be used --------------------------------------------------------------------


@pytest.fixture(params=["not to be made", "a file", "read-only", "too small"])
def bad_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """One that can't hold a tier, and what is said of it."""
    folder = tmp_path / "tier"
    if request.param in {"read-only", "too small"} and os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    if request.param == "read-only":
        with small_disk(folder, MEBIBYTE, "ro"):
            yield folder, os.strerror(errno.EROFS)
    elif request.param == "too small":
        with small_disk(folder, MEBIBYTE):
            yield folder, os.strerror(errno.ENOSPC)
    elif request.param == "a file":
        folder.touch()
        yield folder, os.strerror(errno.ENOTDIR)
    else:
        yield Path("/proc/tier"), os.strerror(errno.ENOENT)


@pytest.mark.interop("tgtd", "tgtadm")
def test_a_folder_that_cannot_hold_one(
    product: Product, tgt_disk: TgtDisk, bad_folder: tuple[Path, str]
) -> None:
    folder, why = bad_folder
    put(tgt_disk.backing, OLD)
    with product.mounted(tgt_disk.url, *options(folder)) as mountpoint:
        path = mountpoint / tgt_disk.name
        assert read(path, MEBIBYTE) == OLD[:MEBIBYTE]
        put(path, NEW[:4096], sync=True)
        assert read(path, MEBIBYTE) == NEW[:4096] + OLD[4096:MEBIBYTE]
    warnings = [line for line in log_of(product).splitlines() if "going on without it" in line]
    assert len(warnings) == 1
    assert "WARNING" in warnings[0]
    assert str(folder) in warnings[0]
    assert why in warnings[0]
    assert read(tgt_disk.backing, MEBIBYTE) == NEW[:4096] + OLD[4096:MEBIBYTE]
