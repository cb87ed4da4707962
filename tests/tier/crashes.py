"""A tier that can be stopped at any step, over a device whose every change is known.

`Truth` is the device: it remembers which content each block had when, so that a read can be held to
what the device had between the read's beginning and its end. It fails, tears and delays on demand.
A `Moment` is the device and the tier's files at one instant, the files both as the kernel has them
and as the disk has them. The tier is a cache: whatever it says after a crash has to be what that
device holds.
"""

import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry, GeometryListener
from orion_iscsifs.errors import OrionError, ScsiError
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier.batch import BatchWriter, Job
from orion_iscsifs.tier.segments import SegmentFiles
from orion_iscsifs.tier.store import TierStore

BLOCK = 512
FRAMES = 56
GEOMETRY = Geometry(size_bytes=FRAMES << 16, discard_granularity_bytes=4096)
PAGE = 4096
CLEAN = "closed in order"
"""From this moment on the tier is believed after a loss of power."""


@dataclass
class Moment:
    """One instant."""

    what: str
    files: dict[str, bytes]
    durable: dict[str, bytes]
    device: bytes

    def put(self, folder: Path) -> None:
        """The files, as the kernel has them."""
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def put_after_power_loss(self, folder: Path, rng: random.Random) -> None:
        """The files, each page as it is or as it was when it was synced."""
        folder.mkdir()
        for name, content in self.files.items():
            before = self.durable.get(name, b"").ljust(len(content), b"\0")
            left = bytearray(content)
            loss = rng.choice((0.1, 0.5, 0.9, 1.0))
            for start in range(0, len(content), PAGE):
                if rng.random() < loss:
                    left[start : start + PAGE] = before[start : start + PAGE]
            (folder / name).write_bytes(left)


