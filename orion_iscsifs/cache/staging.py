"""Large buffers to reuse: a fresh one costs a page fault for every 4 KiB."""

from typing import Final

STAGING_BYTES: Final = 1 << 20
_REUSE_FROM_BYTES: Final = 64 << 10


class StagingBuffers:
    """Lends buffers of up to `STAGING_BYTES`; keeps at most `keep_max_bytes` for the next.

    Sizes are powers of two, so that many requests of middling length do not take a large one each.
    """

    def __init__(self, *, keep_max_bytes: int) -> None:
        self._keep_max_bytes = keep_max_bytes
        self._free: dict[int, list[memoryview]] = {}
        self._free_bytes = 0

    def take(self, length: int) -> memoryview:
        """A buffer of at least `length` bytes, its content undefined."""
        if length < _REUSE_FROM_BYTES:
            return memoryview(bytearray(length))  # small ones come cheap from the allocator
        assert length <= STAGING_BYTES
        size = 1 << (length - 1).bit_length()
        if free := self._free.get(size):
            self._free_bytes -= size
            return free.pop()
        return memoryview(bytearray(size))

    def give_back(self, buffer: memoryview) -> None:
        size = len(buffer)
        if size < _REUSE_FROM_BYTES or size & (size - 1):
            return
        if self._free_bytes + size <= self._keep_max_bytes:
            self._free_bytes += size
            self._free.setdefault(size, []).append(buffer)

    def shrink(self, keep_bytes: int) -> None:
        """Let go of all but so much: the rush is over. The largest go first."""
        for size in sorted(self._free, reverse=True):
            free = self._free[size]
            while free and self._free_bytes > keep_bytes:
                free.pop()
                self._free_bytes -= size
