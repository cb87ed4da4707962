"""However a mount ends, what is dirty is written first. Over a file system that does nothing."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cli import daemon
from orion_iscsifs.cli.report import Failed
from orion_iscsifs.config import MountConfig, SessionConfig
from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.fuse.hardening import Hardening
from orion_iscsifs.fuse.kernel import KernelLimits
from orion_iscsifs.url import Source
from tests.fuse.devices import ByteDevice

SOURCE = Source(host="h", target="iqn.2024-01.org.example:disk", lun=1)
CONFIG = MountConfig(session=SessionConfig(initiator_name="iqn.2024-01.org.example:me"))


class NoMount:
    """`FuseMount` without a kernel: serves until it is told to end, or `breaks` is set."""

    def __init__(self, *_: object, **__: object) -> None:
        self.limits = KernelLimits()
        self.breaks = trio.Event()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            task_status.started()
            with self.scope:
                await self.breaks.wait()
                raise RuntimeError("the loop broke")
        finally:
            self.ended.set()

    def terminate(self) -> None:
        self.scope.cancel()

    async def unmount(self) -> None:
        self.terminate()

    async def wait_ended(self) -> None:
        await self.ended.wait()


class Device(ByteDevice):
    """Its flush takes a moment, and fails as often as it is told."""

    failures: int = 0
    error: Exception = ConnectionLost("the target has gone")

    async def flush(self) -> None:
        await trio.sleep(0.01)
        if self.failures:
            self.failures -= 1
            raise self.error
        await super().flush()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    monkeypatch.setenv("ORION_ISCSIFS_RUNTIME", str(tmp_path))
    monkeypatch.setattr(daemon, "FuseMount", NoMount)
    monkeypatch.setattr(daemon, "RETRY_S", 0.01)
    return Device(1 << 20)


def make(device: BlockDevice) -> daemon.Daemon:
    class Stack:
        files: Mapping[str, BlockDevice] = {"lun1": device}

        async def drain(self) -> None:
            await device.flush()

        def on_files_change(self, listener: object) -> None:
            """Nothing ever changes."""

        def unmounting(self) -> None:
            """Nobody waits for it."""

        def give_back(self) -> None:
            """There is no reservation."""

        async def end_earlier(self) -> list[str]:
            return []

        def describe(self, path: str) -> Mapping[str, str]:
            return {"name": path}

        def status(self) -> Mapping[str, Any]:
            return {"luns": [{"name": "lun1", "dirty_bytes": 5}]}

    @asynccontextmanager
    async def open_stack(
        _source: Source, _config: MountConfig, _mountpoint: str
    ) -> AsyncIterator[Stack]:
        yield Stack()

    return daemon.Daemon(SOURCE, "/mnt/x", CONFIG, open_stack, hardening=Hardening())


async def test_a_cancelled_daemon_flushes(device: Device) -> None:
    with trio.CancelScope() as scope:
        await make(device).run(scope.cancel)
    assert scope.cancelled_caught
    assert device.flushes == 1


async def test_a_broken_file_system_is_reported_after_the_flush(device: Device) -> None:
    made = make(device)

    def break_it() -> None:
        made._mount.breaks.set()  # type: ignore[attr-defined]

    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run, break_it)
    assert caught.group_contains(RuntimeError, match="the loop broke")
    assert device.flushes == 1


async def test_one_that_is_unmounted_before_it_is_ready_has_ended_in_order(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unmounted_at_once(mount: NoMount, *, task_status: object) -> None:
        mount.ended.set()

    monkeypatch.setattr(NoMount, "serve", unmounted_at_once)
    readied: list[bool] = []
    await make(device).run(lambda: readied.append(True))
    assert readied
    assert device.flushes == 1


@pytest.mark.parametrize("error", [ConnectionLost("gone"), ZeroDivisionError("a bug")])
async def test_a_failed_flush_is_tried_again(device: Device, error: Exception) -> None:
    device.failures, device.error = 3, error
    made = make(device)
    ready: Callable[[], None] = lambda: made._mount.terminate()  # noqa: E731 (made later)
    await made.run(ready)
    assert device.flushes == 1


async def test_giving_up(device: Device) -> None:
    device.failures = 1_000_000
    made = make(device)

    def ready() -> None:
        made._mount.terminate()
        made._give_up()

    with pytest.raises(Failed, match="5 bytes given up"):
        await made.run(ready)
    assert device.flushes == 0
