"""What the kernel was told of a mount, and a later worker has to stand by.

Inode numbers and the files they mean, their times, the answer to FUSE_INIT, the mount's device.
Kept as JSON in a memory file that the supervisor holds (`custody`): a new one for each change, so
that a worker that dies in the middle of it leaves the former one.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Final, Self

import msgspec

from orion_iscsifs.custody import STATE, Custody
from orion_iscsifs.fuse.tree import ROOT_INODE

_BYTES_MAX: Final = 64 << 20


def disk_of(described: Mapping[str, str]) -> str:
    """What tells the disk behind a file from others, given the file's `user.orion.*` attributes.

    Another size is no other disk; another length of the blocks is.
    """
    name, block = described.get("name") or "without a name", described.get("block_size", "?")
    return f"{name}, blocks of {block} bytes"


class Handover(msgspec.Struct, kw_only=True):
    """Changed in place; `save` after each change, before the kernel can see it."""

    inodes: dict[str, int] = {}
    """Path → inode, of everything in the tree but the root."""
    disks: dict[str, str] = {}
    """Path of a device file → `disk_of` it."""
    next_inode: int = ROOT_INODE + 1
    """Never used so far."""
    born_ns: int = msgspec.field(default_factory=time.time_ns)
    """The files' times."""
    init_reply: bytes = b""
    """struct fuse_init_out, as the kernel got it. Empty: unknown, and nobody can take over."""
    device: str | None = None
    """`major:minor` of the mount."""

    @classmethod
    def of(cls, custody: Custody) -> Self | None:
        """What an earlier worker has left. Raises msgspec.DecodeError or OSError."""
        file = custody.inherit(STATE)
        if file is None:
            return None
        try:
            return msgspec.json.decode(os.pread(file, _BYTES_MAX, 0), type=cls)
        finally:
            os.close(file)

    def saver(self, custody: Custody) -> Callable[[], None]:
        """Keeps the present state with the supervisor. Raises OSError."""

        def save() -> None:
            file = os.memfd_create("orion-iscsifs")
            try:
                os.write(file, msgspec.json.encode(self))
                custody.keep(STATE, file)
            finally:
                os.close(file)

        return save
