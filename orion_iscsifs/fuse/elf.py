"""The global offset table of a loaded shared object: where it keeps the address of a symbol.

Only what is needed to find the slots through which one object calls a function of another one, on
Linux for x86-64 and AArch64 (RELA relocations): System V ABI, chapter 5, "Dynamic Linking". The
object is read where the loader has mapped it. Every step checks what it reads; what is not as the
ABI says raises `UnknownLayout`, and nothing has been changed then.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_WORD: Final = 8
_NULL, _PLTRELSZ, _STRTAB, _SYMTAB, _RELA, _RELASZ, _RELAENT = 0, 2, 5, 6, 7, 8, 9
_STRSZ, _SYMENT, _PLTREL, _JMPREL = 10, 11, 20, 23
_DYNAMIC_ENTRIES_MAX: Final = 256
_RELOCATION_BYTES_MAX: Final = 1 << 22
_SYMBOL_NAME_BYTES_MAX: Final = 64
_SLOT_TYPES: Final = {"x86_64": frozenset({6, 7}), "aarch64": frozenset({1025, 1026})}
"""R_*_GLOB_DAT and R_*_JUMP_SLOT."""
_PROT: Final = {"r": 1, "w": 2, "x": 4}


class UnknownLayout(Exception):
    """The loaded object is not laid out as expected; the text says in what way."""


class _LinkMap(ctypes.Structure):
    """The public beginning of `struct link_map` (<link.h>); musl's handle begins the same way."""

    _fields_ = (
        ("l_addr", ctypes.c_size_t),
        ("l_name", ctypes.c_char_p),
        ("l_ld", ctypes.c_size_t),
    )


class _Dynamic(ctypes.Structure):
    _fields_ = (("tag", ctypes.c_int64), ("value", ctypes.c_uint64))


class _Relocation(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("info", ctypes.c_uint64),
        ("addend", ctypes.c_int64),
    )


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_uint32),
        ("info", ctypes.c_ubyte),
        ("other", ctypes.c_ubyte),
        ("section", ctypes.c_uint16),
        ("value", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """What the loader knows of an address."""

    file: str
    symbol: str
    """The function that begins exactly there; empty if none is known to."""


def place_of(address: int) -> Place | None:
    """dladdr(3); None for an address that belongs to no loaded object."""
    info = _DlInfo()
    found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    if not found or info.dli_fname is None:
        return None
    begins = info.dli_sname is not None and info.dli_saddr == address
    return Place(os.fsdecode(info.dli_fname), info.dli_sname.decode() if begins else "")


def slots_of(path: str) -> dict[str, int]:
    """Symbol → address of its slot, of the object that is loaded from `path`."""
    types = _SLOT_TYPES.get(platform.machine())
    if types is None or ctypes.sizeof(ctypes.c_void_p) != _WORD:
        raise UnknownLayout(f"machine {platform.machine()} is not known")
    try:
        handle = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)._handle
    except OSError as error:
        raise UnknownLayout(f"{path} is not loaded: {error}") from error
    loaded = _LinkMap.from_address(handle)
    if loaded.l_name is None or not _same_file(os.fsdecode(loaded.l_name), path):
        raise UnknownLayout(f"the handle of {path} is no link map")
    tags = _dynamic(loaded.l_ld, loaded.l_addr)
    if tags.get(_SYMENT) != ctypes.sizeof(_Symbol) or tags.get(_PLTREL, _RELA) != _RELA:
        raise UnknownLayout("its relocations are not RELA")
    found: dict[str, int] = {}
    for table, size in ((_RELA, _RELASZ), (_JMPREL, _PLTRELSZ)):
        for entry in _relocations(tags, table, size):
            if entry.info & 0xFFFFFFFF in types:
                found.setdefault(_name(tags, entry.info >> 32), loaded.l_addr + entry.offset)
    return found


def _same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return Path(one).name == Path(other).name


def _dynamic(address: int, base: int) -> dict[int, int]:
    tags: dict[int, int] = {}
    for number in range(_DYNAMIC_ENTRIES_MAX):
        entry = _Dynamic.from_address(address + number * ctypes.sizeof(_Dynamic))
        if entry.tag == _NULL:
            break
        value = entry.value
        if entry.tag in {_STRTAB, _SYMTAB, _RELA, _JMPREL} and value < base:
            value += base  # glibc has added it already, musl leaves the section as it is
        tags[entry.tag] = value
    if not {_STRTAB, _SYMTAB, _STRSZ} <= tags.keys():
        raise UnknownLayout("its dynamic section is incomplete")
    return tags


def _relocations(tags: dict[int, int], table: int, size: int) -> Iterator[_Relocation]:
    step = ctypes.sizeof(_Relocation)
    start, length = tags.get(table, 0), tags.get(size, 0)
    if not start or not length:
        return
    if length > _RELOCATION_BYTES_MAX or length % step or tags.get(_RELAENT, step) != step:
        raise UnknownLayout(f"its relocations are {length} bytes")
    for at in range(start, start + length, step):
        yield _Relocation.from_address(at)


def _name(tags: dict[int, int], index: int) -> str:
    symbol = _Symbol.from_address(tags[_SYMTAB] + index * ctypes.sizeof(_Symbol))
    room = tags[_STRSZ] - symbol.name
    if room <= 0:
        raise UnknownLayout("a symbol's name lies outside the string table")
    text = ctypes.string_at(tags[_STRTAB] + symbol.name, min(room, _SYMBOL_NAME_BYTES_MAX))
    return text.partition(b"\0")[0].decode(errors="replace")


def read_slot(slot: int) -> int:
    return ctypes.c_size_t.from_address(slot).value


def write_slot(slot: int, address: int) -> None:
    """One aligned store: whoever calls through the slot sees the old address or the new one."""
    if slot % _WORD:
        raise UnknownLayout("a slot is not aligned")
    with _writable(slot):
        ctypes.c_size_t.from_address(slot).value = address


@contextmanager
def _writable(slot: int) -> Iterator[None]:
    """RELRO: the loader may have made the page read-only after it had filled the table."""
    before = _protection(slot)
    if before & _PROT["w"]:
        yield
        return
    page = os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.c_void_p(slot & -page)
    if libc.mprotect(start, ctypes.c_size_t(page), before | _PROT["w"]) != 0:
        raise UnknownLayout(f"mprotect: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.mprotect(start, ctypes.c_size_t(page), before)


def _protection(address: int) -> int:
    with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, rights, *_ = line.split(maxsplit=2)
            start, _, end = span.partition("-")
            if int(start, 16) <= address < int(end, 16):
                return sum(bit for letter, bit in _PROT.items() if letter in rights)
    raise UnknownLayout("a slot is not mapped")
