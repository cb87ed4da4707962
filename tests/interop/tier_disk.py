"""A small file system for a tier, and what can happen to it."""

import contextlib
import fcntl
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from orion_iscsifs.testing.programs import run
from tests.interop.conftest import MEBIBYTE
from tests.interop.product import loop_device, sized_file
from tests.interop.tiered import segments

_SHUTDOWN = 0x8004587D
"""FS_IOC_SHUTDOWN: from now on everything there fails, as if the disk had gone."""
_WITHOUT_LOG = 2


class TierDisk:
    """ext4 on a loop device; `misfortunes` come while a mount uses it, `mend` after its end."""

    def __init__(self, device: Path, folder: Path) -> None:
        self._device = device
        self.folder = folder
        self._filler = folder / "filler"
        self._aside = folder / "aside"
        self._chosen = random.Random(6)
        self._is_broken = False

    def delete(self) -> None:
        """The tier's folder with all that is in it."""
        for path in self.folder.glob("*.tier"):
            shutil.rmtree(path)

    def delete_segments(self) -> None:
        for path in segments(self.folder):
            path.unlink(missing_ok=True)

    def move_away(self) -> None:
        """And back after the end: what is in it is out of date by then."""
        self._aside.mkdir()
        for path in self.folder.glob("*.tier"):
            path.rename(self._aside / path.name)

    def fill(self) -> None:
        """Until there is no room left, not even for a page."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (MEBIBYTE, 4096):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def turn_read_only(self) -> None:
        """As ext4 does after an error: also for files that are open."""
        self._is_broken = True
        run(["mount", "-o", "remount,abort", self.folder])

    def shut_down(self) -> None:
        """Nothing can be read or written any more."""
        self._is_broken = True
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        finally:
            os.close(folder)

    def overwrite(self) -> None:
        """Pages of segments, with noise: headers, entries, records."""
        for path in segments(self.folder):
            with contextlib.suppress(FileNotFoundError), path.open("r+b", buffering=0) as file:
                pages = os.fstat(file.fileno()).st_size // 4096
                for page in (self._chosen.choice([0, 1]), *self._chosen.sample(range(pages), 16)):
                    file.seek(page * 4096 + self._chosen.randrange(64))
                    file.write(self._chosen.randbytes(512))

    def truncate(self) -> None:
        for path in segments(self.folder):
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, self._chosen.choice([0, 4096, 4096 * 3, MEBIBYTE]))

    def mend(self) -> None:
        """A disk that works, with what it still has."""
        if self._is_broken:
            self._is_broken = False
            run(["umount", self.folder])
            self._mount()
        self._filler.unlink(missing_ok=True)
        if self._aside.exists():
            for path in self._aside.iterdir():
                shutil.rmtree(self.folder / path.name, ignore_errors=True)
                path.rename(self.folder / path.name)
            self._aside.rmdir()

    def _mount(self) -> None:
        run(["mount", "-o", "noatime", self._device, self.folder])


@contextlib.contextmanager
def tier_disk(backing: Path, folder: Path, size_bytes: int) -> Iterator[TierDisk]:
    """Needs root. `folder` is where it is mounted, and is made."""
    folder.mkdir()
    with loop_device(sized_file(backing, size_bytes)) as device:
        run(["mkfs.ext4", "-q", "-m", "0", device])
        disk = TierDisk(device, folder)
        disk._mount()
        try:
            yield disk
        finally:
            run(["umount", "-l", folder])
