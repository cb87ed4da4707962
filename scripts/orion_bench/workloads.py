"""What is measured, as data: one fio job each, and how the mount under it is set up."""

import enum
from dataclasses import dataclass, field, replace

MEBIBYTE = 1 << 20


class Unit(enum.Enum):
    IOPS = "IOPS"
    MB_PER_S = "MB/s"


@dataclass(frozen=True, kw_only=True)
class Workload:
    name: str
    title: str
    unit: Unit
    fio: dict[str, str]
    span_bytes: int = 0
    """The working set; 0: the whole LUN."""
    warm: bool = False
    """Read the working set once before measuring."""
    cached: bool = False
    """Mounted with a cache that holds the working set; otherwise with one that is far too small."""
    options: tuple[str, ...] = field(default=())
    """Further mount options on this project's side."""
    round_trip_s: float | None = None
    """To the target, by a proxy; None: there is no proxy."""
    is_tree: bool = False
    """Files of an ext4 on the LUN are read, and not the LUN's file by fio."""

    @property
    def writes(self) -> bool:
        return "write" in self.fio.get("rw", "")

    def at(self, round_trip_s: float) -> "Workload":
        """The same with the target so far away."""
        far = f"{round_trip_s * 1000:g} ms"
        return replace(
            self,
            name=f"{self.name}@{far.replace(' ', '')}",
            title=f"{self.title}, {far} away",
            round_trip_s=round_trip_s,
        )


def _random(rw: str, depth: int, **more: str) -> dict[str, str]:
    return {
        "rw": rw,
        "bs": "4k",
        "iodepth": str(depth),
        "ioengine": "libaio",
        "direct": "1",
        **more,
    }


def _sequential(rw: str, **more: str) -> dict[str, str]:
    return {"rw": rw, "bs": "1M", "iodepth": "4", "ioengine": "libaio", "direct": "1", **more}


# The working set of hits and absorbed writes: below the default dirty_max, half of cache_size.
SMALL_BYTES = 64 * MEBIBYTE
# The time that the last write-back takes is part of a write's result, unless absorbing is the
# question.
DRAIN = {"end_fsync": "1"}

WORKLOADS = (
    Workload(
        name="randread-32",
        title="random read 4 KiB, depth 32, from the target",
        unit=Unit.IOPS,
        fio=_random("randread", 32),
    ),
    Workload(
        name="randread-1",
        title="random read 4 KiB, depth 1, from the target",
        unit=Unit.IOPS,
        fio=_random("randread", 1),
    ),
    Workload(
        name="randwrite-32",
        title="random write 4 KiB, depth 32, to the target",
        unit=Unit.IOPS,
        fio=_random("randwrite", 32, **DRAIN),
    ),
    Workload(
        name="seqread",
        title="sequential read 1 MiB, direct, depth 4",
        unit=Unit.MB_PER_S,
        fio=_sequential("read"),
    ),
    Workload(
        name="seqwrite",
        title="sequential write 1 MiB, direct, depth 4",
        unit=Unit.MB_PER_S,
        fio=_sequential("write", **DRAIN),
    ),
    Workload(
        name="seqread-buffered",
        title="sequential read 128 KiB, buffered",
        unit=Unit.MB_PER_S,
        fio={"rw": "read", "bs": "128k", "ioengine": "psync", "direct": "0"},
    ),
    Workload(
        name="hits-32",
        title="random read 4 KiB, depth 32, from the cache",
        unit=Unit.IOPS,
        fio=_random("randread", 32),
        span_bytes=SMALL_BYTES,
        warm=True,
        cached=True,
    ),
    Workload(
        name="absorbed-32",
        title="random write 4 KiB, depth 32, absorbed",
        unit=Unit.IOPS,
        fio=_random("randwrite", 32),
        span_bytes=SMALL_BYTES,
        cached=True,
    ),
)

TREE = Workload(
    name="tree",
    title="files of an ext4 over a loop device, one after the other",
    unit=Unit.MB_PER_S,
    fio={},
    is_tree=True,
)

BY_NAME = {workload.name: workload for workload in WORKLOADS}
