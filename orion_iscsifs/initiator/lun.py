"""A LUN as a BlockDevice: byte ranges become READ, WRITE, SYNCHRONIZE CACHE and UNMAP.

A target that comes back after an outage may show another disk under the same number, or the same
one with another size. So the LUN is probed again after each new login before a held command is
sent, and a LUN that is another disk is refused: reading it would give wrong data, and writing to
it would destroy somebody else's.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Final, Self

import trio

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener, check_request
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.errors import (
    DeviceError,
    NotSupported,
    OrionError,
    PathInaccessible,
    WriteProtected,
)
from orion_iscsifs.initiator.commands import SYNCHRONIZE_PATIENCE, LogicalUnit
from orion_iscsifs.initiator.probe import LunInfo, probe
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.zeroing import Zeroing
from orion_iscsifs.protocol.transfer import prompt_bytes_max
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.lun import encode_lun
from orion_iscsifs.scsi.sense import SenseData, Status
from orion_iscsifs.scsi.verdict import Action, judge

log = logging.getLogger(__name__)

ZERO_RUN_BYTES_MIN: Final = 64 << 10
"""Shorter runs of zeroes are not looked for: a command costs more than they do."""
PROMPT_COMMANDS_MAX: Final = 8
"""A write that needs more of them waits for an R2T instead."""
_ZERO_RUN: Final = bytes(ZERO_RUN_BYTES_MIN)
_PROBE_BYTES: Final = 8
_NOTHING: Final = bytes(_PROBE_BYTES)
_SETTLE_S: Final = 5.0
_SETTLE_STEP_S: Final = 0.25
"""How long, and how often, a LUN that is missing after a new login is asked for."""


def runs_of_zeroes(data: memoryview) -> list[Range]:
    """The whole stretches of `ZERO_RUN_BYTES_MIN` that are zero, joined, as ranges of `data`."""
    runs: list[Range] = []
    size = ZERO_RUN_BYTES_MIN
    for start in range(0, len(data) - size + 1, size):
        end = start + size
        # Nearly all data differ from zeroes at one of the ends: the whole is looked at seldom.
        if data[start : start + _PROBE_BYTES] != _NOTHING:
            continue
        if data[end - _PROBE_BYTES : end] != _NOTHING or bytes(data[start:end]) != _ZERO_RUN:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((start, end))
    return runs


class AnotherDisk(DeviceError):
    """The LUN's number is the same and its disk is not."""


