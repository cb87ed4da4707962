"""Slots of the dynamic linker in this very process: found with care, changed, and put back.

The slot of a function in a loaded object (`elf`) must hold the address of that function, or one
inside the object itself (not bound yet). Anything else is `Unsound`, and nothing is changed.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orion_iscsifs.fuse.elf import call_slots


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


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an object keeps the address of `function`."""

    address: int
    function: str

    def put(self, value: int) -> int:
        """Another address; what was there. The page may be read-only by now (RELRO)."""
        page = self.address & -mmap.PAGESIZE
        mapping = next((m for m in _mappings() if m.start <= self.address < m.end), None)
        if mapping is None:
            raise Unsound(f"the slot of {self.function} is not mapped")
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        writes = mmap.PROT_READ | mmap.PROT_WRITE
        if not mapping.writable and libc.mprotect(page, mmap.PAGESIZE, writes):
            raise Unsound(f"mprotect: {os.strerror(ctypes.get_errno())}")
        place = ctypes.c_uint64.from_address(self.address)
        before = place.value
        place.value = value
        if not mapping.writable:
            libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ)
        return before


def loaded_library(prefix: str) -> str:
    """The path of the one loaded object whose name begins so."""
    found = {m.path for m in _mappings() if os.path.basename(m.path).startswith(prefix)}
    if len(found) != 1:
        raise Unsound(f"{len(found)} objects named {prefix} are loaded")
    return found.pop()


def find_slot(path: str, functions: Iterable[str], provider: ctypes.CDLL) -> Slot:
    """The slot through which the loaded object at `path` calls one of `functions` of `provider`.

    Raises Unsound, NotUnderstood, or an OSError.
    """
    names = frozenset(functions)
    mappings = list(_mappings())
    own = [mapping for mapping in mappings if mapping.path == path]
    if not own:
        raise Unsound(f"{os.path.basename(path)} is not loaded")
    slots = call_slots(Path(path).read_bytes(), names)
    found = [(name, at) for name, places in slots.items() for at in places]
    if len(found) != 1:
        raise Unsound(f"{os.path.basename(path)} calls {' or '.join(names)} in {len(found)} ways")
    function, at = found[0]
    address = own[0].start - own[0].offset + at
    if not any(mapping.start <= address < mapping.end for mapping in mappings):
        raise Unsound(f"the slot of {function} is not mapped")
    held = ctypes.c_uint64.from_address(address).value
    genuine = ctypes.cast(getattr(provider, function), ctypes.c_void_p).value
    if held != genuine and not any(mapping.start <= held < mapping.end for mapping in own):
        raise Unsound(f"the slot of {function} holds another address")
    return Slot(address, function)


def _mappings() -> Iterator[_Mapping]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            yield _Mapping(start, end, "w" in fields[1], int(fields[2], 16), fields[5])
