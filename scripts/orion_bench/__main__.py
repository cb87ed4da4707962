"""`scripts/bench`: the same workloads on both sides, alternating, in one run."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console

from orion_bench.appends import appends_as_json, measure_appends, print_appends
from orion_bench.measure import measure_rounds
from orion_bench.report import OURS, THEIRS, Results, as_json, print_table
from orion_bench.rereads import (
    fill_tier,
    forget_pages,
    sides_with_tier,
    used_bytes,
    workloads_at,
)
from orion_bench.sides import Lun, OrionSide, QemuSide, Side
from orion_bench.trees import fill_with_tree
from orion_bench.workloads import BY_NAME, MEBIBYTE, Workload
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.programs import ProgramFailed
from orion_iscsifs.testing.tgt import Tgt

IQN = "iqn.2024-01.org.example:bench"


@contextlib.contextmanager
def temporary_folder(where: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="orion-bench-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fill(path: Path, size_bytes: int) -> None:
    """Real pages with bytes that do not compress, so that no layer gets away with a zero."""
    block = os.urandom(MEBIBYTE)
    with path.open("wb") as file:
        for _ in range(size_bytes // MEBIBYTE):
            file.write(block)


@contextlib.contextmanager
def served_lun(
    folder: Path, size_bytes: int, *, distant: bool, content: Callable[[Path, int], None] = fill
) -> Iterator[Lun]:
    backing = folder / "backing.img"
    content(backing, size_bytes)
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(Tgt(folder))
        target = daemon.add_target(IQN)
        target.add_lun(1, backing)
        proxy = None
        if distant:
            host, _, port = daemon.portal.rpartition(":")
            proxy = stack.enter_context(TcpProxy(host, int(port)))
        yield Lun(daemon, target, backing, proxy)


def _chosen(_context: click.Context, _parameter: click.Parameter, value: str) -> list[Workload]:
    names = value.split(",") if value else list(BY_NAME)
    if unknown := [name for name in names if name not in BY_NAME]:
        raise click.BadParameter(f"no workload {unknown[0]!r}; there are {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names]


def _delays(_context: click.Context, _parameter: click.Parameter, value: str) -> list[float]:
    """Milliseconds, comma-separated, as seconds."""
    try:
        delays = [float(word) / 1000 for word in value.split(",") if word]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected milliseconds, as in 0,1,5,20") from None
    if any(not 0 <= delay <= 1 for delay in delays):
        raise click.BadParameter("0 to 1000 milliseconds")
    return delays


def _terminate(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@click.command(context_settings={"max_content_width": 100})
@click.option("--workloads", callback=_chosen, default="", help="Comma-separated; default: all.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True)
@click.option("--lun-mib", type=click.IntRange(128), default=2048, show_default=True)
@click.option("--sides", default=f"{OURS},{THEIRS}", show_default=True)
@click.option("--cache", default="writeback", show_default=True, help="cache= of our mount.")
@click.option("--cache-size", default="256M", show_default=True, help="Where the cache counts.")
@click.option("--small-cache-size", default="64M", show_default=True, help="Where it shouldn't.")
@click.option("--option", "-o", "options", multiple=True, help="Further mount option of ours.")
@click.option(
    "--delays",
    callback=_delays,
    default="",
    help="Round trips to the target in ms, as in 0,1,5,20; default: no proxy in between.",
)
@click.option(
    "--fsync",
    "appends",
    is_flag=True,
    help="append+fsync on ext4 over a loop device, for every cache= of ours; needs root.",
)
@click.option(
    "--tier",
    "rereads",
    is_flag=True,
    help="Read again after a remount, from a tier on a local disk; 5 ms unless --delays; as root.",
)
@click.option("--json", "as_document", is_flag=True, help="One JSON document on stdout.")
def main(
    workloads: list[Workload],
    rounds: int,
    seconds: float,
    lun_mib: int,
    sides: str,
    cache: str,
    cache_size: str,
    small_cache_size: str,
    options: tuple[str, ...],
    delays: list[float],
    appends: bool,
    rereads: bool,
    as_document: bool,
) -> None:
    """Measure this project's mount next to qemu-storage-daemon's FUSE export of the same LUN.

    The LUN is a file in memory served by a tgtd of the benchmark's own. Rounds alternate between
    the two sides; the table shows medians and the ratio.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if appends:
        delays = delays or [0.001, 0.005, 0.020]
    if rereads:
        delays = delays or [0.005]
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own inside it
    with (
        temporary_folder(memory) as folder,
        served_lun(
            folder,
            lun_mib * MEBIBYTE,
            distant=bool(delays),
            content=fill_with_tree if rereads else fill,
        ) as lun,
    ):
        run = Run(lun, folder, rounds, seconds, delays, as_document)
        if appends:
            _compare_appends(run)
        elif rereads:
            _compare_rereads(run, options)
        else:
            ours = OrionSide(lun, folder, cache, cache_size, small_cache_size, options)
            known: dict[str, Side] = {OURS: ours, THEIRS: QemuSide(lun, folder)}
            names = sides.split(",")
            if unknown := [name for name in names if name not in known]:
                raise click.BadParameter(f"no side {unknown[0]!r}; there are {', '.join(known)}")
            _compare(run, workloads, [known[name] for name in names])


@dataclass(frozen=True)
class Run:
    """What all comparisons have in common. Times in seconds."""

    lun: Lun
    folder: Path
    rounds: int
    seconds: float
    delays: list[float]
    as_document: bool
    progress: Console = field(default_factory=lambda: Console(stderr=True))

    def show(self, workloads: list[Workload], results: Results) -> None:
        if self.as_document:
            click.echo(as_json(workloads, results))
        else:
            print_table(Console(width=140), workloads, results)


def _compare(run: Run, workloads: list[Workload], sides: list[Side]) -> None:
    if run.delays:
        workloads = [workload.at(delay_s) for delay_s in run.delays for workload in workloads]
    results = measure_rounds(workloads, sides, run.rounds, run.seconds, progress=run.progress)
    run.show(workloads, results)


def _compare_appends(run: Run) -> None:
    # The log belongs on a disk: a sync in memory costs nothing.
    with temporary_folder(Path(tempfile.gettempdir())) as log_dir:
        latencies = measure_appends(
            run.lun, run.folder, log_dir, run.delays, run.rounds, run.seconds, run.progress
        )
    if run.as_document:
        click.echo(appends_as_json(latencies))
    else:
        print_appends(Console(width=140), latencies)


def _compare_rereads(run: Run, options: tuple[str, ...]) -> None:
    workloads = workloads_at(run.delays)
    with temporary_folder(Path(tempfile.gettempdir())) as tier_dir:
        fill_tier(run.lun, run.folder, tier_dir, options)
        results = measure_rounds(
            workloads,
            sides_with_tier(run.lun, run.folder, tier_dir, options),
            run.rounds,
            run.seconds,
            progress=run.progress,
            before=lambda: forget_pages(tier_dir),
        )
        used = used_bytes(tier_dir) // MEBIBYTE
    size = run.lun.backing.stat().st_size // MEBIBYTE
    run.progress.print(f"the tier: {used} MiB for {size} MiB", highlight=False)
    run.show(workloads, results)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ProgramFailed as error:
        click.echo(f"bench: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("bench: interrupted", err=True)
        sys.exit(130)
