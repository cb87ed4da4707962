"""Crashes at every step of the write log: what was promised is there afterwards.

Nothing acknowledged is lost with the process, nothing flushed is lost with the host; with
`destage=ordered` the device alone shows a state that the order of flushes allows, also in the
middle of a replay.
"""

import random
from pathlib import Path

import pytest
import trio

from orion_iscsifs.cache import logdestage
from orion_iscsifs.testing.memory import MemoryDevice
from tests.cache.crashes import (
    GEOMETRY,
    Crash,
    Moment,
    Promise,
    Recorder,
    Stepping,
    Writer,
    timed_threads,
)
from tests.cache.logs import KIB, Size, logged

SMALL = Size(segment_bytes=64 * KIB, segments=5, dirty_max_bytes=96 * KIB)


async def a_life(
    folder: Path,
    memory: MemoryDevice,
    promise: Promise,
    rng: random.Random,
    *,
    ordered: bool,
    key: bytes | None,
) -> list[Moment]:
    """Write for a while, with two writers; moments of it, the last of them in the middle."""
    share = rng.choice((0.04, 0.1))
    recorder = Recorder(folder, memory, promise, lambda: rng.random() < share)
    with recorder.watching(), trio.CancelScope() as killed:
        async with logged(
            folder,
            recorder.device(rng),
            dirty_age_s=0.5,
            ordered=ordered,
            size=SMALL,
            passphrase=key,
        ) as write_log:
            writer = Writer(write_log, promise, rng)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(writer.run, 25)
            recorder.moments.append(recorder.now())
            if rng.random() < 0.5:
                killed.cancel()
    if not killed.cancelled_caught:
        # It ended well: the device has all.
        promise.check(
            memory.peek(0, GEOMETRY.size_bytes), least=promise.acknowledged, ordered=ordered
        )
    return recorder.moments


async def check(
    moment: Moment,
    crash: Crash,
    folder: Path,
    rng: random.Random,
    *,
    ordered: bool,
    key: bytes | None,
) -> None:
    """Mount again after the crash, look, write on, crash again by SIGKILL, and look again."""
    memory = moment.after(crash, folder, rng)
    device_alone = memory.peek(0, GEOMETRY.size_bytes)
    if ordered:
        moment.promise.check(device_alone, least={}, ordered=True)
    promise, least = moment.promise, moment.least(crash)

    def look() -> None:
        """The log may be lost now, in the middle of what the device gets for a second time."""
        if ordered:
            promise.check(memory.peek(0, GEOMETRY.size_bytes), least={}, ordered=True)

    device = Stepping(memory, look)
    async with logged(folder, device, ordered=ordered, size=SMALL, passphrase=key) as write_log:
        image = bytearray(GEOMETRY.size_bytes)
        await write_log.read_into(0, memoryview(image))
        promise.check(bytes(image), least=least, ordered=ordered and crash is not Crash.KILL)
    assert memory.peek(0, GEOMETRY.size_bytes) == image, "what was shown was not what was replayed"


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fast"])
@pytest.mark.parametrize(
    "seed",
    [*range(36), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(36, 60))],
)
async def test_what_was_promised_is_there(
    memory_path: Path,
    seed: int,
    ordered: bool,
    autojump_clock: object,
    cheap_keys: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(seed)
    key = b"a passphrase" if seed % 3 == 2 else None
    monkeypatch.setattr(logdestage, "WORKERS", rng.choice((1, 3, 16)))
    # So many requests go with FUA, more of them with a flush behind them: both are wanted.
    monkeypatch.setattr(logdestage, "FUA_REQUESTS_MAX", rng.choice((0, 3, 16)))
    memory = MemoryDevice(geometry=GEOMETRY, volatile_cache=True)
    promise = Promise()
    with timed_threads(rng):
        moments = await a_life(memory_path / "log", memory, promise, rng, ordered=ordered, key=key)
        for number, moment in enumerate(moments):
            for crash in Crash:
                left = memory_path / f"{number}-{crash.name}"
                await check(moment, crash, left, rng, ordered=ordered, key=key)
    assert moments
