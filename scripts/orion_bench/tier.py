"""The compressed read tier on its own: `PYTHONPATH=scripts python -m orion_bench.tier [FOLDER]`.

What a hit costs next to a hit in RAM and next to a device that is 5 ms away, and what it is made
of; what compression saves and costs; what a RAM hit waits for while the tier is busy; how a tier of
100 GiB opens.
"""

import contextlib
import os
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import trio
import zstandard
from rich.console import Console
from rich.table import Table

from orion_bench.__main__ import temporary_folder
from orion_bench.steps import measure_steps
from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.block.pages import FRAME_BYTES
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import CacheConfig, CacheMode
from orion_iscsifs.testing import tiers
from orion_iscsifs.testing.faults import FaultyDevice
from orion_iscsifs.testing.memory import MemoryDevice
from orion_iscsifs.tier import record
from orion_iscsifs.tier.fresh import new_tier_superblock
from orion_iscsifs.tier.packed import Packed, pack_all, unpack
from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.tier import CompressedTier, open_tier

MIB: Final = 1 << 20
GIB: Final = 1 << 30
DATA_BYTES: Final = 64 * MIB
DISTANCE_S: Final = 0.005
LEVELS: Final = (-5, 1, 3, 9)
READS: Final = 2000


def files_of(kind: str) -> Iterator[Path]:
    if kind == "text":
        yield from sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        yield from sorted(Path("/usr/share").rglob("*.txt"))
    else:
        yield from sorted(Path("/usr/bin").iterdir())
        yield from sorted(Path("/usr/lib").rglob("*.so*"))


def data_of(kind: str) -> bytes:
    """Some of this machine's files, one after the other."""
    if kind == "random":
        return random.Random(1).randbytes(DATA_BYTES)
    content = bytearray()
    for path in files_of(kind):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                content += path.read_bytes()
        if len(content) >= DATA_BYTES:
            break
    return bytes(content[: min(len(content), DATA_BYTES) & -MIB])


@contextlib.asynccontextmanager
async def tier_over(device: BlockDevice, folder: Path) -> AsyncIterator[CompressedTier]:
    size = device.geometry.size_bytes
    block = new_tier_superblock(
        "naa.bench", size_bytes=size, block_bytes=512, tier_bytes=GIB, boot_id="bench"
    )
    store = TierStore.create(folder, block)
    store.resume(boot_id="bench")
    try:
        async with open_tier(device, store) as tier:
            yield tier
    finally:
        store.close()


def cache_of(size_bytes: int) -> CacheConfig:
    return CacheConfig(
        mode=CacheMode.WRITETHROUGH,
        size_bytes=size_bytes,
        dirty_max_bytes=size_bytes // 2,
        readahead="off",
    )


