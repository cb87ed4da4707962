"""`fallocate` for a FUSE binding that does not pass it on, and the session that it keeps to itself.

Theory of operation
-------------------
pyfuse3 hands libfuse a table of operations (`struct fuse_lowlevel_ops`) that has no `fallocate`, so
the kernel is told that there is none, and a loop device on the file has no discard. The table is
handed over in one call, `fuse_session_new`. While `pyfuse3.init` runs, and only then, the slot
through which pyfuse3 makes that call points here (`slots` finds it); the call goes on to libfuse
with a copy of the table that has our `fallocate` in it.

libfuse calls it, as every operation, in the trio thread, from the task that has read the request.
It only notes the request; the answer is given later, by `reply`, as libfuse allows for all of them
(fuse_lowlevel.h: "the filesystem may reply at any time").

What makes it sound: everything is looked at before it is changed. The slot must hold the address
of libfuse's function, or one inside pyfuse3 (not bound yet); the table must have the length and the
entries that libfuse 3's public header gives it. Anything else, and nothing is changed: the mount
has no `fallocate` then, and the log says why.
"""

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pyfuse3

from orion_iscsifs.fuse.elf import NotUnderstood
from orion_iscsifs.fuse.slots import Unsound, find_slot, loaded_library

_log = logging.getLogger(__name__)

OnFallocate = Callable[[int, int, int, int, int], None]
"""Request, inode, mode, offset, length. Must not wait; `reply` answers the request later."""

_POINTER_BYTES: Final = 8
# Positions in struct fuse_lowlevel_ops (libfuse 3, fuse_lowlevel.h).
_INIT: Final = 0
_READ: Final = 15
_FORGET_MULTI: Final = 38
_FALLOCATE: Final = 40
_READDIRPLUS: Final = 41
_ENTRIES_MIN: Final = 42
_ENTRIES_MAX: Final = 64

# libfuse 3.17 renamed it in its header, and added the version as an argument.
_PLAIN: Final = "fuse_session_new"
_VERSIONED: Final = "fuse_session_new_versioned"

_Fallocate: Final = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
)
_SessionNew: Final = {
    _PLAIN: ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    ),
    _VERSIONED: ctypes.CFUNCTYPE(
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ),
}


class Hook:
    """One per process: pyfuse3 has one session."""

    def __init__(self) -> None:
        self._on_fallocate: OnFallocate | None = None
        self._reply: Any = None
        self._session_new: Any = None
        self.installed = False
        """The session in use passes `fallocate` on."""
        self.session = 0
        """The address of libfuse's session; 0: not known."""
        # As long as the process lives: libfuse keeps the address.
        self._callback = _Fallocate(self._fallocate)

    @contextmanager
    def around_init(self, on_fallocate: OnFallocate) -> Iterator[None]:
        """For the time of `pyfuse3.init`. Never raises; `installed` says how it went."""
        self._on_fallocate, self.installed, self.session = on_fallocate, False, 0
        try:
            libfuse = ctypes.CDLL(loaded_library("libfuse3.so"))
            slot = find_slot(os.path.realpath(pyfuse3.__file__), _SessionNew, libfuse)
            self._reply = libfuse.fuse_reply_err
            self._reply.argtypes = (ctypes.c_void_p, ctypes.c_int)
            before = slot.put(self._replacement(slot.function, libfuse))
        except (Unsound, NotUnderstood, OSError, AttributeError) as error:
            _log.info("no fallocate on the device files, so no discard by loop devices: %s", error)
            yield
            return
        try:
            yield
        finally:
            try:
                slot.put(before)
            except (Unsound, OSError) as error:
                # What stands there instead does the same, as long as the process lives.
                _log.info("the slot of fuse_session_new is not put back: %s", error)

    def reply(self, request: int, code: int) -> None:
        """Answer a request, once, with an errno (0: done)."""
        self._reply(request, code)

    def _replacement(self, function: str, libfuse: ctypes.CDLL) -> int:
        """The address of what pyfuse3 calls instead of `fuse_session_new`."""
        prototype = _SessionNew[function]
        genuine = prototype((function, libfuse))

        def session_new(arguments: int, table: int, size: int, *rest: int) -> int:
            try:
                extended = self._extended(table, size)
            except Unsound as error:
                _log.info("no fallocate on the device files: %s", error)
                self.session = int(genuine(arguments, table, size, *rest) or 0)
            else:
                self.session = int(genuine(arguments, ctypes.addressof(extended), size, *rest) or 0)
                self.installed = bool(self.session)
            return self.session

        self._session_new = prototype(session_new)
        return ctypes.cast(self._session_new, ctypes.c_void_p).value or 0

    def _extended(self, table: int, size: int) -> "ctypes.Array[ctypes.c_void_p]":
        """A copy of the table with our entry. libfuse copies it once more."""
        entries = size // _POINTER_BYTES
        if size % _POINTER_BYTES or not _ENTRIES_MIN <= entries <= _ENTRIES_MAX or not table:
            raise Unsound(f"a table of operations of {size} bytes")
        copy = (ctypes.c_void_p * entries).from_buffer_copy(ctypes.string_at(table, size))
        present = [bool(copy[index]) for index in (_INIT, _READ, _FORGET_MULTI, _READDIRPLUS)]
        if not all(present) or copy[_FALLOCATE]:
            raise Unsound("the table of operations is not the known one")
        copy[_FALLOCATE] = ctypes.cast(self._callback, ctypes.c_void_p).value
        return copy

    def _fallocate(
        self, request: int, inode: int, mode: int, offset: int, length: int, _info: int
    ) -> None:
        """Called by libfuse. No exception may leave it: it would leave the request unanswered."""
        try:
            assert self._on_fallocate is not None
            self._on_fallocate(request, inode, mode, offset, length)
        except BaseException:
            _log.exception("fallocate")
            self.reply(request, errno.EIO)


hook: Final = Hook()
