"""append+fsync on ext4 over a loop device on the LUN's file: what a database or a mail server does.

Each append is 4 KiB and each is followed by an fsync: ext4 writes data and journal, and the loop
device passes the flushes on. So a figure holds several writes and flushes of the LUN.
"""

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orion_bench.sides import Lun, OrionSide, QemuSide, Side
from orion_bench.trees import mounted_ext4
from orion_bench.workloads import Unit, Workload
from orion_iscsifs.testing.programs import ProgramFailed, run

CACHES = ("none", "writethrough", "writeback", "log")


@dataclass(frozen=True)
class Latency:
    """Of one append with its fsync."""

    mean_ms: float
    p99_ms: float


Latencies = Mapping[float, Mapping[str, Sequence[Latency]]]
"""Round trip in seconds → side → one latency a round; none where the side could not do it."""

_WORKLOAD = Workload(name="append", title="append+fsync", unit=Unit.IOPS, fio={"rw": "write"})


def measure_appends(
    lun: Lun,
    folder: Path,
    log_dir: Path,
    delays: Sequence[float],
    rounds: int,
    seconds: float,
    progress: Console,
) -> Latencies:
    """Every side at every distance, `rounds` times."""
    sides: list[Side] = [
        OrionSide(
            lun, folder, cache, "256M", "256M", _options(cache, log_dir), name=f"cache={cache}"
        )
        for cache in CACHES
    ]
    sides.append(QemuSide(lun, folder))
    latencies: dict[float, dict[str, list[Latency]]] = {
        delay_s: {side.name: [] for side in sides} for delay_s in delays
    }
    for number in range(1, rounds + 1):
        for delay_s in delays:
            for side in sides:
                words = "not possible"
                with contextlib.suppress(ProgramFailed):
                    latency = _measure(side, folder, delay_s, seconds)
                    latencies[delay_s][side.name].append(latency)
                    words = f"{latency.mean_ms:.2f} ms"
                progress.print(
                    f"round {number}  {delay_s * 1000:g} ms  {side.name:20} {words}",
                    highlight=False,
                )
    return latencies


def _options(cache: str, log_dir: Path) -> tuple[str, ...]:
    return (f"log_dir={log_dir}",) if cache == "log" else ()


def _measure(side: Side, folder: Path, delay_s: float, seconds: float) -> Latency:
    side.lun.be_distant(0)
    _make_file_system(side.lun.backing)
    with side.mounted(_WORKLOAD) as file, mounted_ext4(file, folder) as files:
        side.lun.be_distant(delay_s)
        try:
            return _append(files / "appended", seconds)
        finally:
            side.lun.be_distant(0)


def _make_file_system(backing: Path) -> None:
    """At the target: qemu's FUSE export damages one that is made through it."""
    lazy = "lazy_itable_init=0,lazy_journal_init=0"
    # Blocks as on a large disk; a small one would get 1 KiB, and reads before writes.
    words: list[str | Path] = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", lazy, backing, "256M"]
    run(words, timeout_s=120)


def _append(path: Path, seconds: float) -> Latency:
    settings = {
        "name": "append",
        "filename": str(path),
        "rw": "write",
        "bs": "4k",
        "size": "128m",
        "ioengine": "psync",
        "fallocate": "none",
        "fsync": "1",
        "runtime": f"{max(1, round(seconds * 1000))}ms",
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    report = run(
        ["fio", "--time_based", "--output-format=json", *arguments], timeout_s=seconds + 120
    )
    job = json.loads(report[report.index("{") :])["jobs"][0]
    return Latency(
        mean_ms=1000 / job["write"]["iops"],
        p99_ms=job["sync"]["lat_ns"]["percentile"]["99.000000"] / 1e6,
    )


def _median(latencies: Sequence[Latency]) -> Latency | None:
    if not latencies:
        return None
    return Latency(
        mean_ms=statistics.median(latency.mean_ms for latency in latencies),
        p99_ms=statistics.median(latency.p99_ms for latency in latencies),
    )


def print_appends(console: Console, latencies: Latencies) -> None:
    table = Table(box=None, pad_edge=False, title="append+fsync, mean / p99 of the fsync in ms")
    table.add_column("round trip", justify="right")
    for name in next(iter(latencies.values())):
        table.add_column(name, justify="right")
    for delay_s, sides in latencies.items():
        medians = [_median(each) for each in sides.values()]
        cells = [f"{each.mean_ms:.2f} / {each.p99_ms:.2f}" if each else "-" for each in medians]
        table.add_row(f"{delay_s * 1000:g} ms", *cells)
    console.print(table)


def appends_as_json(latencies: Latencies) -> str:
    appends = [
        {
            "round_trip_ms": delay_s * 1000,
            "side": name,
            "mean_ms": median.mean_ms if median else None,
            "p99_ms": median.p99_ms if median else None,
            "rounds_ms": [latency.mean_ms for latency in each],
        }
        for delay_s, sides in latencies.items()
        for name, each in sides.items()
        for median in [_median(each)]
    ]
    return json.dumps({"version": 1, "appends": appends}, indent=2)
