"""The keys of a sealed tier: one for each segment, out of the data key and the segment's salt.

Sequence numbers and lives come again when a folder is put back to an older state and goes on from
there; salts do not.
"""

import os

from orion_iscsifs.localstore.seal import Seal

SALT_BYTES = 16
NO_SALT = bytes(SALT_BYTES)
_KEPT = 64


class SegmentSeals:
    """Of one tier. Used by several threads: each step is one operation on a dictionary."""

    def __init__(self, key: Seal | None, lun: str) -> None:
        """`key`: None: the tier is not sealed."""
        self._key = key
        self._lun = lun.encode()
        self._salts: dict[int, bytes] = {}
        self._seals: dict[int, Seal] = {}

    def new_salt(self) -> bytes:
        """For the header of a segment that begins."""
        return NO_SALT if self._key is None else os.urandom(SALT_BYTES)

    def note(self, number: int, salt: bytes) -> None:
        """The header of this segment has this salt."""
        # One that was made ahead and never used may have had this number before.
        self.forget(number)
        if self._key is not None:
            self._salts[number] = salt

    def forget(self, number: int) -> None:
        """The segment has gone."""
        self._salts.pop(number, None)
        self._seals.pop(number, None)

    def of(self, number: int) -> Seal | None:
        """To seal and open what is in this segment; None: the tier is not sealed."""
        if self._key is None:
            return None
        found = self._seals.get(number)
        if found is None:
            # A segment that has just gone has no salt any more: then nothing opens, as it should.
            found = self._key.derived(self._salts.get(number, NO_SALT), self._lun)
            if len(self._seals) >= _KEPT:
                self._seals.clear()
            self._seals[number] = found
        return found
