"""`DeviceFlusher`: as few `device.flush()` as the contract allows.

A flush makes durable what had completed when it *began*. So a caller may share a flush under way
only if no write has completed since that began; otherwise it needs the next one, which everybody
who waits by then shares. With no write since the last good flush there is nothing to do.
"""

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.errors import OrionError


class _Round:
    """One `device.flush()` under way."""

    __slots__ = ("covers", "ended", "error")

    def __init__(self, covers: int) -> None:
        self.covers = covers
        self.ended = trio.Event()
        self.error: OrionError | None = None


class DeviceFlusher:
    """Counts writes and shares flushes."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._writes = 0
        self._durable_writes = 0
        self._current: _Round | None = None

    def note_write(self) -> None:
        """A write, discard or zeroing has completed, in part or as a whole."""
        self._writes += 1

    async def flush(self) -> None:
        """Every write noted before this call is durable when it returns."""
        needed = self._writes
        while self._durable_writes < needed:
            shared = self._current
            if shared is None:
                await self._begin()
                continue
            await shared.ended.wait()
            if shared.covers >= needed and shared.error is not None:
                raise shared.error
            # Otherwise it was begun too early, or its owner was cancelled: go round again.

    async def _begin(self) -> None:
        self._current = own = _Round(self._writes)
        try:
            await self._device.flush()
            self._durable_writes = max(self._durable_writes, own.covers)
        except OrionError as error:
            own.error = error
            raise
        finally:
            self._current = None
            own.ended.set()
