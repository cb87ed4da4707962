"""One life of a process that uses a LUN through the whole stack, until somebody kills it.

It tells what it does in a file, a line at a time, each before or after the act as it says: what is
in the file was true at the time of the kill. `read_reports` makes a `Promise` of it.
"""

import os
import random
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import trio

from orion_iscsifs.cache.writelog import WriteLog
from orion_iscsifs.config import (
    CacheConfig,
    CacheMode,
    Destage,
    MountConfig,
    SecretBytes,
    SessionConfig,
)
from orion_iscsifs.localstore import seal
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.url import parse
from tests.cache.crashes import BLOCK, BLOCKS, Promise, stamp

AREA = BLOCK * BLOCKS


def config(
    log_dir: str, mode: CacheMode, destage: Destage, key: SecretBytes | None = None
) -> MountConfig:
    cache = CacheConfig(
        mode=mode,
        size_bytes=4 << 20,
        dirty_max_bytes=1 << 20,
        dirty_age_s=0.05,
        log_dir=log_dir,
        log_bytes=16 << 20,
        destage=destage,
        key=key,
    )
    return MountConfig(
        session=SessionConfig(initiator_name="iqn.2026-11.org.example:crash"), cache=cache
    )


def live(url: str, settings: MountConfig, reports: str, state: str, seed: int, first: int) -> None:
    """Write stamped blocks and flush, for ever. `first`: the number of the first write."""
    os.environ["ORION_ISCSIFS_STATE"] = state
    descriptor = os.open(reports, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(*words: object) -> None:
        os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())

    async def run() -> None:
        async with open_stack(parse(url), settings, "crash") as stack:
            tell("open")
            await _write(stack, random.Random(seed), tell, first)

    with cheap_keys():
        trio.run(run)


def cheap_keys() -> AbstractContextManager[object]:
    """Scrypt is slow on purpose, and a life is short."""
    return patch.object(seal, "COST", seal.Cost(16, 1, 1))


async def _write(stack: Stack, rng: random.Random, tell: object, first: int) -> None:
    assert callable(tell)
    device, log = stack.files["lun1"], stack.units[0].log
    for number in range(first, first + 100_000):
        start = rng.randrange(BLOCKS)
        count = min(rng.choice((1, 1, 2, 8, 9, 40)), BLOCKS - start)
        tell("write", number, start, count)
        content = b"".join(stamp(number, block) for block in range(start, start + count))
        await device.write(start * BLOCK, content)
        tell("wrote", number)
        if rng.random() < 0.2:
            await device.flush()
            tell("flushed", number, _durable(log))
        if rng.random() < 0.02:
            await trio.sleep(0.01)


def _durable(log: WriteLog | None) -> int:
    return 0 if log is None else log.store.durable


def read(url: str, settings: MountConfig, target: str, state: str) -> None:
    """Mount again, and store what the area holds."""
    os.environ["ORION_ISCSIFS_STATE"] = state

    async def run() -> bytes:
        async with open_stack(parse(url), settings, "crash") as stack:
            content = bytearray(AREA)
            await stack.files["lun1"].read_into(0, memoryview(content))
            return bytes(content)

    with cheap_keys():
        Path(target).write_bytes(trio.run(run))


def read_reports(reports: Path, promise: Promise) -> int:
    """Add what a life has reported; the sequence number up to which its log was durable."""
    spans: dict[int, range] = {}
    durable = 0
    for line in reports.read_text().splitlines():
        word, *numbers = line.split()
        values = [int(number) for number in numbers]
        if word == "write":
            number, start, count = values
            spans[number] = range(start, start + count)
            for block in spans[number]:
                promise.written.setdefault(block, {})[number] = promise.flushes
        elif word == "wrote":
            for block in spans[values[0]]:
                promise.acknowledged[block] = values[0]
        elif word == "flushed":
            durable = values[1]
            promise.flushes += 1
            promise.flushed.update(promise.acknowledged)
            for number in promise.acknowledged.values():
                promise.covered_by.setdefault(number, promise.flushes)
    return durable
