"""`fallocate` for a FUSE binding that does not pass it on.

Theory of operation
-------------------
pyfuse3 hands libfuse a table of operations (`struct fuse_lowlevel_ops`) that has no `fallocate`, so
the kernel is told that there is none, and a loop device on the file has no discard. The table is
handed over in one call, `fuse_session_new`. While `pyfuse3.init` runs, and only then, the slot
through which pyfuse3 makes that call points here (`elf` finds it); the call goes on to libfuse with
a copy of the table that has our `fallocate` in it.

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
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyfuse3

from orion_iscsifs.fuse.elf import NotUnderstood, call_slots

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


class Unsound(Exception):
    """Something is not as expected: nothing has been changed."""


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A line of /proc/self/maps."""

    start: int
    end: int
    writable: bool
    offset: int
    path: str


class Hook:
    """One per process: pyfuse3 has one session."""

    def __init__(self) -> None:
        self._on_fallocate: OnFallocate | None = None
        self._reply: Any = None
        self._session_new: Any = None
        self.installed = False
        """The session in use passes `fallocate` on."""
        # As long as the process lives: libfuse keeps the address.
        self._callback = _Fallocate(self._fallocate)

    @contextmanager
    def around_init(self, on_fallocate: OnFallocate) -> Iterator[None]:
        """For the time of `pyfuse3.init`. Never raises; `installed` says how it went."""
        self._on_fallocate, self.installed = on_fallocate, False
        try:
            slot, function, libfuse = _find()
            self._reply = libfuse.fuse_reply_err
            self._reply.argtypes = (ctypes.c_void_p, ctypes.c_int)
            before = _swap(slot, self._replacement(function, libfuse))
        except (Unsound, NotUnderstood, OSError, AttributeError) as error:
            _log.info("no fallocate on the device files, so no discard by loop devices: %s", error)
            yield
            return
        try:
            yield
        finally:
            _swap(slot, before)

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
                return int(genuine(arguments, table, size, *rest) or 0)
            session = int(genuine(arguments, ctypes.addressof(extended), size, *rest) or 0)
            self.installed = bool(session)
            return session

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


def _find() -> tuple[int, str, ctypes.CDLL]:
    """The address of the slot, the name of the function in it, and libfuse."""
    binding = os.path.realpath(pyfuse3.__file__)
    mappings = list(_mappings())
    own = [mapping for mapping in mappings if mapping.path == binding]
    libraries = {m.path for m in mappings if os.path.basename(m.path).startswith("libfuse3.so")}
    if not own or len(libraries) != 1:
        raise Unsound("pyfuse3 and libfuse are not loaded as shared objects")
    libfuse = ctypes.CDLL(libraries.pop())
    slots = call_slots(Path(binding).read_bytes(), frozenset(_SessionNew))
    found = [(name, at) for name, places in slots.items() for at in places]
    if len(found) != 1:
        raise Unsound(f"pyfuse3 calls fuse_session_new in {len(found)} ways")
    function, at = found[0]
    slot = own[0].start - own[0].offset + at
    genuine = ctypes.cast(getattr(libfuse, function), ctypes.c_void_p).value
    held = ctypes.c_uint64.from_address(slot).value
    inside = any(mapping.start <= held < mapping.end for mapping in own)
    if not any(m.start <= slot < m.end for m in mappings) or (held != genuine and not inside):
        raise Unsound("the slot of fuse_session_new holds another address")
    return slot, function, libfuse


def _mappings() -> Iterator[_Mapping]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            yield _Mapping(start, end, "w" in fields[1], int(fields[2], 16), fields[5])


def _swap(slot: int, address: int) -> int:
    """Put an address into a slot, which may be read-only by now (RELRO); what was there."""
    page = slot & -mmap.PAGESIZE
    mapping = next((m for m in _mappings() if m.start <= slot < m.end), None)
    if mapping is None:
        raise Unsound("the slot of fuse_session_new is not mapped")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if not mapping.writable and libc.mprotect(
        page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE
    ):
        raise Unsound(f"mprotect: {os.strerror(ctypes.get_errno())}")
    place = ctypes.c_uint64.from_address(slot)
    before = place.value
    place.value = address
    if not mapping.writable:
        libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ)
    return before
