"""The daemon of one mount: data path, file system, control socket and their order of ending.

The end always goes the same way, however it was begun (umount(8), our command, a signal): first
the kernel's mount goes, so that no new request comes; then every device is flushed, again and
again until it works; only then the sessions log out and the process ends. Dirty data is given up
only on request: `umount --force`, or a second signal while it is being flushed.
"""

import json
import logging
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cli.report import Exit, Failed, orion_error
from orion_iscsifs.cli.trimming import trim
from orion_iscsifs.config import MountConfig
from orion_iscsifs.config.places import create_private, runtime_dir
from orion_iscsifs.config.render import to_toml
from orion_iscsifs.errors import MountError, OrionError
from orion_iscsifs.fuse.control import control_files
from orion_iscsifs.fuse.hardening import Hardening
from orion_iscsifs.fuse.mount import FuseMount
from orion_iscsifs.fuse.operations import DeviceFiles
from orion_iscsifs.monitor import control, metrics
from orion_iscsifs.monitor.status import Status, dirty_bytes, document, mount_status
from orion_iscsifs.url import Source

_log = logging.getLogger(__name__)

RETRY_S: Final = 5.0
"""Between two tries to flush after the mount has gone."""
ABANDONED_S: Final = 5.0
"""How long the data path may take to end once its dirty data is given up."""
CLOSE_S: Final = 20.0
"""How long logging out may take once everything is durable."""
PROGRESS_S: Final = 0.2
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stack(Protocol):
    """What the daemon needs of `orion_iscsifs.stack.Stack`."""

    @property
    def files(self) -> Mapping[str, BlockDevice]: ...

    def on_files_change(self, listener: Callable[[str, BlockDevice | None], None]) -> None: ...

    async def drain(self) -> None: ...

    def unmounting(self) -> None: ...

    def describe(self, path: str) -> Mapping[str, str]: ...

    def status(self) -> Mapping[str, Any]: ...


OpenStack = Callable[[Source, MountConfig, str], AbstractAsyncContextManager[Stack]]


