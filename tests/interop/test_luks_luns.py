"""LUKS volumes on LUNs: no target sees plaintext, and nobody the passphrase."""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import pytest

from tests.interop.conftest import MEBIBYTE as MIB
from tests.interop.conftest import Disk, MakeEmbedded, TgtDisk
from tests.interop.luks import CHEAP_PBKDF2, content_of, cryptsetup_opens
from tests.interop.product import Product, get, put
from tests.interop.test_secrets import process_words
from tests.interop.workers import (
    can_take_over,
    kill_worker,
    log_of,
    supervisor_of,
    takeovers,
    watchdog,
)

pytestmark = pytest.mark.interop("cryptsetup")

MARKER = b"MARKER that nobody at the target may read. " * 3
Kind = Literal["luks1", "luks2"]


def lun_words(kind: Kind) -> list[str]:
    return ["--type", kind, *CHEAP_PBKDF2]


@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_no_target_ever_sees_plaintext(
    product: Product, disk: Disk, keys: list[Path], tmp_path: Path, kind: Kind, cache: str
) -> None:
    write_and_look(product, disk, keys, tmp_path, kind, cache)


@pytest.mark.fuse
@pytest.mark.interop("tgtd", "tgtadm")
@pytest.mark.parametrize(("kind", "cache"), [("luks1", "none"), ("luks2", "writeback")])
def test_the_target_never_sees_plaintext(
    product: Product, tgt_disk: TgtDisk, keys: list[Path], tmp_path: Path, kind: Kind, cache: str
) -> None:
    write_and_look(product, tgt_disk, keys, tmp_path, kind, cache)


