"""What a hit of the tier is made of: each step by itself, many times."""

import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio
import zstandard

from orion_iscsifs.background import background
from orion_iscsifs.block.device import Buffer
from orion_iscsifs.block.pages import FRAME_BYTES, PAGE_BYTES
from orion_iscsifs.localstore.seal import OVERHEAD_BYTES, Seal
from orion_iscsifs.tier import record
from orion_iscsifs.tier.packed import Packed, pack_all, unpack_all
from orion_iscsifs.tier.record import Header
from orion_iscsifs.workers import Workers

TIMES: Final = 1000
_RECORDS: Final = 400


def measure_steps(folder: Path, content: bytes) -> list[tuple[str, str]]:
    """Microseconds of each step, median, for the frames of `content` in turn."""
    folder.mkdir()
    frames = [content[at : at + FRAME_BYTES] for at in range(0, len(content), FRAME_BYTES)]
    packed = pack_all(frames[:_RECORDS], zstandard.ZstdCompressor(level=1))
    plain, sealed = _records(packed, None), _records(packed, Seal(bytes(32)))
    path = folder / "records"
    places = _write(path, plain)
    return [
        ("read it, from the page cache", _of(_reader(path, places, is_cold=False))),
        ("read it, from the disk", _of(_reader(path, places, is_cold=True))),
        ("check it", _of(lambda at: record.decode(plain[at % len(plain)], None))),
        (
            "check it and open its seal",
            _of(lambda at: record.decode(sealed[at % len(sealed)], Seal(bytes(32)))),
        ),
        ("unpack 4 KiB of it", _of(_unpacker(packed, PAGE_BYTES))),
        ("unpack all 64 KiB of it", _of(_unpacker(packed, FRAME_BYTES))),
        ("a hand-over to a thread and back", f"{trio.run(_hand_over):,.0f}"),
        ("the same by trio.to_thread", f"{trio.run(_to_thread):,.0f}"),
    ]


def _of(step: Callable[[int], object]) -> str:
    taken = []
    for number in range(TIMES):
        began = time.perf_counter()
        step(number)
        taken.append(1e6 * (time.perf_counter() - began))
    return f"{statistics.median(taken):,.0f}"


def _records(packed: list[tuple[int, Buffer]], seal: Seal | None) -> list[bytes]:
    records, overhead = [], 0 if seal is None else OVERHEAD_BYTES
    for seq, (codec, payload) in enumerate(packed):
        stored = len(payload) + overhead
        header = Header(1, 1, 0, seq, 0xFFFF, codec, FRAME_BYTES, stored, life=1, seq=seq)
        records.append(b"".join(record.encode(header, payload, seal)))
    return records


def _write(path: Path, records: list[bytes]) -> list[tuple[int, int]]:
    places, at = [], 0
    with path.open("wb") as file:
        for one in records:
            places.append((at, len(one)))
            at += file.write(one)
        file.flush()
        os.fsync(file.fileno())
    random.Random(1).shuffle(places)
    return places


def _reader(path: Path, places: list[tuple[int, int]], *, is_cold: bool) -> Callable[[int], object]:
    descriptor = os.open(path, os.O_RDONLY)

    def read(number: int) -> None:
        if is_cold and not number % len(places):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        place, size = places[number % len(places)]
        os.pread(descriptor, size, place)

    return read


def _unpacker(packed: list[tuple[int, Buffer]], length: int) -> Callable[[int], object]:
    decompressor = zstandard.ZstdDecompressor()

    def unpack(number: int) -> None:
        codec, payload = packed[number % len(packed)]
        found = Packed(codec, payload, FRAME_BYTES)
        unpack_all([(found, part) for part in found.lacking(0, length)], decompressor)
        found.copy(0, length, memoryview(bytearray(length)))

    return unpack


async def _hand_over() -> float:
    workers = Workers(1, "bench")

    async def once() -> None:
        task = trio.lowlevel.current_task()
        workers.submit(lambda: None, lambda _: trio.lowlevel.reschedule(task))
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    async with background(workers.run):
        while not workers.is_open:
            await trio.lowlevel.checkpoint()
        return await _median(once)


async def _to_thread() -> float:
    return await _median(lambda: trio.to_thread.run_sync(int))


async def _median(once: Callable[[], Awaitable[object]]) -> float:
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        await once()
        taken.append(1e6 * (time.perf_counter() - began))
    return statistics.median(taken)
