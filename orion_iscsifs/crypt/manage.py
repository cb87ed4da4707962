"""Making a volume, and adding and removing its key slots.

The order of the writes is what makes each of them safe against a crash: key material is durable
before the header names it, and it is wiped before the header forgets it.
"""

import os
import uuid
from dataclasses import dataclass
from typing import Final, Literal

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.crypt import headers, keys, luks1, luks2
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.headers import Header
from orion_iscsifs.crypt.kdf import KeyDigest, Pbkdf2
from orion_iscsifs.crypt.keys import Costs
from orion_iscsifs.crypt.luks1 import Luks1
from orion_iscsifs.crypt.volume import Slot, Volume
from orion_iscsifs.errors import UsageError

DIGEST_ITERATIONS: Final = 100_000
"""Of the digest of the volume key, which nobody can guess anyway."""
_PAYLOAD_BYTES_MIN: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a new volume is to be."""

    version: Literal[1, 2] = 2
    sector_bytes: int | None = None
    """Of the payload; None: 4096 where that fits the device, else 512."""
    key_bytes: int = 64
    costs: Costs
    label: str = ""
    force: bool = False


async def format_volume(device: BlockDevice, passphrase: bytes, how: Format) -> Header:
    """Make a volume of the device: what was on it is lost.

    Raises LuksError when something seems to be there, unless `how.force` is set.
    """
    found = await headers.looks_used(device)
    if found and not how.force:
        raise LuksError(
            f"luks format: there is {found} on it",
            advice="--force destroys it; nothing was written",
        )
    payload = luks1.PAYLOAD_BYTES if how.version == 1 else luks2.PAYLOAD_BYTES
    if device.geometry.size_bytes < payload + _PAYLOAD_BYTES_MIN:
        raise UsageError(
            f"luks format: the device has {device.geometry.size_bytes} bytes;"
            f" a LUKS{how.version} header alone takes {payload}",
            advice="a LUKS1 header (--type luks1) takes 2 MiB" if how.version == 2 else "",
        )
    key = os.urandom(how.key_bytes)
    empty = await _empty_header(device, how, key)
    header, slot = await _with_key(empty, how.costs, key)
    material = await _sealed(slot, passphrase, key)
    # First nothing is there any more, then the key, then what says that it is there.
    await device.write_zeroes(0, payload, may_unmap=False)
    await device.flush()
    await headers.write(device, slot.offset_bytes, material)
    await headers.store(device, header)
    return header


async def _empty_header(device: BlockDevice, how: Format, key: bytes) -> Header:
    salt = os.urandom(keys.SALT_BYTES)
    kdf = Pbkdf2(how.costs.hash, DIGEST_ITERATIONS, salt)
    name = str(uuid.uuid4())
    if how.version == 1:
        if how.sector_bytes not in {None, 512} or how.costs.pbkdf != "pbkdf2" or how.label:
            raise UsageError("luks format: LUKS1 has sectors of 512 bytes, PBKDF2 and no label")
        digest = await _digest(kdf, key, luks1.DIGEST_BYTES)
        return luks1.new(
            uuid=name, hash_name=how.costs.hash, key_bytes=how.key_bytes, digest=digest
        )
    sector = how.sector_bytes or sector_default(device)
    size = device.geometry.size_bytes
    if size % sector:
        # It would open here, without the rest at its end, but not with dm-crypt.
        raise UsageError(
            f"luks format: the {size} bytes of the device are not whole sectors of {sector}",
            advice="--sector-size 512",
        )
    digest = await _digest(kdf, key, 32)
    return luks2.new(
        uuid=name,
        sector_bytes=sector,
        digest=digest,
        label=how.label,
    )


def sector_default(device: BlockDevice) -> int:
    """4096 where the device writes that much at once: it costs an eighth of the time."""
    geometry = device.geometry
    fits = geometry.physical_block_bytes >= 4096 and not geometry.size_bytes % 4096
    return 4096 if fits else 512


async def _digest(kdf: Pbkdf2, key: bytes, length: int) -> KeyDigest:
    return KeyDigest(kdf, await trio.to_thread.run_sync(kdf.derive, key, length))


async def add_key(
    device: BlockDevice, header: Header, existing: bytes, new: bytes, costs: Costs
) -> tuple[Header, int]:
    """One more passphrase; returns the new header and the number of its key slot."""
    volume = header.volume
    _, key = await keys.unlock(device, volume, existing)
    changed, slot = await _with_key(header, costs, key)
    material = await _sealed(slot, new, key)
    await headers.write(device, slot.offset_bytes, material)
    await headers.store(device, changed)
    return changed, slot.number


async def remove_key(
    device: BlockDevice, header: Header, slot: Slot, *, force: bool = False
) -> Header:
    """The slot's key material is overwritten, then the header forgets it.

    Raises LuksError for the last slot, unless `force` is set: then nothing opens the volume.
    """
    if len(header.volume.slots) == 1 and not force:
        raise LuksError(
            f"luks remove-key: slot {slot.number} is the last one: without it the data is lost",
            advice="add another key first, or give the data up with --force",
        )
    # Random, so that it does not show as a hole and is not sent as one.
    await headers.write(device, slot.offset_bytes, os.urandom(slot.room_bytes))
    changed = header.without_slot(slot.number)
    await headers.store(device, changed)
    return changed


async def slot_of(device: BlockDevice, volume: Volume, passphrase: bytes) -> Slot:
    """The slot that opens with the passphrase. Raises WrongPassphrase."""
    return (await keys.unlock(device, volume, passphrase))[0]


async def _with_key(header: Header, costs: Costs, key: bytes) -> tuple[Header, Slot]:
    """The header with one more slot, whose material is still to be written."""
    if isinstance(header, Luks1):
        if costs.pbkdf != "pbkdf2":
            raise UsageError("luks: LUKS1 has PBKDF2 only", advice="--pbkdf pbkdf2")
        place = header.free_slot()
        kdf = await keys.choose(_with_hash(costs, header.hash), len(key))
        assert isinstance(kdf, Pbkdf2)
        changed1 = header.with_slot(place.number, kdf)
        return changed1, changed1.slot(place.number)
    chosen = await keys.choose(costs, len(key))
    slot = header.free_slot(chosen, len(key), costs.hash)
    return header.with_slot(slot), slot


def _with_hash(costs: Costs, name: str) -> Costs:
    """A LUKS1 volume has one hash for everything."""
    return Costs(
        pbkdf=costs.pbkdf, hash=name, iter_time_s=costs.iter_time_s, iterations=costs.iterations
    )


async def _sealed(slot: Slot, passphrase: bytes, key: bytes) -> bytes:
    keys.check_memory(slot.kdf)
    random = os.urandom((slot.stripes - 1) * slot.key_bytes)
    return await trio.to_thread.run_sync(slot.seal, passphrase, key, random)
