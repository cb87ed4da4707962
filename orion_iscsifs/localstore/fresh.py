"""The superblock of a log that is made anew."""

import secrets
from datetime import UTC, datetime

import msgspec

from orion_iscsifs.localstore import segment
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.seal import Seal, new_sealing
from orion_iscsifs.localstore.superblock import Superblock


def new_superblock(
    lun: str, *, size_bytes: int, block_bytes: int, log_bytes: int, target: str = ""
) -> Superblock:
    """For a new log of `log_bytes`. Raises LogError if that is too little."""
    size, count = segment.layout(log_bytes)
    if count < segment.SEGMENTS_MIN:
        least = segment.SEGMENTS_MIN * segment.SEGMENT_MIN_BYTES
        raise LogError(f"log_size: {log_bytes} bytes are less than {least}")
    return Superblock(
        store=secrets.token_bytes(16),
        lun=lun,
        size_bytes=size_bytes,
        block_bytes=block_bytes,
        segment_bytes=size,
        segments=count,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        target=target,
    )


def begun(block: Superblock, passphrase: bytes | None) -> tuple[Superblock, Seal | None]:
    """In its first life, and its key. With a passphrase it is sealed, which blocks for a moment."""
    if passphrase is None:
        return msgspec.structs.replace(block, life=1, sealing=None), None
    sealing, key = new_sealing(passphrase, block.store)
    return msgspec.structs.replace(block, life=1, sealing=sealing), Seal(key)
