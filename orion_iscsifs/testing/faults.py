"""`FaultyDevice`: scripted misbehaviour on top of any block device.

Faults are scripted per kind of call ("read", "write", "flush", "discard", "zero"): a delay, a gate
that holds calls until it is opened, and errors for the next calls.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Literal

import trio

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry, GeometryListener
from orion_iscsifs.errors import OrionError, ScsiError

Kind = Literal["read", "write", "flush", "discard", "zero"]


def medium_error() -> OrionError:
    """MEDIUM ERROR, WRITE ERROR: the error that `fail` raises unless told otherwise."""
    return ScsiError("the device failed", status=2, sense_key=3, asc=0x0C)


class FaultyDevice:
    """Passes calls on, late, held or not at all.

    A held or delayed call has not reached the device below yet; `arrive_first=True` turns that
    round: it has been carried out, and only its answer is held or late.
    """

    def __init__(self, device: BlockDevice, *, arrive_first: bool = False) -> None:
        self._device = device
        self.arrive_first = arrive_first
        self._delays_s: dict[Kind, Callable[[], float]] = {}
        self._gates: dict[Kind, trio.Event] = {}
        self._failures: defaultdict[Kind, int] = defaultdict(int)
        self._error: Callable[[], OrionError] = medium_error
        self._changed = trio.lowlevel.ParkingLot()
        self.waiting: defaultdict[Kind, int] = defaultdict(int)
        """Calls that a gate or a delay holds right now."""

    # -- the script ------------------------------------------------------------------------------

    def delay(self, kind: Kind, seconds: float | Callable[[], float]) -> None:
        """Every call of this kind takes that much longer from now on; a callable is asked anew."""
        self._delays_s[kind] = seconds if callable(seconds) else lambda: seconds

    def hold(self, kind: Kind) -> None:
        """Calls of this kind wait until `release`."""
        self._gates.setdefault(kind, trio.Event())

    def release(self, kind: Kind) -> None:
        self._gates.pop(kind).set()

    def fail(self, kind: Kind, times: int, error: Callable[[], OrionError] = medium_error) -> None:
        """The next `times` calls of this kind raise `error()`; 0 mends it."""
        self._failures[kind] = times
        self._error = error

    async def wait_held(self, kind: Kind, count: int = 1) -> None:
        """Return once `count` calls of this kind are waiting."""
        while self.waiting[kind] < count:
            await self._changed.park()

    # -- the contract ----------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        return self._device.geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._device.on_geometry_change(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._before("read")
        await self._device.read_into(offset, target)
        await self._after("read")

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await self._before("write")
        await self._device.write(offset, source, fua=fua)
        await self._after("write")

    async def flush(self) -> None:
        await self._before("flush")
        await self._device.flush()
        await self._after("flush")

    async def discard(self, offset: int, length: int) -> None:
        await self._before("discard")
        await self._device.discard(offset, length)
        await self._after("discard")

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self._before("zero")
        await self._device.write_zeroes(offset, length, may_unmap=may_unmap)
        await self._after("zero")

    # -- inside ----------------------------------------------------------------------------------

    async def _before(self, kind: Kind) -> None:
        if not self.arrive_first:
            await self._wait(kind)
        if self._failures[kind] > 0:
            self._failures[kind] -= 1
            raise self._error()

    async def _after(self, kind: Kind) -> None:
        if self.arrive_first:
            await self._wait(kind)

    async def _wait(self, kind: Kind) -> None:
        gate, delay = self._gates.get(kind), self._delays_s.get(kind)
        if gate is None and delay is None:
            return
        self.waiting[kind] += 1
        self._changed.unpark_all()
        try:
            if gate is not None:
                await gate.wait()
            if delay is not None:
                await trio.sleep(delay())
        finally:
            self.waiting[kind] -= 1
            self._changed.unpark_all()
