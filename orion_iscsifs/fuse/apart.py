"""What may never return, done by a process that can be left behind.

A system call on a FUSE mount waits for the mount's daemon. If that hangs, the call can't be
interrupted once the daemon has taken the request, not even by SIGKILL, and a process with such a
thread can't end. So commands never make these calls themselves: a child does (this file, run as a
program by itself, imports next to nothing), and is abandoned when its time is up.
"""

import ctypes
import errno
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

ANSWER_S: Final = 5.0
"""How long a living daemon may take to answer a question."""
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_CHUNK_BYTES: Final = 1 << 16
_OWN_SCORE: Final = "/proc/self/oom_score_adj"


class NoAnswer(TimeoutError):
    """The child did not end in time; it was killed, or will be once the kernel lets it."""


def ask(question: str, path: str, *, timeout_s: float = ANSWER_S) -> str:
    """One of `_QUESTIONS`, asked of `path`. Raises OSError as the call itself, or `NoAnswer`."""
    words = [sys.executable, "-I", "-S", __file__, question, path]
    _, said = run(words, timeout_s=timeout_s)
    try:
        answer: dict[str, int | str] = json.loads(said)
    except ValueError:
        raise OSError(errno.EIO, f"{question}: {said.decode(errors='replace').strip()}") from None
    if "errno" in answer:
        code = int(answer["errno"])
        raise OSError(code, os.strerror(code), path)
    return str(answer["value"])


def run(words: Sequence[str], *, timeout_s: float) -> tuple[int, bytes]:
    """A program's exit code and all it says. Raises `NoAnswer`; OSError if it can't be started."""
    reading, writing = os.pipe()
    try:
        child = os.posix_spawn(
            words[0],
            list(words),
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, writing, 1),
                (os.POSIX_SPAWN_DUP2, writing, 2),
            ],
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    _no_exception_for(child)
    try:
        said = _read_all(reading, time.monotonic() + timeout_s)
    except BaseException:
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
        with suppress(OSError):
            os.waitpid(child, os.WNOHANG)
        raise
    finally:
        os.close(reading)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said


def _no_exception_for(child: int) -> None:
    """What a daemon starts is not kept from the OOM killer as the daemon is (`hardening.py`)."""
    with suppress(OSError, ValueError), open(_OWN_SCORE, encoding="ascii") as ours:
        if int(ours.read()) < 0:
            with open(f"/proc/{child}/oom_score_adj", "w", encoding="ascii") as theirs:
                theirs.write("0")


def _read_all(reading: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    said = bytearray()
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise NoAnswer(errno.ETIMEDOUT, "no answer")
        chunk = os.read(reading, _CHUNK_BYTES)
        if not chunk:
            return bytes(said)
        said += chunk


# -- in the child --------------------------------------------------------------------------------


def _alive(path: str) -> str:
    os.statvfs(path)  # unlike stat(), never answered from the kernel's cache
    return ""


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _sync(path: str) -> str:
    """fsync every file below; `sync` never reaches a FUSE server."""

    def refused(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(path, onerror=refused):
        for name in names:
            file = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
    return ""


def _umount(path: str, flags: int = 0) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), flags | _UMOUNT_NOFOLLOW) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return ""


_QUESTIONS: Final[Mapping[str, Callable[[str], str]]] = {
    "alive": _alive,
    "realpath": os.path.realpath,
    "read": _read,
    "sync": _sync,
    "umount": _umount,
    "detach": lambda path: _umount(path, _MNT_DETACH),
}


def _answer(question: str, path: str) -> None:
    try:
        answer: dict[str, int | str] = {"value": _QUESTIONS[question](path)}
    except OSError as error:
        answer = {"errno": error.errno or errno.EIO}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
