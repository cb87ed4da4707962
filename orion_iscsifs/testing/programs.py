"""Start and end other people's programs for tests and benchmarks.

Every program runs in a session of its own, so that a Ctrl-C at the terminal reaches the test run
and not the target it still needs to unmount from, and is ended by its process id only.
"""

import contextlib
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.02
LOG_TAIL_BYTES = 2000
PORTS_OF_THE_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")
PORTS_TRIED = 100


class ProgramFailed(RuntimeError):
    """A program ended early, never became ready, or answered with an error."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago.

    The kernel gives it to nobody by itself (for a connection, or to who asks for port 0), so that
    it stays free until it is used, and while its program is restarted. At random: other test runs
    look for one, too.
    """
    end = int(PORTS_OF_THE_KERNEL.read_text(encoding="ascii").split()[0])
    # 0: one of the kernel's after all.
    for port in (*random.sample(range(end // 2, end), PORTS_TRIED), 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                found: int = probe.getsockname()[1]
                return found
    raise ProgramFailed(f"no free port on {host}")


def accepts(host: str, port: int) -> bool:
    """Whether somebody accepts connections there now."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether a socket of this host listens on `port`, found out without connecting to it.

    An old target may take a probe's connection for a client's first login, so it isn't bothered.
    """
    wanted = f"{port:04X}"
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.exists():
            continue
        for row in table.read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state = row.split()[:4]
            if state == "0A" and local.rsplit(":", 1)[1] == wanted:
                return True
    return False


def run(
    arguments: Sequence[str | Path],
    *,
    timeout_s: float = 30.0,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a short command and return its stdout; `ProgramFailed` with what it said otherwise."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed programs, arguments as a list, no shell
            [str(argument) for argument in arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            text=True,
            errors="replace",
            env=environment,
        )
    except FileNotFoundError as error:
        raise ProgramFailed(f"{arguments[0]}: not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ProgramFailed(f"{arguments[0]}: no end after {timeout_s} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise ProgramFailed(f"{arguments[0]}: exit code {done.returncode}: {said}")
    return done.stdout


def wait_until(ready: Callable[[], bool], *, what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Poll `ready` until it is true; `ProgramFailed` naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise ProgramFailed(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(POLL_INTERVAL_S)


class Program:
    """A long-running program with its output in a file; a context manager that ends it."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = Path(arguments[0]).name
        self.log = log
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(  # noqa: S603 - fixed programs, no shell
                    [str(argument) for argument in arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment,
                )
        except FileNotFoundError as error:
            raise ProgramFailed(f"{self.name}: not installed") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def log_tail(self) -> str:
        """The end of what the program has said."""
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait for readiness; a program that ends first has failed."""

        def ready_or_dead() -> bool:
            if not self.running():
                code = self._process.returncode
                raise ProgramFailed(f"{self.name}: ended with {code}: {self.log_tail()}")
            return ready()

        wait_until(ready_or_dead, what=f"{self.name} ready", timeout_s=timeout_s)

    def wait(self, timeout_s: float) -> int:
        """The exit code; `ProgramFailed` if it still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ProgramFailed(f"{self.name}: still running after {timeout_s} s") from error

    def send_signal(self, number: signal.Signals) -> None:
        if self.running():
            self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, insist after `STOP_TIMEOUT_S`; the exit code."""
        self.send_signal(number)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
