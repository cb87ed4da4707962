"""Responses that must not be overtaken on another connection (RFC 7143 §4.2.2.3).

On one connection TCP keeps the order. On several, a response with a Response Fence waits until
every StatSN sent before it is acknowledged on every connection, and what follows waits until it is
acknowledged itself. NOP-Ins ask for the acknowledgments. An initiator that never acknowledges
can't hold the session up for ever: the wait for all of them ends after `Limits.abort_wait_s`.
"""

from typing import TYPE_CHECKING, Final

import trio

from orion_iscsifs.protocol import serial
from orion_iscsifs.scsi.sense import LUN_RESET, POWER_ON, SenseData, SenseKey
from orion_iscsifs.target.tasks import Task
from orion_iscsifs.target.unit import Outcome

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel, TargetPdu
    from orion_iscsifs.target.session import Session

_RFC3720: Final = "RFC3720"
CLEARED_BY_ANOTHER: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2F, 0x00)
_AFTER_ABORTS: Final = (LUN_RESET, POWER_ON, CLEARED_BY_ANOTHER)


class Fence:
    """One for a session; a fence for one logical unit holds the answers of all."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._raised = 0
        self._held: list[tuple[Task, Outcome]] = []

    @property
    def several(self) -> bool:
        """Whether there is any other connection to be overtaken on (§4.2.2.3.3 a)."""
        return len(self._session.live) > 1

    @property
    def agreed(self) -> bool:
        """TaskReporting is ResponseFence or FastAbort (§13.23)."""
        return self._session.parameters.task_reporting != _RFC3720

    def holds(self, task: Task, outcome: Outcome) -> bool:
        """Whether the answer has to wait for a fence; then it is sent from here.

        The task stays active meanwhile: it has its place in the command window, which bounds what
        is held, and it can be aborted or change its connection.
        """
        if self._raised:
            self._held.append((task, outcome))
            return True
        if task.channel is not None and task.channel.live and self._wants(outcome):
            # Up at once: what is answered next, in this very batch, must not overtake.
            self._raised += 1
            self._session.later(self._answer, task, outcome)
            return True
        return False

    def _wants(self, outcome: Outcome) -> bool:
        """Whether this is the unit attention after a multi-task abort (§4.2.2.3.4 a)."""
        return outcome.sense in _AFTER_ABORTS and self.agreed and self.several

    async def respond(self, channel: "Channel", pdu: "TargetPdu") -> None:
        """Send `pdu` after everything before it and, if that was agreed on, before the rest."""
        closing = self.agreed
        self._raised += closing
        await self._acknowledged(self._session.live)
        if channel.live:
            channel.send_status(pdu)
            channel.flush()
        if closing:
            await self._acknowledged([channel])
            self._lower()

    async def _answer(self, task: Task, outcome: Outcome) -> None:
        """Send the end of a command in the same way; the fence is up already."""
        await self._acknowledged(self._session.live)
        if not task.aborted:
            self._session.execution.answer_now(task, outcome)
        if task.channel is not None:
            task.channel.flush()
            await self._acknowledged([task.channel])
        self._lower()

    async def _acknowledged(self, channels: "list[Channel]") -> None:
        """Until everything sent so far on `channels` is acknowledged, or they are gone."""
        waiting = [(channel, channel.connection.stat_sn) for channel in channels if channel.live]
        for channel, stat_sn in waiting:
            if serial.less(channel.acknowledged, stat_sn):
                channel.ping()
        with trio.move_on_after(self._session.limits.abort_wait_s):
            for channel, stat_sn in waiting:
                while channel.live and serial.less(channel.acknowledged, stat_sn):
                    await channel.acknowledgment.wait()

    def _lower(self) -> None:
        """What was held goes out in its order, up to the next answer that wants a fence."""
        self._raised -= 1
        if self._raised:
            return
        held, self._held = self._held, []
        for task, outcome in held:
            if not task.aborted:
                self._session.execution.answer(task, outcome)
        self._session.flush()
