"""Small volumes whose keys cost nothing to open."""

from typing import Literal

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import Geometry
from orion_iscsifs.crypt.keys import Costs, PbkdfName
from orion_iscsifs.crypt.manage import Format, format_volume
from orion_iscsifs.testing.memory import MemoryDevice

MIB = 1 << 20
PASSPHRASE = b"correct horse battery staple"
PLAIN = b"plaintext that nobody may see..." * 16
"""512 bytes that no cipher produces."""


def costs(pbkdf: PbkdfName = "pbkdf2") -> Costs:
    """As cheap as they may be."""
    if pbkdf == "pbkdf2":
        return Costs(pbkdf=pbkdf, iterations=1000)
    return Costs(pbkdf=pbkdf, iterations=4, memory_kib=64, lanes=2)


def how(
    version: Literal[1, 2] = 2,
    *,
    sector_bytes: int | None = None,
    pbkdf: PbkdfName = "pbkdf2",
    key_bytes: int = 64,
    force: bool = False,
) -> Format:
    return Format(
        version=version,
        sector_bytes=sector_bytes,
        key_bytes=key_bytes,
        costs=costs(pbkdf),
        force=force,
    )


def disk(
    payload_bytes: int = 4 * MIB, *, block_bytes: int = 512, record: bool = False
) -> MemoryDevice:
    """Room for a LUKS2 header, and so much payload."""
    geometry = Geometry(
        size_bytes=16 * MIB + payload_bytes,
        logical_block_bytes=block_bytes,
        discard_granularity_bytes=4096,
        zeroes_after_discard=True,
    )
    return MemoryDevice(geometry=geometry, record=record)


async def volume(
    version: Literal[1, 2] = 2,
    *,
    sector_bytes: int | None = None,
    pbkdf: PbkdfName = "pbkdf2",
    block_bytes: int = 512,
) -> MemoryDevice:
    """A disk with a volume on it that opens with PASSPHRASE; made once for each kind."""
    made = disk(block_bytes=block_bytes)
    kind = version, sector_bytes, pbkdf
    if kind not in _made:
        wanted = how(version, sector_bytes=sector_bytes, pbkdf=pbkdf)
        await format_volume(AlignedDevice(made), PASSPHRASE, wanted)
        _made[kind] = made.peek(0, 2 * MIB)
    made.poke(0, _made[kind])
    return made


_made: dict[tuple[object, ...], bytes] = {}
"""The beginning of each kind of volume."""
