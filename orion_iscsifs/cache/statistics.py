"""Counters of one cache, for the status command and for tests."""

from dataclasses import dataclass


@dataclass(slots=True)
class CacheStatistics:
    """Plain attributes; all but `dirty_bytes` and `in_flight_bytes` only grow."""

    hits: int = 0
    """Reads served from RAM alone."""
    misses: int = 0
    """Reads that had to wait for the device."""
    dirty_bytes: int = 0
    """Whole pages that the device does not have yet, those being written included."""
    in_flight_bytes: int = 0
    """The part of `dirty_bytes` that is being written."""
    writebacks: int = 0
    """Requests that the write-back sent."""
    writeback_bytes: int = 0
    writeback_failures: int = 0
    flushes: int = 0
    throttled_writes: int = 0
    """Writes that had to wait for room."""
    readahead_bytes: int = 0
    """Brought ahead of a reader: hits, waste, and what waits in the cache to be read."""
    readahead_hit_bytes: int = 0
    """The part of it that was read."""
    readahead_waste_bytes: int = 0
    """The part of it that went unread: evicted, overwritten, discarded, or nowhere to put."""

    @property
    def readahead_unread_bytes(self) -> int:
        return self.readahead_bytes - self.readahead_hit_bytes - self.readahead_waste_bytes
