"""CmdSN order of one session, whatever connection a request comes on (RFC 7143 §4.2.2.1).

The command window is real: MaxCmdSN moves by one when a command ends, so at most `size` of them
are here at once. A request ahead of ExpCmdSN is held until the gap fills; one outside the window,
and a duplicate inside it, is silently ignored. Decides and never waits.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.pdu import (
    LogoutRequest,
    NopOut,
    ScsiCommand,
    TaskManagementRequest,
    TextRequest,
)

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel

Sequenced = ScsiCommand | TaskManagementRequest | NopOut | TextRequest | LogoutRequest
Deliver = Callable[["Channel", Sequenced], None]


class CommandOrder:
    """`exp_cmd_sn` and `max_cmd_sn` are what every PDU of the session tells the initiator."""

    def __init__(self, cmd_sn: int, size: int, deliver: Deliver) -> None:
        self.exp_cmd_sn = cmd_sn
        self.max_cmd_sn = serial.add(cmd_sn, size - 1)
        self.held: dict[int, tuple[Channel, Sequenced]] = {}
        self._deliver = deliver
        self._frozen: int | None = None
        """Commands that ended while a fault keeps MaxCmdSN where it is."""
        self._reached: list[tuple[int, trio.Event]] = []
        self._plugs: set[int] = set()
        """CmdSNs ahead that count as received, whatever becomes of the connection."""

    def covers(self, cmd_sn: int) -> bool:
        """Neither old, nor beyond MaxCmdSN."""
        size = (self.max_cmd_sn - self.exp_cmd_sn + 1) & 0xFFFF_FFFF
        return (cmd_sn - self.exp_cmd_sn) & 0xFFFF_FFFF < size

    def take(self, channel: "Channel", pdu: Sequenced) -> None:
        """Deliver `pdu` and what it was the predecessor of; immediate ones at once."""
        if pdu.immediate:
            self._deliver(channel, pdu)
            return
        if not self.covers(pdu.cmd_sn):
            return
        if pdu.cmd_sn != self.exp_cmd_sn:
            self.held.setdefault(pdu.cmd_sn, (channel, pdu))
            return
        self.exp_cmd_sn = (self.exp_cmd_sn + 1) & 0xFFFF_FFFF
        self._deliver(channel, pdu)
        while self.held and (following := self.held.pop(self.exp_cmd_sn, None)) is not None:
            self.exp_cmd_sn = serial.add(self.exp_cmd_sn, 1)
            self._deliver(*following)
        if self._reached:
            self._wake()

    def ended(self) -> None:
        """A non-immediate request left: there is room for another."""
        if self._frozen is None:
            self.max_cmd_sn = (self.max_cmd_sn + 1) & 0xFFFF_FFFF
        else:
            self._frozen += 1

    def discard(self, channel: "Channel") -> list[Sequenced]:
        """Forget what `channel` brought and nobody has acknowledged (§11.14); what it was."""
        gone = [
            number
            for number, (owner, _) in self.held.items()
            if owner is channel and number not in self._plugs
        ]
        return [self.held.pop(number)[1] for number in gone]

    def plug(self, channel: "Channel", cmd_sn: int) -> bool:
        """Take a CmdSN in the window as received, though its request never came (§11.6.1)."""
        if not self.covers(cmd_sn) or cmd_sn in self.held:
            return False
        self._plugs = {number for number in self._plugs if number in self.held} | {cmd_sn}
        # A NOP-Out that wants no answer: it fills the gap and does nothing.
        self.take(channel, NopOut(immediate=False, cmd_sn=cmd_sn))
        return True

    def plug_up_to(self, channel: "Channel", cmd_sn: int) -> None:
        """Every CmdSN before `cmd_sn` counts as received (§4.2.3.3, target resets)."""
        while self.covers(self.exp_cmd_sn) and serial.less(self.exp_cmd_sn, cmd_sn):
            self.plug(channel, self.exp_cmd_sn)

    def reached(self, cmd_sn: int) -> trio.Event | None:
        """An event for when everything before `cmd_sn` has come; None if it has."""
        if not serial.less(self.exp_cmd_sn, cmd_sn) or not self.covers(serial.add(cmd_sn, -1)):
            return None
        event = trio.Event()
        self._reached.append((cmd_sn, event))
        return event

    def no_longer(self, event: trio.Event) -> None:
        """Nobody waits for this event of `reached` any more."""
        self._reached = [waiting for waiting in self._reached if waiting[1] is not event]

    def _wake(self) -> None:
        waiting, self._reached = self._reached, []
        for cmd_sn, event in waiting:
            if serial.less(self.exp_cmd_sn, cmd_sn):
                self._reached.append((cmd_sn, event))
            else:
                event.set()

    def freeze(self) -> None:
        """Commands that end no longer move MaxCmdSN."""
        if self._frozen is None:
            self._frozen = 0

    def thaw(self) -> None:
        """Give back what `freeze` kept."""
        count, self._frozen = self._frozen or 0, None
        self.max_cmd_sn = serial.add(self.max_cmd_sn, count)
