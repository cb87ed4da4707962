"""A tree of files on ext4, read file by file as a build or a backup of it does.

The file system fills the LUN. Sizes are those of a usual disk: most files are small, most bytes are
in larger ones. The content of every other 64 KiB compresses to half, and none of the rest.
"""

import contextlib
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from orion_bench.figures import Figure
from orion_iscsifs.testing.programs import run

FILL_SHARE: Final = 0.85
"""Of the LUN; ext4 needs some for itself."""
FILES_PER_FOLDER: Final = 100
_MEDIAN_LOG: Final = 9.7  # of 16 KiB
_SPREAD_LOG: Final = 1.5
_FILE_MAX_BYTES: Final = 8 << 20
_FRAME_BYTES: Final = 64 << 10


def fill_with_tree(path: Path, size_bytes: int) -> None:
    """An ext4 with a tree of files; what is free holds content of the same kind."""
    fill_compressible(path, size_bytes)
    tree = path.with_name("tree")
    tree.mkdir()
    try:
        _make_tree(tree, int(size_bytes * FILL_SHARE))
        extended = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        words: list[str | Path] = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0"]
        run([*words, "-E", extended, "-d", tree, path], timeout_s=600)
    finally:
        shutil.rmtree(tree)


def fill_compressible(path: Path, size_bytes: int) -> None:
    """Every other frame of a kind that a disk holds: bytes that compress to half, or not at all."""
    with path.open("wb") as file:
        for _ in range(size_bytes // (2 * _FRAME_BYTES)):
            file.write(_two_frames())


def _two_frames() -> bytes:
    half = os.urandom(_FRAME_BYTES // 2)
    return os.urandom(_FRAME_BYTES) + b"".join(
        half[i : i + 64] + bytes(64) for i in range(0, len(half), 64)
    )


def _make_tree(tree: Path, size_bytes: int) -> None:
    sizes, number = random.Random(20240101), 0
    while size_bytes > 0:
        size = min(int(sizes.lognormvariate(_MEDIAN_LOG, _SPREAD_LOG)) + 1, _FILE_MAX_BYTES)
        folder = tree / f"{number // FILES_PER_FOLDER:05}"
        folder.mkdir(exist_ok=True)
        with (folder / f"{number:07}").open("wb") as file:
            for start in range(0, size, 2 * _FRAME_BYTES):
                file.write(_two_frames()[: size - start])
        number += 1
        size_bytes -= max(size, 4096)


@contextlib.contextmanager
def mounted_ext4(file: Path, folder: Path, options: str = "defaults") -> Iterator[Path]:
    """The file system in `file`, over a loop device that reads past the page cache."""
    mountpoint = folder / "ext4"
    mountpoint.mkdir(exist_ok=True)
    device = run(["losetup", "--direct-io=on", "--find", "--show", file]).strip()
    try:
        run(["mount", "-t", "ext4", "-o", options, device, mountpoint])
        try:
            yield mountpoint
        finally:
            run(["umount", mountpoint], timeout_s=120)
    finally:
        run(["losetup", "--detach", device])


def read_tree(file: Path, folder: Path, seconds: float) -> Figure:
    """Read the files one after the other, for so long at most; each counts from open to close."""
    times: list[float] = []
    read_bytes = 0
    with mounted_ext4(file, folder, "ro,noload") as root:
        began = now = time.monotonic()
        for path in _files(root):
            read_bytes += len(path.read_bytes())
            times.append(time.monotonic() - now)
            now += times[-1]
            if now - began >= seconds:
                break
    p50, p99 = (statistics.quantiles(times, n=100)[at] for at in (49, 98))
    return Figure(rate=read_bytes / 1e6 / (now - began), p50_us=p50 * 1e6, p99_us=p99 * 1e6)


def _files(root: Path) -> Iterator[Path]:
    for folder in sorted(path for path in root.iterdir() if path.name != "lost+found"):
        yield from sorted(folder.iterdir())