def drop_page_cache(folder: Path) -> None:
    for path in folder.glob("rseg-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


async def time_reads(device: BlockDevice, length: int, places: list[int]) -> list[float]:
    """Microseconds of each, and of the turn that all other tasks get after it."""
    target, taken = memoryview(bytearray(length)), []
    for place in places:
        began = time.perf_counter()
        await device.read_into(place, target)
        await trio.lowlevel.checkpoint()
        taken.append(1e6 * (time.perf_counter() - began))
    return taken


def row(name: str, length: int, taken: list[float]) -> tuple[str, str, str, str]:
    ordered = sorted(taken)
    p99 = ordered[int(len(ordered) * 0.99)]
    speed = length * len(taken) / sum(taken)
    return name, f"{statistics.median(taken):,.0f}", f"{p99:,.0f}", f"{speed:,.0f}"


async def measure_hits(folder: Path, content: bytes) -> list[tuple[str, str, str, str]]:
    size, rng = len(content), random.Random(1)
    memory = MemoryDevice(geometry=Geometry(size_bytes=size), yields=False)
    memory.poke(0, content)
    distant = FaultyDevice(memory)
    random_4k = [rng.randrange(size // 4096) * 4096 for _ in range(READS)]
    in_order = list(range(0, size, MIB))
    rows = []
    async with tier_over(distant, folder) as tier:
        for start in in_order:
            await tier.read_into(start, memoryview(bytearray(MIB)))
            await tier.appender.drain()
        distant.delay("read", DISTANCE_S)
        config = cache_of(2 * size)
        async with WritebackCache(tier, config) as cache:
            for start in in_order:
                await cache.read_into(start, memoryview(bytearray(MIB)))
            for length, places, what in ((4096, random_4k, "4 KiB"), (MIB, in_order, "1 MiB")):
                taken = await time_reads(cache, length, places)
                rows.append(row(f"{what}, RAM cache", length, taken))
                taken = await time_reads(tier, length, places)
                rows.append(row(f"{what}, tier, in the page cache", length, taken))
                drop_page_cache(folder)
                taken = await time_reads(tier, length, places[: len(places) // 2])
                rows.append(row(f"{what}, tier, from the disk", length, taken))
                taken = await time_reads(distant, length, places[:200])
                rows.append(row(f"{what}, device 5 ms away", length, taken))
    return rows


async def measure_busy(folder: Path, content: bytes) -> list[tuple[str, str, str, str]]:
    """Hits in RAM while nothing else happens, and while everything else is new to the tier."""
    size = len(content)
    memory = MemoryDevice(geometry=Geometry(size_bytes=2 * size), yields=True)
    memory.poke(0, content)
    memory.poke(size, content)
    hot = [place * 4096 for place in range(256)] * 40
    config = cache_of(8 * MIB)
    rows = []
    async with tier_over(memory, folder) as tier, WritebackCache(tier, config) as cache:
        await time_reads(cache, 4096, hot)
        rows.append(row("RAM hit, tier idle", 4096, await time_reads(cache, 4096, hot)))

        async def flood() -> None:
            target = memoryview(bytearray(256 << 10))
            for start in range(size, 2 * size, 256 << 10):
                await tier.read_into(start, target)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            rows.append(row("RAM hit, tier busy", 4096, await time_reads(cache, 4096, hot)))
            nursery.cancel_scope.cancel()
    return rows


def measure_compression(kind: str, level: int) -> tuple[str, str, str, str, str]:
    """Ratio as stored, and processor time for each megabyte."""
    content = data_of(kind)
    compressor = zstandard.ZstdCompressor(level=level)
    decompressor = zstandard.ZstdDecompressor()
    pieces = [content[at : at + FRAME_BYTES] for at in range(0, len(content), FRAME_BYTES)]
    began = time.process_time()
    stored = pack_all(pieces, compressor)
    compressed = time.process_time()
    for codec, payload in stored:
        unpack(Packed(codec, payload, FRAME_BYTES), decompressor)
    ended = time.process_time()
    stored_bytes = sum(record.record_bytes(len(payload)) for _, payload in stored)
    megabytes = len(content) / 1e6
    return (
        f"{kind} ({megabytes:.0f} MB)",
        str(level),
        f"{len(content) / stored_bytes:.2f}",
        f"{1e3 * (compressed - began) / megabytes:.2f}",
        f"{1e3 * (ended - compressed) / megabytes:.2f}",
    )


def measure_opening(folder: Path) -> tuple[str, str, str]:
    tiers.make(folder, tier_bytes=100 * GIB, records=1_600_000)
    began, processor = time.perf_counter(), time.process_time()
    store = TierStore.open(folder)
    store.resume(boot_id=tiers.BOOT)
    try:
        return (
            f"{store.index.memory_bytes / MIB:.1f} MiB",
            f"{time.perf_counter() - began:.1f} s",
            f"{time.process_time() - processor:.1f} s",
        )
    finally:
        store.close()


def table(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    shown = Table(*heads, title=title)
    for line in rows:
        shown.add_row(*line)
    return shown


def main() -> None:
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "/var/tmp")  # noqa: S108  on a disk
    console = Console()
    heads = ("read", "p50 µs", "p99 µs", "MB/s")
    with temporary_folder(where) as folder:
        binaries = data_of("binaries")
        hits = trio.run(measure_hits, folder / "hits", binaries)
        console.print(table("hits, one at a time", heads, [*hits]))
        steps = measure_steps(folder / "steps", binaries)
        console.print(table("a hit, step by step: a record of 64 KiB", ("step", "µs"), [*steps]))
        busy = trio.run(measure_busy, folder / "busy", binaries)
        console.print(table("while the tier takes in binaries", heads, [*busy]))
        rows = [
            measure_compression(kind, level)
            for kind in ("text", "binaries", "random")
            for level in LEVELS
        ]
        heads_of_ratio = ("content", "level", "ratio", "compress ms/MB", "decompress ms/MB")
        console.print(table("compression, frame by frame", heads_of_ratio, [*rows]))
        opened = measure_opening(folder / "large")
        console.print(table("100 GiB, 1.6 million records", ("index", "open", "CPU"), [opened]))


if __name__ == "__main__":
    main()
