"""`LogStore`: one log, a folder with two superblocks and a fixed number of segments.

Theory of operation
-------------------
`append` is one `pwritev` into the page cache: what it wrote survives this process. `commit` is
`fdatasync` in a thread, shared by all who wait ("group commit"): what was appended before survives
the host. A segment is *prepared* in the background before it is needed: its new header is durable
before the first record goes in. It is *free* again when all its epochs are on the target.

Writers never get the last prepared segment, so the destager can always record its progress.

An error of the disk ends the log: `failed` is set, nothing is appended or synced again (after a
failed fdatasync nobody knows what is on the disk), and the owner has to do without. `retire` makes
sure that what is in it is never replayed.

Everything but `append` and the attributes blocks or waits. Opening and closing are plain functions,
to be run in a thread.
"""

import logging
import os
import secrets
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import trio

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.flushing import SharedFlush
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore import files, record, segment, superblock
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.record import Flag, Header, Kind
from orion_iscsifs.localstore.scan import Place, Scan, Source
from orion_iscsifs.localstore.superblock import ForeignFormat, Superblock

log = logging.getLogger(__name__)

_PAGE_MASK: Final = 4095
_PAD: Final = bytes(4096)
_PREPARED_AHEAD: Final = 2


class _Slot:
    """One file of the ring."""

    def __init__(self, index: int, descriptor: int) -> None:
        self.index: Final = index
        self.descriptor: Final = descriptor
        self.number = -1
        """Which use of the file this is; -1: none."""
        self.last_epoch = 0
        """The newest epoch with a change in it."""
        self.fresh = False
        """The file has never been written: its blocks are only reserved."""


