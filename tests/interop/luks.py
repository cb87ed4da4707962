"""LUKS volumes as other programs and this project see them, and derivations that take no time."""

import subprocess
from pathlib import Path

import trio

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.cli.image import open_image
from orion_iscsifs.crypt.opening import open_luks
from orion_iscsifs.testing.conformance import read

CHEAP_PBKDF2 = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]


def cryptsetup_opens(image: Path, key: Path) -> bool:
    done = subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", "--key-file", key, image],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in {0, 2}, done.stderr
    return done.returncode == 0


def content_of(image: Path, key: Path, offset: int, length: int) -> bytes:
    """Plaintext, as this project reads it."""
    passphrase = key.read_bytes()

    async def run() -> bytes:
        with open_image(str(image), writable=False) as device:
            opened = await open_luks(device, passphrase, str(image))
            return await read(AlignedDevice(opened), offset, length)

    return trio.run(run)
