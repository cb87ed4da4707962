"""A real mount inside the test's process; what blocks in it runs in threads or other programs."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from orion_iscsifs.config import FuseConfig
from orion_iscsifs.fuse import mountpoint
from orion_iscsifs.fuse.mount import FuseMount
from orion_iscsifs.fuse.operations import DeviceFiles
from tests.fuse.devices import ByteDevice

T = TypeVar("T")


@dataclass
class Mounted:
    folder: Path
    filesystem: DeviceFiles
    mount: FuseMount

    @property
    def lun(self) -> Path:
        return self.folder / "lun1"

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """A system call on the mount: never on the thread that answers it."""
        return await trio.to_thread.run_sync(function, *args)

    async def run(self, *command: str | Path, **environment: str) -> str:
        """A program; its output. Fails the test when it fails."""
        done = await trio.run_process(
            [str(word) for word in command],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, **environment},
        )
        output = done.stdout.decode(errors="replace")
        assert done.returncode == 0, f"{command}: {done.returncode}\n{output}"
        return output


MountFiles = Callable[..., AbstractAsyncContextManager[Mounted]]


@pytest.fixture
def mount_files(tmp_path: Path) -> MountFiles:
    """`async with mount_files({"lun1": device}, read_only=True) as mounted`."""
    folder = tmp_path / "mnt"
    folder.mkdir()

    @asynccontextmanager
    async def mounted(files: Mapping[str, ByteDevice], **config: Any) -> AsyncIterator[Mounted]:
        settings = FuseConfig(**config)
        filesystem = DeviceFiles(
            files, config=settings, control={"status.json": lambda: b'{"version": 1}\n'}
        )
        mount = FuseMount(
            filesystem, mountpoint.check(str(folder)), fsname="a,test\\", config=settings
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(mount.serve)
            try:
                yield Mounted(folder, filesystem, mount)
            finally:
                with trio.CancelScope(shield=True):
                    await mount.unmount()
                nursery.cancel_scope.cancel()

    return mounted
