"""What a tier takes on the disk and in memory, while more goes through it than it can hold."""

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import ProgramFailed
from tests.interop.conftest import MEBIBYTE, MakeTgtDisk
from tests.interop.product import Product
from tests.interop.test_memory import OVERHEAD_BYTES_MAX, SAMPLES_MIN, resident
from tests.interop.tiered import TIER_BYTES, options, settle, tier_files, tier_of

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

CACHE_BYTES = 32 * MEBIBYTE
LUN_BYTES = 3 * TIER_BYTES
STAGED_BYTES_MAX = TIER_BYTES // 8
INDEX_BYTES_MAX = MEBIBYTE
"""Some 24 bytes for each 32 KiB of the tier are a twentieth of that."""
EVICTED_MIN = 4
"""Segments: the tier has met its limit, and goes on."""
WORKERS = 4
LOAD_S = 90.0
SIZES = (4096, 65536, 65536, 262144)


@dataclass
class Most:
    """The largest figures that were seen."""

    samples: int = 0
    allocated_bytes: int = 0
    size_bytes: int = 0
    resident_bytes: int = 0

    def look(self, folder: Path, pid: int) -> None:
        stats = [stat for path in tier_files(folder) if (stat := _stat(path)) is not None]
        self.samples += 1
        self.allocated_bytes = max(self.allocated_bytes, sum(one.st_blocks * 512 for one in stats))
        self.size_bytes = max(self.size_bytes, sum(one.st_size for one in stats))
        self.resident_bytes = max(self.resident_bytes, *resident(pid).values())


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


@contextmanager
def watched(folder: Path, pid: int) -> Iterator[Most]:
    """A thread looks all the time."""
    most, is_over = Most(), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            most.look(folder, pid)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield most
        finally:
            is_over.set()
            watching.result()


def load(file: int, seed: int, is_over: threading.Event) -> None:
    """Random reads and writes of what does not compress, and each place comes again."""
    choose = random.Random(seed)
    while not is_over.is_set():
        size = choose.choice(SIZES)
        offset = choose.randrange((LUN_BYTES - size) // 65536) * 65536
        if choose.random() < 0.4:
            os.pwrite(file, choose.randbytes(size), offset)
        else:
            os.pread(file, size, offset)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "is_sealed",
    [pytest.param(False, id="plain"), pytest.param(True, id="sealed", marks=pytest.mark.slow)],
)
def test_the_limits_hold_while_more_goes_through_it_than_fits(
    product: Product, make_tgt_disk: MakeTgtDisk, tmp_path: Path, *, is_sealed: bool
) -> None:
    disk, folder = make_tgt_disk(size_bytes=LUN_BYTES), tmp_path / "tier"
    content = random.Random(1).randbytes(LUN_BYTES)
    disk.backing.write_bytes(content)
    words = options(folder, f"cache_size={CACHE_BYTES}")
    words += [f"cache_key_file={product.secret_file('the key')}"] if is_sealed else []
    with product.mounted(disk.url, *words) as mountpoint:
        file = os.open(mountpoint / disk.name, os.O_RDWR)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            with watched(folder, product.pid(mountpoint)) as most:
                loaded_until_full(product, mountpoint, file)
                settle(product, mountpoint)
        finally:
            os.close(file)
    assert most.samples >= SAMPLES_MIN
    # It was full, and stayed within its limit to the byte.
    assert TIER_BYTES * 7 // 8 < most.allocated_bytes <= TIER_BYTES, most
    assert most.size_bytes <= TIER_BYTES, most
    limit = CACHE_BYTES + OVERHEAD_BYTES_MAX + STAGED_BYTES_MAX + INDEX_BYTES_MAX
    assert CACHE_BYTES < most.resident_bytes < limit, most


def loaded_until_full(product: Product, mountpoint: Path, file: int) -> None:
    """Until the tier has let go of some segments."""
    is_over = threading.Event()
    with ThreadPoolExecutor(WORKERS) as pool:
        loads = [pool.submit(load, file, seed, is_over) for seed in range(WORKERS)]
        try:
            for _ in range(int(LOAD_S)):
                wait(loads, timeout=1, return_when="FIRST_COMPLETED")
                if tier_of(product, mountpoint)["evicted_segments"] >= EVICTED_MIN:
                    break
            else:
                raise ProgramFailed(f"the tier: {tier_of(product, mountpoint)}")
        finally:
            is_over.set()
    for one in loads:
        one.result()
