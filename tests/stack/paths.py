"""A target behind two proxies: two paths, which a test may lose one by one."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import (
    CacheConfig,
    CacheMode,
    MountConfig,
    MultipathConfig,
    ReserveConfig,
    ReserveMode,
    SessionConfig,
)
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.target import Portal, RamDevice, Running, TargetConfig, serve
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.url import parse

IQN = "iqn.2026-11.org.example:paths"
HERE = "127.0.0.1"
SIZE = 8 << 20


@dataclass
class Paths:
    """What a test turns."""

    running: Running
    disk: RamDevice
    proxies: list[TcpProxy]

    def url(self, *, number: int = 0) -> str:
        return f"iscsi://{self.proxies[number].portal}/{IQN}/1"


@asynccontextmanager
async def two_paths(groups: Sequence[int] = (1, 2)) -> AsyncIterator[Paths]:
    """A portal of the target, and a proxy to it, for each of the portal group tags."""
    async with RamDevice(SIZE) as disk:
        config = TargetConfig(iqn=IQN, units={1: disk})
        portals = [Portal(HERE, 0, group) for group in groups]
        async with serve([config], portals) as running:
            proxies = [TcpProxy(*address) for address in running.portals]
            try:
                yield Paths(running, disk, proxies)
            finally:
                for proxy in proxies:
                    proxy.close()


def mount(
    paths: Paths,
    *,
    session: dict[str, Any] | None = None,
    reserve: ReserveMode = ReserveMode.AUTO,
    **multipath: Any,
) -> MountConfig:
    """Over all proxies, without a cache; time-outs are short."""
    further = tuple(proxy.portal for proxy in paths.proxies[1:])
    return MountConfig(
        session=SessionConfig(
            **{
                "initiator_name": "iqn.2026-11.org.example:me",
                "noop_interval_s": 0.3,
                "noop_timeout_s": 0.3,
                "login_timeout_s": 1.0,
                "replacement_timeout_s": 20.0,
                **(session or {}),
            }
        ),
        multipath=MultipathConfig(**{"portals": further, **multipath}),
        reserve=ReserveConfig(mode=reserve),
        cache=CacheConfig(mode=CacheMode.NONE),
    )


@asynccontextmanager
async def mounted(paths: Paths, **options: Any) -> AsyncIterator[tuple[Stack, BlockDevice]]:
    """`options` as `mount` takes them."""
    config = mount(paths, **options)
    async with open_stack(parse(paths.url()), config) as stack:
        yield stack, stack.files["lun1"]


def states(stack: Stack) -> list[str]:
    return [str(path["state"]) for path in stack.status()["paths"]]


async def until(stack: Stack, *wanted: str, within_s: float = 10.0) -> None:
    """Wait until the paths are in these states."""
    with trio.move_on_after(within_s):
        while states(stack) != list(wanted):
            await trio.sleep(0.02)
    assert states(stack) == list(wanted), stack.status()["paths"]


async def until_access(stack: Stack, *wanted: str) -> None:
    """Wait until the paths have been asked and are in these access states (ALUA)."""

    def found() -> list[str | None]:
        return [path["alua"] for path in stack.status()["paths"]]

    with trio.move_on_after(10):
        while found() != list(wanted):
            await trio.sleep(0.02)
    assert found() == list(wanted), stack.status()["paths"]


async def read(device: BlockDevice, offset: int = 0, length: int = 4096) -> bytes:
    target = bytearray(length)
    await device.read_into(offset, memoryview(target))
    return bytes(target)
