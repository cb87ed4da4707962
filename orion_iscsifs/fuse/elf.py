"""Where a shared object keeps the addresses of the functions it calls: its GOT slots. Pure.

A call from one shared object into another goes through a slot that the dynamic linker fills in. The
relocations of the object say which slot is which function's (System V ABI, chapter 5: `DT_JMPREL`,
`DT_RELA`). 64-bit little-endian objects of x86-64 and AArch64 only.
"""

from collections.abc import Iterator
from struct import Struct
from struct import error as StructError
from typing import Final

_HEADER: Final = Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = Struct("<IIQQQQQQ")
_DYNAMIC: Final = Struct("<qQ")
_RELA: Final = Struct("<QQq")
_SYMBOL: Final = Struct("<IBBHQQ")
_MAGIC: Final = b"\x7fELF\x02\x01"
"""64 bits, little-endian."""
_JUMP_SLOTS: Final = {62: frozenset({6, 7}), 183: frozenset({1025, 1026})}
"""By e_machine: R_X86_64_GLOB_DAT and _JUMP_SLOT, R_AARCH64_GLOB_DAT and _JUMP_SLOT."""
_PT_LOAD: Final = 1
_PT_DYNAMIC: Final = 2
_DT_PLTRELSZ: Final = 2
_DT_STRTAB: Final = 5
_DT_SYMTAB: Final = 6
_DT_RELA: Final = 7
_DT_RELASZ: Final = 8
_DT_JMPREL: Final = 23
_NAME_BYTES_MAX: Final = 256


class NotUnderstood(Exception):
    """The file is of another kind, or damaged."""


def call_slots(image: bytes, names: frozenset[str]) -> dict[str, list[int]]:
    """Name → the virtual addresses of its slots, relative to where the object is loaded.

    `image` is the file. Raises NotUnderstood.
    """
    try:
        return _call_slots(image, names)
    except (StructError, IndexError, ValueError, OverflowError, KeyError) as error:
        raise NotUnderstood(f"not an object that can be read: {error}") from None


def _call_slots(image: bytes, names: frozenset[str]) -> dict[str, list[int]]:
    header = _HEADER.unpack_from(image)
    if header[0][:6] != _MAGIC:
        raise NotUnderstood("not a 64-bit little-endian ELF file")
    kinds = _JUMP_SLOTS.get(header[2])
    if kinds is None:
        raise NotUnderstood(f"machine {header[2]} is not known")
    segments = [
        _SEGMENT.unpack_from(image, header[5] + index * header[9]) for index in range(header[10])
    ]
    table = dict(_dynamic(image, segments))
    found: dict[str, list[int]] = {}
    for start, size in ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)):
        if start not in table:
            continue
        offset = _place(segments, table[start])
        for at in range(offset, min(offset + table.get(size, 0), len(image)), _RELA.size):
            slot, info, _ = _RELA.unpack_from(image, at)
            if info & 0xFFFFFFFF not in kinds:
                continue
            symbol = _place(segments, table[_DT_SYMTAB]) + (info >> 32) * _SYMBOL.size
            name_at = _place(segments, table[_DT_STRTAB]) + _SYMBOL.unpack_from(image, symbol)[0]
            name = image[name_at : name_at + _NAME_BYTES_MAX].split(b"\0")[0].decode("latin-1")
            if name in names:
                found.setdefault(name, []).append(slot)
    return found


def _dynamic(image: bytes, segments: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Tag and value of each entry of the dynamic section."""
    for kind, _, offset, _, _, size, _, _ in segments:
        if kind != _PT_DYNAMIC:
            continue
        for at in range(offset, min(offset + size, len(image)), _DYNAMIC.size):
            tag, value = _DYNAMIC.unpack_from(image, at)
            if tag == 0:
                return
            yield tag, value


def _place(segments: list[tuple[int, ...]], address: int) -> int:
    """The offset in the file of a virtual address."""
    for kind, _, offset, start, _, size, _, _ in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    raise NotUnderstood(f"address {address:#x} is not in the file")
