"""Into the background, with the outcome told to whoever waits in front.

The command forks twice before any thread or event loop exists. The daemon, no child of anybody's
terminal, tells through a pipe how the start went: `{"pid": …}`, then either `{"ready": true}` or
`{"error": line, "code": n}`. Until it is ready, its stderr is still the user's.
"""

import json
import logging
import math
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, NoReturn

from orion_iscsifs.cli.report import Exit, Failed, describe, exit_code, orion_error, verbosity

_log = logging.getLogger(__name__)

INTERRUPTED_S: Final = 10.0
"""How long an interrupted start may take to end."""
TICK_S: Final = 0.05
"""How soon an interrupt is noticed."""

Body = Callable[[Callable[[], None]], None]
"""Runs the daemon; calls its argument once the mount can be used."""


def run_in_background(body: Body, *, failure: int) -> None:
    """Return once the daemon is ready. Raises `Failed` with its one line if it never is."""
    reading, writing = os.pipe()
    # An interrupt in the middle of a fork would be swallowed by Python's own hooks, and one in the
    # middle of reading could cost a message. So it stays blocked, and is asked for.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        first = os.fork()
        if first == 0:
            os.close(reading)
            _leave_terminal()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _run(body, writing, failure)
        os.close(writing)
        os.waitpid(first, 0)
        _await_ready(reading, failure)
    except BaseException:
        _take_interrupt()  # it has been heeded
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    finally:
        os.close(reading)
    # The mount stands, and the command is over: what is pressed now comes too late.


def _leave_terminal() -> None:
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    os.chdir("/")
    os.umask(0o077)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _run(body: Body, writing: int, failure: int) -> NoReturn:
    """Never returns: the rest of the command belongs to the process in front."""

    pipe = open(writing, "wb", buffering=0)  # noqa: SIM115 (lives as long as the process)

    def send(**message: Any) -> bool:  # noqa: ANN401 (JSON)
        """Whether the command in front was still there to hear it."""
        if not pipe.closed:
            with suppress(BrokenPipeError):
                pipe.write(json.dumps(message).encode() + b"\n")
                return True
        return False

    def ready() -> None:
        if not send(ready=True):
            # The command was interrupted, so nobody knows of this mount: it ends as it came.
            os.kill(os.getpid(), signal.SIGTERM)
        pipe.close()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        os.close(null)

    code: int = Exit.DONE
    try:
        send(pid=os.getpid())
        body(ready)
    except BaseException as error:  # the process ends here, whatever it was
        code = exit_code(error, failure=failure)
        if pipe.closed:
            _log.critical("%s", describe(error), exc_info=orion_error(error) is None)
        elif verbosity.debug:
            traceback.print_exception(error)
        send(error=describe(error), code=code)
    os._exit(code)


def _await_ready(pipe: int, failure: int) -> None:
    """Return when the daemon says that it is ready; after an interrupt, end it."""
    heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    pid, told, give_up_at = 0, False, math.inf
    for message in _messages(pipe):
        pid = message.get("pid", pid)
        if _take_interrupt() and heeded:
            give_up_at = min(give_up_at, time.monotonic() + INTERRUPTED_S)
        if give_up_at < math.inf:
            # A mount that came about all the same is told again.
            if pid and (not told or message.get("ready")):
                told = True
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            if time.monotonic() > give_up_at:
                break
        elif message.get("ready"):
            return
        elif "error" in message:
            raise Failed(message["error"], message["code"])
    if give_up_at == math.inf:
        advice = "run it with -f to see why"
        raise Failed("mount: the daemon died at its start", failure, advice=advice)
    while pid and _is_alive(pid) and time.monotonic() < give_up_at:
        time.sleep(TICK_S)
    raise Failed("mount: interrupted", failure, advice="nothing is mounted")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _messages(pipe: int) -> Iterator[dict[str, Any]]:
    """What the daemon says until it closes its end, as its exit does; now and then nothing, {}."""
    poll, rest = select.poll(), b""
    poll.register(pipe, select.POLLIN)
    while True:
        yield {}
        if poll.poll(TICK_S * 1000):
            content = os.read(pipe, 4096)
            if not content:
                return
            *lines, rest = (rest + content).split(b"\n")
            yield from map(json.loads, lines)


def _take_interrupt() -> bool:
    """Whether the user has pressed Ctrl-C since the last call."""
    return signal.sigtimedwait({signal.SIGINT}, 0) is not None