class LunDevice:
    """One disk of a target. See `block.device.BlockDevice` for the promises."""

    def __init__(self, unit: LogicalUnit, info: LunInfo, *, read_only: bool) -> None:
        self._unit = unit
        self._read_only = read_only
        self._listeners: list[GeometryListener] = []
        self._synchronizes = True
        self.write_guard: Callable[[], Awaitable[None]] | None = None
        """Awaited before each change of the medium, while it is in doubt whether it is ours."""
        self._zeroing = Zeroing(unit, info)
        self._take(info)
        unit.in_use = True
        unit.reread_limits = self._reread
        unit.look_again = self._look_again
        unit.session.checks.append(self._check_after_login)
        unit.session.scsi_event_listeners.append(self._scsi_event)

    @classmethod
    async def open(cls, session: Session, number: int, *, read_only: bool) -> Self:
        """Probe the LUN. Raises LunNotFound, NotADisk, or another DeviceError."""
        unit = LogicalUnit(session, number)
        return cls(unit, await probe(unit), read_only=read_only)

    def _take(self, info: LunInfo) -> None:
        self.info = info
        self._zeroing.take(info)
        self._geometry = self._described()
        self._shift = info.capacity.block_bytes.bit_length() - 1
        self._alignment_bytes = info.transfer_alignment_bytes
        self._first_aligned_bytes = info.capacity.lowest_aligned_lba << self._shift

    def _described(self) -> Geometry:
        """What the device says of itself, without what it has refused since."""
        geometry = self.info.geometry(read_only=self._read_only)
        return (
            geometry if self._zeroing.discards else replace(geometry, discard_granularity_bytes=0)
        )

    @property
    def unit(self) -> LogicalUnit:
        return self._unit

    @property
    def session(self) -> Session:
        return self._unit.session

    @property
    def number(self) -> int:
        return self._unit.number

    @property
    def is_refused(self) -> bool:
        """It is not, or may not be, the disk that was opened."""
        return self._unit.is_refused

    def close(self) -> None:
        """Leave the session: it does not look after this LUN any more."""
        session = self._unit.session
        session.checks.remove(self._check_after_login)
        session.scsi_event_listeners.remove(self._scsi_event)

    async def refresh(self) -> None:
        """Look at the LUN again: a change is taken and told, as when the device reports one.

        Raises AnotherDisk (the LUN is refused from then on) or what the commands raise.
        """
        await self._reread()

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        length = len(target)
        check_request(self._geometry, offset, length)
        step = self._geometry.transfer_bytes_max
        shift = self._shift
        if 0 < length <= step:
            command = cdb.read(offset >> shift, length >> shift)
            await self._unit.read_exactly("READ", command, target)
            return
        for start, end in self._parts(offset, length):
            part = target[start - offset : end - offset]
            command = cdb.read(start >> shift, len(part) >> shift)
            await self._unit.read_exactly("READ", command, part)

    def _parts(self, offset: int, length: int) -> Iterator[Range]:
        """A long transfer in as many commands as it takes, cut where the device likes it."""
        step, end = self._geometry.transfer_bytes_max, offset + length
        over = (offset - self._first_aligned_bytes) % self._alignment_bytes
        size = step - (over + step) % self._alignment_bytes
        while offset < end:
            yield offset, min(offset + size, end)
            offset += size
            size = step - step % self._alignment_bytes

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        data = memoryview(source)
        self._check_write(offset, len(data))
        if self.write_guard is not None:
            await self.write_guard()
        fua = fua and self._geometry.write_cache
        bit = fua and self.info.mode.dpofua
        if len(data) >= ZERO_RUN_BYTES_MIN and self._zeroing.is_cheap and runs_of_zeroes(data):
            await self._write_sparsely(offset, data, fua=bit)
            bit = False
        elif bit and (step := self._prompt_step_bytes(len(data))):
            await self._write_promptly(offset, data, step)
        else:
            await self._write(offset, data, fua=bit)
        if fua and not bit:
            await self.flush()

    async def _write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        shift, length = self._shift, len(data)
        if 0 < length <= self._geometry.transfer_bytes_max:
            command = cdb.write(offset >> shift, length >> shift, fua=fua)
            await self._unit.write("WRITE", command, data)
            return
        for start, end in self._parts(offset, length):
            part = data[start - offset : end - offset]
            command = cdb.write(start >> shift, len(part) >> shift, fua=fua)
            await self._unit.write("WRITE", command, part)

    def _prompt_step_bytes(self, length: int) -> int:
        """In which steps to write so that nothing waits for an R2T; 0: as one command."""
        most = prompt_bytes_max(self._unit.session.parameters)
        step = most - most % self._alignment_bytes
        return step if step < length <= step * PROMPT_COMMANDS_MAX else 0

    async def _write_promptly(self, offset: int, data: memoryview, step: int) -> None:
        """With FUA somebody waits for it: several commands take one round trip, an R2T a second."""
        errors: list[OrionError] = []

        async def write(start: int) -> None:
            try:
                await self._write(offset + start, data[start : start + step], fua=True)
            except OrionError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for start in range(0, len(data), step):
                nursery.start_soon(write, start)
        if errors:
            raise errors[0]

    async def _write_sparsely(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """The runs of zeroes are sent as such: they take no space there, and no time on the way."""
        position = 0
        for start, end in [*runs_of_zeroes(data), (len(data), len(data))]:
            if position < start:
                await self._write(offset + position, data[position:start], fua=fua)
            if start < end:
                await self._zero(offset + start, offset + end, may_unmap=True)
            position = end

    async def _zero(self, start: int, end: int, *, may_unmap: bool) -> None:
        shift = self._shift
        await self._zeroing.zero(start >> shift, end >> shift, self._write, may_unmap=may_unmap)

    async def flush(self) -> None:
        if not self._geometry.write_cache or not self._synchronizes or self._geometry.read_only:
            return
        deferred, self._unit.deferred = self._unit.deferred, None
        if deferred is not None:
            raise deferred
        try:
            await self._unit.command(
                "SYNCHRONIZE CACHE", cdb.synchronize_cache(), patience=SYNCHRONIZE_PATIENCE
            )
        except NotSupported:
            # No such command means no volatile cache to write out (SBC-4 §4.15).
            log.info("LUN %d has no SYNCHRONIZE CACHE: taken as having no cache", self._unit.number)
            self._synchronizes = False
        except DeviceError:
            # Whatever was told late is told now.
            self._unit.deferred = None
            raise

    async def discard(self, offset: int, length: int) -> None:
        self._check_write(offset, length)
        if self.write_guard is not None:
            await self.write_guard()
        await self._zeroing.discard(offset >> self._shift, (offset + length) >> self._shift)
        if self._geometry.discard_granularity_bytes and not self._zeroing.discards:
            self._adopt(self._described())

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._check_write(offset, length)
        if self.write_guard is not None:
            await self.write_guard()
        await self._zero(offset, offset + length, may_unmap=may_unmap)

    def _check_write(self, offset: int, length: int) -> None:
        if self._geometry.read_only:
            raise WriteProtected(f"LUN {self._unit.number} is read-only")
        check_request(self._geometry, offset, length)

    async def _check_after_login(self) -> None:
        """Raises a TransportError or ProtocolViolation only: what the device says is its own."""
        unit = LogicalUnit(self._unit.session, self._unit.number, urgent=True)
        settled = trio.current_time() + _SETTLE_S
        while True:
            try:
                self._compare(await probe(unit))
                return
            except DeviceError as error:
                # A target may listen before it has all of its LUNs.
                final = isinstance(error, AnotherDisk | PathInaccessible)
                if final or trio.current_time() >= settled:
                    log.error("%s", error.line)
                    self._unit.refuse(error)
                    return
            await trio.sleep(_SETTLE_STEP_S)

    def _scsi_event(self, lun: int, sense: SenseData) -> None:
        """The target reports a condition without a command to report it with."""
        if (
            lun == encode_lun(self._unit.number)
            and judge(Status.CHECK_CONDITION, sense) is Action.REREAD_CAPACITY
        ):
            self._unit.session.supervisor.start(self._look_again)

    async def _look_again(self) -> None:
        """A command came for a LUN that is refused: it may be in order by now."""
        try:
            await self._reread()
        except DeviceError as error:
            self._unit.refuse(error)

    async def _reread(self) -> None:
        """The device reported a change (2A/01, 2A/09, ...): take its new size and limits."""
        session = self._unit.session
        logins = session.counters.logins
        info = await probe(LogicalUnit(session, self._unit.number))
        if session.counters.logins != logins:
            # The answers may come from two disks. The check after that login has looked by itself.
            return
        try:
            self._compare(info)
        except AnotherDisk as error:
            self._unit.refuse(error)
            raise

    def _compare(self, info: LunInfo) -> None:
        """Take what a new probe found, unless it is another disk."""
        if self.info.is_other_disk(info):
            raise AnotherDisk(
                f"LUN {self._unit.number} is another disk now: {_shown(info)};"
                f" it was {_shown(self.info)}",
                advice="mount again to use the new disk; unwritten data belongs to the old one",
            )
        self._unit.accept()
        before = self._geometry
        self._take(info)
        if self._geometry != before:
            self._adopt(self._geometry)

    def _adopt(self, geometry: Geometry) -> None:
        self._geometry = geometry
        log.warning("LUN %d changed: %s", self._unit.number, geometry)
        for listener in self._listeners:
            listener(geometry)


def _shown(info: LunInfo) -> str:
    return f"{info.name or 'without a name'}, {info.capacity.block_bytes}-byte blocks"
