"""`SharedFlush`: as few flushes as the contract of `BlockDevice.flush` allows.

A flush makes durable what had completed when it *began*. So a caller may share a flush under way
only if no write has completed since that began; otherwise it needs the next one, which everybody
who waits by then shares. With no write since the last good flush there is nothing to do.

It serves a device (SYNCHRONIZE CACHE) as well as files (fdatasync: "group commit").
"""

from collections.abc import Awaitable, Callable

import trio

from orion_iscsifs.errors import OrionError


class _Round:
    """One flush under way."""

    __slots__ = ("covers", "ended", "error")

    def __init__(self, covers: int) -> None:
        self.covers = covers
        self.ended = trio.Event()
        self.error: OrionError | None = None


class SharedFlush:
    """Counts writes and shares calls of `flush`, which raises an OrionError when it fails."""

    def __init__(self, flush: Callable[[], Awaitable[None]]) -> None:
        self._flush = flush
        self._writes = 0
        self._durable_writes = 0
        self._current: _Round | None = None

    def note_write(self) -> None:
        """A write, discard or zeroing has completed, in part or as a whole."""
        self._writes += 1

    @property
    def is_needed(self) -> bool:
        """Whether a noted write may not be durable yet."""
        return self._durable_writes < self._writes

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
            await self._flush()
            self._durable_writes = max(self._durable_writes, own.covers)
        except OrionError as error:
            own.error = error
            raise
        finally:
            self._current = None
            own.ended.set()
