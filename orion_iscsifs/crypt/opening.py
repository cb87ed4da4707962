"""Opening the volume on a device: header, passphrase, layer."""

import logging

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.crypt import headers, keys
from orion_iscsifs.crypt.device import LuksDevice
from orion_iscsifs.crypt.errors import LuksError, WrongPassphrase

log = logging.getLogger(__name__)


async def open_luks(device: BlockDevice, passphrase: bytes, what: str) -> LuksDevice:
    """The layer that shows the plaintext; `what` names the device in a warning.

    Raises LuksError, in words for the user. Nothing is written.
    """
    try:
        return await _open(device, passphrase, what)
    except WrongPassphrase as error:
        advice = newline_advice(passphrase)
        raise WrongPassphrase(f"{what}: {error}", advice=advice) from None
    except LuksError as error:
        raise type(error)(f"{what}: {error}", advice=error.advice) from None


async def _open(device: BlockDevice, passphrase: bytes, what: str) -> LuksDevice:
    aligned = AlignedDevice(device)
    header = await headers.load(aligned)
    if header.damage:
        log.warning(
            "%s: LUKS2: %s: the other one is used; `orion-iscsifs luks add-key` writes both anew",
            what,
            header.damage,
        )
    volume = header.volume
    _, key = await keys.unlock(aligned, volume, passphrase)
    return LuksDevice(device, volume.payload, key, uuid=volume.uuid)


def newline_advice(passphrase: bytes) -> str:
    """What may be the matter with a key file whose content opens nothing."""
    if passphrase.endswith(b"\n"):
        return (
            "the key file ends with a newline, which counts: if the passphrase was typed in,"
            " make the file with `printf %s`"
        )
    return "it may be the key file of another volume"
