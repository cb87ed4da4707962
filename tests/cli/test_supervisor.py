"""What becomes of a worker that ends, and what of the mount. With workers that do nothing else."""

import signal
import subprocess
import sys
import time

import pytest

from orion_iscsifs.testing.programs import wait_until
from tests.cli.conftest import REPOSITORY


def supervised(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.supervised", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(*words: str) -> tuple[list[str], str]:
    """The lines on stdout, and the log."""
    with supervised(*words) as program:
        try:
            said, log = program.communicate(timeout=40)
        finally:
            program.kill()
    return said.splitlines(), log


def test_a_worker_that_ends_by_itself_ends_all() -> None:
    assert outcome("end") == (["worker 0 begins: end", "ready", "ended"], "")


def test_a_worker_that_never_gets_ready() -> None:
    said, log = outcome("refuse")
    assert said == ["worker 0 begins: refuse", "failed with 32: no such target (look again)"]
    assert log == ""


@pytest.mark.parametrize(("how", "why"), [("die", "was killed by SIGKILL"), ("crash", "code 32")])
def test_one_that_dies_is_replaced(how: str, why: str) -> None:
    said, log = outcome("die", how, "end")
    assert said[:2] == ["worker 0 begins: die", "ready"]
    assert said[2:] == [f"worker 1 inherits: {how}", "worker 2 inherits: end", "ended"]
    assert why in log
    assert log.count("taken over by process") == 2


def test_it_is_not_replaced_where_that_is_not_safe() -> None:
    said, _ = outcome("--no-takeover", "die", "end")
    assert said[:2] == ["worker 0 begins: die", "ready"]
    assert "was killed by SIGKILL; the mount ends with it: it is not safe" in said[2]
    assert len(said) == 3


def test_a_worker_can_forbid_it() -> None:
    said, _ = outcome("die", "forbid", "end")
    assert said[2] == "worker 1 inherits: forbid"
    assert "was killed by SIGKILL; the mount ends with it: its write log has failed" in said[3]
    assert len(said) == 4


def test_one_that_can_not_go_on_is_believed() -> None:
    said, _ = outcome("die", "name", "end")
    assert said[2] == "worker 1 inherits: name"
    assert said[3].startswith("failed with 32: it can't go on (unmount /mnt/x")
    assert len(said) == 4


def test_not_more_than_five_in_a_minute() -> None:
    started = time.monotonic()
    said, log = outcome("die")
    assert sum(line.startswith("worker") for line in said) == 6
    assert "6 times within 60 s: the mount is given up" in said[-1]
    assert log.count("a new one takes the mount over") == 5
    assert time.monotonic() - started > 3  # the pauses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_handed_on(number: int) -> None:
    with supervised("die", "stay") as program:
        try:
            assert program.stdout is not None
            for expected in ("worker 0 begins: die", "ready", "worker 1 inherits: stay"):
                assert program.stdout.readline().strip() == expected
            time.sleep(0.5)
            program.send_signal(number)
            said, _ = program.communicate(timeout=20)
        finally:
            program.kill()
    assert said.splitlines()[-1] == "ended"


def test_a_worker_does_not_outlive_the_supervisor() -> None:
    with supervised("stay") as program:
        assert program.stdout is not None
        assert "worker" in program.stdout.readline()
        program.kill()
        # Its copy of stdout is the last one: the pipe ends with the worker.
        wait_until(lambda: program.stdout is not None and not program.stdout.readline(), what="end")
