"""A memory cgroup of a test's own, in whichever version this host has."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orion_iscsifs.testing.programs import ProgramFailed, run, wait_until


class NoMemoryGroup(Exception):
    """None can be made here; the message says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """Processes of this folder share a limit, and so does the page cache that they fill."""

    folder: Path
    version: int

    def __post_init__(self) -> None:
        if not (self.folder / self._limit).exists():
            raise NoMemoryGroup(f"{self.folder} has no {self._limit}")

    @property
    def peak_bytes(self) -> int:
        """The most that was ever in use; 0 where the kernel does not count it (before 5.19)."""
        file = self.folder / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")
        return int(file.read_text(encoding="ascii")) if file.exists() else 0

    @property
    def times_full(self) -> int:
        """How often somebody met the limit, and had to make room first."""
        if self.version == 1:
            return int((self.folder / "memory.failcnt").read_text(encoding="ascii"))
        return self._event("memory.events", "max")

    @property
    def killed(self) -> int:
        """How many processes of it the kernel has killed for lack of memory."""
        file = "memory.events" if self.version == 2 else "memory.oom_control"
        return self._event(file, "oom_kill")

    def limit(self, limit_bytes: int) -> None:
        self._put(self._limit, str(limit_bytes))
        # What is swapped out would not press.
        with contextlib.suppress(OSError):
            if self.version == 2:
                self._put("memory.swap.max", "0")
            else:
                self._put("memory.swappiness", "0")

    def command(self, *words: str | Path) -> list[str | Path]:
        """These words as a command that runs, with all its children, inside."""
        enter = 'echo $$ >"$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, self.folder / "cgroup.procs", *words]

    def pids(self) -> list[int]:
        return [int(row) for row in (self.folder / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Kill whoever is left in it, and take it away."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(self._removed, what=f"the end of {self.folder}")

    @property
    def _limit(self) -> str:
        return "memory.max" if self.version == 2 else "memory.limit_in_bytes"

    def _removed(self) -> bool:
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()

    def _event(self, file: str, name: str) -> int:
        for row in (self.folder / file).read_text(encoding="ascii").splitlines():
            if row.split()[0] == name:
                return int(row.split()[1])
        return 0

    def _put(self, file: str, value: str) -> None:
        (self.folder / file).write_text(value, encoding="ascii")


@contextlib.contextmanager
def memory_group(limit_bytes: int, private: Path) -> Iterator[MemoryGroup]:
    """A new group. `private` is where the hierarchy is mounted for a while if it is nowhere else.

    Raises `NoMemoryGroup`.
    """
    with contextlib.ExitStack() as undo:
        version, parent = _mounted() or _mount(private, undo)
        folder = parent / f"orion-iscsifs-test-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            folder.mkdir()
        except OSError as error:
            raise NoMemoryGroup(f"no group can be made in {parent}: {error.strerror}") from None
        undo.callback(_remove_folder, folder)
        group = MemoryGroup(folder, version)
        undo.callback(group.remove)
        try:
            group.limit(limit_bytes)
        except OSError as error:
            raise NoMemoryGroup(f"no limit can be set in {folder}: {error.strerror}") from None
        yield group


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()


def _mounted() -> tuple[int, Path] | None:
    """The version that has the memory controller, and where a group may be made."""
    for row in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, folder, kind, options = row.split(" ")[:4]
        if kind == "cgroup2" and _delegates(Path(folder)):
            return 2, Path(folder)
        if kind == "cgroup" and "memory" in options.split(","):
            return 1, _own_group(Path(folder))
    return None


def _mount(private: Path, undo: contextlib.ExitStack) -> tuple[int, Path]:
    private.mkdir()
    try:
        run(["mount", "-t", "cgroup2", "none", private])
    except ProgramFailed as error:
        raise NoMemoryGroup(f"no cgroup with memory is mounted, nor may be: {error}") from None
    undo.callback(run, ["umount", "-l", private])
    if not _delegates(private):
        raise NoMemoryGroup("neither cgroup version offers its memory controller here")
    return 2, private


def _delegates(root: Path) -> bool:
    """Whether groups below `root` have the memory controller, or may have it from now on."""
    control = root / "cgroup.subtree_control"
    try:
        if "memory" not in (root / "cgroup.controllers").read_text(encoding="ascii").split():
            return False
        if "memory" not in control.read_text(encoding="ascii").split():
            control.write_text("+memory", encoding="ascii")
    except OSError:
        return False
    return True


def _own_group(root: Path) -> Path:
    """Below the group we are in, where it is visible: its limits go on to hold."""
    for row in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = row.split(":", 2)
        if "memory" in controllers.split(","):
            own = root / path.lstrip("/")
            return own if own.is_dir() else root
    return root