def write_and_look(
    product: Product, disk: Disk, keys: list[Path], folder: Path, kind: Kind, cache: str
) -> None:
    """Write through a mount, look at the file behind the LUN, read it again in other ways."""
    product("luks", "format", disk.url, "--key-file", keys[0], *lun_words(kind))
    option = f"luks_key_file={keys[0]}"
    content = (MARKER * (6 * MIB // len(MARKER)))[: 5 * MIB]
    with product.mounted(disk.url, option, f"cache={cache}") as mountpoint:
        file = mountpoint / disk.name
        size = file.stat().st_size
        assert size == disk.size_bytes - (2 if kind == "luks1" else 16) * MIB
        descriptor = os.open(file, os.O_RDWR)
        os.pwrite(descriptor, content, 12345)
        os.pwrite(descriptor, MARKER, size - len(MARKER))
        os.fsync(descriptor)
        os.close(descriptor)
        shown = (mountpoint / ".orion" / "config.toml").read_text()
        assert f'luks_key_file = "{keys[0]}"' in shown
        assert "correct horse" not in shown
    stored = disk.backing.read_bytes()
    assert MARKER[:16] not in stored
    assert b"correct horse" not in stored
    with product.mounted(disk.url, option, "ro") as mountpoint:
        file = mountpoint / disk.name
        assert get(file, len(content), 12345) == content
        assert get(file, len(MARKER), size - len(MARKER)) == MARKER
    # A copy: the embedded target holds a lock on its file.
    copy = Path(shutil.copy(disk.backing, folder / "copy"))
    assert cryptsetup_opens(copy, keys[0])
    assert content_of(copy, keys[0], 12345, len(content)) == content


@pytest.mark.fuse
def test_mistakes_with_an_encrypted_lun(
    product: Product, make_embedded: MakeEmbedded, keys: list[Path], tmp_path: Path
) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(bytes(40 * MIB))
    target = make_embedded({1: str(backing)})
    mountpoint = product.new_mountpoint()

    def refused(*options: str, code: int = 32) -> str:
        words = ["mount", target.lun_url(), str(mountpoint), "-o", ",".join(options)]
        said = product(*words, code=code).stderr
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
        return said

    def refused_twice(*options: str) -> str:
        """The LUN by itself, and as one of all LUNs."""
        words = ["mount", target.url, str(mountpoint), "-o", ",".join(options)]
        assert product(*words, code=32).stderr
        return refused(*options)

    option = f"luks_key_file={keys[0]}"
    assert "there is no header on it" in refused_twice(option)
    assert not backing.read_bytes().strip(b"\0"), "it was written to"
    product("luks", "format", target.lun_url(), "--key-file", keys[0], *lun_words("luks2"))
    said = refused(f"luks_key_file={keys[1]}")
    assert "no key slot opens with this passphrase" in said
    assert "ends with a newline, which counts" in said
    assert "battery" not in said
    assert "No such file" in refused("luks_key_file=/nonexistent", code=2)
    said = refused(option, "cache=log", f"log_dir={tmp_path}/log", code=2)
    assert "cache_key_file" in said
    assert not (tmp_path / "log").exists()
    again = product("luks", "format", target.lun_url(), "--key-file", keys[0], code=1)
    assert "there is a LUKS volume on it" in again.stderr
    # Without the option it is the raw disk that it always was.
    with product.mounted(target.lun_url()) as folder:
        assert get(folder / "lun1", 6) == b"LUKS\xba\xbe"
        # The file in the mount is a target of the command too.
        product("luks", "dump", folder / "lun1")
        product(
            "luks",
            "add-key",
            folder / "lun1",
            "--key-file",
            keys[0],
            "--new-key-file",
            keys[2],
            *CHEAP_PBKDF2,
        )
    with product.mounted(target.lun_url(), f"luks_key_file={keys[2]}") as folder:
        assert (folder / "lun1").stat().st_size == 24 * MIB


def test_the_command_leaves_tiers_and_reservations_alone(
    product: Product, make_embedded: MakeEmbedded, keys: list[Path], tmp_path: Path
) -> None:
    """With the options of a mount: a tier of the raw LUN would take the place of the volume's."""
    url = make_embedded({1: f"ram:{24 * MIB}"}).lun_url()
    options = ["-o", f"tier_dir={tmp_path}/tier,cache_key_file={keys[0]}"]
    product("luks", "format", url, "--key-file", keys[0], *options, *CHEAP_PBKDF2)
    assert not (tmp_path / "tier").exists()
    (lun,) = json.loads(product("inspect", url, "--json").stdout)["luns"]
    assert lun["reservations"]["holder"] is None


@pytest.mark.fuse
@pytest.mark.interop("tgtd", "tgtadm")
@can_take_over
def test_a_new_worker_needs_no_key_file_and_nobody_sees_the_passphrase(
    product: Product, tgt_disk: TgtDisk, keys: list[Path], tmp_path: Path
) -> None:
    secret = "correct horse"
    key = tmp_path / "on-a-stick"
    shutil.copy(keys[0], key)
    product("luks", "format", tgt_disk.url, "--key-file", key, *CHEAP_PBKDF2)
    with (
        watchdog(product),
        product.mounted(tgt_disk.url, f"luks_key_file={key}", "cache=writethrough") as folder,
    ):
        put(folder / "lun1", MARKER * 2000, 4096, sync=True)
        key.unlink()
        kill_worker(supervisor_of(product, folder))
        assert get(folder / "lun1", 2000 * len(MARKER), 4096) == MARKER * 2000
        put(folder / "lun1", MARKER * 1000, 8 * MIB, sync=True)
        assert takeovers(product, folder) == 1
        assert len(str(product.status(folder)["luns"][0]["luks"])) == 36
        shown = [process_words(), log_of(product), product("status", folder, "--json").stdout]
        shown += [
            (folder / ".orion" / name).read_text(encoding="utf-8")
            for name in ("status.json", "config.toml", "metrics")
        ]
        assert not any(secret in text for text in shown)
    stored = tgt_disk.backing.read_bytes()
    assert MARKER[:16] not in stored
    assert secret.encode() not in stored


@pytest.mark.fuse
@pytest.mark.slow
def test_a_lun_that_is_mounted_is_not_changed_behind_the_mount(
    product: Product, make_embedded: MakeEmbedded, keys: list[Path]
) -> None:
    """Slow, since the command waits for a mount that may be about to end."""
    target = make_embedded({1: "ram:40M"})
    product("luks", "format", target.lun_url(), "--key-file", keys[0], *lun_words("luks2"))
    words = ["luks", "add-key", target.lun_url(), "--key-file", str(keys[0])]
    words += ["--new-key-file", str(keys[1]), *CHEAP_PBKDF2]
    with product.mounted(target.lun_url(), f"luks_key_file={keys[0]}") as folder:
        busy = product(*words, code=1)
        assert str(folder) in busy.stderr
        product("luks", "dump", target.lun_url())
    product(*words)


@pytest.mark.fuse
@pytest.mark.interop("tgtd", "tgtadm", "mkfs.ext4")
def test_a_file_system_in_an_encrypted_lun(
    product: Product, tgt_disk: TgtDisk, keys: list[Path], tmp_path: Path
) -> None:
    """mkfs and fsck as on any disk; the file system is nowhere to be seen at the target."""
    product("luks", "format", tgt_disk.url, "--key-file", keys[0], *CHEAP_PBKDF2)
    with product.mounted(tgt_disk.url, f"luks_key_file={keys[0]}") as mountpoint:
        file = mountpoint / "lun1"
        tree = tmp_path / "tree"
        tree.mkdir()
        (tree / "hello").write_bytes(MARKER * 1000)
        words: list[str | Path] = ["mkfs.ext4", "-q", "-F", "-d", tree, file]
        product.run(*words)
        product.run("fsck.ext4", "-fn", file)
    stored = tgt_disk.backing.read_bytes()
    assert MARKER[:16] not in stored
    assert stored[16 * MIB + 0x438 : 16 * MIB + 0x43A] != b"\x53\xef"
    assert content_of(tgt_disk.backing, keys[0], 0x438, 2) == b"\x53\xef"
    # A mistake is noticed by what is on the plaintext, too.
    with product.mounted(tgt_disk.url, f"luks_key_file={keys[0]}") as mountpoint:
        outcome = product("luks", "format", mountpoint / "lun1", "--key-file", keys[0], code=1)
        assert "ext4" in outcome.stderr
