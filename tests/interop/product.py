"""The installed command, as a user runs it, with state and control sockets of its own."""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from orion_iscsifs.testing.programs import Program, free_port, run, wait_until

COMMAND = Path(sys.executable).parent / "orion-iscsifs"
COMMAND_TIMEOUT_S = 60.0


class Hardening(TypedDict):
    """What keeps the daemon running when memory is short."""

    io_flusher: bool
    memory_locked: bool
    oom_score_adj: int | None
    refused: dict[str, str]


class MountStatus(TypedDict):
    """What `status --json` says of one mount, as far as these tests look (INTERFACE §7)."""

    mountpoint: str
    source: str
    pid: int
    state: str
    luns: list[dict[str, object]]
    sessions: list[dict[str, object]]
    hardening: Hardening


@dataclass(frozen=True)
class Outcome:
    """How a command ended. The command line is kept for the message of a failed assertion."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return self.stdout + self.stderr


class Product:
    """Runs `orion-iscsifs` and other programs in one environment."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "ORION_ISCSIFS_STATE": str(home / "state"),
            "ORION_ISCSIFS_RUNTIME": str(home / "run"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "NO_COLOR": "1",
        }
        self._mountpoints = 0

    def __call__(
        self, *arguments: str | Path, code: int | None = 0, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Outcome:
        """Run `orion-iscsifs ARGUMENTS`; its exit code has to be `code`, unless that is None."""
        return self.run(COMMAND, *arguments, code=code, timeout_s=timeout_s)

    def run(
        self, *arguments: str | Path, code: int | None = 0, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Outcome:
        """Run any program. Its output goes through files: a daemon that it leaves behind and that
        holds on to them can't make this wait."""
        words = tuple(str(argument) for argument in arguments)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment,
                timeout=timeout_s,
                check=False,
            )
            out.seek(0)
            err.seek(0)
            outcome = Outcome(words, done.returncode, out.read(), err.read())
        if code is not None:
            assert outcome.code == code, f"{' '.join(words)}: {outcome.code}: {outcome.said}"
        return outcome

    def start(self, *arguments: str | Path) -> Program:
        """`orion-iscsifs ARGUMENTS` in the foreground, as a process to end later."""
        log = self.home / f"{arguments[0]}-{time.monotonic_ns()}.log"
        return Program([COMMAND, *arguments], log=log, environment=self.environment)

    def new_mountpoint(self) -> Path:
        self._mountpoints += 1
        mountpoint = self.home / f"mnt{self._mountpoints}"
        mountpoint.mkdir()
        return mountpoint

    @contextlib.contextmanager
    def mounted(self, source: str, *options: str) -> Iterator[Path]:
        """Mounted inside the block; at its end unmounted by `orion-iscsifs umount`."""
        mountpoint = self.new_mountpoint()
        try:
            self.mount(source, mountpoint, *options)
            yield mountpoint
            if is_mounted(mountpoint):
                self.umount(mountpoint)
        finally:
            abandon(mountpoint)

    def mount(self, source: str, mountpoint: Path, *options: str, code: int = 0) -> Outcome:
        words = ["-o", ",".join(options)] if options else []
        return self("mount", source, mountpoint, *words, code=code)

    def umount(self, mountpoint: Path) -> None:
        """Unmount, and hold the command to its word: the daemon has gone when it returns."""
        pid = self.pid(mountpoint)
        self("umount", mountpoint)
        assert not is_mounted(mountpoint)
        assert not alive(pid), "the daemon still runs although `umount` has returned"

    def status(self, mountpoint: Path) -> MountStatus:
        document = json.loads(self("status", mountpoint, "--json").stdout)
        assert document["version"] == 1
        mounts: list[MountStatus] = document["mounts"]
        (mount,) = mounts
        return mount

    def pid(self, mountpoint: Path) -> int:
        """The daemon's; from the control file where there is one, which costs no new process."""
        with contextlib.suppress(OSError):
            text = (mountpoint / ".orion" / "status.json").read_text(encoding="utf-8")
            pid: int = json.loads(text)["mounts"][0]["pid"]
            return pid
        return self.status(mountpoint)["pid"]

    def secret_file(self, secret: str) -> Path:
        path = self.home / f"secret-{len(list(self.home.glob('secret-*')))}"
        path.touch(mode=0o600)
        path.write_text(secret + "\n", encoding="ascii")
        return path


class EmbeddedTarget:
    """`orion-iscsifs target serve` as a process of its own. Its first disk is LUN 1 here."""

    def __init__(
        self,
        product: Product,
        luns: Mapping[int, str],
        *options: str | Path,
        iqn: str = "iqn.2024-01.org.example:embedded",
    ) -> None:
        self._product = product
        self.iqn = iqn
        self.port = free_port()
        self._arguments: list[str | Path] = ["target", "serve", "--iqn", iqn]
        self._arguments += ["--listen", f"127.0.0.1:{self.port}"]
        for lun, backing in luns.items():
            self._arguments += ["--lun", f"{lun}={backing}"]
        self._arguments += options
        self.program = self._start()

    @property
    def portal_url(self) -> str:
        return f"iscsi://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.portal_url}/{self.iqn}"

    def lun_url(self, lun: int = 1) -> str:
        return f"{self.url}/{lun}"

    def stop(self) -> int:
        """End it with SIGTERM; its exit code."""
        return self.program.stop()

    def resume(self) -> None:
        """Start it again as it was, on the same port."""
        self.program = self._start()

    def _start(self) -> Program:
        program = self._product.start(*self._arguments)
        ready = f"ready {self.url}"
        try:
            program.wait_until(lambda: ready in program.log_tail().splitlines())
        except BaseException:
            program.stop()
            raise
        return program


# -- what the host says ---------------------------------------------------------------------------


def mount_entry(mountpoint: Path) -> list[str] | None:
    """The fields of /proc/mounts for this mount point: source, folder, type, options, ..."""
    for row in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        fields = row.split(" ")
        if fields[1] == str(mountpoint):
            return fields
    return None


def is_mounted(mountpoint: Path) -> bool:
    return mount_entry(mountpoint) is not None


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def abandon(mountpoint: Path) -> None:
    """Take a mount away by force, so that a failed test leaves none behind.

    Aborting the FUSE connection ends held requests at once and lets the daemon end by itself; a
    lazy unmount then needs nobody's answer.
    """
    if not is_mounted(mountpoint):
        return
    with contextlib.suppress(OSError):
        minor = os.minor(os.lstat(mountpoint).st_dev)
        Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1", encoding="ascii")
    subprocess.run(["umount", "-i", "-l", mountpoint], check=False, capture_output=True)


def sized_file(path: Path, size_bytes: int) -> Path:
    """A sparse file of that size."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that do not compress and differ from block to block and from seed to seed."""
    return random.Random(seed).randbytes(length)


def put(path: Path, data: bytes, offset: int = 0, *, sync: bool = False) -> None:
    """Write into the file where it is, without truncating it; `sync`: with an fsync at the end."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        assert file.write(data) == len(data)
        if sync:
            os.fsync(file.fileno())


def get(path: Path, length: int, offset: int = 0) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(length)


@contextlib.contextmanager
def loop_device(file: Path, *, block_bytes: int = 512) -> Iterator[Path]:
    """A loop device with direct I/O on the file, as the manual shows it."""
    how = ["--direct-io=on", "--sector-size", str(block_bytes)]
    device = Path(run(["losetup", "--find", "--show", *how, file]).strip())
    try:
        yield device
    finally:
        run(["losetup", "--detach", device])


def wait_for_text(path: Path, text: str, timeout_s: float = 20.0) -> None:
    wait_until(
        lambda: text in path.read_text(encoding="utf-8", errors="replace"),
        what=f"{text!r} in {path.name}",
        timeout_s=timeout_s,
    )
