"""Run one fio job on one mounted file and read its report."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from orion_bench.sides import Side
from orion_bench.workloads import MEBIBYTE, Unit, Workload
from orion_iscsifs.testing.programs import run


class FioPercentiles(TypedDict):
    percentile: dict[str, int]


class FioDirection(TypedDict):
    iops: float
    bw_bytes: int
    clat_ns: FioPercentiles


@dataclass(frozen=True)
class Figure:
    """One measurement. `rate` is in the workload's unit."""

    rate: float
    p50_us: float
    p99_us: float


def measure(side: Side, workload: Workload, *, seconds: float) -> Figure:
    """Mount, warm the cache if the workload asks for it, run fio, make it durable, unmount."""
    if workload.round_trip_s is not None:
        side.lun.be_distant(workload.round_trip_s)
    with side.mounted(workload) as file:
        span_bytes = workload.span_bytes or file.stat().st_size
        if workload.warm:
            _read_through(file, span_bytes)
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


def _read_through(file: Path, span_bytes: int) -> None:
    count = str(span_bytes // MEBIBYTE)
    run(["dd", f"if={file}", "of=/dev/null", "bs=1M", f"count={count}", "iflag=direct"])


def _make_durable(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
