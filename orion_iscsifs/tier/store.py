"""`TierStore`: one tier on disk, a folder with two superblocks and a bounded number of segments.

Theory of operation
-------------------
The segments are a queue. Entries and records are added to the newest (`current`); the oldest goes
as a whole. That is S3-FIFO's `main` with one bit: before a segment goes, what was read since it was
written is written again at the other end (`appending`), at most a quarter of a segment, so that no
more than a third is written on top of what is new. `policy` has the newcomers and the ghosts.

One segment is made ahead (`prepared`), so that an entry never waits for the disk. It counts for the
size: all files together never exceed `size_bytes`.

*Entries* are written by the trio thread, each with one `pwrite` into the page cache: what they say
survives this process. *Records* are written by a thread, to a place that nothing else uses, and
their entries follow when they are there. Nothing is synced but segments that have been filled (an
error shows then, at the latest) and superblocks. So after a loss of power the order in which things
reached the disk is unknown, and the tier is worth nothing: it has to be closed in order (`clean`)
or opened again in the same boot of the host, else all of it is dropped.

An error of the disk ends the tier: `failed` is set, the index is empty from then on. From that
moment the device changes without INVALIDATE entries, so nothing on the disk may ever be believed
again. `retire` sees to that, in several ways, for the disk may be full, read-only, or gone.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import trio

from orion_iscsifs.block.ranges import Range
from orion_iscsifs.errors import BusyError, OrionError
from orion_iscsifs.localstore import files
from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.localstore.superblock import ForeignFormat
from orion_iscsifs.tier import journal, record, segments, superblock, trust
from orion_iscsifs.tier.current import Current
from orion_iscsifs.tier.index import ROWS_MAX, Index
from orion_iscsifs.tier.journal import Entry, Kind
from orion_iscsifs.tier.loading import Loaded, Loader
from orion_iscsifs.tier.seals import SegmentSeals
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.superblock import TierError, TierSuperblock

log = logging.getLogger(__name__)

_REASON_MAX: Final = 200

_GIVE_UP: Final = "`orion-iscsifs cache drop` gives it up; it holds nothing that the LUN lacks"


class TierStore:
    """See the module's docstring. Made by `create` or `open`; then `resume` it; `close` it.

    Those methods block, and so do the others that say so: run them in a thread.
    """

    def __init__(self, folder: Path, lock: int, counter: int, block: TierSuperblock) -> None:
        self.folder: Final = folder
        self.superblock = block
        self.failed: OrionError | None = None
        self.seal: Seal | None = None
        """Set it before `resume`, if `superblock.sealing` is not None."""
        self.on_failure: Callable[[], object] | None = None
        """Called in a thread when the tier has failed: make sure that no mount believes it again.
        It may block and raise OSError or OrionError; then the tier tries it again."""
        self.on_end: Callable[[], object] = lambda: None
        """Called at once when the tier has failed."""
        self.room = trio.lowlevel.ParkingLot()
        """Unparked when a segment has been prepared, or none ever will."""
        self.store_id = record.store_id(block.store)
        self.files: Final = SegmentFiles(folder)
        self.seals = SegmentSeals(None, block.lun)
        self.index = Index(0)
        self.numbers: deque[int] = deque()
        """Of the segments, the oldest first; the current one is the last."""
        self.current: Current | None = None
        self.leaving = -1
        """The number of the oldest segment, once its file is being removed."""
        self.next_seq = 0
        self.is_durable: set[int] = set()
        """Segments that were synced after the last change to them."""
        self._last = -1, 0
        """The newest segment when it was opened, and how many entries it had. If the tier is
        sealed nothing is added to it: an older state of it, put back, would use its key again."""
        self._prepared: Current | None = None
        self._filled: list[Current] = []
        """Full, and not synced yet."""
        self._is_resumed = False
        self._lock = lock
        self._mutex = threading.Lock()
        self._counter = counter

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def create(
        cls, folder: Path, block: TierSuperblock, *, seal: Seal | None = None
    ) -> "TierStore":
        """A new, empty tier. Raises TierError or BusyError."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            store = cls(folder, _lock(folder), 0, block)
        except OSError as error:
            raise TierError(
                f"tier {folder}: can't be made: {error.strerror}", advice="choose another tier_dir"
            ) from None
        try:
            if not superblock.may_be_replaced(files.superblock_pages(folder)):
                raise TierError(
                    f"tier {folder}: there is something else in that folder",
                    advice="choose another tier_dir",
                )
            store.restart(block, seal=seal)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open(cls, folder: Path, *, shared: bool = False) -> "TierStore":
        """An existing tier; only its superblock is read. `shared`: only to look, without a lock.

        Raises TierError or BusyError.
        """
        lock = -1
        try:
            lock = -1 if shared else _lock(folder)
            found = superblock.newest(files.superblock_pages(folder))
            if found is None:
                raise ForeignFormat("neither of its superblocks is sound")
        except (ForeignFormat, OSError) as error:
            if lock >= 0:
                os.close(lock)
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise TierError(f"tier {folder}: can't be opened: {why}", advice=_GIVE_UP) from None
        return cls(folder, lock, *found)

    def restart(self, block: TierSuperblock, *, seal: Seal | None = None) -> None:
        """As after `create`, in this folder: nothing that is in it counts any more.

        Blocks; raises TierError. To be done before `resume`.
        """
        assert not self.numbers, "a tier in use can't be begun anew"
        assert (block.sealing is None) == (seal is None)
        try:
            segments.remove_all(self.folder)
            self.write_superblock(block)
            self.write_superblock(block)
        except OSError as error:
            raise TierError(f"tier {self.folder}: can't be made: {error.strerror}") from None
        self.store_id = record.store_id(block.store)
        self.seal = seal

    def resume(self, *, boot_id: str, tier_bytes: int | None = None) -> str:
        """Read the index, and begin a new life, durably.

        Returns why what was in it was dropped, all or in part; "" if it was not. `tier_bytes`: what
        it may have from now on. Blocks; raises TierError.
        """
        assert (self.superblock.sealing is None) == (self.seal is None), "it needs its key"
        try:
            return self._resume(boot_id, tier_bytes)
        except OSError as error:
            raise TierError(
                f"tier {self.folder}: can't be gone on with: {error.strerror}", advice=_GIVE_UP
            ) from None

    def _resume(self, boot_id: str, tier_bytes: int | None) -> str:
        self.seals = SegmentSeals(self.seal, self.superblock.lun)
        was, block = self.superblock, trust.resized(self.superblock, tier_bytes)
        dropped = trust.reason_against(was, boot_id, self.files)
        if not dropped and block.segment_bytes != was.segment_bytes:
            dropped = "it is to have a very different size"
        rows_max = block.segments * journal.records_max(block.segment_bytes)
        if dropped:
            found = Loaded(Index(rows_max), dropped=dropped)
        else:
            found = Loader(self.files, block, self.seals).load()
        found.trim(block.segments)
        if not found.numbers:
            # Before the superblock vouches for this boot: they must never be believed again.
            self._remove_others([])
        newest = found.numbers[-1] if found.numbers else -1
        life = block.life + 1
        self.write_superblock(
            msgspec.structs.replace(
                block, boot_id=boot_id, clean=False, ended="", life=life, newest=newest
            )
        )
        self._remove_others(found.numbers)
        self._take(found, is_durable=was.clean)
        return found.dropped

    def _remove_others(self, numbers: list[int]) -> None:
        for number in self.files.numbers():
            if number not in numbers:
                self.files.remove(number)

    def _take(self, found: Loaded, *, is_durable: bool) -> None:
        self._is_resumed = True
        self.index = found.index
        self.numbers = deque(found.numbers)
        self.is_durable = set(found.numbers) if is_durable else set()
        if self.numbers:
            number = self.numbers[-1]
            self._last = number, found.ends[number][0]
        if self.numbers and self.seal is None:
            descriptor = os.open(self.files.path(number), os.O_RDWR | os.O_CLOEXEC)
            self.current = Current(
                self.superblock.store, number, descriptor, end=found.ends[number]
            )

    # -- what there is -----------------------------------------------------------------------

    @property
    def state(self) -> str:
        """`ok` or `failed`, for `status`."""
        return "ok" if self.failed is None else "failed"

    @property
    def used_bytes(self) -> int:
        """Of its files: the superblocks, and what the segments hold."""
        used = 2 * journal.PAGE_BYTES
        # Not resumed: whoever only looks at it.
        count = len(self.numbers if self._is_resumed else self.files.numbers())
        used += count * self.superblock.segment_bytes
        if self.current is not None:
            used += self.current.position - self.superblock.segment_bytes
        return used

    @property
    def size_bytes(self) -> int:
        """What all its files together never exceed."""
        block = self.superblock
        return 2 * journal.PAGE_BYTES + block.segments * block.segment_bytes

    # -- entries -----------------------------------------------------------------------------

    @property
    def records_left(self) -> int:
        """So many records fit into the current segment, whatever their size."""
        current = self.current
        if current is None:
            return 0
        size = self.superblock.segment_bytes
        rows_max = min(journal.records_max(size), ROWS_MAX)
        return max(
            min(
                (size - current.position) // record.RECORD_MAX_BYTES,
                rows_max - self.index.count(current.number),
                journal.entries_max(size) - current.entries,
            ),
            0,
        )

    def has_room(self, entries: int) -> bool:
        """Whether so many entries fit into the journal of the current segment."""
        current = self.current
        most = journal.entries_max(self.superblock.segment_bytes)
        return current is not None and current.entries + entries <= most

    def begin_segment(self) -> bool:
        """Go on in the segment that was made ahead; False: there is none. Without a checkpoint."""
        prepared = self._prepared
        if prepared is None:
            return False
        if self.current is not None:
            self.index.end(self.current.number)
            self._filled.append(self.current)
        self.current, self._prepared = prepared, None
        self.numbers.append(prepared.number)
        self.index.begin(prepared.number)
        return True

    @property
    def needs_segment(self) -> bool:
        """Whether a segment has to be made ahead."""
        return self._prepared is None and self.failed is None

    def invalidate(self, span: Range) -> bool:
        """An entry that nothing is true of the range any more; False: no room now (see `room`).

        Also False when the tier has failed, perhaps by this. Without a checkpoint.
        """
        if self.failed is not None:
            return False
        if not (self.has_room(1) or self.begin_segment()):
            return False
        entry = Entry(
            Kind.INVALIDATE, 0, 0, span[0], span[1] - span[0], self._seq(), self.superblock.life
        )
        return self.add([entry])

    def add(self, entries: list[Entry]) -> bool:
        """Write entries to the current segment, which has room for them. False: it has failed.

        Without a checkpoint.
        """
        current = self.current
        assert current is not None
        assert self.has_room(len(entries)), "the journal would run into the records"
        try:
            current.add(entries, self.seals.of(current.number))
        except OSError as error:
            self.fail("writing", error)
            return False
        self.is_durable.discard(current.number)
        return True

    def _seq(self) -> int:
        self.next_seq += 1
        return self.next_seq

    def take_seqs(self, count: int) -> int:
        """The first of so many numbers that nothing else gets in this life."""
        first = self.next_seq + 1
        self.next_seq += count
        return first

    # -- segments ----------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """The next segment takes the place of another."""
        return len(self.numbers) >= self.superblock.segments

    @property
    def is_nearly_full(self) -> bool:
        """There is no room left that was never used, or as good as none."""
        return len(self.numbers) + 1 >= self.superblock.segments

    def prepare(self) -> None:
        """Make a segment ahead. Blocks; raises OSError. There has to be room for it."""
        assert self._prepared is None
        assert len(self.numbers) < self.superblock.segments
        number = self.superblock.newest + 1
        salt = self.seals.new_salt()
        descriptor = self.files.make(self.superblock, number, salt)
        self.seals.note(number, salt)
        try:
            self._change(newest=number)
        except BaseException:
            os.close(descriptor)
            raise
        end = 0, journal.records_start(self.superblock.segment_bytes)
        self._prepared = Current(self.superblock.store, number, descriptor, end=end)

    def sync_filled(self) -> None:
        """Segments that have been filled become durable. Blocks; raises OSError."""
        while self._filled:
            filled = self._filled[0]
            os.fdatasync(filled.descriptor)
            os.close(filled.descriptor)
            self._filled.pop(0)
            self.is_durable.add(filled.number)

    def forget_oldest(self) -> None:
        """The oldest segment's file is gone: so is the rest of it."""
        number = self.numbers.popleft()
        self.index.forget(number)
        self.files.close(number)
        self.seals.forget(number)
        self.is_durable.discard(number)

    # -- ending ------------------------------------------------------------------------------

    def fail(self, doing: str, error: OSError) -> None:
        """The tier has ended: once, with a line in the log of the program."""
        if self.failed is None:
            why = error.strerror or str(error)
            self.failed = TierError(f"tier {self.folder}: {doing}: {why}")
            log.warning("%s; going on without it", self.failed)
            self.index = Index(0)
            self.room.unpark_all()
            self.on_end()

    def tell_owner(self) -> bool:
        """Whether the owner has seen to it that the tier is not believed again. Blocks."""
        if self.on_failure is None:
            return False
        try:
            self.on_failure()
        except (OSError, OrionError) as error:
            log.warning("tier %s: can't be marked as ended: %s", self.folder, error)
            return False
        return True

    def retire(self) -> None:
        """Make sure that what is on the disk is never believed. Blocks.

        Raises TierError if nothing of what can be tried works.
        """
        why = str(self.failed)[-_REASON_MAX:]  # a page has to hold it
        trust.retire(self.folder, lambda: self._change(ended=why, clean=False))

    def mark_clean(self) -> None:
        """All of it is durable, and the next mount may believe it. Blocks; raises OSError.

        Nothing may be added any more.
        """
        self.sync_filled()
        if self.numbers and self.numbers[0] == self.leaving:
            # Whoever was about to forget it was stopped.
            self.files.remove(self.leaving)
            self.forget_oldest()
        newest, entries = self._last
        if self.current is not None:
            newest, entries = self.current.number, self.current.entries
        for number in self.numbers:
            if number not in self.is_durable:
                trust.sync_path(self.files.path(number))
        self._change(clean=True, newest=newest, entries=entries)
        if self._prepared is not None:
            os.close(self._prepared.descriptor)
            self.files.remove(self._prepared.number)
            self._prepared = None

    def _change(self, **changes: object) -> None:
        """Fields of the superblock, durably. Several threads may want to."""
        with self._mutex:
            self.write_superblock(msgspec.structs.replace(self.superblock, **changes))

    def write_superblock(self, block: TierSuperblock) -> None:
        """The next copy, durable. Blocks; raises OSError."""
        self._counter += 1
        page = superblock.encode(self._counter, block)
        files.write_superblock_page(self.folder, self._counter, page)
        self.superblock = block

    def update(self, **changes: object) -> None:
        """Change fields of the superblock, durably. Blocks; raises TierError.

        While the tier is in use: `CompressedTier.update`.
        """
        try:
            self._change(**changes)
        except OSError as error:
            raise TierError(
                f"tier {self.folder}: writing the superblock: {error.strerror}"
            ) from None

    def close(self) -> None:
        """Give the files back; does not mark it clean (`open_tier` does that)."""
        for segment in (self.current, self._prepared, *self._filled):
            if segment is not None:
                os.close(segment.descriptor)
        self.current = self._prepared = None
        self._filled = []
        self.files.close_all()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def drop(folder: Path) -> None:
    """Remove a tier with all that is in it. Raises TierError or BusyError."""
    try:
        held = _lock(folder)
        try:
            segments.remove_all(folder)
            folder.rmdir()
        finally:
            os.close(held)
    except OSError as error:
        raise TierError(f"tier {folder}: can't be removed: {error.strerror}") from None


def is_in_use(folder: Path) -> bool:
    """Whether a process has it open for writing."""
    return files.is_in_use(folder)


def _lock(folder: Path) -> int:
    try:
        return files.lock(folder)
    except BusyError as error:
        raise BusyError(f"tier {folder}: in use by another mount", advice=error.advice) from None
