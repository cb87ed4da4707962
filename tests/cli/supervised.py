"""A supervisor with workers that do nothing but live and die, as a program of its own.

`python -m tests.cli.supervised HOW…`: what becomes of each worker, one word for each: `refuse`
(before it is ready), `die`, `forbid` (and die), `crash` (an exception), `name` (an error with a
name), `end`, `stay`.
With `--no-takeover` first, nobody may go on. The FUSE device is the writing end of a pipe. Prints
`ready`, a line for each worker, and the error in the end.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from orion_iscsifs.cli import supervisor
from orion_iscsifs.cli.daemon import FORWARDED
from orion_iscsifs.cli.report import Failed
from orion_iscsifs.custody import FUSE, custody
from orion_iscsifs.errors import MountError


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def worker(words: list[str], ready: Callable[[], None]) -> None:
    how = words[min(custody.takeovers, len(words) - 1)]
    inherited = custody.inherit(FUSE)
    say(f"worker {custody.takeovers} {'inherits' if inherited is not None else 'begins'}: {how}")
    if how == "refuse":
        raise MountError("no such target", advice="look again")
    device = inherited
    if device is None:
        _, device = os.pipe()
        custody.keep(FUSE, device)
    custody.resumed()
    told: list[int] = []
    if how == "stay":
        signal.signal(FORWARDED, lambda number, _frame: told.append(number))
    ready()
    if how == "forbid":
        custody.forbid("its write log has failed")
    if how in {"die", "forbid"}:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crash":
        raise ZeroDivisionError("a bug")
    if how == "name":
        raise MountError("it can't go on")
    while how == "stay" and not told:
        time.sleep(0.05)
    custody.drop(FUSE)


def main() -> None:
    words = sys.argv[1:]
    obstacle = "it is not safe" if words[0] == "--no-takeover" else None
    words = [word for word in words if not word.startswith("-")]
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    # The reading end is open as long as a worker lives that has it, and no longer.
    made = supervisor.Supervisor(
        "/mnt/x", obstacle, lambda ready: worker(words, ready), lambda: None, foreground=True
    )
    supervisor.takeover.is_gone = lambda _device: False  # type: ignore[attr-defined]
    try:
        made.run(lambda: say("ready"))
    except Failed as error:
        say(f"failed with {error.code}: {error.line}")
    else:
        say("ended")


if __name__ == "__main__":
    main()
