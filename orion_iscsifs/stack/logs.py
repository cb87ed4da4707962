"""The persistent log of one LUN: which folder it is in, and whether what is in it may be replayed.

A log belongs to one LUN, by its designator (VPD page 83h). What an earlier mount has left in it is
newer than what the target has, unless somebody has written to the target since. That is refused if
there is any sign of it:

* another mount of this host has had the LUN since, without this log (the state folder says);
* a key of another initiator is registered;
* registrations have changed since we saw them last (PRGENERATION, SPC-4 §5.13.1), and it is not a
  key of ours that holds the reservation.

A target that was restarted has forgotten both: that is no sign, and is said.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cache.epochs import Epochs
from orion_iscsifs.cache.writelog import WriteLog, open_write_log, recover
from orion_iscsifs.config import CacheConfig, Destage
from orion_iscsifs.custody import custody
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.localstore.files import LogError, is_in_memory
from orion_iscsifs.localstore.fresh import new_superblock
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.localstore.superblock import NAMES, Superblock
from orion_iscsifs.stack.evidence import Evidence, Keeper, Owner, evidence, lun_folder
from orion_iscsifs.stack.exclusive import Exclusive

log = logging.getLogger(__name__)

_FRAMES_MIN_BYTES: Final = 1 << 20
_FORCE: Final = (
    "if nobody did, `orion-iscsifs cache replay --force` writes it, `cache drop` gives it up"
)


def memory(config: CacheConfig) -> tuple[int, int]:
    """`cache_size` parted: bytes for frames, bytes for what is not on the target yet."""
    ring = max(min(config.dirty_max_bytes, config.size_bytes - _FRAMES_MIN_BYTES), 64 << 10)
    return config.size_bytes - ring, ring


async def look(disk: LunDevice, config: CacheConfig) -> LogStore | None:
    """The log that is there, closed, for `open_log`. Raises LogError or WrongKey.

    To be called before a reservation is made: a mount that is refused for its key must not leave a
    trace at the target that makes the next one doubt who has written.
    """
    assert config.log_dir is not None
    folder = lun_folder(config.log_dir, disk.info.name)
    return await trio.to_thread.run_sync(_look, folder, config)


def _look(folder: Path, config: CacheConfig) -> LogStore | None:
    if not any((folder / name).exists() for name in NAMES):
        return None
    store = LogStore.open(folder, shared=True)
    try:
        store.unlock(config.passphrase)
    finally:
        store.close()
    block = store.superblock
    if config.key is not None and block.sealing is None and not (block.clean or block.ended):
        raise LogError(
            f"log {folder}: may hold data that the target lacks, and is not sealed",
            advice="run `orion-iscsifs cache replay` once without cache_key_file=;"
            " the next mount makes the log anew, sealed",
        )
    return store


@asynccontextmanager
async def open_log(
    device: BlockDevice,
    disk: LunDevice,
    volume: str,
    exclusive: Exclusive | None,
    config: CacheConfig,
    known: LogStore | None,
) -> AsyncIterator[WriteLog]:
    """The device with its log in front, for the time of the body.

    `volume`: what tells the content of `device` from all others. `known`: what `look` has found.

    Raises LogError, WrongKey or BusyError when there is a log that must not be used.
    """
    assert config.log_dir is not None
    lun = disk.info.name
    if not lun:
        raise LogError(
            f"LUN {disk.number}: the device has no name (VPD page 83h) to bind a log to",
            advice="mount it without cache=log",
        )
    folder = lun_folder(config.log_dir, lun)
    wanted = _wanted(device, disk, volume, config)
    owner = Owner("logs", disk)
    found = evidence(owner, disk, None if exclusive is None else exclusive.first.found)
    now = trio.current_time()
    store, epochs = await trio.to_thread.run_sync(
        lambda: _open(folder, wanted, config, known, found, now)
    )
    try:
        owner.note(store.superblock.store)
        keeper = Keeper(store.update, exclusive, device)
        await keeper.write(clean=False)
        if is_in_memory(folder):
            log.warning(
                "log_dir %s is in memory: a loss of power takes what was fsynced with it"
                " (put it on a disk)",
                folder.parent,
            )
        if epochs.queue:
            left = epochs.live.covered_bytes
            log.warning("%s: %d bytes in the log are replayed", folder, left)
        async with open_write_log(
            device,
            store,
            epochs,
            dirty_max_bytes=memory(config)[1],
            dirty_age_s=config.dirty_age_s,
            ordered=config.destage is Destage.ORDERED,
        ) as write_log:
            store.on_failure = lambda: _failed(write_log)
            async with background(keeper.run):
                yield write_log
        await _end(store, keeper)
    finally:
        store.close()


async def _end(store: LogStore, keeper: Keeper) -> None:
    """The target has everything. A log that can't be told so is given up; that fails no umount."""
    if store.failed is not None:
        return  # it was given up before
    try:
        await keeper.write(clean=True)
    except LogError as error:
        try:
            await trio.to_thread.run_sync(store.retire, str(error))
        except LogError as problem:
            log.error("%s", problem.line)


def _failed(write_log: WriteLog) -> None:
    """What is not on the target yet is in memory only now, and the log is soon out of date."""
    custody.forbid("its write log has failed")
    write_log.destager.wake()


