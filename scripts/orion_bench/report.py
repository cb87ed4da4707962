"""Medians and ratios, as a table or as JSON."""

import json
import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from orion_bench.figures import Figure
from orion_bench.workloads import Unit, Workload

Results = Mapping[str, Mapping[str, Sequence[Figure]]]
"""Workload name → side name → one figure a round."""

OURS, THEIRS = "orion-iscsifs", "qemu"


def _median(figures: Sequence[Figure]) -> Figure:
    return Figure(
        rate=statistics.median(figure.rate for figure in figures),
        p50_us=statistics.median(figure.p50_us for figure in figures),
        p99_us=statistics.median(figure.p99_us for figure in figures),
    )


def _rate(figure: Figure, unit: Unit) -> str:
    return f"{figure.rate:,.0f} {unit.value}"


def print_table(console: Console, workloads: Sequence[Workload], results: Results) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("workload", no_wrap=True)
    for heading in (OURS, THEIRS, "ratio", "ours p50/p99 µs", "qemu p50/p99 µs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for workload in workloads:
        cells = [workload.title]
        medians = {side: _median(figures) for side, figures in results[workload.name].items()}
        ours, theirs = medians.get(OURS), medians.get(THEIRS)
        cells += [_rate(figure, workload.unit) if figure else "-" for figure in (ours, theirs)]
        cells.append(f"{ours.rate / theirs.rate:.2f}" if ours and theirs else "-")
        cells += [
            f"{figure.p50_us:,.0f} / {figure.p99_us:,.0f}" if figure else "-"
            for figure in (ours, theirs)
        ]
        table.add_row(*cells)
    console.print(table)


def as_json(workloads: Sequence[Workload], results: Results) -> str:
    document = []
    for workload in workloads:
        sides = {
            side: {
                "median": _median(figures).rate,
                "p50_us": _median(figures).p50_us,
                "p99_us": _median(figures).p99_us,
                "rounds": [figure.rate for figure in figures],
            }
            for side, figures in results[workload.name].items()
        }
        ratio = None
        if OURS in sides and THEIRS in sides:
            ratio = sides[OURS]["median"] / sides[THEIRS]["median"]  # type: ignore[operator]
        document.append(
            {
                "workload": workload.name,
                "title": workload.title,
                "unit": workload.unit.value,
                "sides": sides,
                "ratio": ratio,
            }
        )
    return json.dumps({"version": 1, "workloads": document}, indent=2)
