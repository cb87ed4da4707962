"""Byte-granular devices for tests of the file system alone."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener
from orion_iscsifs.errors import OutOfRange, WriteProtected


class ByteDevice:
    """Memory. `before` is called, and awaited, with the name of each request that arrives."""

    def __init__(self, size_bytes: int = 1 << 20, *, read_only: bool = False) -> None:
        self.content = bytearray(size_bytes)
        self.calls: list[tuple[str, int, int]] = []
        self.fua_writes = 0
        self.flushes = 0
        self.keeps_calls = True
        self.before: Callable[[str], Awaitable[None]] | None = None
        self._geometry = Geometry(size_bytes=size_bytes, read_only=read_only)
        self._listeners: list[GeometryListener] = []

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._arrived("read", offset, len(target))
        target[:] = memoryview(self.content)[offset : offset + len(target)]

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await self._arrived("write", offset, len(source))
        if self._geometry.read_only:
            raise WriteProtected("the test's device is read-only")
        self.fua_writes += fua
        memoryview(self.content)[offset : offset + len(source)] = source

    async def flush(self) -> None:
        await self._arrived("flush", 0, 0)
        self.flushes += 1

    async def discard(self, offset: int, length: int) -> None:
        await self._arrived("discard", offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self.write(offset, bytes(length))

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    def grow(self, size_bytes: int) -> None:
        self.content += bytes(size_bytes - len(self.content))
        self._geometry = replace(self._geometry, size_bytes=size_bytes)
        for listener in self._listeners:
            listener(self._geometry)

    async def _arrived(self, name: str, offset: int, length: int) -> None:
        if offset < 0 or offset + length > len(self.content):
            raise OutOfRange(f"{offset}+{length} in the test's device")
        if self.keeps_calls:
            self.calls.append((name, offset, length))
        if self.before is not None:
            await self.before(name)


def filled(size_bytes: int) -> ByteDevice:
    """A device with random content."""
    device = ByteDevice(size_bytes)
    device.content[:] = os.urandom(size_bytes)
    return device
