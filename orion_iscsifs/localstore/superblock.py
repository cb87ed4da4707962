"""The superblock: whose log this is. Two copies of one page, written in turn. Pure.

The copy with the higher counter and a good checksum counts, so a write that is cut short leaves the
one before it. The fields are JSON behind a fixed head: they are few, they change with versions, and
an administrator can read them.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Final, TypeVar, overload

import crc32c
import msgspec

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import Sealing

MAGIC: Final = b"OLSUPER1"
PAGE_BYTES: Final = 4096
NAMES: Final = ("super.0", "super.1")
VERSION: Final = 1
COMPAT_KNOWN: Final = 0
RO_COMPAT_KNOWN: Final = 0
SEALED: Final = 1
"""Incompatible feature: payloads are encrypted."""
LIVES: Final = 2
"""Incompatible feature: the store counts its lives, and records belong to one of them."""
INCOMPAT_KNOWN: Final = SEALED | LIVES
_HEAD: Final = Struct("<8sIIIIQI")
"""Magic, version, compat, ro_compat and incompat feature bits, counter, length of the JSON text."""
_CHECKSUM: Final = Struct("<I")


class Superblock(msgspec.Struct, frozen=True, kw_only=True):
    """Whose log it is, and how far to trust it."""

    store: bytes
    """16 random bytes, of this log and no other."""
    lun: str
    """The designator of the LUN (VPD page 83h), as text."""
    size_bytes: int
    """The LUN's, when it was last seen."""
    block_bytes: int
    segment_bytes: int
    segments: int
    created: str
    """ISO 8601, UTC."""
    target: str = ""
    """Name and LUN, for people."""
    key: int = 0
    """Our reservation key; 0: none is held."""
    generation: int = -1
    """PRGENERATION when it was last known that nobody else may write; -1: not known."""
    clean: bool = False
    """Everything is on the target: nothing to replay."""
    ended: str = ""
    """Why the log must not be replayed any more: it failed, and the target has newer data."""
    life: int = 0
    """How often it has been opened for writing; 0: by a version that did not count."""
    sealing: Sealing | None = None
    """None: its records are in plain text."""

    @property
    def incompat(self) -> int:
        """The features that a reader has to know."""
        return (SEALED if self.sealing else 0) | (LIVES if self.life else 0)


T = TypeVar("T", bound=msgspec.Struct)


class ForeignFormat(OrionError):
    """No superblock that this version may use. The message is for the user."""


def encode(
    counter: int, block: msgspec.Struct, *, incompat: int = 0, magic: bytes = MAGIC
) -> bytes:
    """A page. `magic`: 8 bytes that name the kind of store."""
    text = msgspec.json.encode(block)
    head = _HEAD.pack(magic, VERSION, 0, 0, incompat, counter, len(text))
    page = head + text
    assert len(page) + _CHECKSUM.size <= PAGE_BYTES
    body = page.ljust(PAGE_BYTES - _CHECKSUM.size, b"\0")
    return body + _CHECKSUM.pack(crc32c.crc32c(body))


@overload
def decode(page: Buffer) -> tuple[int, Superblock] | None: ...
@overload
def decode(page: Buffer, kind: type[T], magic: bytes) -> tuple[int, T] | None: ...
def decode(
    page: Buffer, kind: type[msgspec.Struct] = Superblock, magic: bytes = MAGIC
) -> tuple[int, msgspec.Struct] | None:
    """Counter and content; None: damaged, or not one of these. Raises ForeignFormat."""
    view = memoryview(page)
    body = view[: PAGE_BYTES - _CHECKSUM.size]
    if len(view) != PAGE_BYTES or bytes(view[: len(magic)]) != magic:
        return None
    if _CHECKSUM.unpack_from(view, len(body))[0] != crc32c.crc32c(body):
        return None
    _, version, _, ro_compat, incompat, counter, length = _HEAD.unpack_from(view)
    unknown = incompat & ~INCOMPAT_KNOWN | ro_compat & ~RO_COMPAT_KNOWN
    if version != VERSION or unknown:
        raise ForeignFormat(
            f"format version {version}, features {unknown:#x}: not known to this version",
            advice="use the version that wrote it, or `orion-iscsifs cache drop`",
        )
    text = bytes(view[_HEAD.size : _HEAD.size + length])
    try:
        return counter, msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise ForeignFormat(f"its superblock can't be understood: {error}") from None


def incompat(page: Buffer) -> int:
    """The incompatible features of a page that `decode` has found sound."""
    bits: int = _HEAD.unpack_from(page)[4]
    return bits


@overload
def newest(pages: Sequence[Buffer]) -> tuple[int, Superblock] | None: ...
@overload
def newest(pages: Sequence[Buffer], kind: type[T], magic: bytes) -> tuple[int, T] | None: ...
def newest(
    pages: Sequence[Buffer], kind: type[msgspec.Struct] = Superblock, magic: bytes = MAGIC
) -> tuple[int, msgspec.Struct] | None:
    """The copy that counts."""
    found = [copy for page in pages if (copy := decode(page, kind, magic)) is not None]
    return max(found, key=lambda copy: copy[0], default=None)
