"""Every record of a tier read and checked, for `orion-iscsifs cache check`. Blocks.

Without the key of a sealed tier: the checksums are of what is stored.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.tier import trust
from orion_iscsifs.tier.index import Row
from orion_iscsifs.tier.loading import Loader
from orion_iscsifs.tier.reading import RecordReader
from orion_iscsifs.tier.seals import SegmentSeals
from orion_iscsifs.tier.store import TierStore

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Of this boot of the host. Raises OSError."""
    return _BOOT_ID.read_text().strip()


@dataclass
class Checked:
    """What was found."""

    frames: int = 0
    """That the tier has something of."""
    records: int = 0
    bad_records: int = 0
    damage: str = ""
    """Why the next mount will not use all of it, in words; empty: it may."""


def check(store: TierStore, boot_id: str, seal: Seal | None = None) -> Checked:
    """`store` is open and not resumed. Raises OSError."""
    block = store.superblock
    seals = SegmentSeals(seal, block.lun)
    if reason := trust.reason_against(block, boot_id, store.files):
        return Checked(damage=reason)
    loaded = Loader(store.files, block, seals).load()
    found = Checked(frames=loaded.index.frames, damage=loaded.dropped)
    reader = RecordReader(store.files, store.store_id, seals)
    is_readable = block.sealing is None or seal is not None
    for number in loaded.numbers:
        for frame, row in loaded.index.rows(number):
            if row.size_bytes:
                found.records += 1
                found.bad_records += not _is_good(reader, frame, row, is_readable=is_readable)
    return found


def _is_good(reader: RecordReader, frame: int, row: Row, *, is_readable: bool) -> bool:
    try:
        raw = reader.raw(row)
        if is_readable:
            reader.check(frame, row, raw)
        else:
            reader.open(frame, row, raw)
    except OrionError:
        return False
    return True
