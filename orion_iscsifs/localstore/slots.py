"""The ring of segments of an open log: which file is written to, and which comes next.

A segment is *prepared* before it is needed, in the background (`LogStore.keep_prepared`), and
*free* again when all its epochs are on the target. Writers never get the last prepared one, so that
the destager can always record its progress.
"""

import os
from collections import deque
from pathlib import Path
from typing import Final

import trio

from orion_iscsifs.localstore import segment
from orion_iscsifs.localstore.codec import Codec

_PREPARED_AHEAD: Final = 2


class Slot:
    """One file of the ring."""

    def __init__(self, index: int, descriptor: int) -> None:
        self.index: Final = index
        self.descriptor: Final = descriptor
        self.number = -1
        """Which use of the file this is; -1: none."""
        self.last_epoch = 0
        """The newest epoch with a change in it."""
        self.codec: Codec | None = None
        """Of this use; None: there is none."""
        self.fresh = False
        """The file has never been written: its blocks are only reserved."""


class Slots:
    """See the module's docstring."""

    def __init__(self, segment_bytes: int) -> None:
        self.all: list[Slot] = []
        self.position = 0
        """Where the next record goes, in the segment that is written to."""
        self.room = trio.lowlevel.ParkingLot()
        """Unparked when a segment has been prepared, or none ever will."""
        self._segment_bytes: Final = segment_bytes
        self._current: Slot | None = None
        self._prepared: deque[Slot] = deque()
        self._work = trio.lowlevel.ParkingLot()

    def create(self, folder: Path, count: int) -> None:
        """New files; their space is reserved. Blocks; raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        for index in range(count):
            slot = Slot(index, os.open(folder / segment.file_name(index), flags, 0o600))
            self.all.append(slot)
            os.posix_fallocate(slot.descriptor, 0, self._segment_bytes)
            slot.fresh = True

    def open(self, folder: Path, count: int, flags: int) -> None:
        """Those that are there. Blocks; raises OSError."""
        for index in range(count):
            path = folder / segment.file_name(index)
            self.all.append(Slot(index, os.open(path, flags | os.O_CLOEXEC)))

    def close(self) -> None:
        """Give the files back."""
        for slot in self.all:
            os.close(slot.descriptor)
        self.all = []

    # -- writing -----------------------------------------------------------------------------

    def with_room(self, size: int, *, reserve: bool) -> Slot | None:
        """Where a record of this size goes, at `position`; None: nowhere now.

        `reserve`: may use the last prepared segment.
        """
        slot = self._current
        if slot is None or self.position + size > self._segment_bytes:
            return self._next(reserve=reserve)
        return slot

    def _next(self, *, reserve: bool) -> Slot | None:
        if len(self._prepared) <= (0 if reserve else 1):
            self._work.unpark()
            return None
        self._current = self._prepared.popleft()
        self.position = segment.START_BYTES
        self._work.unpark()
        return self._current

    # -- preparing ---------------------------------------------------------------------------

    @property
    def next_number(self) -> int:
        """Of the next use of any file."""
        return 1 + max(slot.number for slot in self.all)

    def to_prepare(self, destaged: int) -> Slot | None:
        """A free one, in the order in which they were used; None: none is, or none is needed."""
        if len(self._prepared) >= _PREPARED_AHEAD:
            return None
        free = [
            slot
            for slot in self.all
            if slot is not self._current
            and slot not in self._prepared
            and slot.last_epoch <= destaged
        ]
        return min(free, key=lambda slot: slot.number, default=None)

    def add_prepared(self, slot: Slot) -> None:
        self._prepared.append(slot)
        self.room.unpark_all()

    async def wait_for_work(self) -> None:
        """Until something may have become free or used up, or the log has ended."""
        await self._work.park()

    def look_again(self) -> None:
        """More may be free."""
        self._work.unpark()

    def end(self) -> None:
        """Nobody shall wait any more."""
        self.room.unpark_all()
        self._work.unpark_all()

    # -- for the owner -----------------------------------------------------------------------

    def used_bytes(self, destaged: int) -> int:
        """Of segments that hold something that the target does not have for certain."""
        current = 0 if self._current is None else self.position
        return current + self._segment_bytes * self._needed(destaged)

    def free(self, destaged: int) -> int:
        """How many are prepared, or as good as."""
        return len(self.all) - self._needed(destaged) - bool(self._current)

    def _needed(self, destaged: int) -> int:
        return sum(slot is not self._current and slot.last_epoch > destaged for slot in self.all)
