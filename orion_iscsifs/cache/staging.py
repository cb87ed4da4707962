"""Large buffers to reuse: a fresh one costs a page fault for every 4 KiB."""

from typing import Final

STAGING_BYTES: Final = 1 << 20
_REUSE_FROM_BYTES: Final = 64 << 10


class StagingBuffers:
    """Lends buffers of up to `STAGING_BYTES`; keeps at most `keep_max` of them for the next."""

    def __init__(self, *, keep_max: int) -> None:
        self._keep_max = keep_max
        self._free: list[memoryview] = []

    def take(self, length: int) -> memoryview:
        """A buffer of at least `length` bytes, its content undefined."""
        if length < _REUSE_FROM_BYTES:
            return memoryview(bytearray(length))  # small ones come cheap from the allocator
        assert length <= STAGING_BYTES
        return self._free.pop() if self._free else memoryview(bytearray(STAGING_BYTES))

    def give_back(self, buffer: memoryview) -> None:
        if len(buffer) == STAGING_BYTES and len(self._free) < self._keep_max:
            self._free.append(buffer)

    def shrink(self, keep: int) -> None:
        """Let go of all but `keep`: the rush is over."""
        del self._free[keep:]
