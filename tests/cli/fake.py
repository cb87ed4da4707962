"""A daemon over memory instead of iSCSI, started like the real command (a program of its own).

`python -m tests.cli.fake PROGRAM-NAME ARGUMENTS…`. Environment:
FAKE_FILE: the device's backing file; its size is the device's.
FAKE_FLUSH_S: how long a flush takes; FAKE_FLUSH_FAILS: path; a flush fails while the file exists.
FAKE_OPEN_S: how long opening the stack takes.
FAKE_OPEN_ERROR: the stack can't be opened, with this message.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry, GeometryListener
from orion_iscsifs.config import MountConfig
from orion_iscsifs.errors import ConnectFailed, ConnectionLost
from orion_iscsifs.url import Source


class CachedFile:
    """Writes stay in memory until a flush, as in a write-back cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = bytearray(path.read_bytes())
        self.dirty_bytes = 0
        self.geometry = Geometry(size_bytes=len(self._content))

    async def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = memoryview(self._content)[offset : offset + len(target)]

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self._content[offset : offset + len(source)] = source
        self.dirty_bytes += len(source)

    async def flush(self) -> None:
        await trio.sleep(float(os.environ.get("FAKE_FLUSH_S", "0")))
        failing = os.environ.get("FAKE_FLUSH_FAILS")
        if failing and os.path.exists(failing):  # noqa: ASYNC240 (a test)
            raise ConnectionLost("192.0.2.1:3260: the target has gone")
        self._path.write_bytes(self._content)
        self.dirty_bytes = 0

    async def discard(self, offset: int, length: int) -> None:
        """A hint."""

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self.write(offset, bytes(length))

    def on_geometry_change(self, listener: GeometryListener) -> None:
        """Never changes."""


class FakeStack:
    def __init__(self, device: CachedFile) -> None:
        self._device = device

    @property
    def files(self) -> dict[str, BlockDevice]:
        return {"lun1": self._device}

    async def drain(self) -> None:
        for device in self.files.values():
            await device.flush()

    def on_files_change(self, listener: object) -> None:
        """Nothing ever changes."""

    def unmounting(self) -> None:
        """Nobody waits for it."""

    def give_back(self) -> None:
        """There is no reservation."""

    async def end_earlier(self) -> list[str]:
        return []

    def describe(self, path: str) -> dict[str, str]:
        return {"name": path}

    def status(self) -> dict[str, Any]:
        return {
            "luns": [{"name": "lun1", "lun": 1, "dirty_bytes": self._device.dirty_bytes}],
            "sessions": [{"target": "iqn.2024-01.org.example:disk", "state": "logged-in"}],
        }


@asynccontextmanager
async def open_fake(
    source: Source, config: MountConfig, mountpoint: str
) -> AsyncIterator[FakeStack]:
    if message := os.environ.get("FAKE_OPEN_ERROR"):
        raise ConnectFailed(message, advice="is the target running?")
    await trio.sleep(float(os.environ.get("FAKE_OPEN_S", "0")))
    yield FakeStack(CachedFile(Path(os.environ["FAKE_FILE"])))


def run() -> None:
    import orion_iscsifs.cli.mount
    from orion_iscsifs.cli.main import main

    def fake() -> Any:
        return open_fake

    orion_iscsifs.cli.mount._real_stack = fake
    sys.argv = sys.argv[1:]
    main()


if __name__ == "__main__":
    run()
