"""How the records of one use of a segment are written, and what makes them sound.

Each use belongs to one *life* of the store, the time from one opening for writing to the next. Its
records name the store and the life together as their owner: what a life has left beyond its end,
and a later one has cut off, is never taken for a record of the later one. In a sealed store each
use has a key of its own, of which the life is part by way of the nonce.
"""

import os
from dataclasses import replace
from typing import Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.localstore import packing, record, segment
from orion_iscsifs.localstore.record import Flag, Header
from orion_iscsifs.localstore.seal import BadSeal, Seal
from orion_iscsifs.localstore.segment import SegmentHeader

_HEADER_NONCE: Final = 1 << 63
"""Added to the number of a use: the nonce of a segment's header, which no record has."""


def new_use(header: SegmentHeader, store: bytes, key: Seal | None, lun: str) -> "Codec":
    """For a segment that is to be used with this header, which is completed."""
    if key is None:
        return Codec(store, header, None)
    salted = replace(header, salt=_salt())
    seal = _derived(key, salted, lun)
    nonce = _HEADER_NONCE | header.number
    tag = seal.encrypt(header.life, nonce, segment.bound(store, salted), b"")
    return Codec(store, replace(salted, tag=tag), seal)


def known_use(header: SegmentHeader, store: bytes, key: Seal | None, lun: str) -> "Codec":
    """For a segment that was found with this header."""
    return Codec(store, header, None if key is None else _derived(key, header, lun))


def _salt() -> bytes:
    return os.urandom(segment.SALT_BYTES)


def _derived(key: Seal, header: SegmentHeader, lun: str) -> Seal:
    return key.derived(header.salt, lun.encode())


class Codec:
    """See the module's docstring. `header` is that of the segment, `owner` what records repeat."""

    def __init__(self, store: bytes, header: SegmentHeader, seal: Seal | None) -> None:
        self.header = header
        self.owner = record.owner(store, header.life)
        self._store = store
        self._seal = seal

    def encode(self, header: Header, payload: Buffer) -> tuple[bytes, Buffer]:
        """The header, checksums and all, and what is stored. `header.stored` is its length."""
        head = record.bound(self.owner, header)
        if self._seal is None:
            return record.complete(head, payload), payload
        stored = self._seal.encrypt(self.header.life, header.seq, head, payload)
        return record.complete(head, stored), stored

    def opened(self, header: Header, stored: Buffer) -> Buffer:
        """What was sealed. Raises BadSeal; the checksums were looked at before."""
        if (self._seal is not None) != (Flag.SEALED in header.flags):
            raise BadSeal(f"record {header.seq} is not sealed as the others are")
        if self._seal is None:
            return stored
        head = record.bound(self.owner, header)
        return self._seal.decrypt(self.header.life, header.seq, head, stored)

    def decode(self, header: Header, stored: Buffer) -> bytes:
        """The content that a record brings. Raises BadSeal, as `opened` does."""
        content = self.opened(header, stored)
        if Flag.COMPRESSED in header.flags:
            try:
                content = packing.unpack(content, header.length)
            except packing.Unpackable as error:
                raise BadSeal(f"record {header.seq}: {error}") from None
        if len(content) != header.length:
            raise BadSeal(f"record {header.seq} holds {len(content)} of {header.length} bytes")
        return bytes(content)

    def check_header(self) -> None:
        """Raises BadSeal if the segment's header is not what was sealed."""
        if self._seal is not None:
            head = segment.bound(self._store, self.header)
            nonce = _HEADER_NONCE | self.header.number
            self._seal.decrypt(self.header.life, nonce, head, self.header.tag)
