"""S3-FIFO with one bit: which entry to reuse next. Pure.

Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023), and the authors' later
advice to use one bit for block I/O. Three FIFO queues:

* `small` takes newcomers and is kept at a tenth of the entries. Whoever leaves it unused is
  evicted and remembered by name in the ghost list; whoever was used moves on to `main`. So a scan
  passes through without touching `main`. What was fetched ahead has to live until it is read, so
  `small` may exceed its share by entries that wait for that.
* `main` gives an entry that was used another round, and evicts it otherwise.
* the ghost list holds names only: a newcomer found there goes to `main` at once.

A hit sets `entry.visited`, nothing else: no list is touched on the hot path.

A busy entry (dirty, or with I/O under way) can't be evicted. When its turn comes it leaves the
queues (`queued` is cleared) and its owner brings it back with `add` once it is idle. So a cache
full of dirty data is not scanned again and again.
"""

from collections import OrderedDict, deque
from typing import Generic, Protocol, TypeVar


class Entry(Protocol):
    """What the queues hold."""

    number: int
    """Its name for the ghost list."""
    visited: bool
    queued: bool
    proven: bool
    """It has its place in `main`."""

    @property
    def busy(self) -> bool: ...


EntryT = TypeVar("EntryT", bound=Entry)


class S3Fifo(Generic[EntryT]):
    """The queues for at most `entries_max` entries."""

    SMALL_SHARE = 10

    def __init__(self, entries_max: int) -> None:
        self._small: deque[EntryT] = deque()
        self._main: deque[EntryT] = deque()
        # Not a plain dict: finding its first key walks over all that were deleted before it.
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._small_max = max(1, entries_max // self.SMALL_SHARE)
        self._ghosts_max = entries_max

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def admit(self, entry: EntryT) -> None:
        """Queue a newcomer; its `number` decides where."""
        entry.proven = entry.number in self._ghosts
        if entry.proven:
            del self._ghosts[entry.number]
        entry.visited = False
        self.add(entry)

    def add(self, entry: EntryT) -> None:
        """Queue an entry, or queue it again after it was busy."""
        assert not entry.queued, "an entry is queued twice"
        entry.queued = True
        (self._main if entry.proven else self._small).append(entry)

    def evict(self, *, spared: int = 0) -> EntryT | None:
        """Take out the entry to reuse; None when all are busy.

        `spared` entries of `small` don't count: they have not had their chance to be used yet.
        """
        small_max = self._small_max + spared
        while self._small or self._main:
            from_small = len(self._small) > small_max or not self._main
            entry = (self._small if from_small else self._main).popleft()
            entry.queued = False
            if entry.busy:
                continue
            if entry.visited:
                entry.visited = False
                entry.proven = True
                self.add(entry)
                continue
            if from_small:
                self._remember(entry.number)
            return entry
        return None

    def _remember(self, number: int) -> None:
        if len(self._ghosts) >= self._ghosts_max:
            self._ghosts.popitem(last=False)
        self._ghosts[number] = None
