"""The files of a tier: segments by number, and descriptors to read them with.

A segment is made whole (reserved on the disk) before it is used, and removed as a whole: the name
is its number, and no number comes again. So a reader that still holds the file of a segment that
has gone finds in it what was always there.

Only the trio thread opens and closes the descriptors to read with; what a thread is to read from is
held for it meanwhile.

Everything here blocks but for a moment (`descriptor`, `hold`) or longer.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orion_iscsifs.localstore.superblock import NAMES
from orion_iscsifs.tier import journal
from orion_iscsifs.tier.superblock import TierSuperblock

DESCRIPTORS_MAX: Final = 64
"""Kept open to read from; a tier may have thousands of segments."""
PATTERN: Final = "rseg-*"


@dataclass(slots=True, eq=False)
class _Open:
    descriptor: int
    holders: int = 0
    is_kept: bool = True


class SegmentFiles:
    """Of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def path(self, number: int) -> Path:
        return self.folder / journal.file_name(number)

    def numbers(self) -> list[int]:
        """Of the files that are there, ascending."""
        found = []
        for path in self.folder.glob(PATTERN):
            try:
                number = int(path.name.removeprefix("rseg-"), 16)
            except ValueError:
                continue
            if path.name == journal.file_name(number):
                found.append(number)
        return sorted(found)

    def make(self, block: TierSuperblock, number: int, salt: bytes) -> int:
        """A new segment, all of it reserved; a descriptor to write to it. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(self.path(number), flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, block.segment_bytes)
            room = journal.entries_max(block.segment_bytes)
            header = journal.SegmentHeader(number, block.life, room, salt)
            os.pwrite(descriptor, journal.encode_header(block.store, header), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def remove(self, number: int) -> None:
        """Raises OSError. It may be gone already."""
        self.path(number).unlink(missing_ok=True)

    def descriptor(self, number: int) -> int:
        """To read with, until the next call of any method here. Raises OSError."""
        return self._opened(number).descriptor

    def hold(self, number: int) -> "Held":
        """To read with, until it is released. Raises OSError."""
        opened = self._opened(number)
        opened.holders += 1
        return Held(opened)

    def _opened(self, number: int) -> _Open:
        found = self._open.get(number)
        if found is None:
            descriptor = os.open(self.path(number), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) >= DESCRIPTORS_MAX:
                self._let_go(self._open.popitem(last=False)[1])
            found = self._open[number] = _Open(descriptor)
        else:
            self._open.move_to_end(number)
        return found

    def close(self, number: int) -> None:
        """Nobody is to begin to read from this segment any more."""
        if number in self._open:
            self._let_go(self._open.pop(number))

    def _let_go(self, opened: _Open) -> None:
        opened.is_kept = False
        if not opened.holders:
            os.close(opened.descriptor)

    def close_all(self) -> None:
        for number in list(self._open):
            self.close(number)


class Held:
    """A descriptor that stays open until `release`."""

    __slots__ = ("_opened", "descriptor")

    def __init__(self, opened: _Open) -> None:
        self._opened = opened
        self.descriptor: Final = opened.descriptor

    def release(self) -> None:
        """Only once."""
        self._opened.holders -= 1
        if not self._opened.is_kept and not self._opened.holders:
            os.close(self.descriptor)


def remove_all(folder: Path) -> None:
    """The superblocks first: without them nothing is believed. Raises OSError."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(PATTERN):
        path.unlink()


def truncate_all(folder: Path) -> None:
    """The weakest way to make the segments unbelievable: it needs no room. Raises OSError."""
    for path in folder.glob(PATTERN):
        os.truncate(path, 0)
