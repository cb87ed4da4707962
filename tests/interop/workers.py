"""Looking at the processes of a daemon, and killing the one that works."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.fuse import takeover
from orion_iscsifs.testing.programs import wait_until
from tests.interop.product import Product, alive

OBSTACLE = takeover.obstacle(os.uname().release)
can_take_over = pytest.mark.skipif(OBSTACLE is not None, reason=f"takeover: {OBSTACLE}")
HUNG_S = 90.0


def log_of(product: Product) -> str:
    return "".join(path.read_text() for path in (product.home / "state" / "log").glob("*.log"))


def supervisor_of(product: Product, mountpoint: Path) -> int:
    found = product.status(mountpoint).get("supervisor_pid")
    assert isinstance(found, int)
    return found


def takeovers(product: Product, mountpoint: Path) -> int:
    found = product.status(mountpoint).get("takeovers")
    assert isinstance(found, int)
    return found


def worker_of(supervisor: int) -> int | None:
    """The worker, without asking the mount; None between two."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text(encoding="ascii")
    living = [int(word) for word in children.split() if alive(int(word))]
    return living[0] if living else None


def kill_worker(supervisor: int) -> None:
    """And return when the next one has begun."""
    wait_until(lambda: worker_of(supervisor) is not None, what="a worker", timeout_s=30)
    victim = worker_of(supervisor)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    wait_until(
        lambda: worker_of(supervisor) not in {victim, None}, what="the next worker", timeout_s=30
    )


@contextlib.contextmanager
def in_front(*words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program beside the test, killed at the end if it is still there."""
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL) as program:
        try:
            yield program
        finally:
            program.kill()


@contextlib.contextmanager
def watchdog(product: Product) -> Iterator[None]:
    """A mount that hangs would hang the test, uninterruptibly: its daemon is killed in time."""

    def end() -> None:
        for lock in (product.home / "run").glob("*.lock"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(lock.read_text()), signal.SIGKILL)

    timer = threading.Timer(HUNG_S, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
