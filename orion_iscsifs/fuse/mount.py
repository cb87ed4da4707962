"""The mount itself: `init`, the request loop, readiness, the end.

pyfuse3 keeps its session in globals, so a process has at most one mount.

Two ways out of `FuseMount.serve`: somebody unmounts (umount(8), fusermount3, our own command),
and the kernel closes the connection; or `serve` is cancelled, and the mount is detached lazily.
Either way the devices stay open: whoever called `serve` flushes them afterwards.

A third way is the death of this process. Then a new one may go on with the same mount (`takeover`),
if the supervisor holds the FUSE device (`custody`) and a `Handover`.
"""

import errno
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import quote

import pyfuse3
import trio

from orion_iscsifs.config import FuseConfig
from orion_iscsifs.custody import FUSE, custody
from orion_iscsifs.errors import BusyError, MountError
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.fuse import readers, takeover
from orion_iscsifs.fuse.handover import Handover
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
        self,
        filesystem: DeviceFiles,
        mountpoint: str,
        *,
        fsname: str,
        config: FuseConfig,
        handover: Handover | None = None,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        """`mountpoint` has passed `mountpoint.check`. `fsname` is what /proc/mounts shows.

        `handover` as for the file system: one with an `init_reply` is of a mount to be taken over.
        """
        self.mountpoint = mountpoint
        self.limits = KernelLimits()
        self._filesystem = filesystem
        self._options = _options(fsname, config)
        self._loop = trio.CancelScope()
        self._ended = trio.Event()
        self._handover = Handover() if handover is None else handover
        self._save = save
        self._takes_over = bool(self._handover.init_reply)
        self._nursery: trio.Nursery | None = None

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Mount, report `started` once the files can be read, answer until it is unmounted."""
        filesystem = self._filesystem
        filesystem.reader_blocks = readers.install(self._loop.cancel)
        if self._takes_over:
            self._take_over()
        else:
            self._init(self.mountpoint)
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
            custody.drop(FUSE)
            is_topmost = self._is_topmost()
            pyfuse3.close(unmount=is_topmost and not self._takes_over)
            if is_topmost and self._takes_over:
                self._detach()
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

    def _init(self, mountpoint: str) -> None:
        with _captured_stderr() as said, hook.around_init(self._on_fallocate):
            try:
                pyfuse3.init(self._filesystem, mountpoint, self._options)
            except RuntimeError as error:
                failure: Exception | None = error
            else:
                failure = None
        if failure is not None:
            readers.uninstall()
            # libfuse says why on stderr only: "fuse: mount failed: …", "fusermount3: …".
            why = " ".join("".join(said).split()) or str(failure)
            raise MountError(f"mount point {self.mountpoint}: {why}")

    def _take_over(self) -> None:
        """Raises MountError; the kernel's requests wait as before then."""
        device = custody.inherit(FUSE)
        if device is None:
            raise MountError(f"{self.mountpoint}: nobody has kept its FUSE device")
        self._init(f"/dev/fd/{device}")  # it is the session's now, which closes it
        try:
            if not hook.session or not init_reply.install(self._handover.init_reply):
                raise MountError(f"{self.mountpoint}: libfuse can't be made to go on")
            takeover.begin(hook.session, self._handover.init_reply)
            if init_reply.said != self._handover.init_reply:
                raise MountError(f"{self.mountpoint}: libfuse agrees to something else now")
            takeover.resend(device)
        except BaseException:
            init_reply.uninstall()
            pyfuse3.close(unmount=False)
            readers.uninstall()
            raise

    def _detach(self) -> None:
        if self._handover.device is not None and mountpoints.find(self.mountpoint) is not None:
            try:
                mountpoints.unmount(self.mountpoint, lazy=True)
            except MountError as error:
                _log.warning("%s", error)

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
        if self._takes_over:
            task_status.started()
            for inode in self._filesystem.device_inodes():
                self._invalidate(inode)  # a size may have changed meanwhile
        else:
            # The kernel answers stat() only after FUSE_INIT, which resets the limits.
            await trio.to_thread.run_sync(os.stat, self.mountpoint, abandon_on_cancel=True)
            mount = mountpoints.find(self.mountpoint)
            self._handover.device = None if mount is None else mount.device
            self._hand_over()
        if (device := self._handover.device) is not None:
            self.limits = await trio.to_thread.run_sync(
                raise_limits, device, abandon_on_cancel=True
            )
        if not self._takes_over:
            task_status.started()

    def _hand_over(self) -> None:
        """From now on another worker may go on after our death."""
        if hook.session and init_reply.said:
            self._handover.init_reply = init_reply.said
            self._save()
            custody.keep(FUSE, takeover.session_descriptor(hook.session))

    async def _unmount(self) -> None:
        # In a thread: the kernel may first write back pages of ours that were mapped.
        if not self._is_topmost():
            raise MountError(f"unmount {self.mountpoint}: detached already")
        await trio.to_thread.run_sync(mountpoints.unmount, self.mountpoint)

    def _is_topmost(self) -> bool:
        """Whether unmounting this path would unmount ours, and not what somebody put there since.

        A lazily detached mount lives on while its files are open.
        """
        if self._handover.device is None:
            return True
        mount = mountpoints.find(self.mountpoint)
        return mount is not None and mount.device == self._handover.device

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
