"""Compression of what is sealed: only where it pays.

Encrypted data can't be compressed by whoever stores it, so it is done before. Level 1 of zstd; what
saves less than an eighth stays as it is. What does not compress (media, encrypted volumes) is
recognised by region, and tried again ever more seldom.
"""

import threading
from typing import Final

import zstandard

from orion_iscsifs.block.device import Buffer

PACKED_MIN_BYTES: Final = 16 << 10
"""Less is not worth the time that a writer waits."""
LEVEL: Final = 1
_REGION_BYTES: Final = 1 << 30
_REGIONS_MAX: Final = 4096
_SKIPPED_MAX: Final = 256
"""Attempts that are left out at most between two, in a region that does not compress."""


class Unpackable(Exception):
    """What was packed is not what it should be."""


class Packer:
    """Compresses, and remembers where that is in vain. May be used in several threads."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._hopeless: dict[int, tuple[int, int]] = {}
        """Of each such region: attempts to leave out now, and after the next failure."""

    def wants(self, offset: int, length: int) -> bool:
        """Whether `pack` should be tried. To be asked once for each piece, since it counts."""
        if length < PACKED_MIN_BYTES:
            return False
        region = offset // _REGION_BYTES
        left, pause = self._hopeless.get(region, (0, 1))
        if left == 0:
            return True
        self._hopeless[region] = left - 1, pause
        return False

    def pack(self, offset: int, payload: Buffer) -> bytes | None:
        """Compressed; None: it does not pay."""
        packed = self._compressor().compress(payload)
        region = offset // _REGION_BYTES
        if len(packed) <= len(payload) - len(payload) // 8:
            self._hopeless.pop(region, None)
            return packed
        if len(self._hopeless) >= _REGIONS_MAX:
            self._hopeless.clear()
        pause = self._hopeless.get(region, (0, 1))[1]
        self._hopeless[region] = pause, min(2 * pause, _SKIPPED_MAX)
        return None

    def _compressor(self) -> zstandard.ZstdCompressor:
        """One for each thread: it can't be shared."""
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=LEVEL)
        return compressor


def unpack(packed: Buffer, length: int) -> bytes:
    """The `length` bytes that were packed. Raises Unpackable; takes no more memory than that."""
    try:
        if zstandard.frame_content_size(packed) != length:
            raise Unpackable(f"does not hold {length} bytes")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=length)
    except zstandard.ZstdError as error:
        raise Unpackable(str(error)) from None
