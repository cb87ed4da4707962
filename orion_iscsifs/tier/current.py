"""The segment that is being filled: where its next entry and its next record go."""

import os

from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.tier import journal
from orion_iscsifs.tier.journal import Entry, Kind, Scribe


class Current:
    """Of one segment. `descriptor`: to write to it; whoever has this closes it."""

    def __init__(self, store: bytes, number: int, descriptor: int, *, end: tuple[int, int]) -> None:
        """`end`: how many entries there are, and where the next record goes."""
        self.number = number
        self.descriptor = descriptor
        self.entries, self.position = end
        self._scribe = Scribe(store, number)

    def add(self, entries: list[Entry], seal: Seal | None) -> None:
        """Write entries, for which there is room, with one system call. Raises OSError.

        Entries without a record get their tag here.
        """
        lines = [
            self._scribe.encode(ordinal, self._tagged(ordinal, entry, seal))
            for ordinal, entry in enumerate(entries, self.entries)
        ]
        content = b"".join(lines)
        at = journal.PAGE_BYTES + self.entries * journal.ENTRY_BYTES
        if os.pwrite(self.descriptor, content, at) != len(content):
            raise OSError(28, os.strerror(28))
        self.entries += len(entries)

    def _tagged(self, ordinal: int, entry: Entry, seal: Seal | None) -> Entry:
        if seal is None or entry.kind == Kind.FRAME:
            return entry
        bound = self._scribe.tagged(ordinal, entry)
        return entry._replace(tag=seal.encrypt(entry.life, entry.seq, bound, b""))
