"""What can't be done in a mount of devices: creating, removing, renaming, attributes of one's own.

A base class of the file system, so that `operations.py` holds only what does something. EPERM is
what a file system answers that does not know an operation for its files (POSIX: "the operation is
not supported"); on a mount with `ro` the kernel says EROFS before it asks.
"""

import errno
from collections.abc import Callable

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from orion_iscsifs.fuse.handlers import FailureLog, handler


class FixedOperations(pyfuse3.Operations):
    """Refuses every change of the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = FailureLog()
        self.reader_blocks: Callable[[], None] = lambda: None

    def failed(self, operation: str, error: Exception, args: tuple[object, ...]) -> int:
        return self.failures.errno_of(operation, error)

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        raise FUSEError(errno.EPERM)

    @handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @handler
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @handler
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EPERM)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EPERM)

    @handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        raise FUSEError(errno.EPERM)

    @handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        raise FUSEError(errno.EINVAL)

    # -- extended attributes: nobody sets any ----------------------------------------------------

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.ENOTSUP)

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.ENOTSUP)
