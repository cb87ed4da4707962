"""The superblock of a tier: whose it is, and how far to trust what is in it. Pure.

The page is that of `localstore.superblock`: two copies, written in turn, with a counter and a
checksum. Only the kind (`MAGIC`) and the fields are the tier's own.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore import rekey, superblock
from orion_iscsifs.localstore.seal import Sealing
from orion_iscsifs.tier import journal

MAGIC: Final = b"OTSUPER1"


class TierSuperblock(msgspec.Struct, frozen=True, kw_only=True):
    """Whose tier it is, and how far to trust it."""

    store: bytes
    """16 random bytes, of this tier and no other."""
    lun: str
    """The designator of the LUN (VPD page 83h), as text."""
    size_bytes: int
    """The LUN's, when it was last seen."""
    block_bytes: int
    segment_bytes: int
    segments: int
    """At most so many files of that size."""
    created: str
    """ISO 8601, UTC."""
    boot_id: str
    """The boot of the host in which it was last open for writing."""
    target: str = ""
    """Name and LUN, for people."""
    key: int = 0
    """Our reservation key; 0: none is held."""
    generation: int = -1
    """PRGENERATION when it was last known that nobody else may write; -1: not known."""
    clean: bool = True
    """It was closed in order, and all of it is durable."""
    ended: str = ""
    """Why nothing in it may be trusted any more."""
    newest: int = -1
    """The newest segment that has been begun; -1: none was."""
    entries: int = 0
    """How many entries the journal of that one has; known only if `clean`."""
    life: int = 0
    """How often it has been opened for writing."""
    sealing: Sealing | None = None
    """None: what is in it is not encrypted."""

    @property
    def incompat(self) -> int:
        """The features that a reader has to know."""
        return superblock.LIVES | (superblock.SEALED if self.sealing else 0)


SEALABLE: Final = (rekey.LOG, (TierSuperblock, MAGIC))
"""For `rekey.change_keys`: logs and tiers."""


def encode(counter: int, block: TierSuperblock) -> bytes:
    """A page."""
    return superblock.encode(counter, block, incompat=block.incompat, magic=MAGIC)


def newest(pages: Sequence[Buffer]) -> tuple[int, TierSuperblock] | None:
    """The copy that counts, with its counter. Raises ForeignFormat."""
    found = superblock.newest(pages, TierSuperblock, MAGIC)
    if found is not None and not is_sound(found[1]):
        raise superblock.ForeignFormat("its superblock holds numbers that can't be")
    return found


def may_be_replaced(pages: Sequence[Buffer]) -> bool:
    """Whether the superblocks of a folder are a tier's, perhaps damaged, and not a log's."""
    return not any(bytes(page[: len(superblock.MAGIC)]) == superblock.MAGIC for page in pages)


def is_sound(block: TierSuperblock) -> bool:
    """Whether its numbers can be those of a tier."""
    return (
        len(block.store) == 16
        and journal.SEGMENT_MIN_BYTES <= block.segment_bytes <= journal.SEGMENT_MAX_BYTES
        and block.segment_bytes % journal.PAGE_BYTES == 0
        and journal.SEGMENTS_MIN <= block.segments <= journal.SEGMENTS_MAX
        and -1 <= block.newest <= journal.NUMBER_MAX
        and 0 <= block.entries <= journal.entries_max(block.segment_bytes)
        and 0 <= block.life <= 0xFFFF_FFFF
        and 0 <= block.size_bytes < 1 << 63
    )


class TierError(OrionError):
    """The tier can't be used, or not any more. The message names it and says why."""
