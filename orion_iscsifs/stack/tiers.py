"""The compressed read cache of one LUN: where it is, and whether what is in it is trusted.

What an earlier mount has left is a copy, and is used only if it is proven that nobody has written
to the LUN since (`evidence.Evidence.doubt`), or if the user says `tier_reuse=always`. That this
host itself has written without it is known, and believed whatever the user says.

To have that proof the next time, a mount with a tier leaves its reservation at the target when it
ends (`Exclusive.stay`): only so can nobody write in between. `umount --release` takes it away.

A tier is worth something and is needed for nothing: one that can't be used is left out, and the
mount goes on without it. Only a key that does not open it is refused, since that is a mistake of
the user's which would cost the tier.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import MountConfig, TierConfig, TierReuse
from orion_iscsifs.errors import BusyError
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.localstore.superblock import NAMES
from orion_iscsifs.stack.evidence import Evidence, Keeper, Owner, evidence, lun_folder
from orion_iscsifs.stack.exclusive import Exclusive, look
from orion_iscsifs.tier.store import TierStore, new_tier_superblock
from orion_iscsifs.tier.superblock import TierError, TierSuperblock
from orion_iscsifs.tier.tier import CompressedTier, open_tier

log = logging.getLogger(__name__)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@asynccontextmanager
async def open_local_tier(
    device: BlockDevice,
    disk: LunDevice,
    volume: str,
    exclusive: Exclusive | None,
    config: MountConfig,
) -> AsyncIterator[CompressedTier | None]:
    """The device with its tier in front, for the time of the body; None: it has to do without.

    `volume`: what tells the content of `device` from all others.
    """
    assert config.tier is not None
    owner = Owner("tiers", disk)
    seen = await look(disk, config) if exclusive is None else exclusive.first.found
    known = evidence(owner, disk, seen)
    try:
        folder = _folder(disk, config.tier)
        wanted = _wanted(device, disk, volume, config.tier)
        store = await trio.to_thread.run_sync(_open, folder, config.tier, wanted, known)
    except (TierError, BusyError) as error:
        log.warning("%s; going on without it", error)
        if not device.geometry.read_only:
            forget_tier(disk)
        yield None
        return
    try:
        async with _tended(device, store, owner, exclusive, config) as tier:
            yield tier
        if store.failed is None and exclusive is not None and _is_for_later(config.tier):
            exclusive.stay()
    finally:
        store.close()


@asynccontextmanager
async def _tended(
    device: BlockDevice,
    store: TierStore,
    owner: Owner,
    exclusive: Exclusive | None,
    config: MountConfig,
) -> AsyncIterator[CompressedTier]:
    """The store as a device, its superblock up to date with the reservation."""
    assert config.tier is not None
    store.on_failure = owner.forget
    owner.note(store.superblock.store)
    async with open_tier(device, store, level=config.tier.level) as tier:
        keeper = Keeper(tier.update, exclusive, device)
        if not device.geometry.read_only:
            # A mount that only reads changes nothing about who may have written. A store that can't
            # be written has failed, which is said, and everything passes through it.
            with suppress(TierError):
                await keeper.write()
        async with background(keeper.run):
            yield tier


def forget_tier(disk: LunDevice) -> None:
    """A mount that writes without a tier: what is in one is out of date from now on."""
    Owner("tiers", disk).forget()


def _is_for_later(config: TierConfig) -> bool:
    return config.reuse is TierReuse.RESERVATION


def _folder(disk: LunDevice, config: TierConfig) -> Path:
    if not disk.info.name:
        raise TierError(
            f"LUN {disk.number}: the device has no name (VPD page 83h) to bind a tier to"
        )
    return lun_folder(config.folder, disk.info.name)


def _wanted(
    device: BlockDevice, disk: LunDevice, volume: str, config: TierConfig
) -> TierSuperblock:
    geometry = device.geometry
    return new_tier_superblock(
        volume,
        size_bytes=geometry.size_bytes,
        block_bytes=geometry.logical_block_bytes,
        tier_bytes=config.size_bytes,
        boot_id=_boot_id(),
        target=f"{disk.session.nexus.target_name} LUN {disk.number}",
    )


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _open(folder: Path, config: TierConfig, wanted: TierSuperblock, known: Evidence) -> TierStore:
    """What is there, if it may be used, or else an empty one. Blocks.

    Raises TierError or BusyError.
    """
    if not any((folder / name).exists() for name in NAMES):
        return _resumed(TierStore.create(folder, wanted), config, wanted)
    try:
        store = TierStore.open(folder)
    except TierError as error:
        log.warning("%s; it is made anew", error)
        return _resumed(TierStore.create(folder, wanted), config, wanted)
    try:
        why = _doubt(store.superblock, wanted, known, config.reuse)
        if why:
            log.warning("tier %s: what is in it is not used: %s", folder, why)
            store.restart(wanted)
        return _resumed(store, config, wanted)
    except BaseException:
        store.close()
        raise


def _resumed(store: TierStore, config: TierConfig, wanted: TierSuperblock) -> TierStore:
    dropped = store.resume(boot_id=wanted.boot_id, tier_bytes=config.size_bytes)
    if dropped:
        log.warning("tier %s: what is in it is not used: %s", store.folder, dropped)
    return store


def _doubt(block: TierSuperblock, wanted: TierSuperblock, known: Evidence, reuse: TierReuse) -> str:
    """Why what an earlier mount has left is not used; empty: it is."""
    if block.lun != wanted.lun:
        return f"it belongs to another LUN, {block.lun}"
    if block.block_bytes != wanted.block_bytes:
        return "the blocks of the LUN had another length"
    if reuse is TierReuse.NEVER:
        return "tier_reuse=never"
    doubt = known.doubt(block.store, block.generation)
    # What this host has done itself is no matter of trust.
    certain = known.owner != block.store.hex()
    return doubt if certain or reuse is TierReuse.RESERVATION else ""