class Truth:
    """The device. `step` is told before and after each change."""

    def __init__(self, content: bytes, rng: random.Random, *, troubles: float = 0.1) -> None:
        self.memory = MemoryDevice(geometry=GEOMETRY)
        self.memory.poke(0, content)
        self.step: Callable[[str], None] = lambda what: None
        self.delays_s: tuple[float, ...] = (0, 0, 0.001, 0.01, 0.06)
        self._rng = rng
        self._troubles = troubles
        self._now = 0
        self._history: dict[int, list[tuple[int, bytes]]] = {}

    geometry = GEOMETRY

    def on_geometry_change(self, listener: GeometryListener) -> None:
        """It never changes."""

    # -- what a read may show --------------------------------------------------------------------

    @property
    def now(self) -> int:
        return self._now

    def check(self, offset: int, content: bytes, began: int) -> None:
        """Every block is what the device had at `began` or later."""
        if content == self.memory.peek(offset, len(content)):
            return
        for at in range(0, len(content), BLOCK):
            block, shown = (offset + at) // BLOCK, content[at : at + BLOCK]
            history = self._history.get(block, [])
            current = self.memory.peek(offset + at, BLOCK)
            since = [version for when, version in history if when >= began]
            is_known = shown in (current, *since)
            assert is_known, (
                f"block {block} is not what the device has, nor what it had during the read"
            )

    def _poke(self, offset: int, content: Buffer) -> None:
        self._now += 1
        for at in range(0, len(content), BLOCK):
            old = self.memory.peek(offset + at, BLOCK)
            self._history.setdefault((offset + at) // BLOCK, []).append((self._now, old))
        self.memory.poke(offset, content)

    # -- the contract ----------------------------------------------------------------------------

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._wait()
        target[:] = self.memory.peek(offset, len(target))
        if self._rng.random() < self._troubles / 4:
            raise _error()
        await self._wait()

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        await self._change(offset, bytes(source))

    async def discard(self, offset: int, length: int) -> None:
        start, end = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
        await self._change(start, bytes(max(end - start, 0)))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self._change(offset, bytes(length))

    async def flush(self) -> None:
        await self._wait()

    async def _change(self, offset: int, content: bytes) -> None:
        """In two parts, with a pause: it may be torn, refused, or cancelled in between."""
        await self._wait()
        self.step("before a change")
        trouble = self._rng.random() < self._troubles
        if trouble and self._rng.random() < 0.3:
            raise _error()
        cut = self._rng.randrange(len(content) // BLOCK + 1) * BLOCK
        if cut:
            self._poke(offset, content[:cut])
            self.step("in the middle of a change")
            await self._wait()
        if trouble and self._rng.random() < 0.5:
            raise _error()
        self._poke(offset + cut, content[cut:])
        self.step("after a change")
        await self._wait()
        if trouble:
            raise _error()

    async def _wait(self) -> None:
        await trio.sleep(self._rng.choice(self.delays_s))


def _error() -> OrionError:
    return ScsiError("the device failed", status=2, sense_key=3, asc=0x0C)


class Recorder:
    """Takes a `Moment` at every step that `wanted` picks."""

    def __init__(self, folder: Path, truth: Truth, wanted: Callable[[], bool]) -> None:
        self.moments: list[Moment] = []
        self._folder = folder
        self._truth = truth
        self._wanted = wanted
        self._durable: dict[str, bytes] = {}
        self._is_clean = False
        truth.step = self.step

    def step(self, what: str) -> None:
        if self._wanted():
            self.moments.append(self.now(what))

    def now(self, what: str) -> Moment:
        return Moment(
            CLEAN if self._is_clean else what,
            _files(self._folder),
            dict(self._durable),
            self._truth.memory.peek(0, GEOMETRY.size_bytes),
        )

    def _step_in_thread(self, what: str) -> None:
        """At one instant: nothing else runs in the trio thread meanwhile."""
        with suppress(RuntimeError):  # before there is a trio thread to ask
            trio.from_thread.run_sync(self.step, what)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take part in everything that writes, and know what is durable."""
        run, add = BatchWriter.run, TierStore.add
        make, remove = SegmentFiles.make, SegmentFiles.remove
        write_superblock = TierStore.write_superblock
        sync, sync_data, pwritev = os.fsync, os.fdatasync, os.pwritev

        def recorded_run(writer: BatchWriter, job: Job) -> None:
            self._step_in_thread("before a batch")
            run(writer, job)
            self._step_in_thread("after a batch")

        def torn_pwritev(descriptor: int, parts: list[Buffer], at: int) -> int:
            whole = b"".join(parts)
            os.pwrite(descriptor, whole[: len(whole) // 2], at)
            self._step_in_thread("in the middle of a batch")
            return pwritev(descriptor, parts, at)

        def recorded_add(store: TierStore, entries: Any) -> bool:
            self.step("before entries")
            result = add(store, entries)
            self.step("after entries")
            return result

        def recorded_make(files: SegmentFiles, *args: Any) -> int:
            descriptor = make(files, *args)
            self._step_in_thread("a new segment")
            return descriptor

        def recorded_remove(files: SegmentFiles, number: int) -> None:
            self._step_in_thread("before a segment goes")
            remove(files, number)
            self._step_in_thread("after a segment has gone")

        def recorded_superblock(store: TierStore, block: Any) -> None:
            write_superblock(store, block)
            self._is_clean = block.clean and block.life > 0
            self._step_in_thread("a superblock")

        def recorded_sync(descriptor: int) -> None:
            found = _content(descriptor)
            sync(descriptor)
            self._durable |= found

        def recorded_sync_data(descriptor: int) -> None:
            found = _content(descriptor)
            sync_data(descriptor)
            self._durable |= found

        with (
            patch.object(BatchWriter, "run", recorded_run),
            patch.object(TierStore, "add", recorded_add),
            patch.object(SegmentFiles, "make", recorded_make),
            patch.object(SegmentFiles, "remove", recorded_remove),
            patch.object(TierStore, "write_superblock", recorded_superblock),
            patch.object(os, "fsync", recorded_sync),
            patch.object(os, "fdatasync", recorded_sync_data),
            patch.object(os, "pwritev", torn_pwritev),
        ):
            yield


@contextmanager
def slow_threads(rng: random.Random) -> Iterator[None]:
    """Threads take virtual time: before they begin and after they have ended, others go on.

    Else the clock would run on while they work, and a whole life be over before the first has.
    """
    run_sync = trio.to_thread.run_sync

    async def keep_awake() -> None:
        while True:
            await trio.lowlevel.checkpoint()

    async def slowly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await trio.sleep(rng.choice((0, 0.001, 0.02, 0.1)))
            try:
                return await awake(lambda: run_sync(function, *args, **options))
            finally:
                await trio.sleep(rng.choice((0, 0.001, 0.02, 0.1)))

    async def awake(call: Callable[[], Awaitable[Any]]) -> Any:
        """No timeout is due while there is something to do."""
        outcome: list[Any] = []
        error: list[BaseException] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_awake)
            try:
                outcome.append(await call())
            except OSError as raised:
                error.append(raised)
            nursery.cancel_scope.cancel()
        if error:
            raise error[0]
        return outcome[0]

    with patch.object(trio.to_thread, "run_sync", slowly):
        yield


class User:
    """Reads, writes, discards and zeroes at random, and holds what it reads to the truth."""

    def __init__(self, tier: BlockDevice, truth: Truth, rng: random.Random) -> None:
        self._tier = tier
        self._truth = truth
        self._rng = rng

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            with (
                suppress(OrionError),
                trio.move_on_after(self._rng.choice((0.0, 0.005, 0.02, *[1000] * 20))),
            ):
                await self._one()
            await trio.lowlevel.checkpoint()

    async def _one(self) -> None:
        rng = self._rng
        # Some places are visited again and again.
        frame = rng.randrange(12) if rng.random() < 0.5 else rng.randrange(FRAMES)
        blocks = rng.choice((1, 8, 8, 32, 128, 128, 200, 1024))
        start = min((frame << 16) + rng.choice((0, 0, rng.randrange(128) * BLOCK)), SIZE - BLOCK)
        length = min(blocks * BLOCK, SIZE - start)
        choice = rng.random()
        if choice < 0.6:
            await self._read(start, length)
        elif choice < 0.85:
            await self._tier.write(start, content(rng, min(length, 200 * BLOCK)))
        elif choice < 0.9:
            await self._tier.discard(start, length)
        elif choice < 0.95:
            await self._tier.write_zeroes(start, length)
        else:
            await trio.sleep(rng.choice((0.001, 0.1, 1)))

    async def _read(self, start: int, length: int) -> None:
        began, target = self._truth.now, bytearray(length)
        await self._tier.read_into(start, memoryview(target))
        self._truth.check(start, bytes(target), began)


SIZE = GEOMETRY.size_bytes


def content(rng: random.Random, length: int) -> bytes:
    """Each block of its own; it compresses, or not."""
    if rng.random() < 0.5:
        return rng.randbytes(length)
    return b"".join(rng.randbytes(16) * (BLOCK // 16) for _ in range(length // BLOCK))


def _files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.iterdir() if folder.exists() else ():
        with suppress(FileNotFoundError):  # a thread removes segments
            found[path.name] = path.read_bytes()
    return found


def _content(descriptor: int) -> dict[str, bytes]:
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {path.name: path.read_bytes()} if path.is_file() else {}
