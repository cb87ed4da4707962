"""What the kernel asks and what we answer: one request, one `BlockDevice` call.

Decisions
---------
* A device file behaves like a block device node: truncating it (also `O_TRUNC`) succeeds and
  changes nothing, writing past the end is ENOSPC, a write that begins inside and reaches past the
  end stores what fits and says how much, reading past the end is short.
* `fsync` is the durability contract: it is `device.flush()`. `flush` (every `close(2)`) does
  nothing: `losetup` and `dd` open and close a device all the time, as on a real one.
* A handle opened with O_SYNC or O_DSYNC writes with `fua=True`.
* Times are those of the mount and never move: a changed mtime would make the kernel drop its page
  cache. Setting them is accepted, as `touch` and `cp -p` expect. Mode and owner belong to the
  mount options, so changing them is EPERM.
* Inodes live as long as their LUN; `forget` has nothing to do.
* A handle that an earlier worker of this mount has opened is taken for what its number says
  (`handles`), and an inode means what it meant then (`handover`).
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileInfo,
    FUSEError,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.block.gone import GoneDevice
from orion_iscsifs.config import FuseConfig
from orion_iscsifs.errors import OrionError
from orion_iscsifs.fuse.allocation import allocate
from orion_iscsifs.fuse.buffers import BUFFER_BYTES, POOLED_BYTES_MIN, ReplyBuffers
from orion_iscsifs.fuse.fixed import FixedOperations
from orion_iscsifs.fuse.handlers import handler
from orion_iscsifs.fuse.handles import handle_number, opened_by
from orion_iscsifs.fuse.handover import Handover, disk_of
from orion_iscsifs.fuse.tree import Kind, Node, Tree

VALID_S: Final = 3600.0
"""How long the kernel may keep names and attributes; a new size is told at once."""
BLOCK_BYTES: Final = 4096
"""What statfs and stat give as the block size: the page, the least that the kernel caches."""
SECTOR_BYTES: Final = 512
"""Unit of st_blocks, whatever the device's block is."""

_WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR
_FUA_FLAGS: Final = os.O_SYNC | os.O_DSYNC
_BY_HANDLE: Final = frozenset({"read", "write", "fsync"})
"""Operations whose first argument is an open device file."""


