"""The head of a log on the disk: its folder, and the two copies of the superblock in it.

Blocking, for threads. Two of them may write at once (the keeper of the superblock and the one who
retires a log that has failed): they take turns, and each changes what the other has written.
"""

import os
from pathlib import Path
from threading import Lock
from typing import Final

import msgspec

from orion_iscsifs.localstore import superblock
from orion_iscsifs.localstore.superblock import Superblock

FILES: Final = ("wlog-*", "super.*")
"""The superblocks last: without them nothing is replayed."""

IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


class Head:
    """`block` is what was written last."""

    def __init__(self, folder: Path, counter: int, block: Superblock) -> None:
        self.folder: Final = folder
        self.block = block
        self._counter = counter
        self._turn = Lock()

    def write(self, block: Superblock) -> None:
        """The next copy, durable. Raises OSError."""
        with self._turn:
            self._write(block)

    def update(self, changes: dict[str, object]) -> None:
        """Change fields, durably. Raises OSError."""
        with self._turn:
            self._write(msgspec.structs.replace(self.block, **changes))

    def _write(self, block: Superblock) -> None:
        self._counter += 1
        name = superblock.NAMES[self._counter % len(superblock.NAMES)]
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.folder / name, flags, 0o600)
        try:
            os.pwrite(descriptor, superblock.encode(self._counter, block), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(self.folder)
        self.block = block


def newest(folder: Path) -> tuple[int, Superblock] | None:
    """Counter and content of the copy that counts. Raises OSError or ForeignFormat."""
    return superblock.newest([_page(folder / name) for name in superblock.NAMES])


def _page(path: Path) -> bytes:
    try:
        return path.read_bytes()[: superblock.PAGE_BYTES]
    except FileNotFoundError:
        return b""


def remove_files(folder: Path) -> None:
    """All that a log is made of. Raises OSError."""
    for pattern in FILES:
        for path in sorted(folder.glob(pattern)):
            path.unlink()
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """The names in it are durable when this returns. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_in_memory(folder: Path) -> bool:
    """Whether the file system there is one that a loss of power takes away; False: not known."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1] in IN_MEMORY
    return False
