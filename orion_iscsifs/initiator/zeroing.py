"""Giving blocks back and making them zero, by the command that the device has for it.

`discard` is a hint. What the device says that it takes (Logical Block Provisioning page, SBC-3
§6.6.4), in this order: UNMAP, WRITE SAME(16) with UNMAP, WRITE SAME(10) with UNMAP.

`write_zeroes` is a promise, and UNMAP promises nothing: a device may leave a block as it is. WRITE
SAME with UNMAP does, where unmapped blocks read as zeroes (LBPRZ): what is not unmapped is written
(SBC-3 §5.50). So: WRITE SAME with UNMAP where that saves space, WRITE SAME, and plain writes.
NDOB (no data-out buffer) is used when REPORT SUPPORTED OPERATION CODES shows the bit.

A form that the device refuses with ILLEGAL REQUEST is not tried again: devices say in their pages
what they can't do, some for fear of the initiator and some by mistake.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from orion_iscsifs.errors import DeviceError, NotSupported, ScsiError
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.probe import LunInfo
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.provisioning import Form, encode_unmap
from orion_iscsifs.scsi.sense import SenseKey
from orion_iscsifs.scsi.support import (
    ONE_COMMAND_BYTES,
    UNKNOWN,
    SupportedCommand,
    decode_one_command,
)

log = logging.getLogger(__name__)

UNMAP_BLOCKS_MAX: Final = 1 << 22
"""Our own limit for one UNMAP, so that none takes longer than `command_timeout`."""
ZERO_BYTES_MAX: Final = 32 << 20
"""Our own limit for one WRITE SAME, which may write all of it."""
_PLAIN_BYTES_MAX: Final = 1 << 20
_BLOCKS_10_MAX: Final = 0xFFFF
_LBA_10_MAX: Final = 0xFFFF_FFFF
_NDOB_BYTE: Final = 1
_NDOB_BIT: Final = 0x01

WritePlainly = Callable[[int, memoryview], Awaitable[None]]
"""Byte offset and content: an ordinary write."""


_WITH_UNMAP: Final = frozenset({Form.WRITE_SAME_16_UNMAP, Form.WRITE_SAME_10_UNMAP})
_OF_16_BYTES: Final = frozenset({Form.WRITE_SAME_16_UNMAP, Form.WRITE_SAME_16})


class Zeroing:
    """Of one LUN. `take` what it says of itself, at first and after each change."""

    def __init__(self, unit: LogicalUnit, info: LunInfo) -> None:
        self._unit = unit
        self._refused: set[Form] = set()
        self._ndob: bool | None = None
        self.take(info)

    def take(self, info: LunInfo) -> None:
        self._info = info
        self._block_bytes = info.capacity.block_bytes
        self._granules = info.granules
        self._discards = [form for form in info.discard_forms() if form not in self._refused]
        self._zeroes = [form for form in info.zero_forms() if form not in self._refused]

    @property
    def is_cheap(self) -> bool:
        """Zeroes cost no space: they are better sent as such than as data."""
        return bool(self._zeroes) and self._zeroes[0] in _WITH_UNMAP

    @property
    def discards(self) -> bool:
        """Some command for it is left that the device has not refused."""
        return bool(self._discards)

    async def discard(self, start: int, end: int) -> None:
        """The whole granules among the LBAs; nothing if the device takes no such hint."""
        start, end = self._granules.inside(start, end)
        while self._discards and start < end:
            form = self._discards[0]
            try:
                start = await self._send(form, start, end)
            except DeviceError as error:
                self._drop(form, error)

    async def zero(self, start: int, end: int, plainly: WritePlainly, *, may_unmap: bool) -> None:
        """Every one of the LBAs. `plainly` is for devices without a command for it."""
        while start < end:
            form = next((one for one in self._zeroes if may_unmap or one not in _WITH_UNMAP), None)
            if form is None:
                await self._write_plainly(start, end, plainly)
                return
            try:
                start = await self._send(form, start, end)
            except DeviceError as error:
                self._drop(form, error)

    async def _write_plainly(self, start: int, end: int, plainly: WritePlainly) -> None:
        size = self._block_bytes
        zeroes = memoryview(bytes(min((end - start) * size, _PLAIN_BYTES_MAX)))
        for offset in range(start * size, end * size, _PLAIN_BYTES_MAX):
            await plainly(offset, zeroes[: end * size - offset])

    async def _send(self, form: Form, start: int, end: int) -> int:
        """The next part of the range; where it ended."""
        lba, blocks = next(self._granules.cut(start, end, self._blocks_max(form)))
        if form is Form.UNMAP:
            parameters = encode_unmap([(lba, blocks)])
            await self._unit.send(form.value, cdb.unmap(len(parameters)), parameters)
        else:
            await self._write_same(form, lba, blocks)
        return lba + blocks

    async def _write_same(self, form: Form, lba: int, blocks: int) -> None:
        if form in _OF_16_BYTES and self._ndob is None:
            answer = await self._asked(OpCode.WRITE_SAME_16)
            self._ndob = answer.looks_at(_NDOB_BYTE, _NDOB_BIT)
        unmap = form in _WITH_UNMAP
        if form in _OF_16_BYTES:
            ndob = bool(self._ndob)
            command = cdb.write_same_16(lba, blocks, unmap=unmap, no_data_out=ndob)
        else:
            ndob = False
            command = cdb.write_same(lba, blocks, unmap=unmap)
        # Without data it is a write all the same (the W bit): what is cancelled or fenced has to
        # wait for it, as for any other command that changes the medium.
        data = b"" if ndob else bytes(self._block_bytes)
        await self._unit.send(form.value, command, data)

    async def _asked(self, opcode: int) -> SupportedCommand:
        """A device that can't tell has told nothing."""
        buffer = bytearray(ONE_COMMAND_BYTES)
        command = cdb.report_supported_operation_codes(opcode, allocation_length=len(buffer))
        try:
            count = await self._unit.read(
                "REPORT SUPPORTED OPERATION CODES", command, memoryview(buffer)
            )
        except DeviceError:
            return UNKNOWN
        return decode_one_command(bytes(buffer[:count]), opcode)

    def _blocks_max(self, form: Form) -> int:
        limits = self._info.limits
        if form is Form.UNMAP:
            return min(limits.unmap_blocks_max or UNMAP_BLOCKS_MAX, UNMAP_BLOCKS_MAX)
        ours = UNMAP_BLOCKS_MAX if form in _WITH_UNMAP else ZERO_BYTES_MAX // self._block_bytes
        most = min(limits.write_same_blocks_max or _BLOCKS_10_MAX, ours)
        return most if form in _OF_16_BYTES else min(most, _BLOCKS_10_MAX)

    def _drop(self, form: Form, error: DeviceError) -> None:
        """Not supported after all; raises `error` if it says something else."""
        refused = isinstance(error, NotSupported) or (
            isinstance(error, ScsiError) and error.sense_key == SenseKey.ILLEGAL_REQUEST
        )
        if not refused:
            raise error
        log.info("LUN %d has no %s: %s", self._unit.number, form.value, error)
        self._refused.add(form)
        self.take(self._info)
