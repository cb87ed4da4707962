"""SCSI commands to one logical unit, with the retries that their statuses call for.

`scsi.verdict.judge` says what a status and its sense mean; this file holds the budgets: how often
a condition may be reported before the command fails, and how long a busy device is waited for.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from orion_iscsifs.errors import DeviceError, ProtocolViolation, ReservationConflict
from orion_iscsifs.initiator.depth import QueueDepth
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.scsi import cdb, verdict
from orion_iscsifs.scsi.lun import encode_lun
from orion_iscsifs.scsi.sense import SenseData, Status, decode_sense
from orion_iscsifs.scsi.verdict import Action

log = logging.getLogger(__name__)

_RETRIES_MAX: Final = 8
"""Conditions that clear by being reported (unit attentions, aborted commands)."""
_ABSENT_S: Final = 5.0
"""How long a unit in use may be said to be absent: some targets say so while they move it."""
_BUSY_PAUSE_FIRST_S: Final = 0.05
_BUSY_PAUSE_MAX_S: Final = 2.0
SYNCHRONIZE_PATIENCE: Final = 4.0
"""SYNCHRONIZE CACHE may have to write a whole cache: so many times `command_timeout`."""


_DELAYED: Final = frozenset(
    {Action.RETRY_AFTER_DELAY, Action.START, Action.OTHER_PATH, Action.ABSENT}
)


async def _nothing() -> None:
    """What to do about changed limits, or for a second look, while the device is not open yet."""


def _unheard() -> None:
    """Nobody cares about access states where there is one path."""


@dataclass(slots=True)
class _Budget:
    """What is left of one command's second chances."""

    retries: int = _RETRIES_MAX
    pause_s: float = _BUSY_PAUSE_FIRST_S
    busy_until: float | None = None
    busy_answers: int = 0
    started: bool = False
    absent_until: float | None = None


