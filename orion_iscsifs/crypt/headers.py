"""Reading and writing LUKS headers on a device.

The device takes any offset and length here (an `AlignedDevice`). A LUKS2 header is written one copy
after the other, each made durable before the next is begun, and the copy that counted until then
comes last: whatever happens, the newest that was ever durable is whole, or a newer one is.
"""

import os
from typing import Final

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.crypt import luks1, luks2, signatures
from orion_iscsifs.crypt.errors import LuksError, NoLuksHeader
from orion_iscsifs.crypt.luks1 import Luks1
from orion_iscsifs.crypt.luks2 import Luks2
from orion_iscsifs.crypt.volume import MAGIC

Header = Luks1 | Luks2
_SALT_BYTES: Final = 64


async def read(device: BlockDevice, offset: int, length: int) -> bytes:
    """So many bytes, or fewer where the device ends."""
    length = max(0, min(length, device.geometry.size_bytes - offset))
    target = bytearray(length)
    if length:
        await device.read_into(offset, memoryview(target))
    return bytes(target)


async def load(device: BlockDevice) -> Header:
    """The header of the volume on the device.

    Raises NoLuksHeader, or LuksError, in words for the user. Nothing is changed, also where the
    second copy of a LUKS2 header has to stand in for the first (`damage` of the result says so).
    """
    head = await read(device, 0, luks2.BINARY_BYTES)
    if head[:6] == MAGIC and int.from_bytes(head[6:8], "big") == 1:
        return luks1.parse(head)
    first = await _copy(device, 0)
    if isinstance(first, Luks2):
        second = await _copy(device, first.size_bytes)
        return luks2.choose(first, second)
    second = await _find_second(device)
    if first is None:
        await _refuse_other(device, second)
    if second is None and isinstance(first, LuksError):
        raise first
    return luks2.choose(first, second)


async def _copy(device: BlockDevice, offset: int) -> Luks2 | LuksError | None:
    """The copy of a LUKS2 header there; None: there is none."""
    try:
        found = luks2.examine(await read(device, offset, luks2.BINARY_BYTES), offset)
        if found is None:
            return None
        return luks2.parse(await read(device, offset, found.size_bytes), offset)
    except LuksError as error:
        return error


async def _find_second(device: BlockDevice) -> Luks2 | LuksError | None:
    """It is behind the first one, whose length is not known any more."""
    damaged = None
    for offset in luks2.SIZES:
        found = await _copy(device, offset)
        if isinstance(found, Luks2):
            return found
        damaged = damaged or found
    return damaged


async def _refuse_other(device: BlockDevice, second: Luks2 | LuksError | None) -> None:
    """Without a first header, a second one may be what is left of a volume that was overwritten."""
    found = signatures.find(await read(device, 0, signatures.HEAD_BYTES))
    if not isinstance(second, Luks2):
        what = f", but {found}" if found else ""
        raise NoLuksHeader(
            f"LUKS: there is no header on it{what}",
            advice="`orion-iscsifs luks format` makes one, and destroys what is there",
        )
    if found and "second header" not in found:
        raise LuksError(
            f"LUKS2: the first header is gone, and {found} is in its place",
            advice="it was overwritten; mount it without luks_key_file to see what is there",
        )


async def looks_used(device: BlockDevice) -> str:
    """What seems to be on the device, in words; empty: nothing that is known."""
    size = device.geometry.size_bytes
    found = signatures.find(await read(device, 0, signatures.HEAD_BYTES))
    if found:
        return found
    length = min(size, signatures.HEAD_BYTES)
    return signatures.find_at_end(await read(device, size - length, length))


async def store(device: BlockDevice, header: Header) -> None:
    """Durable when it returns. LUKS1 has one copy: its 592 bytes go out as one request."""
    if isinstance(header, Luks1):
        await write(device, 0, header.encode())
        return
    for second in (False, True) if header.is_second else (True, False):
        blob = header.encode(second=second, salt=os.urandom(_SALT_BYTES))
        await write(device, header.size_bytes if second else 0, blob)


async def write(device: BlockDevice, offset: int, content: bytes) -> None:
    """Durable when it returns."""
    await device.write(offset, content)
    await device.flush()
