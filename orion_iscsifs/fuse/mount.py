"""The mount itself: `init`, the request loop, readiness, the end.

pyfuse3 keeps its session in globals, so a process has at most one mount.

Two ways out of `FuseMount.serve`: somebody unmounts (umount(8), fusermount3, our own command),
and the kernel closes the connection; or `serve` is cancelled, and the mount is detached lazily.
Either way the devices stay open: whoever called `serve` flushes them afterwards.
"""

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import quote

import pyfuse3
import trio

from orion_iscsifs.config import FuseConfig
from orion_iscsifs.errors import BusyError, MountError
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.fuse import readers
from orion_iscsifs.fuse.hook import hook
from orion_iscsifs.fuse.kernel import KernelLimits, raise_limits
from orion_iscsifs.fuse.nosec import init_reply
from orion_iscsifs.fuse.operations import DeviceFiles
from orion_iscsifs.fuse.tree import Node

_log = logging.getLogger(__name__)

IDLE_TASKS: Final = 32
"""Tasks that wait for a request; fewer, and a burst pays for starting new ones."""
TASKS_MAX: Final = 512
"""Requests in flight: the kernel's background limit, and room for waiting callers."""


class FuseMount:
    """One mount of one file system."""

    def __init__(
        self, filesystem: DeviceFiles, mountpoint: str, *, fsname: str, config: FuseConfig
    ) -> None:
        """`mountpoint` has passed `mountpoint.check`. `fsname` is what /proc/mounts shows."""
        self.mountpoint = mountpoint
        self.limits = KernelLimits()
        self._filesystem = filesystem
        self._options = _options(fsname, config)
        self._loop = trio.CancelScope()
        self._ended = trio.Event()
        self._device: str | None = None
        """`major:minor` once it is mounted."""
        self._nursery: trio.Nursery | None = None

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Mount, report `started` once the files can be read, answer until it is unmounted."""
        filesystem = self._filesystem
        filesystem.reader_blocks = readers.install(self._loop.cancel)
        self._init()
        init_reply.install()
        filesystem.has_attributes = lambda: init_reply.in_force
        filesystem.invalidate = self._invalidate
        filesystem.invalidate_name = self._invalidate_name
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._become_ready, task_status)
                with self._loop:
                    await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=TASKS_MAX)
                nursery.cancel_scope.cancel()
        finally:
            filesystem.invalidate = lambda _inode: None
            filesystem.invalidate_name = lambda _node: None
            # Closes the connection, and detaches the mount if it is still there.
            init_reply.uninstall()
            pyfuse3.close(unmount=self._is_topmost())
            readers.uninstall()
            self._ended.set()

    async def unmount(self) -> None:
        """End `serve`: unmount, lazily if the mount is busy."""
        try:
            await self._unmount()
        except (BusyError, MountError) as error:
            # The daemon has to go. Who still has a file open gets ENOTCONN; what was written is
            # flushed by our caller.
            _log.warning("%s; detaching it", error)
            self.terminate()

    def terminate(self) -> None:
        """End `serve` at once; who still has a file open gets ENOTCONN."""
        self._loop.cancel()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    # -- inside ----------------------------------------------------------------------------------

    def _init(self) -> None:
        with _captured_stderr() as said, hook.around_init(self._on_fallocate):
            try:
                pyfuse3.init(self._filesystem, self.mountpoint, self._options)
            except RuntimeError as error:
                failure: Exception | None = error
            else:
                failure = None
        if failure is not None:
            readers.uninstall()
            # libfuse says why on stderr only: "fuse: mount failed: …", "fusermount3: …".
            why = " ".join("".join(said).split()) or str(failure)
            raise MountError(f"mount point {self.mountpoint}: {why}")

    def _on_fallocate(self, request: int, inode: int, mode: int, offset: int, length: int) -> None:
        """Called while the request is read: only notes it."""
        assert self._nursery is not None
        self._nursery.start_soon(self._allocate, request, inode, mode, offset, length)

    async def _allocate(
        self, request: int, inode: int, mode: int, offset: int, length: int
    ) -> None:
        code = errno.EIO
        try:
            code = await self._filesystem.fallocate(inode, mode, offset, length)
        finally:
            # Also when it is cancelled: whoever waits for the answer gets one, and the session
            # lives until the nursery has ended.
            hook.reply(request, code)

    async def _become_ready(self, task_status: trio.TaskStatus[None]) -> None:
        # The kernel answers stat() only after FUSE_INIT, which resets the limits.
        await trio.to_thread.run_sync(os.stat, self.mountpoint, abandon_on_cancel=True)
        mount = mountpoints.find(self.mountpoint)
        if mount is not None:
            self._device = mount.device
            self.limits = await trio.to_thread.run_sync(
                raise_limits, mount.device, abandon_on_cancel=True
            )
        task_status.started()

    async def _unmount(self) -> None:
        # In a thread: the kernel may first write back pages of ours that were mapped.
        if not self._is_topmost():
            raise MountError(f"unmount {self.mountpoint}: detached already")
        await trio.to_thread.run_sync(mountpoints.unmount, self.mountpoint)

    def _is_topmost(self) -> bool:
        """Whether unmounting this path would unmount ours, and not what somebody put there since.

        A lazily detached mount lives on while its files are open.
        """
        if self._device is None:
            return True
        mount = mountpoints.find(self.mountpoint)
        return mount is not None and mount.device == self._device

    def _invalidate(self, inode: int) -> None:
        # Attributes only: the kernel takes this without waiting for anything of ours.
        try:
            pyfuse3.invalidate_inode(inode, attr_only=True)
        except OSError as error:
            # ENOENT: the kernel has not asked for this file yet. ENOTCONN, ENODEV: it is ending.
            if error.errno not in {errno.ENOENT, errno.ENOTCONN, errno.ENODEV}:
                _log.warning("the kernel was not told of a new size: %s", error)

    def _invalidate_name(self, node: Node) -> None:
        # In pyfuse3's own thread: the kernel may hold the folder's lock for a request of ours.
        pyfuse3.invalidate_entry_async(node.parent, node.name, node.inode, ignore_enoent=True)


def _options(fsname: str, config: FuseConfig) -> set[str]:
    # libfuse wants ASCII, and a backslash before a comma.
    shown = quote(fsname, safe="!#$%&'()*+,-./:;<=>?@[]^_`{|}~").replace(",", "\\,")
    options = {f"fsname={shown}", f"subtype={mountpoints.SUBTYPE}", "default_permissions"}
    options |= {"nosuid", "nodev", "noatime"}
    if config.allow_other:
        options.add("allow_other")
    if config.read_only:
        options.add("ro")
    return options


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """What C code writes to file descriptor 2 meanwhile; filled in when the block ends."""
    said: list[str] = []
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield said
            finally:
                os.dup2(kept, 2)
                file.seek(0)
                said.append(file.read(4096).decode(errors="replace"))
    finally:
        os.close(kept)
