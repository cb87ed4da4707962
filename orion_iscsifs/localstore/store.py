"""`LogStore`: one log, a folder with two superblocks and a fixed number of segments.

Theory of operation
-------------------
`append` is one `pwritev` into the page cache: what it wrote survives this process. `commit` is
`fdatasync` in a thread, shared by all who wait ("group commit"): what was appended before survives
the host. A segment is *prepared* in the background before it is needed (`slots`): its new header is
durable before the first record goes in.

An error of the disk ends the log: `failed` is set, nothing is appended or synced again (after a
failed fdatasync nobody knows what is on the disk), and the owner has to do without. `retire` makes
sure that what is in it is never replayed.

A log may be *sealed* (`seal`): what it stores is encrypted, and what it is given and gives back is
not. `append` encrypts by itself, which is fast; it leaves compression to `pack`, which is not.

Every opening for writing begins a new *life* of the store (`codec`), and that is durable before
anything else is.

Everything but `append` and the attributes blocks or waits. Opening and closing are plain functions,
to be run in a thread.
"""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import trio

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.flushing import SharedFlush
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore import codec, files, record, segment, superblock
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.fresh import begun
from orion_iscsifs.localstore.head import Head
from orion_iscsifs.localstore.packing import Packer
from orion_iscsifs.localstore.record import (
    BrokenRecord,
    Flag,
    Header,
    Kind,
    NoRecord,
    UnknownRecord,
)
from orion_iscsifs.localstore.scan import Place, Scan, Source
from orion_iscsifs.localstore.seal import (
    LIFE_MAX,
    OVERHEAD_BYTES,
    BadSeal,
    Seal,
    WrongKey,
    unwrap,
)
from orion_iscsifs.localstore.slots import Slot, Slots
from orion_iscsifs.localstore.superblock import ForeignFormat, Superblock

log = logging.getLogger(__name__)

_PAGE_MASK: Final = 4095
_PAD: Final = bytes(4096)
_REASON_MAX: Final = 200
_PACKED_IN_THREAD_BYTES: Final = 64 << 10
"""To hand less to a thread takes longer than to compress it."""


