"""`Ring`: a fixed piece of memory, given out in order and given back in the same order."""

import mmap
from typing import Final

_PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Ring:
    """Of `size_bytes`. `head` only grows: it says how far memory was given out."""

    __slots__ = ("_memory", "_size", "_tail", "head")

    def __init__(self, size_bytes: int) -> None:
        self._size: Final = size_bytes
        self._memory = memoryview(mmap.mmap(-1, size_bytes, flags=_PRIVATE))
        self.head = 0
        self._tail = 0

    @property
    def size_bytes(self) -> int:
        return self._size

    @property
    def used_bytes(self) -> int:
        """Given out, and wasted at the end of the memory."""
        return self.head - self._tail

    def take(self, length: int) -> memoryview | None:
        """So many bytes in one piece; None: not now."""
        if self.head == self._tail:
            self.head = self._tail = -(-self.head // self._size) * self._size
        at = self.head % self._size
        waste = self._size - at if at + length > self._size else 0
        if self.used_bytes + waste + length > self._size:
            return None
        at = (at + waste) % self._size
        self.head += waste + length
        return self._memory[at : at + length]

    def undo(self, length: int) -> None:
        """What was taken last is not needed after all."""
        self.head -= length

    def give_back(self, head: int) -> None:
        """Everything that was taken while `head` was less than this."""
        self._tail = max(self._tail, head)
