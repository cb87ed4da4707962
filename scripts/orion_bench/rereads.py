"""Reading again after a remount what was read before: from a tier on a local disk, next to qemu.

The tier is filled at no distance, once. Each measurement mounts afresh, with the target at its
distance and the tier's files out of the page cache, so that they really come from the disk.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from orion_bench.measure import read_through
from orion_bench.sides import Lun, OrionSide, QemuSide, Side
from orion_bench.workloads import BY_NAME, TREE, Workload

_REREADS = (
    TREE,
    *(BY_NAME[name] for name in ("randread-1", "seqread-buffered", "randread-32", "seqread")),
)
_PASSES = 4


def workloads_at(delays: Sequence[float]) -> list[Workload]:
    """What is read again, at each distance."""
    return [workload.at(delay_s) for delay_s in delays for workload in _REREADS]


def sides_with_tier(
    lun: Lun, folder: Path, tier_dir: Path, options: tuple[str, ...]
) -> tuple[Side, Side]:
    """This project with a tier in `tier_dir`, and qemu."""
    tier = (f"tier_dir={tier_dir}", "tier_size=16G", *options)
    return OrionSide(lun, folder, "writeback", "256M", "64M", tier), QemuSide(lun, folder)


def fill_tier(lun: Lun, folder: Path, tier_dir: Path, options: tuple[str, ...]) -> None:
    """Read the whole LUN, at no distance: as often as it takes, since the tier skips what comes
    faster than it can be compressed."""
    lun.be_distant(0)
    ours, _ = sides_with_tier(lun, folder, tier_dir, options)
    with ours.mounted(TREE) as file:
        for _ in range(_PASSES):
            read_through(file, file.stat().st_size)


def forget_pages(folder: Path) -> None:
    """Take its files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def used_bytes(folder: Path) -> int:
    """On the disk, by all files in it."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
