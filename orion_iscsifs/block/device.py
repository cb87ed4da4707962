"""`BlockDevice`: the one interface between two storage layers.

Every box of the data path *is* a BlockDevice and *has* one below it. A layer knows this contract
and never its neighbour; `orion_iscsifs.testing.conformance` states the promises as tests.

Promises of every implementation
--------------------------------
* Offsets and lengths are multiples of `geometry.logical_block_bytes` and lie inside
  `[0, geometry.size_bytes)`; anything else raises `Misaligned` or `OutOfRange` and changes nothing.
  (`AlignedDevice` at the top of the stack lifts the first rule for its caller.)
* The caller owns every buffer. The callee fills or borrows it until its coroutine returns or
  raises, and never touches it afterwards.
* A read that begins after a write returned sees that write. Requests that overlap in time may take
  effect in either order; they never mix within one logical block.
* `flush()` returns once every write that *completed before it began* is durable. `fua=True` makes
  that one write durable before it returns.
* A failed or cancelled write may leave its own range torn (old or new data, block by block) and
  nothing else.
* `discard` is a hint: afterwards the range reads as zeroes or as what it held, the same at every
  read. `write_zeroes` makes it read as zeroes.
* A device with `geometry.read_only` raises `WriteProtected` from `write`, `discard` and
  `write_zeroes`; `flush` succeeds.
* An error is an `OrionError`; anything else is a bug.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orion_iscsifs.errors import Misaligned, OutOfRange

Buffer = bytes | bytearray | memoryview
"""What `write` takes: any contiguous buffer of bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Size, limits and abilities of a device; immutable, replaced as a whole when they change.

    Sources: READ CAPACITY(16) (SBC-4 §5.20), Block Limits VPD page B0h (SBC-4 §6.6.4), MODE SENSE
    caching page (SBC-4 §6.5.6).
    """

    size_bytes: int
    logical_block_bytes: int = 512
    physical_block_bytes: int = 4096
    alignment_bytes: int = 0
    """Offset of the first physical block: LOWEST ALIGNED LOGICAL BLOCK ADDRESS (SBC-3 §5.16.2)."""
    optimal_transfer_bytes: int = 1 << 20
    """Best length of one large request."""
    transfer_bytes_max: int = 0
    """Longest request that the device takes as one command; longer ones are split below. 0: any."""
    discard_granularity_bytes: int = 0
    """0: `discard` is not supported (it then does nothing). Only whole granules are discarded:
    OPTIMAL UNMAP GRANULARITY (SBC-3 §6.6.4)."""
    discard_alignment_bytes: int = 0
    """Offset of the first granule: UNMAP GRANULARITY ALIGNMENT (SBC-3 §6.6.4)."""
    zeroes_after_discard: bool = False
    """What has been unmapped reads as zeroes (LBPRZ: SBC-3 §5.16.2, §6.6.7), so `write_zeroes` may
    give the space back. `discard` alone promises no zeroes: the device may ignore it."""
    read_only: bool = False
    write_cache: bool = True
    """The device has a volatile write cache: `flush` costs something and is needed."""
    fua: bool = True
    """A write with `fua` needs no flush of its own (DPOFUA: SBC-3 §6.5.1)."""

    def __post_init__(self) -> None:
        assert self.size_bytes % self.logical_block_bytes == 0, "the size is whole logical blocks"


GeometryListener = Callable[[Geometry], None]
"""Called (synchronously, on the trio thread) with the new geometry after a change."""


class BlockDevice(Protocol):
    """Random-access storage in logical blocks. See the module's docstring for the promises."""

    @property
    def geometry(self) -> Geometry: ...

    async def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes at `offset`. Zero length is allowed and does nothing."""

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        """Store `source` at `offset`."""

    async def flush(self) -> None:
        """Make every write that completed before this call durable."""

    async def discard(self, offset: int, length: int) -> None:
        """Tell the device that the range's content is no longer needed."""

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make the range read as zeroes."""

    def on_geometry_change(self, listener: GeometryListener) -> None:
        """Call `listener` whenever size or write protection changes; layers pass it upwards."""


def check_request(geometry: Geometry, offset: int, length: int) -> None:
    """Raise `Misaligned` or `OutOfRange` unless the range is whole blocks inside the device."""
    mask = geometry.logical_block_bytes - 1
    if (offset | length) & mask or offset < 0 or length < 0:
        raise Misaligned(
            f"range {offset}+{length} is not in {geometry.logical_block_bytes}-byte blocks"
        )
    if offset + length > geometry.size_bytes:
        raise OutOfRange(f"range {offset}+{length} reaches past the end ({geometry.size_bytes})")
