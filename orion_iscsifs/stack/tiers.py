"""The compressed read cache of one LUN: where it is, and whether what is in it is trusted.

What an earlier mount has left is a copy, and is used only if it is proven that nobody has written
to the LUN since (`evidence.Evidence.doubt`), or if the user says `tier_reuse=always`. That this
host itself has written without it is known, and believed whatever the user says.

To have that proof the next time, a mount with a tier leaves its reservation at the target when it
ends (`Exclusive.stay`): only so can nobody write in between. `umount --release` takes it away.

A tier is worth something and is needed for nothing: one that can't be used is left out, and the
mount goes on without it. Only a missing or a wrong key is refused, since that is a mistake of the
user's, which would cost the tier or lay open what was sealed. One that is not sealed is removed
before a mount with a key begins another.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import MountConfig, TierConfig, TierReuse
from orion_iscsifs.errors import BusyError
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.localstore.seal import Seal, WrongKey, new_sealing, unwrap
from orion_iscsifs.localstore.superblock import NAMES
from orion_iscsifs.stack.evidence import Evidence, Keeper, Owner, evidence, lun_folder
from orion_iscsifs.stack.exclusive import Exclusive
from orion_iscsifs.stack.exclusive import look as look_at_reservation
from orion_iscsifs.tier.checking import boot_id
from orion_iscsifs.tier.fresh import new_tier_superblock
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.superblock import TierError, TierSuperblock
from orion_iscsifs.tier.tier import CompressedTier, open_tier

log = logging.getLogger(__name__)

_SUFFIX: Final = ".tier"
"""Of the folder: a log may be in the same one."""


async def look(disk: LunDevice, config: MountConfig) -> Seal | None:
    """Try the key of the tier that is there; what it unlocks. Raises WrongKey.

    To be called before a reservation is made, as `logs.look`.
    """
    if config.tier is None or not disk.info.name:
        return None
    folder = lun_folder(config.tier.folder, disk.info.name, _SUFFIX)
    return await trio.to_thread.run_sync(_look, folder, config.cache.passphrase)


def _look(folder: Path, passphrase: bytes | None) -> Seal | None:
    if not any((folder / name).exists() for name in NAMES):
        return None
    try:
        store = TierStore.open(folder, shared=True)
    except TierError:
        return None  # it is made anew
    block = store.superblock
    store.close()
    if block.sealing is None:
        return None
    if passphrase is None:
        raise WrongKey(
            f"tier {folder}: is sealed, and there is no key",
            advice="add cache_key_file=FILE; `orion-iscsifs cache drop` gives the tier up",
        )
    try:
        return Seal(unwrap(block.sealing, passphrase, block.store))
    except WrongKey as error:
        raise WrongKey(
            f"tier {folder}: {error}",
            advice="give cache_key_file= the key that it was sealed with;"
            " `orion-iscsifs cache drop` gives the tier up",
        ) from None


@asynccontextmanager
async def open_local_tier(
    device: BlockDevice,
    disk: LunDevice,
    volume: str,
    exclusive: Exclusive | None,
    config: MountConfig,
    unlocked: Seal | None,
) -> AsyncIterator[CompressedTier | None]:
    """The device with its tier in front, for the time of the body; None: it has to do without.

    `volume`: what tells the content of `device` from all others. `unlocked`: what `look` has found.
    """
    assert config.tier is not None
    owner = Owner("tiers", disk)
    seen = await look_at_reservation(disk, config) if exclusive is None else exclusive.first.found
    known = evidence(owner, disk, seen)
    try:
        opening = _Opening(
            folder=_folder(disk, config.tier),
            wanted=_wanted(device, disk, volume, config.tier),
            config=config.tier,
            known=known,
            unlocked=unlocked,
            passphrase=config.cache.passphrase,
        )
        store = await trio.to_thread.run_sync(opening.store)
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
    return lun_folder(config.folder, disk.info.name, _SUFFIX)


def _wanted(
    device: BlockDevice, disk: LunDevice, volume: str, config: TierConfig
) -> TierSuperblock:
    geometry = device.geometry
    return new_tier_superblock(
        volume,
        size_bytes=geometry.size_bytes,
        block_bytes=geometry.logical_block_bytes,
        tier_bytes=config.size_bytes,
        boot_id=boot_id(),
        target=f"{disk.session.nexus.target_name} LUN {disk.number}",
    )


@dataclass(frozen=True, slots=True)
class _Opening:
    """What is needed to open a tier, or to make it."""

    folder: Path
    wanted: TierSuperblock
    config: TierConfig
    known: Evidence
    unlocked: Seal | None
    passphrase: bytes | None = field(repr=False)

    def store(self) -> TierStore:
        """What is there, if it may be used, or else an empty one. Blocks.

        Raises TierError or BusyError.
        """
        if not any((self.folder / name).exists() for name in NAMES):
            return self._resumed(self._made())
        try:
            store = TierStore.open(self.folder)
        except TierError as error:
            log.warning("%s; it is made anew", error)
            return self._resumed(self._made())
        try:
            why = self._doubt(store.superblock)
            if why:
                log.warning("tier %s: what is in it is not used: %s", self.folder, why)
                block, seal = self._sealed()
                store.restart(block, seal=seal)
            else:
                store.seal = self.unlocked
            return self._resumed(store)
        except BaseException:
            store.close()
            raise

    def _made(self) -> TierStore:
        block, seal = self._sealed()
        return TierStore.create(self.folder, block, seal=seal)

    def _sealed(self) -> tuple[TierSuperblock, Seal | None]:
        """What is wanted, with a key of its own if there is a passphrase."""
        if self.passphrase is None:
            return self.wanted, None
        sealing, key = new_sealing(self.passphrase, self.wanted.store)
        return msgspec.structs.replace(self.wanted, sealing=sealing), Seal(key)

    def _resumed(self, store: TierStore) -> TierStore:
        try:
            dropped = store.resume(boot_id=self.wanted.boot_id, tier_bytes=self.config.size_bytes)
        except BaseException:
            store.close()
            raise
        if dropped:
            log.warning("tier %s: what is in it is not used: %s", self.folder, dropped)
        return store

    def _doubt(self, block: TierSuperblock) -> str:
        """Why what an earlier mount has left is not used; empty: it is."""
        if block.lun != self.wanted.lun:
            return f"it belongs to another LUN, {block.lun}"
        if block.block_bytes != self.wanted.block_bytes:
            return "the blocks of the LUN had another length"
        if (block.sealing is None) != (self.unlocked is None):
            return "it was made anew by another mount"
        if block.sealing is None and self.passphrase is not None:
            return "it is not sealed"
        if self.config.reuse is TierReuse.NEVER:
            return "tier_reuse=never"
        doubt = self.known.doubt(block.store, block.generation)
        # What this host has done itself is no matter of trust.
        certain = self.known.owner != block.store.hex()
        return doubt if certain or self.config.reuse is TierReuse.RESERVATION else ""
