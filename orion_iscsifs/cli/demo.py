"""`orion-iscsifs demo`: the whole way once, with no configuration.

An embedded target in a program of its own, a mount of its LUN, a file system on it through a loop
device where that is possible (plain writes and reads otherwise), unmounting, and a look into the
target's backing file. Everything happens in one temporary folder and is gone afterwards.
"""

import hashlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from orion_iscsifs.cli.report import PROGRAM, Exit, Failed
from orion_iscsifs.fuse import mountpoint as mountpoints

LUN_BYTES: Final = 64 << 20
DATA_BYTES: Final = 8 << 20
PLAIN_OFFSET: Final = 5 << 20
START_TIMEOUT_S: Final = 30.0
_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"


@click.command()
def demo() -> None:
    """Embedded target, mount, write, read back, unmount, check: in one go."""
    with tempfile.TemporaryDirectory(prefix="orion-demo-") as folder:
        _Demo(Path(folder)).run()


@dataclass
class _Demo:
    folder: Path

    @property
    def environment(self) -> Mapping[str, str]:
        """Own state and control sockets: a demo leaves nothing behind."""
        return {
            **os.environ,
            "PATH": f"{os.environ.get('PATH', os.defpath)}:{_SBIN}",
            "ORION_ISCSIFS_STATE": str(self.folder / "state"),
            "ORION_ISCSIFS_RUNTIME": str(self.folder / "run"),
        }

    def run(self) -> None:
        backing, mountpoint = self.folder / "disk.img", self.folder / "mnt"
        mountpoint.mkdir()
        data = os.urandom(DATA_BYTES)
        with self._target(backing) as url:
            _step(f"target   {url}")
            lun = mountpoint / "lun1"
            with self._mounted(f"{url.rstrip('/')}/1", mountpoint):
                _step(f"mounted  {lun}, {lun.stat().st_size >> 20} MiB")
                through_loop = self._can_use_loop()
                if through_loop:
                    self._use_file_system(lun, data)
                else:
                    _use_plainly(lun, data)
            _step("unmounted")
        self._check(backing, data, through_loop=through_loop)
        how = "ext4 on a loop device" if through_loop else "plain writes and reads"
        click.echo(f"demo: it works: {DATA_BYTES >> 20} MiB written and read back ({how})")

    # -- the two programs ------------------------------------------------------------------------

    @contextmanager
    def _target(self, backing: Path) -> Iterator[str]:
        lun = f"1={backing},size={LUN_BYTES}"
        arguments = _command("target", "serve", "--listen", "127.0.0.1:0", "--lun", lun)
        with subprocess.Popen(  # noqa: S603 (ourselves)
            arguments, stdout=subprocess.PIPE, text=True, env=self.environment
        ) as target:
            try:
                yield _ready_url(target)
            finally:
                target.terminate()
                target.wait()

    @contextmanager
    def _mounted(self, url: str, mountpoint: Path) -> Iterator[None]:
        self._call(*_command("mount", url, str(mountpoint)))
        try:
            yield
            self._call(*_command("umount", str(mountpoint)))
        finally:
            if mountpoints.find(str(mountpoint)) is not None:
                with suppress(Failed):
                    self._call(*_command("umount", "--force", str(mountpoint)))

    def _call(self, *command: str) -> str:
        done = subprocess.run(  # noqa: S603 (ourselves and Debian's tools, on our own folder)
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise Failed(f"demo: {Path(command[0]).name}: {why}", Exit.FAILED)
        return done.stdout.strip()

    # -- with a file system ----------------------------------------------------------------------

    def _can_use_loop(self) -> bool:
        if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
            return False
        path = self.environment["PATH"]
        return all(shutil.which(tool, path=path) for tool in ("losetup", "mkfs.ext4", "mount"))

    def _use_file_system(self, lun: Path, data: bytes) -> None:
        inside = self.folder / "ext4"
        inside.mkdir()
        with self._loop(lun) as device:
            self._call("mkfs.ext4", "-q", device)
            _step(f"ext4     made on {device} (losetup --direct-io=on)")
            with self._file_system(device, inside):
                (inside / "data").write_bytes(data)
            self._call("fsck.ext4", "-f", "-n", device)
            with self._file_system(device, inside):
                _compare((inside / "data").read_bytes(), data, "the file read back")
        _step("file     written, unmounted, checked by fsck, mounted again, read back")

    @contextmanager
    def _loop(self, lun: Path) -> Iterator[str]:
        device = self._call("losetup", "--find", "--show", "--direct-io=on", str(lun))
        try:
            yield device
        finally:
            self._call("losetup", "--detach", device)

    @contextmanager
    def _file_system(self, device: str, inside: Path) -> Iterator[None]:
        self._call("mount", device, str(inside))
        try:
            yield
        finally:
            self._call("umount", str(inside))

    # -- the proof -------------------------------------------------------------------------------

    def _check(self, backing: Path, data: bytes, *, through_loop: bool) -> None:
        """The backing file alone, with target and mount gone, must hold what was written."""
        if not through_loop:
            with backing.open("rb") as file:
                file.seek(PLAIN_OFFSET)
                _compare(file.read(DATA_BYTES), data, "the target's backing file")
        elif shutil.which("debugfs", path=self.environment["PATH"]):
            copy = self.folder / "copy"
            self._call("debugfs", "-R", f"dump /data {copy}", str(backing))
            _compare(copy.read_bytes(), data, "the target's backing file")
        else:
            self._call("fsck.ext4", "-f", "-n", str(backing))
        _step("backing  file of the target checked")


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "orion_iscsifs", *words]


def _ready_url(target: subprocess.Popen[str]) -> str:
    """The URL of the line `ready URL`."""
    assert target.stdout is not None, "opened as a pipe"
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if select.select([target.stdout], [], [], 0.2)[0]:
            line = target.stdout.readline()
            if line.startswith("ready "):
                return line.split()[1]
            if not line:
                break
    raise Failed(f"demo: {PROGRAM} target serve did not start", Exit.FAILED)


def _use_plainly(lun: Path, data: bytes) -> None:
    with lun.open("r+b") as file:
        file.seek(PLAIN_OFFSET)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(PLAIN_OFFSET)
        _compare(file.read(len(data)), data, "the data read back")
    _step("data     written, fsynced, read back (no root, so no loop device)")


def _compare(found: bytes, written: bytes, what: str) -> None:
    if hashlib.sha256(found).digest() != hashlib.sha256(written).digest():
        raise Failed(f"demo: {what}: differs from what was written", Exit.FAILED)


def _step(text: str) -> None:
    click.echo(text)
