"""Into the background, with the outcome told to whoever waits in front.

The command forks twice before any thread or event loop exists. The daemon, no child of anybody's
terminal, tells through a pipe how the start went: `{"pid": …}`, then either `{"ready": true}` or
`{"error": line, "code": n}`. Until it is ready, its stderr is still the user's.
"""

import json
import logging
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Final, NoReturn

from orion_iscsifs.cli.report import Exit, Failed, describe, exit_code, orion_error, verbosity

_log = logging.getLogger(__name__)

INTERRUPTED_S: Final = 10.0
"""How long an interrupted start may take to end."""

Body = Callable[[Callable[[], None]], None]
"""Runs the daemon; calls its argument once the mount can be used."""


def run_in_background(body: Body, *, failure: int) -> None:
    """Return once the daemon is ready. Raises `Failed` with its one line if it never is."""
    reading, writing = os.pipe()
    # An interrupt in the middle of a fork would be swallowed by Python's own hooks, or leave a
    # daemon that nobody knows of. It is kept until it can be acted on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    first = os.fork()
    if first == 0:
        os.close(reading)
        _leave_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _run(body, writing, failure)
    os.close(writing)
    os.waitpid(first, 0)
    with os.fdopen(reading, "rb") as messages:
        _await_ready(messages, failure, before)


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


def _await_ready(messages: BinaryIO, failure: int, mask: set[int]) -> None:
    """`mask`: the signals that are to be blocked from now on."""
    pid = 0
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for line in messages:
            message = json.loads(line)
            pid = message.get("pid", pid)
            if message.get("ready"):
                return
            if "error" in message:
                raise Failed(message["error"], message["code"])
    except KeyboardInterrupt:
        pid = pid or json.loads(messages.readline() or b"{}").get("pid", 0)
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        _await_end(messages)
        raise Failed("mount: interrupted", failure, advice="nothing is mounted") from None
    raise Failed("mount: the daemon died at its start", failure, advice="run it with -f to see why")


def _await_end(messages: BinaryIO) -> None:
    """Wait until the daemon has closed its end of the pipe, as its exit does."""
    poll, ends = select.poll(), time.monotonic() + INTERRUPTED_S
    poll.register(messages, select.POLLIN)
    while (left_s := ends - time.monotonic()) > 0 and poll.poll(left_s * 1000):
        if not os.read(messages.fileno(), 4096):
            return
