"""Counters of one tier, for the status command and for tests."""

from dataclasses import dataclass


@dataclass(slots=True)
class TierStatistics:
    """Plain attributes that only grow, but for `staged_bytes` and `level`."""

    hits: int = 0
    """Reads answered from the tier alone."""
    misses: int = 0
    """Reads that had to ask the device for all or a part."""
    hit_bytes: int = 0
    miss_bytes: int = 0
    bad_records: int = 0
    """Damaged, or not what they should have been: read from the device instead."""
    candidate_bytes: int = 0
    """Read from the device or written to it, and fit to be kept."""
    dropped_bytes: int = 0
    """Of candidates: there was no room in memory for them at that time."""
    refused_bytes: int = 0
    """Of candidates: newcomers to a full tier that have to be asked for again."""
    passed_by_bytes: int = 0
    """Of candidates: parts of long sequential streams past a full tier."""
    staged_bytes: int = 0
    """In memory, on their way to the disk."""
    appended_records: int = 0
    raw_bytes: int = 0
    """What was put into records, before compression."""
    stored_bytes: int = 0
    """The same after compression."""
    reappended_bytes: int = 0
    """Of records written again because they were used; part of no other counter."""
    invalidations: int = 0
    """Entries written because the device was about to change."""
    evicted_records: int = 0
    evicted_segments: int = 0
    compress_s: float = 0.0
    """Time of the threads that compress."""
    level: int = 0
    """The zstd level in use; 0: none."""

    @property
    def ratio(self) -> float:
        """How much smaller compression makes things; 1.0 when nothing was stored."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0
