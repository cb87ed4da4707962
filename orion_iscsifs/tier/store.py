"""`TierStore`: one tier on disk, a folder with two superblocks and a bounded number of segments."""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.tier import journal
from orion_iscsifs.tier.superblock import TierError, TierSuperblock


class TierStore:
    """See the module's docstring. Made by `create` or `open`; then `resume` it; `close` it.

    The methods block: run them in a thread.
    """

    folder: Path
    superblock: TierSuperblock
    failed: OrionError | None
    seal: Seal | None
    """Set it before `resume`, if `superblock.sealing` is not None."""
    on_failure: Callable[[], object]
    """Called in a thread when the tier has failed: make sure that no mount trusts it again. It may
    block and raise OSError; until it, or the tier's own way, has succeeded it is called again."""

    @classmethod
    def create(
        cls, folder: Path, block: TierSuperblock, *, seal: Seal | None = None
    ) -> "TierStore":
        """A new, empty tier. Raises TierError or BusyError."""
        raise NotImplementedError

    @classmethod
    def open(cls, folder: Path, *, shared: bool = False) -> "TierStore":
        """An existing tier; only its superblock is read. `shared`: only to look, without a lock.

        Raises TierError or BusyError.
        """
        raise NotImplementedError

    def restart(self, block: TierSuperblock, *, seal: Seal | None = None) -> None:
        """As after `create`, in this folder: nothing that is in it counts any more."""
        raise NotImplementedError

    def resume(self, *, boot_id: str, tier_bytes: int | None = None) -> str:
        """Read the index, and begin a new life, durably. Returns why what was in it was dropped,
        all or in part; "" if it was not. `tier_bytes`: what it may have from now on.

        Raises TierError; BadSeal is a reason to drop, not an error.
        """
        raise NotImplementedError

    def update(self, **changes: object) -> None:
        """Change fields of the superblock, durably. Raises TierError, and the tier has failed."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the files back; does not mark it clean (`open_tier` does that)."""
        raise NotImplementedError

    @property
    def state(self) -> str:
        """`ok` or `failed`."""
        raise NotImplementedError

    @property
    def used_bytes(self) -> int:
        """Of all its files."""
        raise NotImplementedError

    @property
    def size_bytes(self) -> int:
        """What all its files together never exceed."""
        raise NotImplementedError


def new_tier_superblock(
    lun: str, *, size_bytes: int, block_bytes: int, tier_bytes: int, boot_id: str, target: str = ""
) -> TierSuperblock:
    """For a new tier of `tier_bytes`. Raises TierError if that is too little."""
    size, count = journal.layout(tier_bytes)
    if count < journal.SEGMENTS_MIN:
        least = journal.SEGMENTS_MIN * journal.SEGMENT_USUAL_MIN_BYTES + 2 * journal.PAGE_BYTES
        raise TierError(f"tier_size: {tier_bytes} bytes are less than {least}")
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


def drop(folder: Path) -> None:
    """Remove a tier with all that is in it. Raises TierError or BusyError."""
    raise NotImplementedError


def is_in_use(folder: Path) -> bool:
    """Whether a process has it open for writing."""
    raise NotImplementedError
