"""What keeps a daemon from waiting for itself when memory is short. Never fatal.

Somebody writes to a file system on a loop device on our file. When memory runs out, the kernel
makes room by writing such pages back, and that is work for us: if *our* next allocation had to
wait for it, nobody would ever go on. Three things keep us out of that ring, each of use alone:

- PR_SET_IO_FLUSHER: the kernel reclaims memory for us without any I/O, and does not slow us down
  because too much is dirty. Without it, and under a limit of cgroup v1 that we share with a writer,
  the first touch of a page waits for the group's writeback, and so for ourselves: seen to hang.
  It holds for a thread and for those that it starts later, so it has to be set before there are
  any. A child process keeps it too, which does no harm.
- mlockall: what we once had in memory is never taken away, so no page of ours has to be read back
  at the worst moment. Only what has been touched (MCL_ONFAULT): the cache reserves `cache_size`,
  many GiB perhaps, and each thread 8 MiB of stack; to fill all that at once would cost the memory
  of a full cache from the first moment, and would make a mount wait for it. What has never been
  touched can still be faulted in under IO_FLUSHER's rules.
- oom_score_adj: whoever filled the memory is killed, and not the one through whom it is emptied.

A lock survives neither fork nor exec, so each process of a mount (`cli/supervisor.py`) does this
for itself, after the last fork that makes it.
"""

import ctypes
import logging
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

OOM_SCORE_ADJ: Final = -1000
"""Never chosen by the kernel's OOM killer."""

_OOM_SCORE_ADJ: Final = Path("/proc/self/oom_score_adj")
_PR_SET_IO_FLUSHER: Final = 57
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_MCL_ALL: Final = _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Hardening:
    """What is in force. By itself: nothing."""

    io_flusher: bool = False
    memory_locked: bool = False
    oom_score_adj: int | None = None
    """As it is now, whoever set it; None: not visible to us."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why not, by the name of the field above."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def harden() -> Hardening:
    """Set what we may for this process: after its last fork, before its first thread."""
    refused: dict[str, str] = {}
    for name, (step, needs) in _STEPS.items():
        try:
            step()
        except OSError as error:
            refused[name] = f"{error.strerror} (needs {needs})"
            _log.info("%s is not set: %s", name, refused[name])
    return Hardening(
        io_flusher="io_flusher" not in refused,
        memory_locked="memory_locked" not in refused,
        oom_score_adj=_oom_score_adj(),
        refused=refused,
    )


def _set_io_flusher() -> None:
    # prctl takes longs; what is not said to be one is passed as an int, with an undefined half.
    _check(_libc.prctl(_PR_SET_IO_FLUSHER, *map(ctypes.c_ulong, (1, 0, 0, 0))))


def _lock_memory() -> None:
    """Lock only where no limit counts.

    Below a limit the call may succeed today, and refuse memory that is asked for later: untouched
    memory counts too. So a finite limit is set to 0 meanwhile, and then mlockall works only for
    who may ignore it. (CapEff would not tell: root of a user namespace may not.)
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    meanwhile = hard if hard == resource.RLIM_INFINITY else 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (meanwhile, hard))
    try:
        _check(_libc.mlockall(_MCL_ALL))
    except OSError:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
        raise
    if meanwhile == 0:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def _lower_oom_score() -> None:
    if _oom_score_adj() != OOM_SCORE_ADJ:
        _OOM_SCORE_ADJ.write_text(str(OOM_SCORE_ADJ), encoding="ascii")


def _oom_score_adj() -> int | None:
    try:
        return int(_OOM_SCORE_ADJ.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


_STEPS: Final[Mapping[str, tuple[Callable[[], None], str]]] = {
    "io_flusher": (_set_io_flusher, "CAP_SYS_RESOURCE and Linux 5.6"),
    "memory_locked": (_lock_memory, "CAP_IPC_LOCK, or no limit of locked memory (ulimit -l)"),
    "oom_score_adj": (_lower_oom_score, "CAP_SYS_RESOURCE"),
}
