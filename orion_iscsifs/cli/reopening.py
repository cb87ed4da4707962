"""Opening a data path again for a mount that is there already, after its worker has died.

The kernel holds the mount's requests meanwhile, as it would in an outage, and for as long:
`replacement_timeout`. Nothing is answered before the data path is *complete*:

* every session of the dead worker has been ended at the target, by a new login of its path or
  through another one (`stack/inherited.py`), so that none of its writes, still on their way, can
  land after one of ours;
* every device file is there again, and is the same disk.

What only an administrator can mend (another disk, a reservation that was lost, a wrong secret) is
final at once, or nearly: `initiator.budget` knows what a retry is good for. And if the mount goes
away meanwhile (umount(8)), there is nobody left to try for: `MountGone`.
"""

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Final, Protocol, TypeVar

import trio

from orion_iscsifs.cli.report import orion_error
from orion_iscsifs.config import MountConfig
from orion_iscsifs.custody import FUSE, Custody
from orion_iscsifs.errors import BusyError, MountError, ReservationConflict
from orion_iscsifs.fuse.handover import disk_of
from orion_iscsifs.fuse.takeover import is_gone
from orion_iscsifs.initiator.budget import LoginPolicy

_log = logging.getLogger(__name__)

PATIENCE_MIN_S: Final = 10.0
"""Even with `replacement_timeout=0`: nobody else can serve the mount."""
LOOK_S: Final = 0.25
PROBLEMS_SHOWN_MAX: Final = 3


class MountGone(MountError):
    """It was unmounted while there was no worker."""


class Opened(Protocol):
    """What is looked at: `orion_iscsifs.stack.Stack` for one."""

    @property
    def files(self) -> Mapping[str, object]: ...

    def describe(self, path: str) -> Mapping[str, str]: ...

    async def end_earlier(self) -> list[str]: ...


S = TypeVar("S", bound=Opened)


def patience_s(config: MountConfig) -> float:
    """How long requests are held."""
    timeout_s = config.session.replacement_timeout_s
    return math.inf if timeout_s < 0 else max(timeout_s, PATIENCE_MIN_S)


@asynccontextmanager
async def reopened(
    open_stack: Callable[[], AbstractAsyncContextManager[S]],
    disks: Mapping[str, str],
    custody: Custody,
    *,
    patience_s: float,
) -> AsyncIterator[S]:
    """The complete data path. `disks`: path → `disk_of` what was there.

    Raises the OrionError of the last try, or MountGone.
    """
    until = trio.current_time() + patience_s
    async with AsyncExitStack() as layers:
        stack = await _opened(open_stack, layers, until, custody)
        while problems := [*await _living(stack), *_missing(stack, disks)]:
            if trio.current_time() >= until:
                shown = "; ".join(problems[:PROBLEMS_SHOWN_MAX])
                raise MountError(f"take the mount over: {shown}")
            await trio.sleep(LOOK_S)
        yield stack


async def _opened(
    open_stack: Callable[[], AbstractAsyncContextManager[S]],
    layers: AsyncExitStack,
    until: float,
    custody: Custody,
) -> S:
    policy = LoginPolicy()
    told = ""
    while True:
        device = custody.peek(FUSE)
        if device is not None and is_gone(device):
            raise MountGone("unmounted while there was no worker")
        try:
            return await layers.enter_async_context(open_stack())
        except Exception as error:
            known = orion_error(error)
            if known is None or isinstance(known, BusyError | ReservationConflict):
                raise
            decision = policy.after(known, trio.current_time())
            if decision.give_up or trio.current_time() + decision.wait_s > until:
                raise
            if told != str(known):
                told = str(known)
                _log.warning("%s; requests are held, trying again", known)
        await trio.sleep(decision.wait_s)


async def _living(stack: Opened) -> list[str]:
    return [
        f"the earlier session of path {path} is not ended yet" for path in await stack.end_earlier()
    ]


def _missing(stack: Opened, disks: Mapping[str, str]) -> Iterator[str]:
    """Files that are not there, in words. Raises MountError for another disk."""
    for path, disk in disks.items():
        if path not in stack.files:
            yield f"{path} is not there"
        elif (found := disk_of(stack.describe(path))) != disk:
            raise MountError(
                f"take the mount over: {path} is another disk now ({found}; it was {disk})"
            )