@dataclass(slots=True)
class Counters:
    """Requests of the kernel for one device file since the mount."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    errors: int = 0


Content = Callable[[], bytes]
"""Makes the text of one virtual file."""


@dataclass(slots=True)
class _File:
    """A device file and what is asked of it in every request."""

    node: Node
    device: BlockDevice
    size_bytes: int
    read_only: bool
    counters: "Counters"
    flush_failures: int = 0
    last_failure: OrionError | None = None


@dataclass(slots=True)
class _Handle:
    file: _File
    fua: bool
    failures_told: int
    """Of the file's `flush_failures`, those that this handle's fsync has reported or that were
    before its time: every open file hears of a failed write-back once (INTERFACE §6)."""


class DeviceFiles(FixedOperations):
    """The file system over `files`: relative path → device."""

    supports_dot_lookup = True
    enable_writeback_cache = False  # it hides the order of writes and breaks online growth

    def __init__(
        self,
        files: Mapping[str, BlockDevice],
        *,
        config: FuseConfig,
        control: Mapping[str, Content] | None = None,
        describe: Callable[[str], Mapping[str, str]] = lambda _path: {},
        handover: Handover | None = None,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        """`describe`: the `user.orion.*` attributes of a device file, by their last names.

        `handover`: what the kernel knows of an earlier worker's files; `save` is called after each
        change in it.
        """
        super().__init__()
        self.invalidate: Callable[[int], None] = lambda _inode: None
        """Tells the kernel that an inode's attributes changed; set while mounted."""
        self.invalidate_name: Callable[[Node], None] = lambda _node: None
        """Tells the kernel that a file has vanished; set while mounted."""
        self.has_attributes: Callable[[], bool] = lambda: False
        """Whether the kernel may be told of extended attributes; set while mounted."""
        self.describe = describe
        self._config = config
        self._control = {} if config.hide_control or control is None else dict(control)
        self._handover = Handover() if handover is None else handover
        self._save = save
        self._was_served_before = bool(self._handover.inodes)
        self._tree = Tree(
            files,
            list(self._control),
            numbers=self._handover.inodes,
            next_inode=self._handover.next_inode,
        )
        self._files: dict[int, _File] = {}
        for node in self._tree.devices():
            self._open_file(node, files[node.path])
        self._handles: dict[int, _Handle] = {}
        self._texts: dict[int, bytes] = {}
        # Milliseconds since the boot: hardly a number that an earlier worker has given away.
        self._next_handle = time.monotonic_ns() // 1_000_000
        self._buffers = ReplyBuffers()
        self._note_files()

    # -- data ------------------------------------------------------------------------------------

    @handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._handles.get(fh) or self._adopted(fh)
        if handle is None:
            if fh not in self._texts:
                raise FUSEError(errno.EBADF)
            return self._texts[fh][off : off + size]
        file = handle.file
        file.counters.reads += 1
        if off + size > file.size_bytes:
            size = file.size_bytes - off
            if size <= 0:
                return b""
        if size < POOLED_BYTES_MIN or size > BUFFER_BYTES:
            fresh = bytearray(size)
            await file.device.read_into(off, memoryview(fresh))
            return fresh  # type: ignore[return-value]  # pyfuse3 takes any buffer
        buffer = self._buffers.take()
        reply = buffer[:size]
        await file.device.read_into(off, reply)
        # Nothing can run between here and the reply, so the buffer is free again already.
        self._buffers.give_back(buffer)
        return reply  # type: ignore[return-value]  # pyfuse3 takes any buffer

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles.get(fh) or self._adopted(fh)
        if handle is None:
            raise FUSEError(errno.EBADF)
        file = handle.file
        file.counters.writes += 1
        room = file.size_bytes - off
        if len(buf) <= room:
            await file.device.write(off, buf, fua=handle.fua)
            return len(buf)
        if room <= 0:
            raise FUSEError(errno.ENOSPC)
        await file.device.write(off, memoryview(buf)[:room], fua=handle.fua)
        return room

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._handles.get(fh) or self._adopted(fh)
        if handle is None:
            return
        file = handle.file
        file.counters.flushes += 1
        try:
            await file.device.flush()
        except OrionError as error:
            file.flush_failures += 1
            file.last_failure = error
        if handle.failures_told != file.flush_failures and file.last_failure is not None:
            handle.failures_told = file.flush_failures
            raise file.last_failure

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """A folder has nothing of its own: its files are made durable."""
        for file in self._files.values():
            if fh in {pyfuse3.ROOT_INODE, file.node.parent}:
                await file.device.flush()

    async def fallocate(self, inode: int, mode: int, offset: int, length: int) -> int:
        """Not one of pyfuse3's operations: `FuseMount` calls it. Returns an errno, never raises."""
        file = self._files.get(inode)
        if file is None:
            return errno.EOPNOTSUPP if self._tree.node(inode) is not None else errno.ESTALE
        try:
            if file.read_only:
                return errno.EROFS
            await allocate(file.device, mode, offset, length)
        except FUSEError as refusal:
            return refusal.errno
        except Exception as error:
            file.counters.errors += 1
            return self.failed("fallocate", error, (inode, mode, offset, length))
        return 0

    @handler
    async def flush(self, fh: int) -> None:
        """Every close(2): durability is fsync's."""

    # -- opening ---------------------------------------------------------------------------------

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        node = self._node(inode)
        writes = bool(flags & (_WRITE_FLAGS | os.O_TRUNC))
        fua = bool(flags & _FUA_FLAGS)
        fh = handle_number(inode, fua=fua, serial=self._next_handle)
        if node.kind is Kind.VIRTUAL:
            if writes:
                raise FUSEError(errno.EROFS)
            self._texts[fh] = self._control[node.name.decode()]()
            self._next_handle += 1
            # Its size is not known before, and the kernel must not keep it.
            return FileInfo(fh=fh, direct_io=True, keep_cache=False)
        file = self._files[inode]
        if writes and file.read_only:
            raise FUSEError(errno.EROFS)
        self._handles[fh] = _Handle(file, fua=fua, failures_told=file.flush_failures)
        self._next_handle += 1
        return FileInfo(fh=fh, direct_io=False, keep_cache=True)

    def _adopted(self, fh: int) -> _Handle | None:
        """An open file of an earlier worker; None: not one of a device that is there."""
        if not self._was_served_before or fh in self._texts:
            return None
        inode, fua = opened_by(fh)
        node = self._tree.node(inode)
        if node is not None and node.kind is Kind.VIRTUAL:
            self._texts[fh] = self._control[node.name.decode()]()
        file = self._files.get(inode)
        if file is None:
            return None
        handle = _Handle(file, fua=fua, failures_told=file.flush_failures)
        self._handles[fh] = handle
        return handle

    @handler
    async def release(self, fh: int) -> None:
        self._handles.pop(fh, None)
        self._texts.pop(fh, None)

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        if self._node(inode).kind is not Kind.FOLDER:
            raise FUSEError(errno.ENOTDIR)
        return inode

    @handler
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        for position, node in enumerate(self._tree.children(fh)[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, node.name, self._attributes(node), position):
                return

    @handler
    async def releasedir(self, fh: int) -> None:
        """Nothing is kept for an open folder."""

    # -- names and attributes --------------------------------------------------------------------

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        node = self._tree.lookup(parent_inode, name)
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(node)

    @handler
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Inodes live as long as their LUN."""

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._node(inode))

    @handler
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._node(inode)
        now = self._attributes(node)
        if fields.update_size and (node.kind is not Kind.DEVICE or self._files[inode].read_only):
            raise FUSEError(errno.EROFS)
        if (
            (fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(now.st_mode))
            or (fields.update_uid and attr.st_uid != now.st_uid)
            or (fields.update_gid and attr.st_gid != now.st_gid)
        ):
            raise FUSEError(errno.EPERM)
        return now

    @handler
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """The kernel checks modes itself (`default_permissions`)."""
        return True

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """A full disk: everything there is belongs to the device files."""
        reply = StatvfsData()
        reply.f_bsize = reply.f_frsize = BLOCK_BYTES
        total = sum(file.size_bytes for file in self._files.values())
        reply.f_blocks = -(-total // BLOCK_BYTES)
        reply.f_files = len(self._files)
        reply.f_namemax = 255
        return reply

    # -- extended attributes -----------------------------------------------------------------------

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """ENOSYS tells the kernel never to ask again, for the whole mount.

        Any other answer, and it asks for security.capability before every single write, each time
        waiting for us: half the speed of small writes. Unless it was told not to (`nosec`).
        """
        if not self.has_attributes():
            raise FUSEError(errno.ENOSYS)
        value = self._described(inode).get(name)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return list(self._described(inode)) if self.has_attributes() else []

    def _described(self, inode: int) -> dict[bytes, bytes]:
        file = self._files.get(inode)
        if file is None:
            return {}
        found = self.describe(file.node.path)
        return {b"user.orion." + name.encode(): text.encode() for name, text in found.items()}

    # -- files that come and go ------------------------------------------------------------------

    def add_file(self, path: str, device: BlockDevice) -> None:
        """A device file has appeared. The kernel finds it when it next asks for the name."""
        if self._handover.disks.get(path) != self._disk(path):
            self._tree.forget(path)
        self._open_file(self._tree.add(path), device)
        self._note_files()

    def remove_file(self, path: str) -> None:
        """It has vanished. Who has it open keeps it, and gets errors."""
        file = next((file for file in self._files.values() if file.node.path == path), None)
        if file is not None:
            del self._files[file.node.inode]
            self._tree.remove(file.node)
            # Its layers are closed after this: who has the file open must not reach them.
            file.device = GoneDevice(path, file.device.geometry)
            self._note_files()
            self.invalidate_name(file.node)

    def _open_file(self, node: Node, device: BlockDevice) -> None:
        geometry = device.geometry
        self._files[node.inode] = _File(
            node, device, geometry.size_bytes, self._ro(geometry), Counters()
        )
        device.on_geometry_change(self._geometry_listener(node.inode))

    def _note_files(self) -> None:
        """For a worker that may take over, before the kernel hears of them."""
        known = self._handover
        known.inodes, known.next_inode = self._tree.numbers(), self._tree.next_inode
        present = {node.path: self._disk(node.path) for node in self._tree.devices()}
        known.disks = {path: known.disks[path] for path in known.disks if path in known.inodes}
        known.disks |= present
        self._save()

    def _disk(self, path: str) -> str:
        return disk_of(self.describe(path))

    def device_inodes(self) -> list[int]:
        return list(self._files)

    # -- what others ask -------------------------------------------------------------------------

    def counters(self) -> dict[str, Counters]:
        """Path → counters."""
        return {file.node.path: file.counters for file in self._files.values()}

    def failed(self, operation: str, error: Exception, args: tuple[object, ...]) -> int:
        before = self.failures.errors
        code = super().failed(operation, error, args)
        if operation in _BY_HANDLE and isinstance(args[0], int):
            handle = self._handles.get(args[0])
            if handle is not None:
                handle.file.counters.errors += self.failures.errors - before
        return code

    # -- helpers ---------------------------------------------------------------------------------

    def _node(self, inode: int) -> Node:
        node = self._tree.node(inode)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    def _ro(self, geometry: Geometry) -> bool:
        return geometry.read_only or self._config.read_only

    def _geometry_listener(self, inode: int) -> Callable[[Geometry], None]:
        def changed(geometry: Geometry) -> None:
            file = self._files.get(inode)
            if file is None:
                return  # its name has gone; who has it open sees the size of then
            file.size_bytes, file.read_only = geometry.size_bytes, self._ro(geometry)
            self.invalidate(inode)

        return changed

    def _attributes(self, node: Node) -> EntryAttributes:
        config = self._config
        entry = EntryAttributes()
        entry.st_ino = node.inode
        entry.entry_timeout = entry.attr_timeout = VALID_S
        entry.st_uid = os.getuid() if config.uid is None else config.uid
        entry.st_gid = os.getgid() if config.gid is None else config.gid
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._handover.born_ns
        entry.st_blksize = BLOCK_BYTES
        if node.kind is Kind.FOLDER:
            entry.st_mode = stat.S_IFDIR | self._folder_mode(node)
            entry.st_nlink = 2 + self._tree.folders_in(node.inode)
            return entry
        entry.st_nlink = 1
        if node.kind is Kind.VIRTUAL:
            entry.st_mode = stat.S_IFREG | 0o400
            entry.st_size = len(self._control[node.name.decode()]())
            entry.attr_timeout = 0
            return entry
        entry.st_mode = stat.S_IFREG | config.mode
        entry.st_size = self._files[node.inode].size_bytes
        # Dense: no program may take a device for a file with holes.
        entry.st_blocks = entry.st_size // SECTOR_BYTES
        return entry

    def _folder_mode(self, node: Node) -> int:
        """Whoever may read a file may reach it: r becomes r-x, write permission is nobody's."""
        if node.is_control:
            return 0o500
        readable = self._config.mode & 0o444
        return 0o500 | readable | readable >> 2
