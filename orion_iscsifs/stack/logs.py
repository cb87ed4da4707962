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
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.store import LogStore, new_superblock
from orion_iscsifs.localstore.superblock import NAMES, Superblock
from orion_iscsifs.stack.evidence import Evidence, Keeper, Owner, Update, evidence, lun_folder
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


@asynccontextmanager
async def open_log(
    device: BlockDevice,
    disk: LunDevice,
    volume: str,
    exclusive: Exclusive | None,
    config: CacheConfig,
) -> AsyncIterator[WriteLog]:
    """The device with its log in front, for the time of the body.

    `volume`: what tells the content of `device` from all others.

    Raises LogError or BusyError when there is a log that must not be used.
    """
    assert config.log_dir is not None
    if not volume:
        raise LogError(
            f"LUN {disk.number}: the device has no name (VPD page 83h) to bind a log to",
            advice="mount it without cache=log",
        )
    folder = lun_folder(config.log_dir, volume)
    owner = Owner("logs", disk)
    known = evidence(owner, disk, None if exclusive is None else exclusive.first.found)
    wanted = new_superblock(
        volume,
        size_bytes=device.geometry.size_bytes,
        block_bytes=device.geometry.logical_block_bytes,
        log_bytes=config.log_bytes,
        target=f"{disk.session.nexus.target_name} LUN {disk.number}",
    )
    store, epochs = await trio.to_thread.run_sync(
        _open, folder, wanted, None if config.log_force else known, trio.current_time()
    )
    try:
        owner.note(store.superblock.store)
        keeper = Keeper(_updater(store), exclusive)
        await keeper.write(clean=False, size_bytes=device.geometry.size_bytes)
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
        if store.failed is None:
            await keeper.write(clean=True)
    finally:
        store.close()


def _updater(store: LogStore) -> Update:
    async def update(**changes: object) -> None:
        if store.failed is not None:
            raise store.failed
        await trio.to_thread.run_sync(lambda: store.update(**changes))

    return update


def _failed(write_log: WriteLog) -> None:
    """What is not on the target yet is in memory only now, and the log is soon out of date."""
    custody.forbid("its write log has failed")
    write_log.destager.wake()


def forget_log(disk: LunDevice) -> None:
    """A mount that writes without a log: what may be in one is out of date from now on."""
    Owner("logs", disk).forget()


def check_nothing_left(volume: str, config: CacheConfig) -> None:
    """For a mount that only reads: raises LogError when a log holds what the target lacks."""
    assert config.log_dir is not None
    folder = lun_folder(config.log_dir, volume)
    if (folder / NAMES[0]).exists():
        store = LogStore.open(folder, shared=True)
        store.close()
        if not store.superblock.clean:
            raise LogError(
                f"log {folder}: holds data that the target does not have yet",
                advice="mount it read-write once, or run `orion-iscsifs cache replay`",
            )


def _open(
    folder: Path, wanted: Superblock, known: Evidence | None, now: float
) -> tuple[LogStore, Epochs]:
    """What is there, if it is needed, or else an empty log. Blocks.

    Raises LogError or BusyError. For `known` see `_take_over`.
    """
    if not any((folder / name).exists() for name in NAMES):
        return LogStore.create(folder, wanted), Epochs()
    store = LogStore.open(folder)
    try:
        epochs = _take_over(store, wanted, known, now)
    except BaseException:
        store.close()
        raise
    if epochs is not None:
        return store, epochs
    if _layout(store.superblock) == _layout(wanted) and not store.superblock.ended:
        store.restart(wanted)
        return store, Epochs()
    store.close()
    return LogStore.create(folder, wanted), Epochs()


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
    _check_owner(store, wanted)
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


def _check_owner(store: LogStore, wanted: Superblock) -> None:
    """Raises LogError if the log is another LUN's."""
    block = store.superblock
    if block.lun != wanted.lun:
        raise LogError(
            f"log {store.folder}: belongs to another LUN, {block.lun}",
            advice="give each LUN its own folder",
        )
    if block.clean:
        return
    if wanted.size_bytes < block.size_bytes or wanted.block_bytes != block.block_bytes:
        raise LogError(
            f"log {store.folder}: the LUN had {block.size_bytes} bytes in blocks of"
            f" {block.block_bytes}; it has {wanted.size_bytes} in blocks of {wanted.block_bytes}",
            advice="is it the same LUN? " + _FORCE,
        )
