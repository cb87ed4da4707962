"""The daemon of one mount: data path, file system, control socket and their order of ending.

The end always goes the same way, however it was begun (umount(8), our command, a signal): first
the kernel's mount goes, so that no new request comes; then every device is flushed, again and
again until it works; only then the sessions log out and the process ends. Dirty data is given up
only on request: `umount --force`, or a second signal while it is being flushed.

It runs in a worker process (`cli/supervisor.py`). If that is killed, a new one begins here again,
with `custody` full of what the dead one has left: it opens the data path as the kernel knows it
(`cli/reopening.py`) and goes on with the same mount.
"""

import json
import logging
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Final, Protocol

import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cli.reopening import MountGone, patience_s, reopened
from orion_iscsifs.cli.report import Exit, Failed, orion_error
from orion_iscsifs.cli.trimming import trim
from orion_iscsifs.config import MountConfig
from orion_iscsifs.config.places import create_private, runtime_dir
from orion_iscsifs.config.render import to_toml
from orion_iscsifs.custody import custody
from orion_iscsifs.errors import MountError, OrionError
from orion_iscsifs.fuse.control import control_files
from orion_iscsifs.fuse.handover import Handover
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
FORWARDED: Final = signal.SIGUSR1
"""The supervisor has got one of `SIGNALS`. Not that one itself: the same signal may have been sent
to all processes of a service, and must not count twice."""
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stack(Protocol):
    """What the daemon needs of `orion_iscsifs.stack.Stack`."""

    @property
    def files(self) -> Mapping[str, BlockDevice]: ...

    def on_files_change(self, listener: Callable[[str, BlockDevice | None], None]) -> None: ...

    async def drain(self) -> None: ...

    def unmounting(self) -> None: ...

    def give_back(self) -> None: ...

    async def end_earlier(self) -> list[str]: ...

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
        self._state: str | None = None
        self._failure: Exception | None = None
        self._lost_bytes = 0
        self._is_open: trio.Event | None = None
        """Of a mount that is taken over: its data path is there. None: it was there before."""
        self._awaited = Handover()
        """What is to be opened again."""
        self._control = trio.CancelScope()

    async def run(self, ready: Callable[[], None]) -> None:
        """Return when everything is over; `ready` is called once the files can be read."""
        known = Handover.of(custody)
        with self._scope:
            async with background() as nursery:
                if known is not None:
                    self._is_open, self._awaited = trio.Event(), known
                    await nursery.start(self._serve_control)
                try:
                    async with self._opened(known) as stack:
                        await self._serve(stack, known or Handover(), ready)
                except MountGone as error:
                    _log.info("%s: %s", self._mountpoint, error)
        if self._lost_bytes:
            raise Failed(f"{self._mountpoint}: {self._lost_bytes} bytes given up", Exit.FAILED)

    def _opened(self, known: Handover | None) -> AbstractAsyncContextManager[Stack]:
        """The data path; `known`: of a mount that an earlier worker has left."""
        opened = partial(self._open_stack, self._source, self._config, self._mountpoint)
        if known is None:
            return opened()
        return reopened(opened, known.disks, custody, patience_s=patience_s(self._config))

    async def _serve(self, stack: Stack, known: Handover, ready: Callable[[], None]) -> None:
        self._stack = stack
        self._filesystem = DeviceFiles(
            stack.files,
            config=self._config.fuse,
            control=control_files(
                status=self._status_text,
                metrics=lambda: metrics.prometheus_text(self.status()),
                config=to_toml(self._config, self._source.redacted()),
            ),
            describe=stack.describe,
            handover=known,
            save=known.saver(custody),
        )
        stack.on_files_change(self._file_changed)
        self._mount = FuseMount(
            self._filesystem,
            self._mountpoint,
            fsname=self._source.redacted(),
            config=self._config.fuse,
            handover=known,
            save=known.saver(custody),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals, nursery)
            if self._is_open is not None:
                self._is_open.set()
            else:
                await nursery.start(self._serve_control)
            await nursery.start(self._serve_mount)
            try:
                _log.info("%s is mounted on %s", self._source, self._mountpoint)
                custody.resumed()
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
            self._control.cancel()
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
            if not mounted and self._state is not None:
                raise MountError(f"mount {self._mountpoint}: ended by a signal")
            if not mounted:
                # Whoever saw the files was quicker to unmount them than we to look at the kernel's
                # limits: a mount that has begun and ended in order.
                task_status.started()

    async def _serve_control(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        path = control.socket_path(create_private(runtime_dir()), self._mountpoint)
        operations = {
            "status": self._op_status,
            "flush": self._op_flush,
            "release": self._op_release,
            "abandon": self._op_end,
        }
        operations_on = {"trim": self._op_trim}
        with self._control:
            await control.serve(
                path, operations, operations_on=operations_on, task_status=task_status
            )

    # -- ending ----------------------------------------------------------------------------------

    async def _watch_signals(self, nursery: trio.Nursery) -> None:
        """The first one unmounts and flushes, the second gives up what can't be written."""
        count = {True: 0, False: 0}
        with trio.open_signal_receiver(*SIGNALS, FORWARDED) as received:
            async for number in received:
                count[number == FORWARDED] += 1
                _log.info("%s", signal.Signals(number).name)
                if max(count.values()) > 1:
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
        if self._is_open is not None and not self._is_open.is_set():
            return self._status_before()
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
            supervisor_pid=custody.supervisor_pid,
            takeovers=custody.takeovers,
            hardening=self._hardening.as_dict(),
        )

    def _status_before(self) -> Status:
        """While the data path of a mount is opened again."""
        return mount_status(
            mountpoint=self._mountpoint,
            source=self._source.redacted(),
            pid=os.getpid(),
            state="recovering",
            stack={"luns": [{"name": path} for path in sorted(self._awaited.disks)]},
            supervisor_pid=custody.supervisor_pid,
            takeovers=custody.takeovers,
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
            if self._is_open is not None:
                await self._is_open.wait()
            try:
                await self._stack.drain()
            except* OrionError as group:
                failure = orion_error(group)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return {"dirty_bytes": dirty_bytes(self.status())}

    async def _op_trim(self, request: control.Message, send: control.Send) -> control.Message:
        if self._is_open is not None:
            await self._is_open.wait()
        read_only = self._config.fuse.read_only
        return await trim(self._stack.files, request, send, read_only=read_only)

    async def _op_release(self, _send: control.Send) -> control.Message:
        self._stack.give_back()
        return {}

    async def _op_end(self, _send: control.Send) -> control.Message:
        lost = dirty_bytes(self.status())
        if self._is_open is None or self._is_open.is_set():
            self._give_up()
        else:
            self._scope.cancel()  # nothing is dirty, and the mount is not ours yet
        return {"dirty_bytes": lost}
