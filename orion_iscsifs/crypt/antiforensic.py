"""The anti-forensic splitter: a key blown up so that losing any part of it loses all. Pure.

From *New Methods in Hard Disk Encryption* (C. Fruhwirth, 2005), §5.2.1, as the LUKS1 On-Disk Format
Specification 1.2.3, §2.4 has it: of `stripes` blocks all but the last are random; each is mixed in
and diffused by a hash; the last is what makes the sum the key. Wiping any sector of it on a disk
that remaps sectors behind our back is then enough to destroy the key.
"""

import hashlib
from typing import Final

from orion_iscsifs.block.device import Buffer

STRIPES: Final = 4000
"""What every LUKS volume has."""
STRIPES_MAX: Final = 1 << 16


def split(key: Buffer, stripes: int, hash_name: str, random: Buffer) -> bytes:
    """`random` is (stripes - 1) * len(key) bytes that nobody can guess."""
    size = len(key)
    assert stripes >= 1
    assert len(random) == (stripes - 1) * size
    mixed = _mix(memoryview(random), size, hash_name)
    return bytes(random) + _xor(mixed, key)


def merge(material: Buffer, stripes: int, hash_name: str) -> bytes:
    """The key; `material` is `stripes` blocks of its length."""
    assert len(material) % stripes == 0
    size = len(material) // stripes
    view = memoryview(material)
    last = (stripes - 1) * size
    return _xor(_mix(view[:last], size, hash_name), view[last:])


def _mix(blocks: memoryview, size: int, hash_name: str) -> bytes:
    mixed = bytes(size)
    for at in range(0, len(blocks), size):
        mixed = _diffuse(_xor(mixed, blocks[at : at + size]), hash_name)
    return mixed


def _diffuse(block: bytes, hash_name: str) -> bytes:
    """Each part of one digest's length becomes the digest of its number and itself."""
    size = hashlib.new(hash_name).digest_size
    return b"".join(
        hashlib.new(
            hash_name, number.to_bytes(4, "big") + (part := block[at : at + size])
        ).digest()[: len(part)]
        for number, at in enumerate(range(0, len(block), size))
    )


def _xor(one: Buffer, other: Buffer) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(
        len(one), "little"
    )