class LogStore:
    """See the module's docstring. Made by `create` or `open`; `close` it."""

    def __init__(self, folder: Path, lock: int, counter: int, block: Superblock) -> None:
        self.folder: Final = folder
        self.superblock = block
        self.failed: OrionError | None = None
        self.on_failure: Callable[[], object] = lambda: None
        self.room = trio.lowlevel.ParkingLot()
        """Unparked when a segment has been prepared, or none ever will."""
        self.store_id = _store_id(block)
        self.next_seq = 0
        self.durable = 0
        """Every record with a smaller sequence number is durable."""
        self.destaged = 0
        self._oldest: int | None = None
        """The first record that is needed; None: nothing is."""
        self._lock = lock
        self._counter = counter
        self._slots: list[_Slot] = []
        self._current: _Slot | None = None
        self._position = 0
        self._prepared: deque[_Slot] = deque()
        self._unsynced: set[_Slot] = set()
        self._commits = SharedFlush(self._sync)
        self._work = trio.lowlevel.ParkingLot()

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, block: Superblock) -> "LogStore":
        """A new, empty log; its space is reserved. Raises LogError or BusyError."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = files.lock(folder)
            try:
                files.remove_files(folder)
                store = cls(folder, lock, 0, block)
                store._slots = [
                    _create_slot(folder, index, block) for index in range(block.segments)
                ]
                store.write_superblock(block)
                store.write_superblock(block)
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise LogError(
                f"log {folder}: can't be made: {error.strerror}",
                advice="choose another log_dir or a smaller log_size",
            ) from None
        return store

    @classmethod
    def open(cls, folder: Path, *, shared: bool = False) -> "LogStore":
        """An existing log. Raises LogError, ForeignFormat, or BusyError. `shared`: only to look."""
        try:
            lock = -1 if shared else files.lock(folder)
            try:
                found = superblock.newest(files.superblock_pages(folder))
                if found is None:
                    raise ForeignFormat("neither of its superblocks is sound")
                store = cls(folder, lock, *found)
                mode = os.O_RDONLY if shared else os.O_RDWR
                store._slots = [
                    _Slot(index, os.open(folder / segment.file_name(index), mode | os.O_CLOEXEC))
                    for index in range(found[1].segments)
                ]
            except BaseException:
                if lock >= 0:
                    os.close(lock)
                raise
        except ForeignFormat as error:
            raise LogError(
                f"log {folder}: {error}",
                advice=error.advice or "`orion-iscsifs cache drop` gives it up, with what is in it",
            ) from None
        except OSError as error:
            raise LogError(
                f"log {folder}: can't be opened: {error.filename or ''} {error.strerror}".strip(),
                advice="`orion-iscsifs cache drop` gives it up, with what is in it",
            ) from None
        return store

    def restart(self, block: Superblock) -> None:
        """As after `create`, in the files that are there: nothing in them counts any more.

        Blocks; raises LogError.
        """
        try:
            self.write_superblock(block)
            self.write_superblock(block)
        except OSError as error:
            raise self._fail("writing the superblock", error) from None
        self.store_id = _store_id(block)

    def scan(self) -> Scan:
        """Of all segments; blocks while its records are iterated over."""
        sources = []
        for slot in self._slots:
            page = os.pread(slot.descriptor, segment.START_BYTES, 0)
            header = segment.decode(self.superblock.store, page)
            if header is not None:
                slot.number = header.number
                size = min(os.fstat(slot.descriptor).st_size, self.superblock.segment_bytes)
                sources.append(Source(slot.index, slot.descriptor, size, header))
        return Scan(self.store_id, sources)

    def resume(self, scan: Scan) -> None:
        """Go on after what `scan` has found. Blocks; raises LogError."""
        try:
            self._resume(scan)
        except OSError as error:
            raise LogError(f"log {self.folder}: can't be gone on with: {error.strerror}") from None

    def _resume(self, scan: Scan) -> None:
        # The process before may have died before it had synced them.
        files.fdatasync_all([slot.descriptor for slot in self._slots])
        self.next_seq = self.durable = scan.next_seq
        self.destaged, self._oldest = scan.destaged, scan.needed
        for slot in self._slots:
            slot.last_epoch = scan.slots.get(slot.index, 0)
            if slot.number >= 0 and slot.index not in scan.slots:
                # Its records, if there are any, lie beyond the end. They must not come back.
                os.pwrite(slot.descriptor, _PAD[: segment.START_BYTES], 0)
                os.fdatasync(slot.descriptor)

    # -- writing -----------------------------------------------------------------------------

    def append(
        self,
        kind: Kind,
        epoch: int,
        offset: int = 0,
        length: int = 0,
        payload: Buffer = b"",
        *,
        flags: Flag = Flag.NONE,
        reserve: bool = False,
    ) -> Place | None:
        """Write a record; where its payload is, or None: no room now (see `room`).

        `reserve`: may use the last prepared segment. Raises LogError when the log has failed.
        """
        if self.failed is not None:
            raise self.failed
        stored = len(payload)
        size = record.record_bytes(stored)
        slot = self._current
        if slot is None or self._position + size > self.superblock.segment_bytes:
            slot = self._next_segment(reserve=reserve)
            if slot is None:
                return None
        position = self._position
        header = Header(
            kind, self.next_seq, self.durable, epoch, offset, length, stored,
            record.checksum(payload), flags,
        )  # fmt: skip
        # To the end of the page, so that the kernel never has to read what it holds.
        end = position + record.HEADER_BYTES + stored
        padding = min(-end & _PAGE_MASK, self.superblock.segment_bytes - end)
        parts = (record.encode(self.store_id, header), payload, _PAD[:padding])
        try:
            written = os.pwritev(slot.descriptor, parts, position)
        except OSError as error:
            raise self._fail("writing", error) from None
        if written != record.HEADER_BYTES + stored + padding:
            raise self._fail("writing", OSError(28, os.strerror(28)))
        self._position = position + size
        self.next_seq += 1
        self._unsynced.add(slot)
        self._commits.note_write()
        if kind is not Kind.DESTAGED:
            slot.last_epoch = epoch
            if self._oldest is None:
                self._oldest = header.seq
        return Place(slot.index, position + record.HEADER_BYTES)

    def _next_segment(self, *, reserve: bool) -> _Slot | None:
        if len(self._prepared) <= (0 if reserve else 1):
            self._work.unpark()
            return None
        self._current = self._prepared.popleft()
        self._position = segment.START_BYTES
        self._work.unpark()
        return self._current

    def note_destaged(self, epoch: int, oldest: int | None) -> None:
        """Every epoch up to this one is durable on the target: their segments are free.

        `oldest`: the first record that is still needed; None: there is none. Not durable before the
        next commit; a replay that does not know of it does no harm.
        """
        self.destaged, self._oldest = epoch, oldest
        # The record itself is not needed.
        needed = self.next_seq + 1 if oldest is None else oldest
        try:
            self.append(Kind.DESTAGED, epoch, offset=needed, reserve=True)
        except LogError:
            return
        self._work.unpark()

    async def commit(self) -> None:
        """Everything appended before this call is durable when it returns. Raises LogError."""
        await self._commits.flush()

    async def _sync(self) -> None:
        if self.failed is not None:
            raise self.failed
        covers, slots = self.next_seq, [slot.descriptor for slot in self._unsynced]
        self._unsynced.clear()
        try:
            await trio.to_thread.run_sync(files.fdatasync_all, slots)
        except OSError as error:
            raise self._fail("syncing", error) from None
        if self.failed is not None:
            raise self.failed
        self.durable = max(self.durable, covers)

    # -- reading -----------------------------------------------------------------------------

    async def read(self, place: Place, checksum: int, length: int) -> bytes:
        """The payload of a record. Raises LogError if it can't be had, or is damaged."""
        descriptor = self._slots[place.slot].descriptor
        try:
            payload = await trio.to_thread.run_sync(os.pread, descriptor, length, place.position)
        except OSError as error:
            raise LogError(f"log {self.folder}: reading: {error.strerror}") from None
        if len(payload) != length or record.checksum(payload) != checksum:
            raise LogError(f"log {self.folder}: a record has been damaged since it was written")
        return payload

    # -- segments ----------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Of segments that hold something that the target does not have for certain."""
        full = self.superblock.segment_bytes
        current = 0 if self._current is None else self._position
        return current + full * sum(self._is_needed(slot) for slot in self._slots)

    @property
    def free_segments(self) -> int:
        """Prepared, or as good as."""
        return len(self._slots) - sum(map(self._is_needed, self._slots)) - bool(self._current)

    def _is_needed(self, slot: _Slot) -> bool:
        return slot is not self._current and slot.last_epoch > self.destaged

    async def keep_prepared(self) -> None:
        """The background: prepares segments that are free, in the order in which they were used."""
        while self.failed is None:
            slot = self._to_prepare()
            if slot is None:
                await self._work.park()
                continue
            header = segment.SegmentHeader(
                1 + max(other.number for other in self._slots),
                self.destaged,
                self.next_seq if self._oldest is None else self._oldest,
                self.durable,
            )
            page = segment.encode(self.superblock.store, header)
            zeroed = 0 if self.room or not slot.fresh else self.superblock.segment_bytes
            slot.number, slot.last_epoch, slot.fresh = header.number, 0, False
            try:
                await trio.to_thread.run_sync(files.prepare, slot.descriptor, page, zeroed)
            except OSError as error:
                self._fail("preparing a segment", error)
                return
            self._prepared.append(slot)
            self.room.unpark_all()

    def _to_prepare(self) -> _Slot | None:
        if len(self._prepared) >= _PREPARED_AHEAD:
            return None
        free = [
            slot
            for slot in self._slots
            if slot is not self._current
            and slot not in self._prepared
            and slot.last_epoch <= self.destaged
        ]
        return min(free, key=lambda slot: slot.number, default=None)

    # -- ending ------------------------------------------------------------------------------

    def _fail(self, doing: str, error: OSError) -> OrionError:
        """The log has ended: once, with a line in the log of the program."""
        if self.failed is None:
            self.failed = LogError(f"log {self.folder}: {doing}: {error.strerror or error}")
            log.error("%s; going on without it, in write-through", self.failed)
            self.room.unpark_all()
            self._work.unpark_all()
            self.on_failure()
        return self.failed

    def write_superblock(self, block: Superblock) -> None:
        """The next copy, durable. Blocks; raises OSError."""
        self._counter += 1
        page = superblock.encode(self._counter, block)
        files.write_superblock_page(self.folder, self._counter, page)
        self.superblock = block

    def update(self, **changes: object) -> None:
        """Change fields of the superblock. Blocks; raises LogError."""
        try:
            self.write_superblock(msgspec.structs.replace(self.superblock, **changes))
        except OSError as error:
            raise self._fail("writing the superblock", error) from None

    def retire(self, why: str) -> None:
        """Everything in it is on the target, and it must never be replayed. Blocks.

        Raises LogError if that can't be made sure of.
        """
        block = msgspec.structs.replace(self.superblock, ended=why, clean=True)
        problems = []
        attempts: list[Callable[[], None]] = [
            lambda: self.write_superblock(block),
            lambda: files.remove_files(self.folder),
        ]
        for attempt in attempts:
            try:
                attempt()
            except OSError as error:
                problems.append(error.strerror or str(error))
            else:
                return
        raise LogError(
            f"log {self.folder}: can't be marked as ended: {'; '.join(problems)}",
            advice="remove that folder by hand before the next mount: what is in it is out of date",
        )

    def close(self) -> None:
        """Give the files back; what was appended stays."""
        for slot in self._slots:
            os.close(slot.descriptor)
        self._slots = []
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


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


def _store_id(block: Superblock) -> int:
    """What each record repeats."""
    return int.from_bytes(block.store[-8:], "little")


def _create_slot(folder: Path, index: int, block: Superblock) -> _Slot:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    slot = _Slot(index, os.open(folder / segment.file_name(index), flags, 0o600))
    os.posix_fallocate(slot.descriptor, 0, block.segment_bytes)
    slot.fresh = True
    return slot