class Daemon:
    """One mount, from log-in to log-out."""

    def __init__(
        self,
        source: Source,
        mountpoint: str,
        config: MountConfig,
        open_stack: OpenStack,
        *,
        hardening: Hardening,
    ) -> None:
        """`mountpoint` has passed `fuse.mountpoint.check`; `hardening` is what is in force."""
        self._source = source
        self._mountpoint = mountpoint
        self._config = config
        self._open_stack = open_stack
        self._hardening = hardening
        self._scope = trio.CancelScope()
        self._abandon = trio.Event()
        self._signals = 0
        self._state: str | None = None
        self._failure: Exception | None = None
        self._lost_bytes = 0

    async def run(self, ready: Callable[[], None]) -> None:
        """Return when everything is over; `ready` is called once the files can be read."""
        with self._scope:
            async with self._open_stack(self._source, self._config, self._mountpoint) as stack:
                await self._serve(stack, ready)
        if self._lost_bytes:
            raise Failed(f"{self._mountpoint}: {self._lost_bytes} bytes given up", Exit.FAILED)

    async def _serve(self, stack: Stack, ready: Callable[[], None]) -> None:
        self._stack = stack
        self._filesystem = DeviceFiles(
            stack.files,
            config=self._config.fuse,
            control=control_files(
                status=self._status_text,
                metrics=lambda: metrics.prometheus_text(self.status()),
                config=to_toml(self._config, self._source.redacted()),
            ),
        )
        self._filesystem.describe = stack.describe
        stack.on_files_change(self._file_changed)
        self._mount = FuseMount(
            self._filesystem,
            self._mountpoint,
            fsname=self._source.redacted(),
            config=self._config.fuse,
        )
        path = control.socket_path(create_private(runtime_dir()), self._mountpoint)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals, nursery)
            await nursery.start(self._serve_control, path)
            await nursery.start(self._serve_mount)
            try:
                _log.info("%s is mounted on %s", self._source, self._mountpoint)
                ready()
                await self._mount.wait_ended()
            finally:
                # Whatever ended it, dirty data is written first. Only `_abandon` ends this.
                with trio.CancelScope(shield=True):
                    self._state = "unmounting"
                    stack.unmounting()
                    self._mount.terminate()
                    await self._mount.wait_ended()
                    await self._drain()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def _file_changed(self, path: str, device: BlockDevice | None) -> None:
        if device is None:
            self._filesystem.remove_file(path)
        else:
            self._filesystem.add_file(path, device)

    async def _serve_mount(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """An error after the start is kept for the end: the devices must be flushed first."""
        mounted = False

        class Started(trio.TaskStatus[None]):
            def started(self, value: None = None) -> None:
                nonlocal mounted
                mounted = True
                task_status.started()

        try:
            await self._mount.serve(task_status=Started())
        except Exception as error:
            if not mounted:
                raise
            _log.critical("the file system ended: %s", error, exc_info=error)
            self._failure = error
        else:
            if not mounted:
                raise MountError(f"mount {self._mountpoint}: ended by a signal")

    async def _serve_control(
        self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        operations = {"status": self._op_status, "flush": self._op_flush, "abandon": self._op_end}
        operations_on = {"trim": self._op_trim}
        await control.serve(path, operations, operations_on=operations_on, task_status=task_status)

    # -- ending ----------------------------------------------------------------------------------

    async def _watch_signals(self, nursery: trio.Nursery) -> None:
        """The first one unmounts and flushes, the second gives up what can't be written."""
        with trio.open_signal_receiver(*_SIGNALS) as received:
            async for number in received:
                self._signals += 1
                _log.info("%s", signal.Signals(number).name)
                if self._signals > 1:
                    self._give_up()
                elif self._state is None:
                    self._state = "unmounting"
                    # Not awaited here: it may take long, and the second signal must be heard.
                    nursery.start_soon(self._mount.unmount)

    async def _drain(self) -> None:
        """Flush until it works, or until somebody gives the data up."""
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._cancel_when_abandoned, nursery.cancel_scope)
                    await self._stack.drain()
                    nursery.cancel_scope.cancel()
                    _log.info("everything is durable on the target")
                    self._scope.deadline = trio.current_time() + CLOSE_S
                    return
            except* Exception as group:
                known = orion_error(group)
                _log.error(
                    "%d bytes are not on the target yet: %s; trying again",
                    dirty_bytes(self.status()),
                    known or group.exceptions[0],
                    exc_info=None if known else group,
                )
            with trio.move_on_after(RETRY_S):
                await self._abandon.wait()
            if self._abandon.is_set():
                self._lost_bytes = dirty_bytes(self.status())
                _log.critical("%d bytes were given up", self._lost_bytes)
                self._scope.deadline = trio.current_time() + ABANDONED_S
                return

    async def _cancel_when_abandoned(self, scope: trio.CancelScope) -> None:
        await self._abandon.wait()
        scope.cancel()

    def _give_up(self) -> None:
        self._abandon.set()
        self._mount.terminate()

    # -- status ----------------------------------------------------------------------------------

    def status(self) -> Status:
        """One entry of the status document."""
        known = dict(self._stack.status())
        counters = self._filesystem.counters()
        known["luns"] = [
            {**lun, **(asdict(counters[lun["name"]]) if lun.get("name") in counters else {})}
            for lun in known.get("luns", ())
        ]
        return mount_status(
            mountpoint=self._mountpoint,
            source=self._source.redacted(),
            pid=os.getpid(),
            state=self._state,
            stack=known,
            kernel=self._mount.limits.as_dict(),
            hardening=self._hardening.as_dict(),
        )

    def _status_text(self) -> str:
        return json.dumps(document([self.status()]), indent=2) + "\n"

    # -- control operations ----------------------------------------------------------------------

    async def _op_status(self, _send: control.Send) -> control.Message:
        return {"status": self.status()}

    async def _op_flush(self, send: control.Send) -> control.Message:
        async def progress() -> None:
            with suppress(trio.BrokenResourceError):  # the client has gone; the flush goes on
                while True:
                    await send({"dirty_bytes": dirty_bytes(self.status())})
                    await trio.sleep(PROGRESS_S)

        failure: OrionError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(progress)
            try:
                await self._stack.drain()
            except* OrionError as group:
                failure = orion_error(group)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return {"dirty_bytes": dirty_bytes(self.status())}

    async def _op_trim(self, request: control.Message, send: control.Send) -> control.Message:
        read_only = self._config.fuse.read_only
        return await trim(self._stack.files, request, send, read_only=read_only)

    async def _op_end(self, _send: control.Send) -> control.Message:
        lost = dirty_bytes(self.status())
        self._give_up()
        return {"dirty_bytes": lost}
