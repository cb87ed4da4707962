"""How much memory and time a large tier takes to open."""

import time
from pathlib import Path

import pytest

from orion_iscsifs.testing import tiers as synthetic
from orion_iscsifs.tier.store import TierStore

GIB = 1 << 30
MIB = 1 << 20


def memory_of(folder: Path) -> tuple[int, int, float]:
    """Bytes of the index, frames, and seconds to open."""
    began = time.perf_counter()
    store = TierStore.open(folder)
    try:
        assert not store.resume(boot_id="another boot")
        return store.index.memory_bytes, store.index.frames, time.perf_counter() - began
    finally:
        store.close()


def test_a_tenth_of_the_large_one(memory_path: Path) -> None:
    frames = synthetic.make(memory_path / "tier", tier_bytes=10 * GIB, records=160_000)
    memory_bytes, found, _ = memory_of(memory_path / "tier")
    assert found == frames
    assert memory_bytes < 24 * found


@pytest.mark.slow
def test_100_gib(memory_path: Path) -> None:
    """1.6 million records: less than 64 MiB. `orion_bench.tier` says how long it takes."""
    frames = synthetic.make(memory_path / "tier", tier_bytes=100 * GIB, records=1_600_000)
    memory_bytes, found, seconds = memory_of(memory_path / "tier")
    assert found == frames
    assert memory_bytes < 64 * MIB
    assert seconds < 60


@pytest.mark.slow
def test_as_many_records_as_there_can_be(memory_path: Path) -> None:
    """However well everything compresses."""
    synthetic.make(memory_path / "tier", tier_bytes=100 * GIB, records=3_270_000)
    memory_bytes, found, _ = memory_of(memory_path / "tier")
    assert found > 3_250_000
    assert memory_bytes < 64 * MIB
