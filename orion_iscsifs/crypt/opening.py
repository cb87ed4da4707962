"""Opening the volume on a device: header, passphrase, layer."""

import logging

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.crypt import headers, keys
from orion_iscsifs.crypt.device import LuksDevice
from orion_iscsifs.crypt.errors import WrongPassphrase

log = logging.getLogger(__name__)


async def open_luks(device: BlockDevice, passphrase: bytes, what: str) -> LuksDevice:
    """The layer that shows the plaintext; `what` names the device in a warning.

    Raises LuksError, in words for the user. Nothing is written.
    """
    aligned = AlignedDevice(device)
    header = await headers.load(aligned)
    if header.damage:
        log.warning(
            "%s: %s: the other one is used; `orion-iscsifs luks add-key` writes both anew",
            what,
            header.damage,
        )
    volume = header.volume
    try:
        _, key = await keys.unlock(aligned, volume, passphrase)
    except WrongPassphrase as error:
        raise WrongPassphrase(str(error), advice=newline_advice(passphrase)) from None
    return LuksDevice(device, volume.payload, key)


def newline_advice(passphrase: bytes) -> str:
    """What may be the matter with a key file whose content opens nothing."""
    if passphrase.endswith(b"\n"):
        return (
            "the key file ends with a newline, which counts: if the passphrase was typed in,"
            " make the file with `printf %s`"
        )
    return "it may be the key file of another volume"
