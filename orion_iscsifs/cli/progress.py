"""A progress bar of dirty bytes, only on a terminal and only if it takes a moment."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def dirty_bar() -> Iterator[Callable[[int], None]]:
    """Gives a function that is told the dirty bytes left, from time to time."""
    if not sys.stderr.isatty():
        yield lambda _dirty: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("flushing", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("flush", total=None)
        most = 0

        def show(dirty: int) -> None:
            nonlocal most
            most = max(most, dirty)
            progress.update(task, total=most or None, completed=most - dirty)

        yield show
