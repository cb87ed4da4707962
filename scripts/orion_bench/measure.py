"""Run one fio job on one mounted file and read its report."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from rich.console import Console

from orion_bench.figures import Figure
from orion_bench.sides import Side
from orion_bench.trees import read_tree
from orion_bench.workloads import MEBIBYTE, Unit, Workload
from orion_iscsifs.testing.programs import run


class FioPercentiles(TypedDict):
    percentile: dict[str, int]


class FioDirection(TypedDict):
    iops: float
    bw_bytes: int
    clat_ns: FioPercentiles


def measure_rounds(
    workloads: Sequence[Workload],
    sides: Sequence[Side],
    rounds: int,
    seconds: float,
    *,
    progress: Console,
    before: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, list[Figure]]]:
    """Every workload on every side, `rounds` times; neighbours in time are the two sides.

    `before` is called before each measurement.
    """
    results: dict[str, dict[str, list[Figure]]] = {
        workload.name: {side.name: [] for side in sides} for workload in workloads
    }
    for number in range(1, rounds + 1):
        for workload in workloads:
            # Who goes first changes, so that neither profits from its place.
            for side in sides if number % 2 else reversed(sides):
                before()
                figure = measure(side, workload, seconds=seconds)
                results[workload.name][side.name].append(figure)
                progress.print(
                    f"round {number}  {workload.name:24} {side.name:14}"
                    f" {figure.rate:>10,.0f} {workload.unit.value}",
                    highlight=False,
                )
    return results


def measure(side: Side, workload: Workload, *, seconds: float) -> Figure:
    """Mount, warm the cache if the workload asks for it, run fio, make it durable, unmount."""
    if workload.round_trip_s is not None:
        side.lun.be_distant(workload.round_trip_s)
    with side.mounted(workload) as file:
        span_bytes = workload.span_bytes or file.stat().st_size
        if workload.warm:
            read_through(file, span_bytes)
        if workload.is_tree:
            return read_tree(file, side.folder, seconds)
        figure = _run_fio(file, workload, span_bytes=span_bytes, seconds=seconds)
        if workload.writes:
            _make_durable(file)
    return figure


def _run_fio(file: Path, workload: Workload, *, span_bytes: int, seconds: float) -> Figure:
    settings = {
        **workload.fio,
        "name": workload.name,
        "filename": str(file),
        "size": str(span_bytes),
        "runtime": f"{max(1, round(seconds * 1000))}ms",
        # The same requests on both sides and in every round.
        "randseed": "20240101",
        "norandommap": "1",
        "allow_file_create": "0",
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    report = run(
        ["fio", "--time_based", "--output-format=json", *arguments], timeout_s=seconds + 120
    )
    # fio puts notes in front of the document now and then.
    job = json.loads(report[report.index("{") :])["jobs"][0]
    direction: FioDirection = job["write" if workload.writes else "read"]
    percentile = direction["clat_ns"]["percentile"]
    rate = direction["iops"]
    if workload.unit is Unit.MB_PER_S:
        rate = direction["bw_bytes"] / 1e6
    return Figure(
        rate=rate,
        p50_us=percentile["50.000000"] / 1000,
        p99_us=percentile["99.000000"] / 1000,
    )


def read_through(file: Path, span_bytes: int) -> None:
    """Read all of it once, past the kernel's cache."""
    count = str(span_bytes // MEBIBYTE)
    run(["dd", f"if={file}", "of=/dev/null", "bs=1M", f"count={count}", "iflag=direct"])


def _make_durable(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
