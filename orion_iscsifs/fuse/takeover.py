"""Going on with a mount whose worker has died: the same FUSE device, a new libfuse session.

Theory of operation
-------------------
The kernel's side of a mount lives as long as somebody has its /dev/fuse open; the supervisor does
(`custody`). A new worker needs three things.

* **A session on that descriptor.** libfuse takes `/dev/fd/N` as a mount point that is mounted.
* **The outcome of FUSE_INIT.** The kernel asks only once. So libfuse is given a FUSE_INIT of our
  making (`fuse_session_process_buf`), which offers exactly what the first worker has agreed to:
  the answer that the kernel has got says that (`Handover.init_reply`). libfuse's answer to ours is
  swallowed on its way (`nosec`), and is looked at: it has to be the same.
* **The requests that the dead worker had read and not answered.** FUSE_NOTIFY_RESEND (Linux 6.9)
  makes the kernel put all of them back into the queue. It is sent before the first request is read,
  so none is carried out twice by the same worker. One that the dead worker had carried out without
  telling is carried out again: reads, writes of the same bytes to the same place, flushes, discards
  and questions are all the same the second time.

That is sound only if everything that was acknowledged is still there, and if nothing that the dead
worker has sent can arrive later: see `cli/supervisor.py`.
"""

import ctypes
import errno
import os
import re
import select
from struct import Struct
from typing import Final

from orion_iscsifs.errors import MountError
from orion_iscsifs.fuse.slots import loaded_library

LINUX_MIN: Final = (6, 9)
_IN_HEADER: Final = Struct("=IIQQIIIHH")
"""struct fuse_in_header: length, opcode, unique, node, uid, gid, pid, two more."""
_INIT_IN: Final = Struct("=IIIII44x")
"""struct fuse_init_in: major, minor, max_readahead, flags, flags2."""
_INIT_OUT: Final = Struct("=IIIIHHIIHHI28x")
"""struct fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold,
max_write, time_gran, max_pages, map_alignment, flags2."""
_OUT_HEADER: Final = Struct("=IiQ")
_INIT: Final = 26
_NOTIFY_RESEND: Final = 7
_UNIQUE: Final = 1
_BUFFER_BYTES: Final = 8192
"""What libfuse wants to be there at least (FUSE_MIN_READ_BUFFER)."""
_GONE: Final = frozenset({errno.ENODEV, errno.ENOTCONN, errno.EBADF})


class _Buffer(ctypes.Structure):
    """struct fuse_buf; the last field is libfuse 3.17's."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("mem", ctypes.c_void_p),
        ("fd", ctypes.c_int),
        ("pos", ctypes.c_int64),
        ("mem_size", ctypes.c_size_t),
    )


def obstacle(release: str) -> str | None:
    """Why this Linux (`uname -r`) can't repeat what a dead worker has left; None: it can."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is not None and (int(found[1]), int(found[2])) >= LINUX_MIN:
        return None
    return f"it needs Linux {'.'.join(map(str, LINUX_MIN))}, and this is {release}"


def init_request(init_reply: bytes) -> bytes:
    """A FUSE_INIT that offers what `init_reply` (struct fuse_init_out) has accepted."""
    try:
        major, minor, readahead, flags, _, _, _, _, _, _, more = _INIT_OUT.unpack(init_reply)
    except Exception as error:
        raise MountError(f"take the mount over: the answer to FUSE_INIT: {error}") from None
    body = _INIT_IN.pack(major, minor, readahead, flags, more)
    length = _IN_HEADER.size + len(body)
    return _IN_HEADER.pack(length, _INIT, _UNIQUE, 0, 0, 0, 0, 0, 0) + body


def begin(session: int, init_reply: bytes) -> None:
    """Let libfuse's `session` know what was agreed. Its answer must not reach the kernel."""
    request = init_request(init_reply)
    memory = ctypes.create_string_buffer(request, _BUFFER_BYTES)
    buffer = _Buffer(len(request), 0, ctypes.addressof(memory), -1, 0, _BUFFER_BYTES)
    # With the interpreter's lock held: pyfuse3's operations take it for granted.
    libfuse = ctypes.PyDLL(loaded_library("libfuse3.so"))
    process = libfuse.fuse_session_process_buf
    process.argtypes, process.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    process(session, ctypes.addressof(buffer))
    has_ended = libfuse.fuse_session_exited
    has_ended.argtypes = (ctypes.c_void_p,)
    if has_ended(session):
        raise MountError("take the mount over: libfuse does not accept what was agreed")


def session_descriptor(session: int) -> int:
    """The /dev/fuse of a libfuse session."""
    libfuse = ctypes.CDLL(loaded_library("libfuse3.so"))
    libfuse.fuse_session_fd.argtypes = (ctypes.c_void_p,)
    return int(libfuse.fuse_session_fd(session))


def resend(device: int) -> None:
    """Let the kernel repeat every request that was read and not answered.

    Raises MountError if it can't; a mount that has gone meanwhile is no error.
    """
    try:
        os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0))
    except OSError as error:
        if error.errno not in _GONE:
            raise MountError(f"take the mount over: FUSE_NOTIFY_RESEND: {error.strerror}") from None


def is_gone(device: int) -> bool:
    """Whether the mount behind a /dev/fuse has ended."""
    poll = select.poll()
    poll.register(device, 0)  # what tells of an end is always told
    return bool(poll.poll(0))
