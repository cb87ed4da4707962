"""A whole deployment in one process: the stack over loopback TCP over the embedded target."""

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import CacheConfig, CacheMode, MountConfig, SessionConfig
from orion_iscsifs.config.places import state_dir
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.target import Chap, Fault, RamDevice, Running, TargetConfig, serve
from orion_iscsifs.target.settings import Limits
from orion_iscsifs.url import parse

IQN = "iqn.2026-11.org.example:stack"
SIZE = 8 << 20
_REQUESTS = 120
_CLIENTS = 4
_PATIENCE_S = 0.5


def session(**changes: Any) -> SessionConfig:
    return SessionConfig(**{"initiator_name": "iqn.2026-11.org.example:me", **changes})


def mount(mode: CacheMode = CacheMode.WRITEBACK, **changes: Any) -> MountConfig:
    cache = CacheConfig(
        mode=mode,
        size_bytes=4 << 20,
        dirty_max_bytes=1 << 20,
        dirty_age_s=0.2,
        log_dir=str(state_dir() / "logs-of-luns"),
        log_bytes=16 << 20,
    )
    return MountConfig(session=session(**changes), cache=cache)


@asynccontextmanager
async def target(
    *, block_bytes: int = 512, chap: Chap | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[Running, RamDevice]]:
    async with RamDevice(SIZE, block_bytes=block_bytes) as disk:
        config = TargetConfig(iqn=IQN, units={1: disk}, chap=chap)
        async with serve([config], limits=limits) as running:
            yield running, disk


@asynccontextmanager
async def world(
    config: MountConfig, **changes: Any
) -> AsyncIterator[tuple[Running, RamDevice, Stack]]:
    async with (
        target(**changes) as (running, disk),
        open_stack(parse(running.url(1)), config) as stack,
    ):
        yield running, disk, stack


async def compare_with_model(
    world: tuple[Running, RamDevice, Stack],
    faults: Sequence[Fault],
    disturbances: Sequence[Callable[[], Awaitable[None]]],
    *,
    seed: str,
    requests: int = _REQUESTS,
    enough: Callable[[], bool] | None = None,
) -> int:
    """Random requests against a model while the target misbehaves; how many faults acted.

    What happens next is now a fault of `faults`, now one of `disturbances`. Each client sends
    `requests` and then goes on until `enough` says that enough went wrong (by itself: when more
    than three faults have acted).
    """
    running, disk, stack = world
    script = running.targets[0].faults
    device = stack.files["lun1"]
    model = bytearray(SIZE)
    rng = random.Random(seed)

    def satisfied() -> bool:
        return script.hits > 3 if enough is None else enough()

    async def mischief() -> None:
        full_since = trio.current_time()
        while True:
            await trio.sleep(rng.random() * 0.03)
            if len(script.pending) > 2:
                # A client that waits for a busy target is not to find ever more of it; but what
                # never meets its occasion (a SNACK, at level 0) must not keep the others out.
                if trio.current_time() - full_since < _PATIENCE_S:
                    continue
                script.clear()
            full_since = trio.current_time()
            kind = rng.randrange(len(faults) + len(disturbances))
            if kind < len(faults):
                script.add(replace(faults[kind], after=rng.randrange(5)))
            else:
                await disturbances[kind - len(faults)]()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mischief)
        async with trio.open_nursery() as clients:
            for number in range(_CLIENTS):
                own = random.Random(f"{seed} {number}")
                clients.start_soon(_client, device, model, number, own, requests, satisfied)
        nursery.cancel_scope.cancel()
    hits = script.hits
    script.clear()
    if not running.sessions:
        await running.restart()
    await stack.drain()
    assert bytes(disk.view) == model
    return hits


async def _client(
    device: BlockDevice,
    model: bytearray,
    number: int,
    rng: random.Random,
    requests: int,
    satisfied: Callable[[], bool],
) -> None:
    """Owns its share of the disk, so that its part of the model is exact."""
    share = SIZE // _CLIENTS
    for sent in itertools.count():
        if sent >= requests and satisfied():
            break
        length = rng.choice((512, 700, 4096, 20000, 300_000))
        offset = number * share + rng.randrange(share - length)
        if rng.random() < 0.5:
            content = rng.randbytes(length)
            await device.write(offset, content)
            model[offset : offset + length] = content
        else:
            buffer = bytearray(length)
            await device.read_into(offset, memoryview(buffer))
            assert buffer == model[offset : offset + length]
        if rng.random() < 0.05:
            await device.flush()