class LogicalUnit:
    """One LUN of a session, addressed command by command."""

    def __init__(self, session: Session, number: int, *, urgent: bool = False) -> None:
        """`urgent`: for the checks after a login only (see `Session.checks`)."""
        self.session = session
        self.number = number
        self._lun = encode_lun(number)
        self._urgent = urgent
        self._refusal: DeviceError | None = None
        self._looking_again = False
        self.deferred: DeviceError | None = None
        """An error of an earlier, acknowledged write, told late: it belongs to the next flush."""
        self.look_again: Callable[[], Awaitable[None]] = _nothing
        """Awaited when a command comes for a unit that is refused; may `accept` it again."""
        self.reread_limits: Callable[[], Awaitable[None]] = _nothing
        """Awaited when the device says that its capacity or mode changed."""
        self.access_news: Callable[[], None] = _unheard
        """Called when the device says that the access states of its ports changed."""
        self.other_paths = session.is_one_of_several
        """There are other ways to the device: what this port does not serve fails at once."""
        self.in_use = False
        """The unit is known: if it is said to be absent, that may pass."""
        self._in_flight = 0
        self.depth = QueueDepth(session.queue_depth)
        self._line: deque[trio.lowlevel.Task] = deque()
        """Who waits for a place in the unit's queue."""
        self.reservation_news: Callable[[], Awaitable[None]] = _nothing
        """Awaited when the device says that a reservation changed, or that one is in the way."""

    def refuse(self, error: DeviceError) -> None:
        """Until `accept`, no command is sent: they all fail with `error`, the held ones too."""
        self._refusal = error
        self.session.fail_held(self._lun, error)

    def accept(self) -> None:
        self._refusal = None

    @property
    def is_refused(self) -> bool:
        return self._refusal is not None

    def fail_held_writes(self, error: DeviceError) -> None:
        """Those that wait for their turn must not be sent any more."""
        self.session.fail_held(self._lun, error, writes_only=True)

    async def _refused(self) -> None:
        """Another look; raises if the unit is still not the one it should be."""
        if not self._looking_again:
            self._looking_again = True
            try:
                await self.look_again()
            finally:
                self._looking_again = False
        self._check_refusal()

    def _check_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)

    async def read(self, what: str, cdb: bytes, target: memoryview) -> int:
        """A command that returns data; how many bytes came. `what` names it in errors."""
        task = await self.run(what, Task(self._lun, cdb, read_into=target, urgent=self._urgent))
        return task.read.received_bytes if task.read is not None else 0

    async def read_exactly(self, what: str, cdb: bytes, target: memoryview) -> None:
        """As `read`; fewer bytes than asked for, or more to send, are the target's fault."""
        if self._refusal is not None:
            await self._refused()
        task = Task(self._lun, cdb, read_into=target)
        await self._execute(task)
        if task.status:
            task = await self._again(what, task)
        assert task.read is not None
        if task.read.received_bytes != len(target):
            raise ProtocolViolation(
                what,
                f"{task.read.received_bytes} of {len(target)} bytes came with status GOOD",
                section="11.4.5",
            )
        if task.residual_bytes:
            # Its count of bytes is not ours: other blocks, and so another place on the disk.
            raise _residual(what, task)

    async def write(self, what: str, cdb: bytes, source: memoryview) -> None:
        """A command that sends data."""
        if self._refusal is not None:
            await self._refused()
        task = Task(self._lun, cdb, write_from=source)
        await self._execute(task)
        if task.status:
            task = await self._again(what, task)
        if task.residual_bytes:
            raise _residual(what, task)

    async def send(self, what: str, cdb: bytes, parameters: bytes) -> None:
        """A command with a parameter list."""
        source = memoryview(parameters)
        await self.run(what, Task(self._lun, cdb, write_from=source, urgent=self._urgent))

    async def command(self, what: str, cdb: bytes, *, patience: float = 1.0) -> None:
        """A command without data."""
        await self.run(what, Task(self._lun, cdb, patience=patience, urgent=self._urgent))

    async def run(self, what: str, task: Task) -> Task:
        """Carry a task out until it succeeds (the one that did) or raise a DeviceError."""
        if self._refusal is not None:
            await self._refused()
        await self._execute(task)
        return await self._again(what, task) if task.status else task

    async def _execute(self, task: Task) -> None:
        """As `Session.execute`, when the unit's queue has a place."""
        if self._in_flight < self.depth.limit or task.urgent:
            self._in_flight += 1
        else:
            await self._stand_in_line()
        try:
            await self.session.execute(task)
        finally:
            self._in_flight -= 1
            if self._line:
                self._admit()
        if self.depth.limit < self.depth.ceiling and not task.status:
            self.depth.succeeded(trio.current_time())
            self._admit()

    async def _stand_in_line(self) -> None:
        """Until somebody who leaves hands over a place; first come, first served."""
        me = trio.lowlevel.current_task()
        self._line.append(me)

        def leave(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            self._line.remove(me)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def _admit(self) -> None:
        """Hand the free places to those who wait."""
        while self._line and self._in_flight < self.depth.limit:
            self._in_flight += 1
            trio.lowlevel.reschedule(self._line.popleft())

    async def _again(self, what: str, task: Task) -> Task:
        """`task` ended with a status other than GOOD: do what that status asks for."""
        budget = _Budget()
        while task.status:
            sense = decode_sense(task.sense) if task.sense else None
            action = verdict.judge(task.status, sense)
            if action is Action.DONE:
                break
            if action is Action.FAIL or (action is Action.ABSENT and not self.in_use):
                failure = self._failure(what, task, sense)
                if sense is not None and sense.deferred:
                    self.deferred = failure
                if isinstance(failure, ReservationConflict):
                    await self.reservation_news()
                raise failure
            log.info("%s: %s", what, verdict.error(what, task.status, sense))
            await self._prepare_retry(action, budget, what, task, sense)
            self._check_refusal()
            task = task.again()
            await self._execute(task)
        return task

    async def _prepare_retry(
        self, action: Action, budget: _Budget, what: str, task: Task, sense: SenseData | None
    ) -> None:
        if action is Action.OTHER_PATH:
            self.access_news()
            if self.other_paths:
                raise self._failure(what, task, sense)
        if action is Action.START and not budget.started:
            budget.started = True
            await self._start()
        if action in _DELAYED:
            now = trio.current_time()
            self._adapt(task.status, now)
            if action is Action.ABSENT:
                budget.absent_until = budget.absent_until or now + _ABSENT_S
                if now >= budget.absent_until:
                    raise self._failure(what, task, sense)
            if budget.busy_until is None:
                budget.busy_until = now + self.session.nexus.config.command_timeout_s
            budget.busy_answers += 1
            # Time alone does not prove it busy: an outage may have taken that time.
            if now >= budget.busy_until and budget.busy_answers > _RETRIES_MAX:
                raise self._failure(what, task, sense)
            await trio.sleep(budget.pause_s)
            budget.pause_s = min(2 * budget.pause_s, _BUSY_PAUSE_MAX_S)
            return
        budget.retries -= 1
        if budget.retries < 0:
            raise self._failure(what, task, sense)
        if action is Action.REREAD_CAPACITY:
            await self.reread_limits()
        elif action is Action.RESCAN_LUNS:
            self.session.luns_changed()
        elif action is Action.CHECK_ACCESS:
            self.access_news()
        elif action is Action.CHECK_RESERVATION:
            await self.reservation_news()

    def _adapt(self, status: int | None, now: float) -> None:
        if status == Status.TASK_SET_FULL:
            self.depth.task_set_full(self._in_flight, now)
        elif status == Status.BUSY:
            self.depth.busy(now)

    async def _start(self) -> None:
        """What it answers is for the retry to find out."""
        log.warning("LUN %d is stopped: starting it", self.number)
        task = Task(self._lun, cdb.start_stop_unit(start=True), urgent=self._urgent)
        await self.session.execute(task)

    def _failure(self, what: str, task: Task, sense: SenseData | None) -> DeviceError:
        return verdict.error(f"LUN {self.number}: {what}", task.status, sense)


def _residual(what: str, task: Task) -> ProtocolViolation:
    return ProtocolViolation(
        what,
        f"residual {task.residual_bytes} of {task.expected_bytes} bytes with status GOOD",
        section="11.4.5",
    )
