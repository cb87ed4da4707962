"""READ CAPACITY (10) and (16) data (SBC-3 §5.15, §5.16)."""

from dataclasses import dataclass
from typing import Final

from orion_iscsifs.scsi.malformed import Buffer, MalformedData, field

_UNKNOWN_10: Final = 0xFFFF_FFFF
BLOCK_BYTES_MIN: Final = 512
BLOCK_BYTES_MAX: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """`blocks` logical blocks of `block_bytes`."""

    blocks: int
    block_bytes: int
    blocks_per_physical_exponent: int = 0
    """2^n logical blocks are one physical block."""
    lowest_aligned_lba: int = 0
    provisioning: bool = False
    """LBPME: UNMAP and friends may exist."""
    reads_zeroes: bool = False
    """LBPRZ: an unmapped block reads as zeroes."""
    protection: bool = False

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def physical_block_bytes(self) -> int:
        return self.block_bytes << self.blocks_per_physical_exponent


def _checked(command: str, blocks: int, block_bytes: int) -> None:
    if block_bytes & (block_bytes - 1) or not BLOCK_BYTES_MIN <= block_bytes <= BLOCK_BYTES_MAX:
        raise MalformedData(command, f"a logical block of {block_bytes} bytes can't be used")
    if blocks * block_bytes >= 1 << 63:
        raise MalformedData(command, f"{blocks} blocks of {block_bytes} bytes are too many")


def decode_capacity_10(data: Buffer) -> Capacity | None:
    """None: the device has more blocks than fit here; ask READ CAPACITY(16)."""
    if len(data) < 8:
        raise MalformedData("READ CAPACITY(10)", f"{len(data)} bytes where 8 are due")
    last = field(data, 0, 4)
    if last == _UNKNOWN_10:
        return None
    capacity = Capacity(blocks=last + 1, block_bytes=field(data, 4, 4))
    _checked("READ CAPACITY(10)", capacity.blocks, capacity.block_bytes)
    return capacity


def decode_capacity_16(data: Buffer) -> Capacity:
    if len(data) < 12:
        raise MalformedData("READ CAPACITY(16)", f"{len(data)} bytes where 32 are due")
    blocks, block_bytes = field(data, 0, 8) + 1, field(data, 8, 4)
    _checked("READ CAPACITY(16)", blocks, block_bytes)
    # An absurd physical block says nothing; 64 KiB is already more than any disk has.
    exponent = field(data, 13, 1) & 0x0F
    return Capacity(
        blocks=blocks,
        block_bytes=block_bytes,
        blocks_per_physical_exponent=exponent if block_bytes << exponent <= BLOCK_BYTES_MAX else 0,
        lowest_aligned_lba=field(data, 14, 2) & 0x3FFF,
        provisioning=bool(field(data, 14, 1) & 0x80),
        reads_zeroes=bool(field(data, 14, 1) & 0x40),
        protection=bool(field(data, 12, 1) & 0x01),
    )


def encode_capacity_10(capacity: Capacity) -> bytes:
    last = min(capacity.blocks - 1, _UNKNOWN_10)
    return last.to_bytes(4, "big") + capacity.block_bytes.to_bytes(4, "big")


def encode_capacity_16(capacity: Capacity) -> bytes:
    alignment = capacity.provisioning << 15 | capacity.reads_zeroes << 14
    alignment |= capacity.lowest_aligned_lba
    return (
        (capacity.blocks - 1).to_bytes(8, "big")
        + capacity.block_bytes.to_bytes(4, "big")
        + bytes((capacity.protection, capacity.blocks_per_physical_exponent))
        + alignment.to_bytes(2, "big")
        + bytes(16)
    )
