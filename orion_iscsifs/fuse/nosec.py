"""Extended attributes that cost nothing: one flag more in libfuse's answer to FUSE_INIT.

Theory of operation
-------------------
Before each write the kernel asks a file for `security.capability`, which a write would have to
remove; for a FUSE file that is a request that has to wait for us. It does not ask if there are no
extended attributes in the whole mount (getxattr answered ENOSYS), or if the file system says that
it removes such attributes itself: FUSE_HANDLE_KILLPRIV_V2 (Linux 5.12; include/uapi/linux/fuse.h).
Then it asks once for each file, and remembers the answer (S_NOSEC). Device files have neither
capabilities nor set-id bits, so there is nothing to remove, and the promise is kept.

libfuse before 3.17 does not know the flag. Its answer to FUSE_INIT is the first that a session
writes, with writev(2): that one call passes through here (`slots`), and gets the flag.

Where this can't be done, `in_force` stays False, and the files have no extended attributes.

The answer is kept (`said`): a worker that takes the mount over makes libfuse agree to the same
(`takeover`). That one's answer must not go to the kernel, which has asked nothing: `install` with
`answered` swallows it.
"""

import ctypes
import logging
import os
import re
from struct import Struct
from typing import Any, Final

from orion_iscsifs.fuse.elf import NotUnderstood
from orion_iscsifs.fuse.slots import Slot, Unsound, find_slot, loaded_library

_log = logging.getLogger(__name__)

HANDLE_KILLPRIV_V2: Final = 1 << 28
_LINUX_MIN: Final = (5, 12)
_OUT_HEADER: Final = Struct("=IiQ")
_INIT_OUT: Final = Struct("=IIII")
"""The beginning of struct fuse_init_out: major, minor, max_readahead, flags."""
_INIT_OUT_BYTES: Final = 64
_FLAGS_AT: Final = 12
_MAJOR: Final = 7
_MINOR_MIN: Final = 31


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_Writev: Final = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, use_errno=True
)


class InitReply:
    """One per process. `install` before the first request is read, `uninstall` in the end."""

    def __init__(self) -> None:
        self.in_force = False
        """The kernel asks for security.capability once a file, not once a write."""
        self.said = b""
        """The answer, struct fuse_init_out; empty: not seen."""
        self._answered: bytes | None = None
        self._slot: Slot | None = None
        self._before = 0
        self._genuine: Any = None
        self._replacement = _Writev(self._writev)

    def install(self, answered: bytes | None = None) -> bool:
        """Never raises. False: there are no extended attributes, and the log says so.

        `answered`: what the kernel was told long ago; then nothing is written to it.
        """
        self.in_force, self.said, self._answered = False, b"", answered
        try:
            check_kernel(os.uname().release)
            libc = ctypes.CDLL(None, use_errno=True)
            slot = find_slot(loaded_library("libfuse3.so"), ("writev",), libc)
            self._genuine = _Writev(("writev", libc))
            address = ctypes.cast(self._replacement, ctypes.c_void_p).value or 0
            self._before, self._slot = slot.put(address), slot
        except (Unsound, NotUnderstood, OSError, AttributeError) as error:
            _log.info("no extended attributes on the device files: %s", error)
            return False
        return True

    def uninstall(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.put(self._before)

    def _writev(self, descriptor: int, vectors: int, count: int) -> int:
        """Called by libfuse, once. No exception may leave it."""
        try:
            self.uninstall()
            self.in_force = add_flag(vectors, count)
            if self.in_force:
                self.said = _body(vectors)
            else:
                _log.info("no extended attributes on the device files: unknown answer to INIT")
            if self._answered is not None:
                return _length(vectors, count)
        except Exception:
            _log.exception("the answer to FUSE_INIT")
        written: int = self._genuine(descriptor, vectors, count)
        return written


def check_kernel(release: str) -> None:
    """Raises Unsound if this Linux (`uname -r`) does not know FUSE_HANDLE_KILLPRIV_V2."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < _LINUX_MIN:
        raise Unsound(f"they need Linux {'.'.join(map(str, _LINUX_MIN))}, and this is {release}")


def add_flag(vectors: int, count: int) -> bool:
    """Add the flag to an answer to FUSE_INIT, given as an array of iovec; False: it is none."""
    if count != 2:
        return False
    header, body = (_Vector * 2).from_address(vectors)
    if header.length != _OUT_HEADER.size or body.length != _INIT_OUT_BYTES:
        return False
    length, error, _ = _OUT_HEADER.unpack(ctypes.string_at(header.base, _OUT_HEADER.size))
    major, minor, _, flags = _INIT_OUT.unpack(ctypes.string_at(body.base, _INIT_OUT.size))
    if error or length != header.length + body.length or major != _MAJOR or minor < _MINOR_MIN:
        return False
    ctypes.c_uint32.from_address(body.base + _FLAGS_AT).value = flags | HANDLE_KILLPRIV_V2
    return True


def _body(vectors: int) -> bytes:
    """What follows the header."""
    _, body = (_Vector * 2).from_address(vectors)
    return ctypes.string_at(body.base, body.length)


def _length(vectors: int, count: int) -> int:
    """Of all that is to be written."""
    return sum(vector.length for vector in (_Vector * count).from_address(vectors))


init_reply: Final = InitReply()
