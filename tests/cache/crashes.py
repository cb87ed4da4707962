"""A host and its target that can be stopped at any step of the write log, and what must be left.

Every write is stamped with a number of its own in each block. A `Moment` is what was promised and
what was stored at one instant: the files of the log as the kernel has them and as the disk has
them, and the device with what its volatile cache may lose. `Moment.after` makes of it what a crash
leaves.
"""

import copy
import enum
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio

from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.localstore import files
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice

BLOCK = 512
BLOCKS = 256
PAGE = 4096
DELAYS_S = (0, 0.001, 0.01, 0.05)
GEOMETRY = Geometry(
    size_bytes=BLOCK * BLOCKS, discard_granularity_bytes=4096, optimal_transfer_bytes=16 << 10
)


class Crash(enum.Enum):
    """What stops."""

    KILL = "the process"
    POWER = "the host: what was not synced may be lost, page by page"
    BOTH = "the host and the target"
    NO_LOG = "the host, and the log's disk is gone"
    NOTHING_LEFT = "the host and the target, and the log's disk is gone"


@dataclass
class Promise:
    """Of each block: the versions written, each with the flushes that came before it.

    Of two versions of a block the later one has the higher number.
    """

    written: dict[int, dict[int, int]] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)
    """The version that a read has to show at least."""
    flushed: dict[int, int] = field(default_factory=dict)
    """The version that must not be lost any more."""
    flushes: int = 0
    """How many have returned."""
    covered_by: dict[int, int] = field(default_factory=dict)
    """The flush (counted from 1) after which this version was durable."""

    def check(self, image: bytes, *, least: dict[int, int], ordered: bool) -> None:
        """`image` shows every block whole, nothing older than `least`, and a prefix of epochs."""
        shown = [version(image, block) for block in range(BLOCKS)]
        for block, found in enumerate(shown):
            assert not found or found in self.written.get(block, ()), (
                f"block {block}: {found} was never written there"
            )
            wanted = least.get(block, 0)
            assert found >= wanted, f"block {block}: version {found} is older than {wanted}"
        if not ordered:
            return
        seen = max(
            (self.written[block][found] for block, found in enumerate(shown) if found), default=0
        )
        for block, versions in self.written.items():
            for number in reversed(versions):
                if number <= shown[block]:
                    break
                assert self.covered_by.get(number, seen + 1) > seen, (
                    f"block {block} shows {shown[block]} and not {number}, which was flushed before"
                    f" something else that is visible was written"
                )

    def as_now(self) -> "Promise":
        """A copy, which later writes do not change."""
        return Promise(
            {block: dict(versions) for block, versions in self.written.items()},
            dict(self.acknowledged),
            dict(self.flushed),
            self.flushes,
            dict(self.covered_by),
        )


@dataclass
class Moment:
    promise: Promise
    files: dict[str, bytes]
    durable: dict[str, bytes]
    device: bytes
    versions: dict[int, list[bytes]]

    def after(self, crash: Crash, folder: Path, rng: random.Random) -> MemoryDevice:
        """Write the log that is left into `folder`; the device that is left."""
        if crash in (Crash.KILL, Crash.POWER, Crash.BOTH):
            folder.mkdir(parents=True)
            for name, content in self.files.items():
                left = content
                if crash is not Crash.KILL and not name.startswith("super"):
                    left = _mixed(self.durable.get(name, bytes(len(content))), content, rng)
                (folder / name).write_bytes(left)
        device = MemoryDevice(geometry=GEOMETRY, volatile_cache=True)
        device.poke(0, self.device)
        if crash in (Crash.BOTH, Crash.NOTHING_LEFT):
            device._versions = copy.deepcopy(self.versions)
            device.crash(rng.choice)
        return device

    def least(self, crash: Crash) -> dict[int, int]:
        """What must not be missing."""
        if crash is Crash.KILL:
            return self.promise.acknowledged
        return self.promise.flushed if crash in (Crash.POWER, Crash.BOTH) else {}


