"""`LuksDevice`: the plaintext of a LUKS volume on the device below.

A write is encrypted into a staging buffer of its own, piece by piece, so the caller's buffer stays
as it is and no plaintext gets below. A read is decrypted in the caller's buffer.

No thread takes part. Ciphering costs a few microseconds for each sector, nearly all of it in the
interpreter, whose lock it would hold in a thread just the same: the loop would then wait for the
lock for up to 5 ms (sys.getswitchinterval) instead of for one batch. So a long request is ciphered
in batches of `BATCH_SECTORS`, and everybody else has a turn between two of them.

Discards end here, as in dm-crypt by default: what is discarded shows which sectors are not in use,
and would read as noise and not as zeroes. For the same reason zeroes are written as ciphertext.

A sector may be several blocks of the device, which may then be read between two of its own blocks
that are being written. So requests for the same sectors wait for one another there (`RangeLock`).
"""

from dataclasses import replace
from typing import Final

import trio

from orion_iscsifs.block.device import (
    BlockDevice,
    Buffer,
    Geometry,
    GeometryListener,
    check_request,
)
from orion_iscsifs.block.rangelock import RangeLock
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.volume import Payload
from orion_iscsifs.crypt.xts import IV_UNIT_BYTES, SectorCipher
from orion_iscsifs.errors import WriteProtected

BATCH_SECTORS: Final = 64
"""Ciphered without a pause: about 0.2 ms."""
PIECE_BYTES: Final = 1 << 20
"""Of a long write, staged and sent at a time."""


class LuksDevice:
    """A `BlockDevice` over a `BlockDevice`."""

    def __init__(
        self, device: BlockDevice, payload: Payload, key: Buffer, *, uuid: str = ""
    ) -> None:
        """Raises LuksError where the payload does not fit the device."""
        self.uuid: Final = uuid
        """Of the volume, as its header has it."""
        self._device = device
        self._payload = payload
        self._offset: Final = payload.offset_bytes
        self._cipher: Final = SectorCipher(key, payload.sector_bytes)
        self._listeners: list[GeometryListener] = []
        self._check(device.geometry)
        self._geometry = self._translated(device.geometry)
        whole = payload.sector_bytes <= device.geometry.logical_block_bytes
        self._lock: Final = None if whole else RangeLock()
        device.on_geometry_change(self._follow)

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self._geometry, offset, len(target))
        if not len(target):
            return
        await self._fetch(offset, target)
        decrypt, batch = self._cipher.decrypt, BATCH_SECTORS * self._cipher.sector_bytes
        number = self._number(offset)
        for at in range(0, len(target), batch):
            if at:
                await trio.lowlevel.checkpoint()
            part = target[at : at + batch]
            part[:] = decrypt(number + at // IV_UNIT_BYTES, part)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self._check_write(offset, len(source))
        view = memoryview(source)
        for at in range(0, len(view), PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            staged = await self._encrypted(offset + at, piece)
            await self._send(offset + at, staged, fua=fua)

    async def flush(self) -> None:
        await self._device.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Nothing: see the module's docstring."""
        self._check_write(offset, length)
        await trio.lowlevel.checkpoint()

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        del may_unmap  # a hole would read as noise
        self._check_write(offset, length)
        zeroes = memoryview(bytes(min(length, PIECE_BYTES)))
        for at in range(0, length, PIECE_BYTES):
            staged = await self._encrypted(offset + at, zeroes[: length - at])
            await self._send(offset + at, staged, fua=False)

    async def _fetch(self, offset: int, target: memoryview) -> None:
        """Ciphertext, each sector as one write left it."""
        if self._lock is None:
            await self._device.read_into(self._offset + offset, target)
            return
        held = (offset, offset + len(target))
        await self._lock.wait_until_free(held)
        self._lock.shared.append(held)  # no await since the check
        try:
            await self._device.read_into(self._offset + offset, target)
        finally:
            self._lock.leave_shared(held)

    async def _send(self, offset: int, staged: Buffer, *, fua: bool) -> None:
        """Ciphertext, alone with its sectors."""
        if self._lock is None:
            await self._device.write(self._offset + offset, staged, fua=fua)
            return
        async with self._lock.alone((offset, offset + len(staged))):
            await self._device.write(self._offset + offset, staged, fua=fua)

    async def _encrypted(self, offset: int, piece: memoryview) -> Buffer:
        """At most PIECE_BYTES, in a buffer of its own."""
        encrypt, batch = self._cipher.encrypt, BATCH_SECTORS * self._cipher.sector_bytes
        number = self._number(offset)
        if len(piece) <= batch:
            return encrypt(number, piece)
        staged = memoryview(bytearray(len(piece)))
        for at in range(0, len(piece), batch):
            if at:
                await trio.lowlevel.checkpoint()
            part = encrypt(number + at // IV_UNIT_BYTES, piece[at : at + batch])
            staged[at : at + len(part)] = part
        return staged

    def _number(self, offset: int) -> int:
        """The tweak of the sector at `offset`."""
        return self._payload.iv_first + offset // IV_UNIT_BYTES

    def _check_write(self, offset: int, length: int) -> None:
        if self._geometry.read_only:
            raise WriteProtected("the device is read-only")
        check_request(self._geometry, offset, length)

    # -- geometry ----------------------------------------------------------------------------

    def _check(self, below: Geometry) -> None:
        if self._offset % below.logical_block_bytes:
            raise LuksError(
                f"LUKS: the payload at {self._offset} does not begin with a block of the device"
                f" ({below.logical_block_bytes} bytes)",
                advice="the volume was made on a device with smaller blocks",
            )
        wanted = self._payload.size_bytes
        available = below.size_bytes - self._offset
        if available <= 0 or (wanted is not None and wanted > available):
            raise LuksError(
                f"LUKS: the payload ends at {self._offset + (wanted or 0)}, but the device has"
                f" {below.size_bytes} bytes",
                advice="the device has shrunk, or only a part of the volume was copied to it",
            )

    def _translated(self, below: Geometry) -> Geometry:
        block = max(below.logical_block_bytes, self._payload.sector_bytes)
        physical = max(below.physical_block_bytes, block)
        available = max(below.size_bytes - self._offset, 0)
        wanted = self._payload.size_bytes
        size = available if wanted is None else min(wanted, available)
        return replace(
            below,
            size_bytes=size // block * block,
            logical_block_bytes=block,
            physical_block_bytes=physical,
            alignment_bytes=(below.alignment_bytes - self._offset) % physical // block * block,
            discard_granularity_bytes=0,
            discard_alignment_bytes=0,
            zeroes_after_discard=False,
        )

    def _follow(self, below: Geometry) -> None:
        self._geometry = self._translated(below)
        for listener in self._listeners:
            listener(self._geometry)
