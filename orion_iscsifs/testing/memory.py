"""`MemoryDevice`: a block device in RAM, with a volatile write cache to lose.

The memory is an anonymous mapping, so that a device of many GiB costs only what was touched.

The write cache: a write that was not flushed since may be lost in a `crash()`. For every block
changed since the last flush the device remembers the durable version and each version written
after it; `crash()` picks one of them per block, which is what a real disk may do.
"""

import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import trio

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener, check_request
from orion_iscsifs.errors import WriteProtected

# mmap.MAP_NORESERVE exists since Python 3.13 only; this is Linux's value.
_MAP_NORESERVE = 0x4000


@dataclass(frozen=True, slots=True)
class Request:
    """One call that the device carried out."""

    kind: str
    offset: int
    length: int
    fua: bool = False


def _durable_version(versions: Sequence[bytes]) -> bytes:
    return versions[0]


class MemoryDevice:
    """A `BlockDevice` over `size_bytes` of zeroes.

    `calls` counts the coroutines that ran by name; `requests` lists them when `record` is set.
    `yields=False` leaves out the checkpoint that every call has otherwise, for benchmarks.
    """

    def __init__(
        self,
        size_bytes: int | None = None,
        *,
        geometry: Geometry | None = None,
        volatile_cache: bool = False,
        record: bool = False,
        yields: bool = True,
    ) -> None:
        if geometry is None:
            assert size_bytes is not None, "a size or a geometry is needed"
            geometry = Geometry(size_bytes=size_bytes, discard_granularity_bytes=4096)
        self.geometry = geometry
        self.calls: Counter[str] = Counter()
        self.requests: list[Request] = []
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._data = mmap.mmap(-1, max(geometry.size_bytes, 1), flags=flags)
        self._view = memoryview(self._data)
        self._volatile_cache = volatile_cache
        self._versions: dict[int, list[bytes]] = {}
        self._record = record
        self._yields = yields
        self._listeners: list[GeometryListener] = []

    # -- the contract ----------------------------------------------------------------------------

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._begin("read_into", offset, len(target))
        target[:] = self._view[offset : offset + len(target)]

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await self._begin("write", offset, len(source), fua=fua, changes=True)
        self._store(offset, source)
        if fua:
            for at in self._blocks(offset, len(source)):
                self._versions.pop(at, None)

    async def flush(self) -> None:
        await self._begin("flush", 0, 0)
        self._versions.clear()

    async def discard(self, offset: int, length: int) -> None:
        """Whole granules become zero, the rest keeps its content."""
        await self._begin("discard", offset, length, changes=True)
        unit = self.geometry.discard_granularity_bytes
        if not unit:
            return
        start, end = -(-offset // unit) * unit, (offset + length) // unit * unit
        if start < end:
            self._store(start, bytes(end - start))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        del may_unmap  # zeroes are zeroes here
        await self._begin("write_zeroes", offset, length, changes=True)
        self._store(offset, bytes(length))

    # -- what a test does with it ----------------------------------------------------------------

    def peek(self, offset: int, length: int) -> bytes:
        """The content right now, without a call."""
        return bytes(self._view[offset : offset + length])

    def poke(self, offset: int, content: Buffer) -> None:
        """Change the content behind everybody's back; it is durable at once."""
        self._view[offset : offset + len(content)] = content

    def crash(self, choose: Callable[[Sequence[bytes]], bytes] = _durable_version) -> None:
        """Lose power: each block not flushed becomes what `choose` picks of its versions.

        The first version is the durable one, the last the newest. By default all is lost.
        """
        for at, versions in self._versions.items():
            content = choose(versions)
            self._view[at : at + len(content)] = content
        self._versions.clear()

    def change_geometry(
        self, *, size_bytes: int | None = None, read_only: bool | None = None
    ) -> None:
        """Grow (with zeroes), shrink, or change the write protection, and tell the listeners."""
        geometry = self.geometry
        if size_bytes is not None:
            kept = self.peek(0, min(size_bytes, geometry.size_bytes))
            self._view.release()
            self._data.close()
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self._data = mmap.mmap(-1, size_bytes, flags=flags)
            self._view = memoryview(self._data)
            self._view[: len(kept)] = kept
            geometry = replace(geometry, size_bytes=size_bytes)
        if read_only is not None:
            geometry = replace(geometry, read_only=read_only)
        self.geometry = geometry
        for listener in self._listeners:
            listener(geometry)

    # -- inside ----------------------------------------------------------------------------------

    async def _begin(
        self, kind: str, offset: int, length: int, *, fua: bool = False, changes: bool = False
    ) -> None:
        check_request(self.geometry, offset, length)
        if changes and self.geometry.read_only:
            raise WriteProtected("the device is read-only")
        if self._yields:
            await trio.lowlevel.checkpoint()
            check_request(self.geometry, offset, length)  # it may have shrunk meanwhile
        self.calls[kind] += 1
        if self._record:
            self.requests.append(Request(kind, offset, length, fua))

    def _blocks(self, offset: int, length: int) -> range:
        return range(offset, offset + length, self.geometry.logical_block_bytes)

    def _store(self, offset: int, content: Buffer) -> None:
        if self._volatile_cache:
            self._remember(offset, content)
        self._view[offset : offset + len(content)] = content

    def _remember(self, offset: int, content: Buffer) -> None:
        size = self.geometry.logical_block_bytes
        view = memoryview(content)
        for at in self._blocks(offset, len(content)):
            versions = self._versions.setdefault(at, [])
            if not versions:
                versions.append(self.peek(at, size))
            versions.append(bytes(view[at - offset : at - offset + size]))