class LogStore:
    """See the module's docstring. Made by `create` or `open`; `close` it."""

    def __init__(
        self, folder: Path, lock: int, counter: int, block: Superblock, key: Seal | None = None
    ) -> None:
        self.folder: Final = folder
        self._head = Head(folder, counter, block)
        self.failed: OrionError | None = None
        self.on_failure: Callable[[], object] = lambda: None
        self.next_seq = 0
        self.durable = 0
        """Every record with a smaller sequence number is durable."""
        self.destaged = 0
        self._oldest: int | None = None
        """The first record that is needed; None: nothing is."""
        self._lock = lock
        self._key = key
        """Of a sealed store; None: it is not sealed, or not unlocked."""
        self._packer = Packer()
        self._segment_bytes: Final = block.segment_bytes
        self._slots = Slots(block.segment_bytes)
        self._unsynced: set[Slot] = set()
        self._commits = SharedFlush(self._sync)

    @property
    def superblock(self) -> Superblock:
        """As it was written last."""
        return self._head.block

    @property
    def room(self) -> trio.lowlevel.ParkingLot:
        """Unparked when a segment has been prepared, or none ever will."""
        return self._slots.room

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, block: Superblock, passphrase: bytes | None = None) -> "LogStore":
        """A new, empty log; its space is reserved. Raises LogError or BusyError.

        With a passphrase it is sealed.
        """
        block, key = begun(block, passphrase)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            store = cls(folder, files.lock(folder), 0, block, key)
            try:
                files.remove_files(folder)
                store._slots.create(folder, block.segments)
                store.write_superblock(block)
                store.write_superblock(block)
            except BaseException:
                with suppress(OSError):  # a disk that is full must not stay so
                    files.remove_files(folder)
                store.close()
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
            store = None
            try:
                found = superblock.newest(files.superblock_pages(folder))
                if found is None:
                    raise ForeignFormat("neither of its superblocks is sound")
                store = cls(folder, lock, *found)
                mode = os.O_RDONLY if shared else os.O_RDWR
                store._slots.open(folder, found[1].segments, mode)
            except BaseException:
                if store is not None:
                    store.close()
                elif lock >= 0:
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

    def unlock(self, passphrase: bytes | None, known: "LogStore | None" = None) -> None:
        """To come before `scan`, if the log is to be replayed. Blocks; raises LogError or WrongKey.

        None: there is no key, so it must not be sealed. `known`: the same log, as it was opened and
        unlocked before, which saves the time that this takes.
        """
        sealing = self.superblock.sealing
        if sealing is None:
            return
        if known is not None and known.superblock.sealing == sealing:
            self._key = known._key
            return
        if passphrase is None:
            raise LogError(
                f"log {self.folder}: is sealed, and there is no key",
                advice="add cache_key_file=FILE; `orion-iscsifs cache drop` gives the log up",
            )
        try:
            self._key = Seal(unwrap(sealing, passphrase, self.superblock.store))
        except WrongKey as error:
            raise WrongKey(
                f"log {self.folder}: {error}",
                advice="give cache_key_file= the key that it was sealed with;"
                " `orion-iscsifs cache drop` gives the log up",
            ) from None

    def restart(self, block: Superblock, passphrase: bytes | None = None) -> None:
        """As after `create`, in the files that are there: nothing in them counts any more.

        Blocks; raises LogError.
        """
        block, key = begun(block, passphrase)
        try:
            self.write_superblock(block)
            self.write_superblock(block)
        except OSError as error:
            raise self._fail("writing the superblock", error) from None
        self._key = key

    def scan(self) -> Scan:
        """Of all segments; blocks while its records are iterated over."""
        block, sources, damage = self.superblock, [], ""
        for slot in self._slots.all:
            page = os.pread(slot.descriptor, segment.START_BYTES, 0)
            header = segment.decode(block.store, page)
            if segment.is_damaged(page):
                damage = f"the header of {segment.file_name(slot.index)} is damaged"
            if header is not None:
                slot.number = header.number
                slot.codec = codec.known_use(header, block.store, self._key, block.lun)
                size = min(os.fstat(slot.descriptor).st_size, self._segment_bytes)
                sources.append(Source(slot.index, slot.descriptor, size, slot.codec))
        is_locked = block.sealing is not None and self._key is None
        return Scan(sources, is_locked=is_locked, damage=damage)

    def resume(self, scan: Scan) -> None:
        """Go on after what `scan` has found. Blocks; raises LogError."""
        try:
            self._resume(scan)
        except OSError as error:
            raise LogError(f"log {self.folder}: can't be gone on with: {error.strerror}") from None

    def _resume(self, scan: Scan) -> None:
        self._begin_life()
        # The process before may have died before it had synced them.
        files.fdatasync_all([slot.descriptor for slot in self._slots.all])
        self.next_seq = self.durable = scan.next_seq
        self.destaged, self._oldest = scan.destaged, scan.needed
        for slot in self._slots.all:
            slot.last_epoch = scan.slots.get(slot.index, 0)
        unused = [
            slot for slot in self._slots.all if slot.number >= 0 and slot.index not in scan.slots
        ]
        # Their records, if there are any, are not needed or lie beyond the end: they must not come
        # back. But first of all, one says what is not needed: that may be known from these alone.
        for slot in unused[:1]:
            files.prepare(slot.descriptor, self._begin_use(slot), 0)
            self._slots.add_prepared(slot)
        for slot in unused[1:]:
            os.pwrite(slot.descriptor, _PAD[: segment.START_BYTES], 0)
            os.fdatasync(slot.descriptor)
            slot.codec = None

    def _begin_life(self) -> None:
        assert self._key is not None or self.superblock.sealing is None
        # A copy of the superblock that was lost may have known of more lives than the other one.
        used = [slot.codec.header.life for slot in self._slots.all if slot.codec is not None]
        life = 1 + max(self.superblock.life, *used, 0)
        if life > LIFE_MAX:
            raise LogError(
                f"log {self.folder}: has been opened too often to be written to again",
                advice="`orion-iscsifs cache drop` gives it up, with what is in it",
            )
        self.write_superblock(msgspec.structs.replace(self.superblock, life=life))

    # -- writing -----------------------------------------------------------------------------

    async def pack(self, offset: int, payload: Buffer) -> bytes | None:
        """Compressed, for `append`; None: it goes in as it is. What is long is done in a thread."""
        if self._key is None or not self._packer.wants(offset, len(payload)):
            return None
        if len(payload) < _PACKED_IN_THREAD_BYTES:
            return self._packer.pack(offset, payload)
        return await trio.to_thread.run_sync(self._packer.pack, offset, payload)

    def append(
        self,
        kind: Kind,
        epoch: int,
        offset: int = 0,
        length: int = 0,
        payload: Buffer = b"",
        *,
        packed: bytes | None = None,
        flags: Flag = Flag.NONE,
        reserve: bool = False,
    ) -> Place | None:
        """Write a record; where its payload is, or None: no room now (see `room`).

        `packed`: what `pack` has made of the payload. `reserve`: may use the last prepared segment.
        Raises LogError when the log has failed.
        """
        if self.failed is not None:
            raise self.failed
        if packed is not None:
            payload, flags = packed, flags | Flag.COMPRESSED
        stored = len(payload)
        if self._key is not None:
            stored, flags = stored + OVERHEAD_BYTES, flags | Flag.SEALED
        size = record.record_bytes(stored)
        slot = self._slots.with_room(size, reserve=reserve)
        if slot is None:
            return None
        assert slot.codec is not None  # it is prepared
        position = self._slots.position
        header = Header(
            kind, self.next_seq, self.durable, epoch, offset, length, stored, flags=flags
        )
        head, content = slot.codec.encode(header, payload)
        # To the end of the page, so that the kernel never has to read what it holds.
        end = position + record.HEADER_BYTES + stored
        padding = min(-end & _PAGE_MASK, self._segment_bytes - end)
        parts = (head, content, _PAD[:padding])
        try:
            written = os.pwritev(slot.descriptor, parts, position)
        except OSError as error:
            raise self._fail("writing", error) from None
        if written != record.HEADER_BYTES + stored + padding:
            raise self._fail("writing", OSError(28, os.strerror(28)))
        self._slots.position = position + size
        self.next_seq += 1
        self._unsynced.add(slot)
        self._commits.note_write()
        if kind is not Kind.DESTAGED:
            slot.last_epoch = epoch
            if self._oldest is None:
                self._oldest = header.seq
        return Place(slot.index, position + record.HEADER_BYTES)

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
        self._slots.look_again()

    async def commit(self) -> None:
        """Everything appended before this call is durable when it returns. Raises LogError."""
        await self._commits.flush()

    async def _sync(self) -> None:
        if self.failed is not None:
            raise self.failed
        covers, slots = self.next_seq, self._unsynced
        self._unsynced = set()
        try:
            await trio.to_thread.run_sync(files.fdatasync_all, [slot.descriptor for slot in slots])
        except OSError as error:
            raise self._fail("syncing", error) from None
        except BaseException:  # cancelled, before it was begun
            self._unsynced |= slots
            raise
        if self.failed is not None:
            raise self.failed
        self.durable = max(self.durable, covers)

    # -- reading -----------------------------------------------------------------------------

    async def read(self, place: Place, checksum: int, length: int) -> bytes:
        """The `length` bytes that a record brings; `checksum` is that of what is stored.

        Raises LogError if they can't be had, or are damaged.
        """
        slot = self._slots.all[place.slot]
        try:
            return await trio.to_thread.run_sync(_content, slot, place, checksum, length)
        except OSError as error:
            raise LogError(f"log {self.folder}: reading: {error.strerror}") from None
        except (NoRecord, UnknownRecord, BadSeal):
            raise LogError(
                f"log {self.folder}: a record has been damaged since it was written"
            ) from None

    # -- segments ----------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Of segments that hold something that the target does not have for certain."""
        return self._slots.used_bytes(self.destaged)

    @property
    def free_segments(self) -> int:
        """Prepared, or as good as."""
        return self._slots.free(self.destaged)

    async def keep_prepared(self) -> None:
        """The background: prepares segments that are free, in the order in which they were used."""
        while self.failed is None:
            slot = self._slots.to_prepare(self.destaged)
            if slot is None:
                await self._slots.wait_for_work()
                continue
            zeroed = 0 if self.room or not slot.fresh else self._segment_bytes
            page = self._begin_use(slot)
            try:
                await trio.to_thread.run_sync(files.prepare, slot.descriptor, page, zeroed)
            except OSError as error:
                self._fail("preparing a segment", error)
                return
            self._slots.add_prepared(slot)

    def _begin_use(self, slot: Slot) -> bytes:
        """The first page of a segment that is to be used anew."""
        block = self.superblock
        header = segment.SegmentHeader(
            self._slots.next_number,
            self.destaged,
            self.next_seq if self._oldest is None else self._oldest,
            self.durable,
            block.life,
        )
        slot.codec = codec.new_use(header, block.store, self._key, block.lun)
        slot.number, slot.last_epoch, slot.fresh = header.number, 0, False
        return segment.encode(block.store, slot.codec.header)

    # -- ending ------------------------------------------------------------------------------

    def _fail(self, doing: str, error: OSError) -> OrionError:
        """The log has ended: once, with a line in the log of the program."""
        if self.failed is None:
            self.failed = LogError(f"log {self.folder}: {doing}: {error.strerror or error}")
            log.error("%s; going on without it, in write-through", self.failed)
            self._slots.end()
            self.on_failure()
        return self.failed

    def write_superblock(self, block: Superblock) -> None:
        """The next copy, durable. Blocks; raises OSError."""
        self._head.write(block)

    async def update(self, **changes: object) -> None:
        """Change fields of the superblock. Raises LogError."""
        try:
            await trio.to_thread.run_sync(self._head.update, changes)
        except OSError as error:
            raise self._fail("writing the superblock", error) from None

    def retire(self, why: str) -> None:
        """Everything in it is on the target, and it must never be replayed. Blocks.

        Raises LogError if that can't be made sure of.
        """
        problems = []
        why = why[-_REASON_MAX:]  # a page has to hold it
        attempts: list[Callable[[], None]] = [
            lambda: self._head.update({"ended": why, "clean": True}),
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
        self._slots.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _content(slot: Slot, place: Place, checksum: int, length: int) -> bytes:
    """What a record brings; raises as `record.decode` and `Codec.decode` do, and OSError."""
    if slot.codec is None:
        raise NoRecord("the segment is not in use")
    size = record.HEADER_BYTES + length + OVERHEAD_BYTES
    found = os.pread(slot.descriptor, size, place.position - record.HEADER_BYTES)
    header = record.decode(slot.codec.owner, found)
    stored = memoryview(found)[record.HEADER_BYTES :][: header.stored]
    if header.payload_checksum != checksum or record.checksum(stored) != checksum:
        raise BrokenRecord(f"record {header.seq} is damaged")
    if header.length != length:
        raise NoRecord("another record")
    return slot.codec.decode(header, stored)
