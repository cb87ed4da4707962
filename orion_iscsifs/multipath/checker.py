"""Looks after one path: does the target serve the unit through it, and how well?

A path that carries I/O looks after itself, except that a target may change its access state
without a word: that is asked for now and then. All others are tested (TEST UNIT READY and, with
ALUA, REPORT TARGET PORT GROUPS) after news, and again and again with growing pauses. When no path
serves, and the target lets the initiator choose, it is asked to serve one: an explicit transition.
"""

import logging
from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.errors import OrionError
from orion_iscsifs.multipath.paths import PathEvent, PathRecord, PathState

if TYPE_CHECKING:
    from orion_iscsifs.multipath.device import MultipathDevice

log = logging.getLogger(__name__)

_URGENT_S: Final = 1.0
"""The longest pause while no path works."""


class Checker:
    """Of one path; `run` for as long as the device lives."""

    def __init__(self, record: PathRecord, device: "MultipathDevice") -> None:
        self._record = record
        self._device = device
        self._news = trio.Event()

    def news(self) -> None:
        """Check soon."""
        self._news.set()

    async def run(self) -> None:
        record = self._record
        while True:
            self._news = trio.Event()
            pause_s = float("inf")  # A lost session logs in by itself.
            if record.path.is_up:
                await self._look()
                pause_s = record.check_pause_s()
                if not self._device.has_path:
                    pause_s = min(pause_s, _URGENT_S)
            with trio.move_on_after(pause_s):
                await self._news.wait()

    async def _look(self) -> None:
        record = self._record
        epoch = record.path.epoch
        try:
            access = await record.path.check()
        except OrionError as error:
            record.last_error = str(error)
            event = PathEvent.REFUSED if record.path.is_refused else PathEvent.SERVES_NOT
        else:
            record.access = access
            event = record.verdict(access, trio.current_time())
        # A path that was lost meanwhile has been told to the device by its session.
        if not record.path.is_up or record.path.epoch != epoch:
            return
        record.checked_at = trio.current_time()
        record.failed_checks = 0 if event is PathEvent.SERVES else record.failed_checks + 1
        if record.state is PathState.ACTIVE and event is PathEvent.SERVES:
            record.last_error = ""
        self._device.event(record, event)
        # The rank may have changed and the state not.
        self._device.review()
        await self._activate_one()

    async def _activate_one(self) -> None:
        """When it is certain that the target serves no path, choose one for it."""
        chosen = self._device.to_activate()
        if chosen is None:
            return
        log.warning("%s: asking to serve path %s", self._device.name, chosen.path.name)
        try:
            await chosen.path.activate()
        except OrionError as error:
            chosen.last_error = str(error)
        chosen.wake()
