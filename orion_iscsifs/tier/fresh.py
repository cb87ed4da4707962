"""The superblock of a tier that is made anew."""

import secrets
from datetime import UTC, datetime

from orion_iscsifs.tier import journal, trust
from orion_iscsifs.tier.superblock import TierSuperblock


def new_tier_superblock(
    lun: str, *, size_bytes: int, block_bytes: int, tier_bytes: int, boot_id: str, target: str = ""
) -> TierSuperblock:
    """For a new tier of `tier_bytes`. Raises TierError if that is too little."""
    size, count = journal.layout(tier_bytes)
    if count < journal.SEGMENTS_MIN:
        raise trust.too_small(tier_bytes)
    return TierSuperblock(
        store=secrets.token_bytes(16),
        lun=lun,
        size_bytes=size_bytes,
        block_bytes=block_bytes,
        segment_bytes=size,
        segments=count,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        boot_id=boot_id,
        target=target,
    )
