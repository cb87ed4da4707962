"""The two ways to get a file out of a LUN: this project, and qemu-storage-daemon.

Each measurement mounts afresh: caches start empty, and only one of the two ever has the LUN.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orion_bench.workloads import Workload
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.programs import Program, ProgramFailed, run
from orion_iscsifs.testing.tgt import Tgt, TgtTarget

COMMAND = Path(sys.executable).parent / "orion-iscsifs"


@dataclass(frozen=True)
class Lun:
    daemon: Tgt
    target: TgtTarget
    backing: Path
    """The target's file."""
    proxy: TcpProxy | None = None
    """Makes the target distant."""

    @property
    def portal(self) -> str:
        return self.daemon.portal if self.proxy is None else self.proxy.portal

    @property
    def url(self) -> str:
        return self.target.lun_url(1) if self.proxy is None else self.proxy.url(self.target.iqn, 1)

    def be_distant(self, round_trip_s: float) -> None:
        """Each round trip takes that long, from now on."""
        assert self.proxy is not None
        self.proxy.shape(delay_s=round_trip_s / 2)


class Side(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def lun(self) -> Lun: ...

    @property
    def folder(self) -> Path:
        """For what a measurement needs."""

    def mounted(self, workload: Workload) -> contextlib.AbstractContextManager[Path]:
        """The LUN's file, for as long as the block lasts."""


def _is_mounted(path: Path) -> bool:
    rows = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    return any(row.split(" ")[1] == str(path) for row in rows)


def _force_off(path: Path) -> None:
    """Take a mount away whatever its daemon does; held requests end with an error."""
    if not _is_mounted(path):
        return
    with contextlib.suppress(OSError):
        minor = os.minor(os.lstat(path).st_dev)
        Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1", encoding="ascii")
    with contextlib.suppress(ProgramFailed):
        run(["umount", "-i", "-l", path])


@dataclass(frozen=True)
class OrionSide:
    """`orion-iscsifs mount` … `umount`."""

    lun: Lun
    folder: Path
    cache: str
    cache_size: str
    small_cache_size: str
    options: tuple[str, ...]
    name: str = "orion-iscsifs"

    @contextlib.contextmanager
    def mounted(self, workload: Workload) -> Iterator[Path]:
        mountpoint = self.folder / "mnt"
        mountpoint.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "ORION_ISCSIFS_STATE": str(self.folder / "state"),
            "ORION_ISCSIFS_RUNTIME": str(self.folder / "run"),
        }
        options = [f"cache={self.cache}", *self.options, *workload.options]
        if self.cache != "none":
            size = self.cache_size if workload.cached else self.small_cache_size
            options.append(f"cache_size={size}")
        arguments: list[str | Path] = ["mount", self.lun.url, mountpoint, "-o", ",".join(options)]
        try:
            run([COMMAND, *arguments], environment=environment)
            yield mountpoint / "lun1"
            run([COMMAND, "umount", mountpoint], environment=environment, timeout_s=120)
        finally:
            _force_off(mountpoint)


@dataclass(frozen=True)
class QemuSide:
    """qemu-storage-daemon with libiscsi below and its FUSE export above; it has no cache.

    Only its speed is a mark: the FUSE export of qemu 7.2 mixes up data of writes in flight.
    """

    lun: Lun
    folder: Path
    name: str = "qemu"

    @contextlib.contextmanager
    def mounted(self, workload: Workload) -> Iterator[Path]:
        file = self.folder / "qemu-lun1"
        file.touch()
        blockdev = (
            "driver=iscsi,node-name=lun,transport=tcp,cache.direct=on"
            f",portal={self.lun.portal},target={self.lun.target.iqn},lun=1"
        )
        export = f"type=fuse,id=export,node-name=lun,mountpoint={file},writable=on,allow-other=off"
        arguments = ["qemu-storage-daemon", "--blockdev", blockdev, "--export", export]
        log = self.folder / "qemu-storage-daemon.log"
        try:
            with Program(arguments, log=log) as program:
                program.wait_until(lambda: _is_mounted(file))
                yield file
        finally:
            _force_off(file)
