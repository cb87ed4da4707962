"""CRC32C digests (RFC 7143 §13.1 and §11.2.3). The four bytes go out least significant first."""

from typing import Final

import crc32c

DIGEST_BYTES: Final = 4

Buffer = bytes | bytearray | memoryview


def digest(*parts: Buffer) -> bytes:
    """The digest field over the parts in turn; padding counts, so pass it as a part."""
    crc = 0
    for part in parts:
        crc = crc32c.crc32c(part, crc)
    return crc.to_bytes(DIGEST_BYTES, "little")
