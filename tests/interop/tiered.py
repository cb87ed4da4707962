"""What the tests of a mount with a local read tier share."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orion_iscsifs.testing.programs import run, wait_until
from tests.interop.conftest import MEBIBYTE
from tests.interop.product import Product

TIER_BYTES = 64 * MEBIBYTE
"""The least that `tier_size` may be."""
PIECE_BYTES = 128 * 1024
SETTLE_S = 60.0


def options(folder: Path, *more: str) -> list[str]:
    """Without readahead: what hits and what misses is then what the test itself has read."""
    return [f"tier_dir={folder}", f"tier_size={TIER_BYTES}", "readahead=off", *more]


def tier_of(product: Product, mountpoint: Path) -> dict[str, Any]:
    """`tier` of the only LUN, as `status --json` has it."""
    (lun,) = product.status(mountpoint)["luns"]
    tier = lun["tier"]
    assert isinstance(tier, dict), "the mount has no tier"
    return tier


def read(path: Path, length: int, offset: int = 0) -> bytes:
    """Just these bytes, in pieces: not what the page cache has of them, and nothing ahead."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)
        places = range(offset, offset + length, PIECE_BYTES)
        return b"".join(
            os.pread(file, min(PIECE_BYTES, offset + length - place), place) for place in places
        )
    finally:
        os.close(file)


def settle(product: Product, mountpoint: Path) -> dict[str, Any]:
    """Wait until nothing is on its way into the tier any more; its status then."""
    found: dict[str, Any] = {}

    def is_settled() -> bool:
        found.update(tier_of(product, mountpoint))
        return not found["staged_bytes"]

    wait_until(is_settled, what="the tier to take in what it was given", timeout_s=SETTLE_S)
    return found


def read_and_keep(product: Product, mountpoint: Path, name: str, length: int) -> bytes:
    """The beginning of the disk, and from now on the tier has all of it."""
    content = read(mountpoint / name, length)
    kept = settle(product, mountpoint)
    assert (kept["state"], kept["dropped_bytes"]) == ("ok", 0)
    assert kept["candidate_bytes"] >= length
    return content


def tier_files(folder: Path) -> list[Path]:
    """All of all tiers in the folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def segments(folder: Path) -> list[Path]:
    """Of all tiers in the folder, the oldest first."""
    return sorted(folder.glob("*.tier/rseg-*"))


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int, *how: str) -> Iterator[Path]:
    """A file system in memory of that size, mounted there. Needs root."""
    folder.mkdir()
    words = ",".join([f"size={size_bytes}", "mode=700", *how])
    run(["mount", "-t", "tmpfs", "-o", words, "tmpfs", folder])
    try:
        yield folder
    finally:
        run(["umount", "-l", folder])
