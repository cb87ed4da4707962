"""`GuardedDevice`: asserts the contract of `block/device.py` between two layers.

Put one between any two layers in a test: the layer above is held to its duties (buffers left alone
while they are lent), the layer below to its own (illegal requests refused, errors of the right
family, hands off a buffer once its coroutine has ended).
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from orion_iscsifs.block.device import (
    BlockDevice,
    Buffer,
    Geometry,
    GeometryListener,
    check_request,
)
from orion_iscsifs.block.ranges import Range, overlap
from orion_iscsifs.errors import OrionError


class GuardedDevice:
    """Passes everything down and asserts both sides' duties.

    `strict`: also assert what the layer above may promise on top of the contract (a cache does):
    it sends no illegal request, and two of its writes in flight never overlap.
    """

    def __init__(self, device: BlockDevice, *, strict: bool = False) -> None:
        self._device = device
        self._strict = strict
        self._changing: list[Range] = []

    @property
    def geometry(self) -> Geometry:
        return self._device.geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._device.on_geometry_change(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        assert not target.readonly, "a read needs a target that can be written"
        lent = memoryview(bytearray(len(target)))
        with self._request(offset, len(target)):
            await self._device.read_into(offset, lent)
        target[:] = lent
        lent.release()  # whoever still holds it below fails now

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        before = zlib.crc32(source)
        lent = memoryview(source)
        with self._request(offset, len(source), changes=True):
            await self._device.write(offset, lent, fua=fua)
        lent.release()
        assert zlib.crc32(source) == before, "the source changed while it was being written"

    async def flush(self) -> None:
        with self._request(0, 0):
            await self._device.flush()

    async def discard(self, offset: int, length: int) -> None:
        with self._request(offset, length, changes=True):
            await self._device.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        with self._request(offset, length, changes=True):
            await self._device.write_zeroes(offset, length, may_unmap=may_unmap)

    @contextmanager
    def _request(self, offset: int, length: int, *, changes: bool = False) -> Iterator[None]:
        """Around one call below: what must hold before, during and after it."""
        refusal = self._refusal(offset, length)
        assert not (refusal and self._strict), f"illegal request from above: {refusal}"
        wanted = offset, offset + length
        if changes:
            collision = [held for held in self._changing if overlap(held, wanted)]
            assert not (collision and self._strict), f"writes overlap: {wanted} and {collision}"
            self._changing.append(wanted)
        try:
            yield
        except OrionError:
            refusal = None
            raise
        except Exception as error:
            raise AssertionError(f"the layer below raised {error!r}, no OrionError") from error
        finally:
            if changes:
                self._changing.remove(wanted)
        assert refusal is None, f"the layer below carried out an illegal request: {refusal}"

    def _refusal(self, offset: int, length: int) -> OrionError | None:
        try:
            check_request(self.geometry, offset, length)
        except OrionError as error:
            return error
        return None