def forget_log(disk: LunDevice) -> None:
    """A mount that writes without a log: what may be in one is out of date from now on."""
    Owner("logs", disk).forget()


def check_nothing_left(disk: LunDevice, config: CacheConfig) -> None:
    """For a mount that only reads: raises LogError when a log holds what the target lacks."""
    assert config.log_dir is not None
    folder = lun_folder(config.log_dir, disk.info.name)
    if (folder / NAMES[0]).exists():
        store = LogStore.open(folder, shared=True)
        store.close()
        if not store.superblock.clean:
            raise LogError(
                f"log {folder}: holds data that the target does not have yet",
                advice="mount it read-write once, or run `orion-iscsifs cache replay`",
            )


def _wanted(device: BlockDevice, disk: LunDevice, volume: str, config: CacheConfig) -> Superblock:
    geometry = device.geometry
    return new_superblock(
        volume,
        size_bytes=geometry.size_bytes,
        block_bytes=geometry.logical_block_bytes,
        log_bytes=config.log_bytes,
        target=f"{disk.session.nexus.target_name} LUN {disk.number}",
    )


def _open(
    folder: Path,
    wanted: Superblock,
    config: CacheConfig,
    known: LogStore | None,
    found: Evidence,
    now: float,
) -> tuple[LogStore, Epochs]:
    """Blocks. Raises LogError, WrongKey or BusyError."""
    if not any((folder / name).exists() for name in NAMES):
        return LogStore.create(folder, wanted, config.passphrase), Epochs()
    store = LogStore.open(folder)
    try:
        store.unlock(config.passphrase, known)
        epochs = _take_over(store, wanted, None if config.log_force else found, now)
    except BaseException:
        store.close()
        raise
    if epochs is not None:
        return store, epochs
    block = store.superblock
    # What is in the files of a log that was not sealed is to be gone.
    to_be_sealed = config.key is not None and block.sealing is None
    if _layout(block) == _layout(wanted) and not block.ended and not to_be_sealed:
        store.restart(wanted, config.passphrase)
        return store, Epochs()
    store.close()
    return LogStore.create(folder, wanted, config.passphrase), Epochs()


def _layout(block: Superblock) -> tuple[int, int]:
    return block.segments, block.segment_bytes


def _take_over(
    store: LogStore, wanted: Superblock, known: Evidence | None, now: float
) -> Epochs | None:
    """What is in the log; None: nothing that is needed, a new log may take its place.

    Without `known` it is replayed as far as it can be read, whatever speaks against it.
    """
    block, folder = store.superblock, store.folder
    if block.ended:
        return None
    _check_owner(store, wanted, force=known is None)
    if block.clean:
        return None
    epochs, scan = recover(store, now)
    if scan.damage and known is not None:
        raise LogError(
            f"log {folder}: {scan.damage}",
            advice="`orion-iscsifs cache check` tells more, `cache replay --force` writes what can"
            " be read up to there, `cache drop` gives it up",
        )
    if not epochs.queue:
        return None
    if scan.damage:
        log.warning("log %s: %s: replayed up to there", folder, scan.damage)
    _cut(store, epochs, wanted.size_bytes, force=known is None)
    if known is not None and (why := known.objection(block.store, block.generation)):
        raise LogError(f"log {folder}: holds data that the target lacks, but {why}", advice=_FORCE)
    if scan.torn_bytes:
        log.warning(
            "%s: the end of the log was not complete, as after a loss of power;"
            " nothing that was synced is missing",
            folder,
        )
    if known is not None and known.seen and known.seen.generation < block.generation:
        log.warning("%s: the target was restarted since: it can't tell who wrote", folder)
    store.resume(scan)
    return epochs


def _check_owner(store: LogStore, wanted: Superblock, *, force: bool) -> None:
    """Raises LogError if the log is another LUN's."""
    block = store.superblock
    if block.lun != wanted.lun:
        raise LogError(
            f"log {store.folder}: belongs to another LUN, {block.lun}",
            advice="give each LUN its own folder",
        )
    if block.clean:
        return
    had = f"log {store.folder}: the LUN had {block.size_bytes} bytes in blocks of"
    has = f"it has {wanted.size_bytes} in blocks of {wanted.block_bytes}"
    if wanted.block_bytes != block.block_bytes:
        raise LogError(
            f"{had} {block.block_bytes}; {has}",
            advice="it can't be replayed there; `orion-iscsifs cache drop` gives it up",
        )
    if wanted.size_bytes < block.size_bytes and not force:
        raise LogError(f"{had} {block.block_bytes}; {has}", advice="is it the same LUN? " + _FORCE)


def _cut(store: LogStore, epochs: Epochs, size_bytes: int, *, force: bool) -> None:
    """What lies past the end of the LUN can't be replayed: said, or refused with LogError."""
    gone = epochs.cut(size_bytes)
    if not gone:
        return
    what = f"log {store.folder}: {gone} bytes in it lie past the end of the LUN, which has shrunk"
    if not force:
        raise LogError(what, advice="`orion-iscsifs cache replay --force` writes all the others")
    log.warning("%s: they are given up", what)