class Recorder:
    """Takes a `Moment` at every step that `wanted` picks, of one life of a log."""

    def __init__(
        self, folder: Path, memory: MemoryDevice, promise: Promise, wanted: Callable[[], bool]
    ) -> None:
        self.moments: list[Moment] = []
        self.promise = promise
        self._folder = folder
        self._memory = memory
        self._wanted = wanted
        self._durable: dict[str, bytes] = {}

    def step(self) -> None:
        if self._wanted():
            self.moments.append(self.now())

    def now(self) -> Moment:
        return Moment(
            self.promise.as_now(),
            _files(self._folder),
            dict(self._durable),
            self._memory.peek(0, GEOMETRY.size_bytes),
            copy.deepcopy(self._memory._versions),
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know what is durable, and take part in every append."""
        self._durable = _files(self._folder)
        sync, prepare, append = (
            files.fdatasync_all,
            files.prepare,
            LogStore.append,
        )

        def recorded_sync(descriptors: list[int]) -> None:
            found = {_name(one): _content(one) for one in descriptors}
            sync(descriptors)
            self._durable.update(found)

        def recorded_prepare(descriptor: int, page: bytes, zeroed: int) -> None:
            prepare(descriptor, page, zeroed)
            self._durable[_name(descriptor)] = _content(descriptor)

        def recorded_append(store: LogStore, *args: Any, **kwargs: Any) -> Any:
            place = append(store, *args, **kwargs)
            self.step()
            return place

        with (
            patch.object(files, "fdatasync_all", recorded_sync),
            patch.object(files, "prepare", recorded_prepare),
            patch.object(LogStore, "append", recorded_append),
        ):
            yield
            self._durable |= {
                name: content
                for name, content in _files(self._folder).items()
                if name.startswith("super")
            }

    def device(self, rng: random.Random) -> FaultyDevice:
        """The memory, with delays, and a step before and after everything that changes it."""
        device = FaultyDevice(FaultyDevice(Stepping(self._memory, self.step)), arrive_first=True)
        for layer in (device, device._device):
            assert isinstance(layer, FaultyDevice)
            for kind in ("write", "flush", "zero", "read"):
                layer.delay(kind, lambda: rng.choice(DELAYS_S))
        return device


@contextmanager
def timed_threads(rng: random.Random) -> Iterator[None]:
    """What threads do is done at one instant of virtual time, with a pause before and after it.

    Real ones would take no virtual time, or all of it: the clock runs on while they work.
    """

    async def run_sync(function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await trio.sleep(rng.choice(DELAYS_S))
            try:
                return function(*args)
            finally:
                await trio.sleep(rng.choice(DELAYS_S))

    with patch.object(trio.to_thread, "run_sync", run_sync):
        yield


class Stepping:
    """A device that counts its changes as steps."""

    def __init__(self, memory: MemoryDevice, step: Callable[[], None]) -> None:
        self._memory = memory
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    async def write(self, offset: int, source: Any, *, fua: bool = False) -> None:
        self._step()
        await self._memory.write(offset, source, fua=fua)
        self._step()

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self._memory.write_zeroes(offset, length, may_unmap=may_unmap)
        self._step()

    async def flush(self) -> None:
        self._step()
        await self._memory.flush()
        self._step()


class Writer:
    """Writes stamped blocks at random, and flushes; keeps the books of what was promised."""

    def __init__(self, write_log: BlockDevice, promise: Promise, rng: random.Random) -> None:
        self._log = write_log
        self._promise = promise
        self._rng = rng
        self._busy: set[int] = set()
        self._number = max(
            (number for versions in promise.written.values() for number in versions), default=0
        )

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            choice = self._rng.random()
            if choice < 0.75:
                await self._write()
            elif choice < 0.95:
                await self._flush()
            else:
                await trio.sleep(self._rng.choice((0.001, 0.1, 1.5)))

    async def _write(self) -> None:
        rng, promise = self._rng, self._promise
        start = rng.randrange(BLOCKS)
        count = min(rng.choice((1, 1, 2, 8, 9, 40)), BLOCKS - start)
        blocks = range(start, start + count)
        if not self._busy.isdisjoint(blocks):
            return  # two writes of one block at once may land in either order
        self._busy.update(blocks)
        self._number += 1
        number = self._number
        for block in blocks:
            promise.written.setdefault(block, {})[number] = promise.flushes
        content = b"".join(stamp(number, block) for block in blocks)
        await self._log.write(start * BLOCK, content, fua=rng.random() < 0.05)
        for block in blocks:
            promise.acknowledged[block] = number
        self._busy.difference_update(blocks)

    async def _flush(self) -> None:
        promise = self._promise
        covered = dict(promise.acknowledged)
        await self._log.flush()
        for block, number in covered.items():
            promise.flushed[block] = max(promise.flushed.get(block, 0), number)
        promise.flushes += 1
        for number in covered.values():
            promise.covered_by.setdefault(number, promise.flushes)


def stamp(number: int, block: int) -> bytes:
    """One block of version `number`, the same bytes all over."""
    return (number.to_bytes(8, "little") + block.to_bytes(8, "little")) * (BLOCK // 16)


def version(image: bytes, block: int) -> int:
    return _version(bytes(image[block * BLOCK : (block + 1) * BLOCK]), block)


# From one step to the next hardly a block changes.
@lru_cache(maxsize=64 * BLOCKS)
def _version(content: bytes, block: int) -> int:
    if content == bytes(BLOCK):
        return 0
    number = int.from_bytes(content[:8], "little")
    assert content == stamp(number, block), f"block {block} is torn, or another block's"
    return number


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def _name(descriptor: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _mixed(durable: bytes, current: bytes, rng: random.Random) -> bytes:
    """Of each page that was not synced, either version; one of them may be torn."""
    left = bytearray(current)
    loss = rng.choice((0.0, 0.2, 0.5, 0.9, 1.0))
    torn = rng.randrange(max(len(current) // PAGE, 1)) if rng.random() < 0.5 else -1
    for index, start in enumerate(range(0, len(current), PAGE)):
        before = durable[start : start + PAGE]
        if before == current[start : start + PAGE]:
            continue
        if index == torn:
            cut = rng.randrange(0, PAGE, BLOCK)
            left[start : start + cut] = before[:cut]
        elif rng.random() < loss:
            left[start : start + PAGE] = before
    return bytes(left)
