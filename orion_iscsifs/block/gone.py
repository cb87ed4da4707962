"""A device whose LUN has gone for good: what still asks it gets errors, also from `flush`."""

from typing import Final

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener
from orion_iscsifs.errors import LunNotFound


class GoneDevice:
    """Takes the place of a device that was closed while somebody had its file open.

    `flush` fails too: nothing shows any more that what was written before is durable.
    """

    def __init__(self, what: str, geometry: Geometry) -> None:
        """`what` names the device in the errors; `geometry` is the last one that it had."""
        self._what: Final = what
        self._geometry: Final = geometry

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        """Nothing changes any more."""

    async def read_into(self, offset: int, target: memoryview) -> None:
        raise self._error()

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        raise self._error()

    async def flush(self) -> None:
        raise self._error()

    async def discard(self, offset: int, length: int) -> None:
        raise self._error()

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        raise self._error()

    def _error(self) -> LunNotFound:
        return LunNotFound(
            f"{self._what}: the target has removed this LUN",
            advice="close the file; it appears anew when the target shows the LUN again",
        )
