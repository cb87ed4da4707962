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
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.cache.epochs import Epochs
from orion_iscsifs.cache.writelog import WriteLog, open_write_log, recover
from orion_iscsifs.config import CacheConfig, Destage
from orion_iscsifs.config.places import create_private, state_dir
from orion_iscsifs.custody import custody
from orion_iscsifs.initiator.identity import keep
from orion_iscsifs.initiator.keys import LunKeys, lun_stem
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.standing import Own, Seen, foreign_key
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.fresh import new_superblock
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.localstore.superblock import NAMES, Superblock
from orion_iscsifs.stack.exclusive import Exclusive, lun_name

log = logging.getLogger(__name__)

_FRAMES_MIN_BYTES: Final = 1 << 20
_FORCE: Final = (
    "if nobody did, `orion-iscsifs cache replay --force` writes it, `cache drop` gives it up"
)


def log_folder(log_dir: str, lun: str) -> Path:
    """Where the log of a LUN is; `lun` is its designator."""
    safe = re.sub(r"[^A-Za-z0-9.-]", "_", lun)[:64]
    return Path(log_dir) / f"{safe}-{lun_stem(lun)[:8]}"


def memory(config: CacheConfig) -> tuple[int, int]:
    """`cache_size` parted: bytes for frames, bytes for what is not on the target yet."""
    ring = max(min(config.dirty_max_bytes, config.size_bytes - _FRAMES_MIN_BYTES), 64 << 10)
    return config.size_bytes - ring, ring


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about who wrote to the LUN."""

    owner: str
    """The log that the last mount of this host had; empty: none."""
    seen: Seen | None
    """Of the reservation, before this mount changed it; None: there is none."""
    own: Own

    def objection(self, block: Superblock) -> str:
        """Why the log must not be replayed; empty: it may."""
        if self.owner != block.store.hex():
            return "the LUN has been mounted on this host since, without this log"
        if self.seen is None or block.generation < 0:
            return ""
        foreign = foreign_key(self.seen, self.own)
        if foreign is not None:
            return f"another initiator (key {foreign:#018x}) is registered for the LUN"
        holder = self.seen.holder
        held = holder is not None and self.own.keys.is_ours(holder.key)
        if self.seen.generation > block.generation and not held:
            return "another initiator may have written to the LUN since"
        return ""


async def look(disk: LunDevice, config: CacheConfig) -> LogStore | None:
    """The log that is there, closed, for `open_log`. Raises LogError or WrongKey.

    To be called before a reservation is made: a mount that is refused for its key must not leave a
    trace at the target that makes the next one doubt who has written.
    """
    assert config.log_dir is not None
    folder = log_folder(config.log_dir, disk.info.name)
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
    exclusive: Exclusive | None,
    config: CacheConfig,
    known: LogStore | None,
) -> AsyncIterator[WriteLog]:
    """The device with its log in front, for the time of the body. `known`: what `look` has found.

    Raises LogError, WrongKey or BusyError when there is a log that must not be used.
    """
    assert config.log_dir is not None
    lun = disk.info.name
    if not lun:
        raise LogError(
            f"LUN {disk.number}: the device has no name (VPD page 83h) to bind a log to",
            advice="mount it without cache=log",
        )
    folder = log_folder(config.log_dir, lun)
    owner = state_dir() / "logs" / lun_stem(lun_name(disk))
    evidence, now = _evidence(owner, disk, exclusive), trio.current_time()
    store, epochs = await trio.to_thread.run_sync(
        lambda: _open(folder, disk, config, known, evidence, now)
    )
    try:
        keep(owner, store.superblock.store.hex() + "\n")
        keeper = _Keeper(store, exclusive)
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
            if exclusive is not None:
                exclusive.on_generation(keeper.news)
            async with background(keeper.run):
                yield write_log
        if store.failed is None:
            await keeper.write(clean=True)
    finally:
        store.close()


def _failed(write_log: WriteLog) -> None:
    """What is not on the target yet is in memory only now, and the log is soon out of date."""
    custody.forbid("its write log has failed")
    write_log.destager.wake()


def forget_log(disk: LunDevice) -> None:
    """A mount that writes without a log: what may be in one is out of date from now on."""
    owner = state_dir() / "logs" / lun_stem(lun_name(disk))
    if owner.exists():
        keep(owner, "\n")


def check_nothing_left(disk: LunDevice, config: CacheConfig) -> None:
    """For a mount that only reads: raises LogError when a log holds what the target lacks."""
    assert config.log_dir is not None
    folder = log_folder(config.log_dir, disk.info.name)
    if (folder / NAMES[0]).exists():
        store = LogStore.open(folder, shared=True)
        store.close()
        if not store.superblock.clean:
            raise LogError(
                f"log {folder}: holds data that the target does not have yet",
                advice="mount it read-write once, or run `orion-iscsifs cache replay`",
            )


class _Keeper:
    """Keeps the superblock up to date."""

    def __init__(self, store: LogStore, exclusive: Exclusive | None) -> None:
        self._store = store
        self._exclusive = exclusive
        self._news = trio.Event()

    def news(self) -> None:
        """Registrations have changed, by us."""
        self._news.set()

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            if self._store.failed is None:
                await self.write()

    async def write(self, **changes: int) -> None:
        """Some fields, and who may write to the LUN."""
        exclusive = self._exclusive
        if exclusive is not None and exclusive.generation >= 0:
            changes |= {"generation": exclusive.generation, "key": exclusive.first.key}
        else:
            changes |= {"generation": -1, "key": 0}
        await trio.to_thread.run_sync(lambda: self._store.update(**changes))


def _evidence(owner: Path, disk: LunDevice, exclusive: Exclusive | None) -> Evidence:
    try:
        known = owner.read_text().strip()
    except OSError:
        known = ""
    keys = LunKeys.load(create_private(state_dir()), lun_name(disk))
    key = keys.of(disk.session.nexus.isid)
    return Evidence(known, None if exclusive is None else exclusive.first.found, Own(keys, key))


def _open(
    folder: Path,
    disk: LunDevice,
    config: CacheConfig,
    known: LogStore | None,
    evidence: Evidence,
    now: float,
) -> tuple[LogStore, Epochs]:
    """Blocks. Raises LogError, WrongKey or BusyError."""
    geometry = disk.geometry
    wanted = new_superblock(
        disk.info.name,
        size_bytes=geometry.size_bytes,
        block_bytes=geometry.logical_block_bytes,
        log_bytes=config.log_bytes,
        target=f"{disk.session.nexus.target_name} LUN {disk.number}",
    )
    if not any((folder / name).exists() for name in NAMES):
        return LogStore.create(folder, wanted, config.passphrase), Epochs()
    store = LogStore.open(folder)
    try:
        store.unlock(config.passphrase, known)
        epochs = _take_over(store, disk, config, evidence, now)
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
    store: LogStore, disk: LunDevice, config: CacheConfig, known: Evidence, now: float
) -> Epochs | None:
    """What is in the log; None: nothing that is needed, a new log may take its place.

    With `log_force` it is replayed as far as it can be read, whatever speaks against it.
    """
    block, folder = store.superblock, store.folder
    evidence = None if config.log_force else known
    if block.ended:
        return None
    check_owner(store, disk.info.name, disk.geometry)
    if block.clean:
        return None
    epochs, scan = recover(store, now)
    if scan.damage and evidence is not None:
        raise LogError(
            f"log {folder}: {scan.damage}",
            advice="`orion-iscsifs cache check` tells more, `cache replay --force` writes what can"
            " be read up to there, `cache drop` gives it up",
        )
    if not epochs.queue:
        return None
    if scan.damage:
        log.warning("log %s: %s: replayed up to there", folder, scan.damage)
    if evidence is not None and (why := evidence.objection(block)):
        raise LogError(f"log {folder}: holds data that the target lacks, but {why}", advice=_FORCE)
    if scan.torn_bytes:
        log.warning(
            "%s: the end of the log was not complete, as after a loss of power;"
            " nothing that was synced is missing",
            folder,
        )
    if evidence is not None and evidence.seen and evidence.seen.generation < block.generation:
        log.warning("%s: the target was restarted since: it can't tell who wrote", folder)
    store.resume(scan)
    return epochs


def check_owner(store: LogStore, lun: str, geometry: Geometry) -> None:
    """Raises LogError if the log is another LUN's."""
    block = store.superblock
    if block.lun != lun:
        raise LogError(
            f"log {store.folder}: belongs to another LUN, {block.lun}",
            advice="give each LUN its own folder",
        )
    if block.clean:
        return
    if geometry.size_bytes < block.size_bytes or (
        geometry.logical_block_bytes != block.block_bytes
    ):
        raise LogError(
            f"log {store.folder}: the LUN had {block.size_bytes} bytes in blocks of"
            f" {block.block_bytes}; it has {geometry.size_bytes} in blocks of"
            f" {geometry.logical_block_bytes}",
            advice="is it the same LUN? " + _FORCE,
        )
