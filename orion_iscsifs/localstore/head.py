"""The head of a log on the disk: the two copies of its superblock.

Blocking, for threads. Two of them may write at once (the keeper of the superblock and the one who
retires a log that has failed): they take turns, and each changes what the other has written.
"""

from pathlib import Path
from threading import Lock
from typing import Final

import msgspec

from orion_iscsifs.localstore import files, superblock
from orion_iscsifs.localstore.superblock import Superblock


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
        page = superblock.encode(self._counter, block, incompat=block.incompat)
        files.write_superblock_page(self.folder, self._counter, page)
        self.block = block
