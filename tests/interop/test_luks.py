"""LUKS volumes with other programs: cryptsetup for headers, qemu-img and dissect.fve for data."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import trio

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.cli.image import open_image
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.opening import open_luks
from tests.interop.conftest import MEBIBYTE as MIB
from tests.interop.luks import CHEAP_PBKDF2, content_of, cryptsetup_opens
from tests.interop.product import Product

pytestmark = pytest.mark.interop("cryptsetup")

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


def ours_opens(image: Path, key: Path) -> bool:
    try:
        content_of(image, key, 0, 512)
    except LuksError:
        return False
    return True


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
