"""Responses that must not be overtaken on another connection (RFC 7143 §4.2.2.3).

On one connection TCP keeps the order. On several, a response with a Response Fence waits until
every StatSN sent before it is acknowledged on every connection, and what follows waits until it is
acknowledged itself. NOP-Ins ask for the acknowledgments. An initiator that never acknowledges
can't hold the session up for ever: each wait ends after `Limits.abort_wait_s`.
"""

from collections.abc import Callable
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
        """Whether the fence is up; then the answer goes out when it falls."""
        if not self._raised:
            return False
        self._held.append((task, outcome))
        return True

    def wants(self, outcome: Outcome) -> bool:
        """Whether this is the unit attention after a multi-task abort (§4.2.2.3.4 a)."""
        return outcome.sense in _AFTER_ABORTS and self.agreed and self.several

    async def respond(self, channel: "Channel", pdu: "TargetPdu") -> None:
        """Send `pdu` after everything before it and, if that was agreed on, before the rest."""
        await self._pass(channel, lambda: channel.send_status(pdu), closing=self.agreed)

    async def answer(self, channel: "Channel", task: Task, outcome: Outcome) -> None:
        """Send the end of a command in the same way."""
        answer = self._session.retransmission.answer
        await self._pass(channel, lambda: answer(channel, task, outcome), closing=True)

    async def _pass(self, channel: "Channel", send: Callable[[], None], *, closing: bool) -> None:
        self._raised += closing
        try:
            for other in self._session.live:
                await self._acknowledged(other)
            if channel.live:
                send()
                channel.flush()
            if closing:
                await self._acknowledged(channel)
        finally:
            self._raised -= closing
        if not self._raised:
            self._fall()

    async def _acknowledged(self, channel: "Channel") -> None:
        """Until everything sent so far on `channel` is acknowledged, or it is gone."""
        stat_sn = channel.connection.stat_sn
        if serial.less(channel.acknowledged, stat_sn):
            channel.ping()
        with trio.move_on_after(self._session.limits.abort_wait_s):
            while channel.live and serial.less(channel.acknowledged, stat_sn):
                await channel.acknowledgment.wait()

    def _fall(self) -> None:
        held, self._held = self._held, []
        for task, outcome in held:
            if not task.aborted:
                self._session.execution.answer_after_fence(task, outcome)
