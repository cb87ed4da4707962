"""One logical unit over several paths, as a BlockDevice.

Theory of operation
-------------------
`Chooser` names a path for each request. What fails because of its path is sent down another one,
and what fails because of the device is the caller's. Three things differ from a single path:

* A *read* or a *flush* is repeated at once: doing it twice is doing it once.
* A *change* (write, discard, zeroes) that was lost with its path may still be carried out later.
  Its range is kept with the path's record as long as that is LOST; neither the change itself nor
  any newer one that overlaps it is sent meanwhile. `_fence` has the target end the lost session,
  by way of the paths that work; or the session logs in again by itself. See `paths`.
* When no path is left, requests wait up to `hold_s` (`replacement_timeout`), counted from the loss
  of the last path, and fail then; newer ones fail at once, until a path is back.

A change that can't be proven over within `hold_s` fails, and its range stays closed to all others.

The path of a request is chosen when it is sent, so a request never waits for a path to be better.
With one usable path a request costs one more await and a few additions.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import trio

from orion_iscsifs.background import background
from orion_iscsifs.block.device import (
    BlockDevice,
    Buffer,
    Geometry,
    GeometryListener,
    check_request,
)
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.config import PathPolicy
from orion_iscsifs.errors import (
    OrionError,
    PathInaccessible,
    ProtocolViolation,
    ReplacementTimedOut,
    TransportError,
    WriteProtected,
)
from orion_iscsifs.multipath.checker import Checker
from orion_iscsifs.multipath.path import Path
from orion_iscsifs.multipath.paths import (
    DOWN,
    PathEvent,
    PathRecord,
    PathState,
    holding_back,
    path_status,
    to_activate,
)
from orion_iscsifs.multipath.policy import Chooser

log = logging.getLogger(__name__)

_TRIES_MAX: Final = 16
"""A request that so many paths have failed under is not sent again: it may be the reason."""
_FENCE_PAUSE_FIRST_S: Final = 0.25
_FENCE_PAUSE_MAX_S: Final = 5.0

_Operation = Callable[[BlockDevice], Awaitable[None]]


class MultipathDevice:
    """See `block.device.BlockDevice` for the promises. Made by `open_multipath`."""

    def __init__(
        self,
        name: str,
        first: Path,
        nursery: trio.Nursery,
        *,
        policy: PathPolicy,
        failback_s: float | None,
        hold_s: float,
    ) -> None:
        self.name = name
        self.records: list[PathRecord] = []
        self._nursery = nursery
        self._chooser = Chooser(policy, failback_s)
        self._hold_s = float("inf") if hold_s < 0 else hold_s
        self._listeners: list[GeometryListener] = []
        self._geometry = first.device.geometry
        self._changed = trio.Event()
        """Set, and made anew, whenever the state of a path has changed."""
        self._review_due: float | None = None
        self._none_since: float | None = None
        """When the last usable path was lost."""
        self._held_back = False
        """Some path is LOST with writes: look before each change."""
        self.add(first)

    # -- paths -------------------------------------------------------------------------------

    def add(self, path: Path) -> None:
        """A further path. It is checked before it carries anything, unless it is the first."""
        record = PathRecord(path, order=len(self.records))
        self.records.append(record)
        path.on_change(partial(self._news, record))
        path.device.on_geometry_change(partial(self._path_geometry_changed, record))
        checker = Checker(record, self)
        record.wake = checker.news
        if not path.is_up:
            self.event(record, PathEvent.LOST)
        elif len(self.records) == 1:
            # It has just been opened, so it serves; the check says how well.
            self.event(record, PathEvent.SERVES)
        self._nursery.start_soon(checker.run)

    @property
    def has_path(self) -> bool:
        """Whether a request could be sent now."""
        return bool(self._chooser.candidates)

    @property
    def is_held(self) -> bool:
        """Whether requests still wait for a path."""
        return self._none_since is None or trio.current_time() < self._none_since + self._hold_s

    @property
    def is_degraded(self) -> bool:
        """Whether some path is not what it should be."""
        return any(record.state.shown == "failed" for record in self.records)

    def status(self) -> list[dict[str, Any]]:
        """The `paths` of INTERFACE §7, without the LUN."""
        return [
            path_status(
                record.path.name,
                record.state.shown,
                record=record,
                in_use=record in self._chooser.candidates,
                last_error=record.last_error or None,
            )
            for record in self.records
        ]

    def _news(self, record: PathRecord) -> None:
        """A path has come or gone, or the target speaks of access states. Never waits."""
        if not record.path.is_up:
            self.event(record, PathEvent.LOST)
        elif record.state in DOWN:
            self.event(record, PathEvent.RETURNED)
        record.wake()

    def event(self, record: PathRecord, event: PathEvent) -> None:
        """The one place where the state of a path changes."""
        before = record.state
        if not record.apply(event, trio.current_time()):
            return
        level = logging.INFO if PathState.CHECKING in (before, record.state) else logging.WARNING
        log.log(level, "%s: path %s: %s", self.name, record.path.name, record.state.value)
        self.review()

    def review(self) -> None:
        """The states have changed, or it is time to go back to a better path."""
        now = trio.current_time()
        due = self._chooser.review(self.records, now)
        if due is not None and due != self._review_due:
            self._nursery.start_soon(self._review_at, due)
        self._review_due = due
        if not self.has_path:
            if self._none_since is None:
                self._none_since = now
                log.error("%s: no path works: I/O waits", self.name)
                for record in self.records:
                    record.wake()
        elif self._none_since is not None:
            self._none_since = None
            log.warning("%s: I/O goes on", self.name)
        self._held_back = any(record.lost_writes for record in self.records)
        self._take_geometry()
        self._changed.set()
        self._changed = trio.Event()

    def to_activate(self) -> PathRecord | None:
        """See `paths.to_activate`."""
        return None if self._none_since is None else to_activate(self.records, self._none_since)

    async def _review_at(self, due: float) -> None:
        await trio.sleep_until(due)
        self.review()

    # -- requests ----------------------------------------------------------------------------

    async def read_into(self, offset: int, target: memoryview) -> None:
        check_request(self._geometry, offset, len(target))
        await self._carry_out(len(target), lambda device: device.read_into(offset, target))

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        length = len(memoryview(source))
        await self._change(
            offset, length, lambda device: device.write(offset, source, fua=fua), moved=length
        )

    async def flush(self) -> None:
        if self._geometry.write_cache and not self._geometry.read_only:
            await self._carry_out(0, _flush)

    async def discard(self, offset: int, length: int) -> None:
        await self._change(offset, length, lambda device: device.discard(offset, length))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self._change(
            offset,
            length,
            lambda device: device.write_zeroes(offset, length, may_unmap=may_unmap),
        )

    async def _change(
        self, offset: int, length: int, operation: _Operation, *, moved: int = 0
    ) -> None:
        if self._geometry.read_only:
            raise WriteProtected(f"{self.name} is read-only")
        check_request(self._geometry, offset, length)
        changed = (offset, offset + length)
        if self._held_back:
            await self._until_proven(changed)
        await self._carry_out(moved, operation, changed)

    async def _carry_out(
        self, length: int, operation: _Operation, changed: Range | None = None
    ) -> None:
        """Send a request down one path after the other until one has carried it out."""
        failed: list[PathRecord] = []
        while True:
            start = trio.current_time()
            record = self._chooser.choose(start)
            if record is None:
                await self._until_a_path()
                continue
            load = record.begin(length)
            try:
                await operation(record.path.device)
            except BaseException as error:
                record.end(length)
                # A cancelled one, too: what it has sent may be on the way.
                if changed is not None and record.state is PathState.LOST:
                    self._lost(record, changed)
                if not isinstance(error, OrionError):
                    raise
                self._judge(record, error, failed)
            else:
                record.end(length)
                end = trio.current_time()
                record.measure(load, end - start, end)
                return
            if changed is not None:
                await self._until_proven(changed)

    def _judge(self, record: PathRecord, error: OrionError, failed: list[PathRecord]) -> None:
        """A request has failed: raises `error` unless another path may do better."""
        path = record.path
        if isinstance(error, PathInaccessible):
            self.event(record, PathEvent.SERVES_NOT)
        elif path.is_refused:
            self.event(record, PathEvent.REFUSED)
        elif not isinstance(error, TransportError | ProtocolViolation):
            raise error
        elif path.is_up and (record in failed or len(self._chooser.candidates) == 1):
            # The path is there, so it is this request that can't be carried out on it.
            raise error
        record.last_error = str(error)
        record.wake()
        failed.append(record)
        if len(failed) >= _TRIES_MAX:
            raise error
        log.info("%s: path %s: %s; trying again", self.name, path.name, error)

    async def _until_a_path(self) -> None:
        """Raises ReplacementTimedOut when there has been none for too long."""
        while not self.has_path:
            assert self._none_since is not None
            with trio.move_on_at(self._none_since + self._hold_s):
                await self._changed.wait()
                continue
            raise ReplacementTimedOut(
                f"{self.name}: no path works for {self._hold_s:g} s: {self._last_errors()}",
                advice="`orion-iscsifs status` shows the paths",
            )

    def _last_errors(self) -> str:
        told = (
            f"{record.path.name}: {record.last_error or record.state.value}"
            for record in self.records
        )
        return "; ".join(told)

    # -- changes that were lost --------------------------------------------------------------

    def _lost(self, record: PathRecord, changed: Range) -> None:
        """It may land as long as the nexus of the path lives."""
        if not record.lost_writes:
            self._nursery.start_soon(self._fence, record, record.lost_epoch)
        record.lost_writes.append(changed)
        self._held_back = True

    async def _until_proven(self, changed: Range) -> None:
        """Return once nothing that was lost can land in `changed` any more.

        Raises ReplacementTimedOut when that takes too long.
        """
        while (record := next(holding_back(self.records, changed), None)) is not None:
            with trio.move_on_at(record.lost_at + self._hold_s):
                await self._changed.wait()
                continue
            raise ReplacementTimedOut(
                f"{self.name}: a write lost with path {record.path.name} may still arrive at the"
                f" target, {self._hold_s:g} s after the loss",
                advice="it is settled as soon as that path is back",
            )

    async def _fence(self, record: PathRecord, epoch: int) -> None:
        """Have the target end the lost session of a path, however long that takes."""
        pause_s = _FENCE_PAUSE_FIRST_S
        while record.state is PathState.LOST and record.lost_epoch == epoch:
            others = [other.path for other in self.records if other.path.is_up]
            ended = record.path.epoch != epoch
            try:
                ended = ended or (bool(others) and await record.path.fence(others))
            except OrionError as error:
                log.info("%s: path %s: not fenced: %s", self.name, record.path.name, error)
            # The path may have returned, and may have been lost again, in the meantime.
            if ended and record.lost_epoch == epoch:
                self.event(record, PathEvent.NEXUS_ENDED)
                return
            changed = self._changed
            with trio.move_on_after(pause_s):
                await changed.wait()
            pause_s = min(2 * pause_s, _FENCE_PAUSE_MAX_S)

    # -- geometry ----------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._listeners.append(listener)

    def _path_geometry_changed(self, record: PathRecord, _: Geometry) -> None:
        """What one path has noticed, the others may not know yet."""
        self._take_geometry()
        for other in self.records:
            if other is not record and other.path.is_up:
                self._nursery.start_soon(self._refresh, other)

    async def _refresh(self, record: PathRecord) -> None:
        try:
            await record.path.refresh()
        except OrionError as error:
            log.info("%s: path %s: %s", self.name, record.path.name, error)

    def _take_geometry(self) -> None:
        up = [record.path for record in self.records if record.path.is_up]
        known = [path.device.geometry for path in up if not path.is_refused]
        if not known:
            return
        found = common_geometry(known)
        if found != self._geometry:
            self._geometry = found
            for listener in self._listeners:
                listener(found)

    async def refresh(self) -> None:
        """Look at the capacity on every path again."""
        for record in self.records:
            if record.path.is_up:
                await self._refresh(record)


async def _flush(device: BlockDevice) -> None:
    await device.flush()


def common_geometry(known: list[Geometry]) -> Geometry:
    """What can be relied on whichever path a request takes."""
    limits = [geometry.transfer_bytes_max for geometry in known if geometry.transfer_bytes_max]
    granularities = [geometry.discard_granularity_bytes for geometry in known]
    return replace(
        known[0],
        size_bytes=min(geometry.size_bytes for geometry in known),
        transfer_bytes_max=min(limits, default=0),
        optimal_transfer_bytes=min(geometry.optimal_transfer_bytes for geometry in known),
        discard_granularity_bytes=max(granularities) if all(granularities) else 0,
        read_only=any(geometry.read_only for geometry in known),
        fua=all(geometry.fua for geometry in known),
        write_cache=any(geometry.write_cache for geometry in known),
    )


@asynccontextmanager
async def open_multipath(
    name: str,
    first: Path,
    *,
    policy: PathPolicy = PathPolicy.SERVICE_TIME,
    failback_s: float | None = 0.0,
    hold_s: float = 120.0,
) -> AsyncIterator[MultipathDevice]:
    """The device, for the time of the body. `hold_s`: how long requests wait while no path works;
    0: fail at once; negative: for ever."""
    async with background() as nursery:
        yield MultipathDevice(
            name, first, nursery, policy=policy, failback_s=failback_s, hold_s=hold_s
        )
