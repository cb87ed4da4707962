"""LUKS volumes with other programs: cryptsetup for headers, qemu-img and dissect.fve for data."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import trio

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.cli.image import open_image
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.opening import open_luks
from orion_iscsifs.testing.conformance import read
from tests.interop.conftest import Disk, MakeEmbedded, TgtDisk
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

MIB = 1 << 20
MARKER = b"MARKER that nobody at the target may read. " * 3
CHEAP_PBKDF2 = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
CHEAP_ARGON2 = ["--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "1"]


def cheap(pbkdf: str) -> list[str]:
    """The same words for both programs."""
    return CHEAP_PBKDF2 if pbkdf == "pbkdf2" else ["--pbkdf", pbkdf, *CHEAP_ARGON2]


KINDS = [
    pytest.param("luks1", "512", "pbkdf2", "512", id="luks1"),
    pytest.param("luks1", "512", "pbkdf2", "256", id="luks1-256", marks=pytest.mark.slow),
    pytest.param("luks2", "512", "pbkdf2", "512", id="luks2-512-pbkdf2", marks=pytest.mark.slow),
    pytest.param("luks2", "4096", "pbkdf2", "256", id="luks2-4096-pbkdf2"),
    pytest.param("luks2", "512", "argon2id", "512", id="luks2-512-argon2id"),
    pytest.param("luks2", "4096", "argon2id", "512", id="luks2-4096-id", marks=pytest.mark.slow),
    pytest.param("luks2", "4096", "argon2i", "512", id="luks2-4096-i", marks=pytest.mark.slow),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, 20 * MIB)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> list[Path]:
    """Three key files: a passphrase, one with a newline, one with every byte."""
    contents = (b"correct horse", b"battery\nstaple\n", random.Random(1).randbytes(3000))
    paths = [tmp_path / f"key{number}" for number in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return paths


def cryptsetup(*words: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        ["cryptsetup", *map(str, words), "--batch-mode"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def cryptsetup_opens(image: Path, key: Path) -> bool:
    done = subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", "--key-file", key, image],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in {0, 2}, done.stderr
    return done.returncode == 0


def ours_opens(image: Path, key: Path) -> bool:
    try:
        content_of(image, key, 0, 512)
    except LuksError:
        return False
    return True


def content_of(image: Path, key: Path, offset: int, length: int) -> bytes:
    """Plaintext, as this project reads it."""
    passphrase = key.read_bytes()

    async def run() -> bytes:
        with open_image(str(image), writable=False) as device:
            opened = await open_luks(device, passphrase, str(image))
            return await read(AlignedDevice(opened), offset, length)

    return trio.run(run)


def write_content(image: Path, key: Path, offset: int, content: bytes) -> int:
    """Returns the size of the plaintext."""
    passphrase = key.read_bytes()

    async def run() -> int:
        with open_image(str(image), writable=True) as device:
            opened = await open_luks(device, passphrase, str(image))
            await AlignedDevice(opened).write(offset, content)
            await opened.flush()
            return opened.geometry.size_bytes

    return trio.run(run)


@pytest.mark.parametrize(("kind", "sector", "pbkdf", "bits"), KINDS)
def test_made_here_opens_with_cryptsetup(
    product: Product, image: Path, keys: list[Path], kind: str, sector: str, pbkdf: str, bits: str
) -> None:
    words = ["--type", kind, "--sector-size", sector, "--key-size", bits, *cheap(pbkdf)]
    product("luks", "format", image, "--key-file", keys[1], *words)
    dump = cryptsetup("luksDump", image)
    assert f"Version:       \t{kind[-1]}" in dump
    assert "xts-plain64" in dump
    assert pbkdf in dump or kind == "luks1"
    assert f"sector: {sector}" in dump or kind == "luks1"
    assert [cryptsetup_opens(image, key) for key in keys] == [False, True, False]
    product(
        "luks", "add-key", image, "--key-file", keys[1], "--new-key-file", keys[2], *cheap(pbkdf)
    )
    assert [cryptsetup_opens(image, key) for key in keys] == [False, True, True]
    product("luks", "remove-key", image, "--key-file", keys[1])
    assert [cryptsetup_opens(image, key) for key in keys] == [False, False, True]
    # cryptsetup goes on with what we have changed.
    cryptsetup("luksAddKey", image, keys[0], "--key-file", keys[2], *cheap(pbkdf))
    cryptsetup("luksRemoveKey", image, keys[2])
    assert [ours_opens(image, key) for key in keys] == [True, False, False]


@pytest.mark.parametrize(("kind", "sector", "pbkdf", "bits"), KINDS)
def test_made_by_cryptsetup_opens_here(
    product: Product, image: Path, keys: list[Path], kind: str, sector: str, pbkdf: str, bits: str
) -> None:
    words = ["--type", kind, "--key-size", bits, "--cipher", "aes-xts-plain64", *cheap(pbkdf)]
    if kind == "luks2":
        words += ["--sector-size", sector, "--label", "a label"]
    cryptsetup("luksFormat", image, keys[0], *words)
    assert [ours_opens(image, key) for key in keys] == [True, False, False]
    document = json.loads(product("luks", "dump", image, "--json").stdout)["luks"]
    assert document["version"] == int(kind[-1])
    assert document["uuid"] == cryptsetup("luksUUID", image).strip()
    assert document["sector_bytes"] == int(sector)
    assert document["key_bits"] == int(bits)
    assert document["label"] == ("a label" if kind == "luks2" else "")
    assert document["slots"][0]["kdf"]["type"] == pbkdf
    cryptsetup("luksAddKey", image, keys[1], "--key-file", keys[0], *cheap(pbkdf))
    product(
        "luks", "add-key", image, "--key-file", keys[1], "--new-key-file", keys[2], *cheap(pbkdf)
    )
    product("luks", "remove-key", image, "--slot", "0")
    for opens in (cryptsetup_opens, ours_opens):
        assert [opens(image, key) for key in keys] == [False, True, True]
    if kind == "luks2":
        # The checksums, sequence numbers and areas are as cryptsetup wants them.
        assert "Epoch:" in cryptsetup("luksDump", image)
        cryptsetup("config", image, "--label", "another")
        assert ours_opens(image, keys[2])


@pytest.mark.parametrize(
    ("kind", "hash_name"),
    [
        ("luks1", "sha512"),
        pytest.param("luks2", "sha1", marks=pytest.mark.slow),
        pytest.param("luks1", "sha1", marks=pytest.mark.slow),
        pytest.param("luks2", "sha512", marks=pytest.mark.slow),
    ],
)
def test_every_hash(
    product: Product, image: Path, keys: list[Path], kind: str, hash_name: str
) -> None:
    words = ["--type", kind, "--hash", hash_name, *CHEAP_PBKDF2]
    cryptsetup("luksFormat", image, keys[0], *words)
    assert ours_opens(image, keys[0])
    product("luks", "format", image, "--key-file", keys[0], "--force", *words)
    assert cryptsetup_opens(image, keys[0])


def test_cryptsetup_mends_and_reads_our_second_header(
    product: Product, image: Path, keys: list[Path]
) -> None:
    product("luks", "format", image, "--key-file", keys[0], *CHEAP_PBKDF2)
    with image.open("r+b") as file:
        file.seek(4096 + 10)
        file.write(b"!")
    assert (
        "damage: the first copy of the header is damaged" in product("luks", "dump", image).stdout
    )
    assert ours_opens(image, keys[0])
    assert cryptsetup_opens(image, keys[0])
    assert "damage" not in product("luks", "dump", image).stdout


@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_a_cipher_that_is_not_known_here_is_refused(
    product: Product, image: Path, keys: list[Path], kind: str
) -> None:
    words = ["--type", kind, "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"]
    cryptsetup("luksFormat", image, keys[0], *words, *CHEAP_PBKDF2)
    before = image.read_bytes()
    for command in (["dump"], ["remove-key", "--slot", "0", "--force"]):
        outcome = product("luks", command[0], image, *command[1:], code=1)
        assert "aes-cbc-essiv:sha256" in outcome.stderr
        assert outcome.stderr.count("\n") == 1
    assert image.read_bytes() == before


# -- data ------------------------------------------------------------------------------------------


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, timeout=60, capture_output=True)


def secret(key: Path) -> str:
    return f"secret,id=key,format=raw,file={key}"


def luks_options(image: Path) -> str:
    return f"driver=luks,key-secret=key,file.filename={image}"


@pytest.mark.interop("qemu-img")
def test_qemu_reads_what_is_written_here(
    product: Product, image: Path, keys: list[Path], tmp_path: Path
) -> None:
    words = ["--type", "luks1", *CHEAP_PBKDF2]
    product("luks", "format", image, "--key-file", keys[0], *words)
    content = random.Random(3).randbytes(3 * MIB + 512)
    size = write_content(image, keys[0], 1024, content)
    plain = tmp_path / "plain"
    qemu_img(
        *("convert", "--object", secret(keys[0]), "--image-opts", luks_options(image)),
        *("-O", "raw", plain),
    )
    assert plain.stat().st_size == size
    assert plain.read_bytes()[1024 : 1024 + len(content)] == content


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("hash_name", ["sha256", pytest.param("sha1", marks=pytest.mark.slow)])
def test_what_qemu_writes_is_read_here(keys: list[Path], tmp_path: Path, hash_name: str) -> None:
    plain, image = tmp_path / "plain", tmp_path / "made-by-qemu"
    plain.write_bytes(random.Random(4).randbytes(3 * MIB))
    options = f"key-secret=key,iter-time=10,cipher-alg=aes-256,hash-alg={hash_name}"
    qemu_img(
        *("convert", "--object", secret(keys[0]), "-f", "raw", "-O", "luks"),
        *("-o", options, plain, image),
    )
    assert content_of(image, keys[0], 0, 3 * MIB) == plain.read_bytes()
    assert cryptsetup_opens(image, keys[0])


@pytest.mark.parametrize("by", ["us", "cryptsetup"])
@pytest.mark.parametrize(
    ("kind", "sector"), [("luks1", "512"), ("luks2", "512"), ("luks2", "4096")]
)
def test_an_independent_reader_sees_the_same(
    product: Product, image: Path, keys: list[Path], kind: str, sector: str, by: str
) -> None:
    """dissect.fve, which shares no code with us but the AES."""
    from dissect.fve.luks import LUKS

    words = ["--type", kind, *CHEAP_PBKDF2]
    if kind == "luks2":
        words += ["--sector-size", sector]
    if by == "us":
        product("luks", "format", image, "--key-file", keys[0], *words)
    else:
        cryptsetup("luksFormat", image, keys[0], *words)
    content = random.Random(5).randbytes(2 * MIB + 4096)
    size = write_content(image, keys[0], 8192, content)
    write_content(image, keys[0], size - 4096, content[:4096])
    with image.open("rb") as file:
        reader = LUKS(file)
        reader.unlock_with_passphrase(keys[0].read_bytes())
        stream = reader.open()
        stream.seek(8192)
        assert stream.read(len(content)) == content
        stream.seek(size - 4096)
        assert stream.read(4096) == content[:4096]


# -- LUNs ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("program", "what"),
    [
        (["mkfs.ext4", "-q", "-F"], "ext4"),
        (["mkfs.xfs", "-q", "-f"], "XFS"),
        (["mkswap", "-q"], "swap"),
    ],
)
def test_what_is_there_is_recognized(
    product: Product, tmp_path: Path, keys: list[Path], program: list[str], what: str
) -> None:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 320 * MIB)
    product.run(*program, path)
    before = path.read_bytes()[:MIB]
    outcome = product("luks", "format", path, "--key-file", keys[0], code=1)
    assert what in outcome.stderr
    assert path.read_bytes()[:MIB] == before
