"""Opening the volume on a device: header, passphrase, layer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.crypt import headers, keys
from orion_iscsifs.crypt.device import LuksDevice
from orion_iscsifs.crypt.errors import LuksError, WrongPassphrase
from orion_iscsifs.crypt.volume import Volume

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unlocked:
    """A volume and its key."""

    volume: Volume
    key: bytes = field(repr=False)

    def fits(self, volume: Volume) -> bool:
        """Whether `volume` is still the same, with the same key."""
        mine = self.volume
        return (mine.payload, mine.digest, mine.uuid) == (
            volume.payload,
            volume.digest,
            volume.uuid,
        )


async def unlock_luks(device: BlockDevice, passphrase: bytes, what: str) -> Unlocked:
    """The volume on the device; `what` names it in errors. Nothing but reading is done to it.

    Raises LuksError, in words for the user.
    """
    with _named(what, passphrase):
        aligned = AlignedDevice(device)
        volume = (await headers.load(aligned)).volume
        return Unlocked(volume, (await keys.unlock(aligned, volume, passphrase))[1])


async def open_luks(
    device: BlockDevice, passphrase: bytes, what: str, unlocked: Unlocked | None = None
) -> LuksDevice:
    """The layer that shows the plaintext; as `unlock_luks`, which may have been called before.

    The header is looked at anew: the device may have been another writer's in the meantime.
    """
    with _named(what, passphrase):
        header = await headers.load(AlignedDevice(device))
        if header.damage:
            log.warning(
                "%s: LUKS2: %s: the other one is used; `orion-iscsifs luks add-key` writes both",
                what,
                header.damage,
            )
        volume = header.volume
        if unlocked is not None and unlocked.fits(volume):
            return LuksDevice(device, volume.payload, unlocked.key, uuid=volume.uuid)
        _, key = await keys.unlock(AlignedDevice(device), volume, passphrase)
        return LuksDevice(device, volume.payload, key, uuid=volume.uuid)


@contextmanager
def _named(what: str, passphrase: bytes) -> Iterator[None]:
    """Errors say which device they are about."""
    try:
        yield
    except WrongPassphrase as error:
        advice = newline_advice(passphrase)
        raise WrongPassphrase(f"{what}: {error}", advice=advice) from None
    except LuksError as error:
        raise type(error)(f"{what}: {error}", advice=error.advice) from None


def newline_advice(passphrase: bytes) -> str:
    """What may be the matter with a key file whose content opens nothing."""
    if passphrase.endswith(b"\n"):
        return (
            "the key file ends with a newline, which counts: if the passphrase was typed in,"
            " make the file with `printf %s`"
        )
    return "it may be the key file of another volume"
