"""Sequence numbers of a session and a connection, as an initiator keeps them.

`CommandWindow` is session-wide (CmdSN, ExpCmdSN, MaxCmdSN: RFC 7143 §4.2.2.1), `StatusCounter`
belongs to one connection (StatSN: §4.2.2.2).
"""

from dataclasses import dataclass

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol import serial


@dataclass(slots=True)
class CommandWindow:
    """Which CmdSN comes next and how many commands the target takes.

    `exp_cmd_sn` and `max_cmd_sn` only move forward; a MaxCmdSN below ExpCmdSN - 1 makes both
    of that PDU invalid and they are ignored.
    """

    cmd_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int

    @property
    def free(self) -> int:
        """Non-immediate commands that may be sent now; 0 while the window is closed."""
        return max(0, serial.distance(self.cmd_sn, self.max_cmd_sn) + 1)

    def take(self) -> int:
        """The CmdSN for one non-immediate command; the caller has seen `free` > 0."""
        assert self.free > 0
        number = self.cmd_sn
        self.cmd_sn = serial.add(number, 1)
        return number

    def update(self, exp_cmd_sn: int, max_cmd_sn: int) -> bool:
        """Take ExpCmdSN and MaxCmdSN of any target PDU; True if the window moved."""
        if max_cmd_sn == self.max_cmd_sn and exp_cmd_sn == self.exp_cmd_sn:
            return False
        if serial.less(max_cmd_sn, serial.add(exp_cmd_sn, -1)):
            return False
        moved = False
        if serial.less(self.exp_cmd_sn, exp_cmd_sn):
            self.exp_cmd_sn = exp_cmd_sn
        if serial.less(self.max_cmd_sn, max_cmd_sn):
            self.max_cmd_sn = max_cmd_sn
            moved = True
        return moved


@dataclass(slots=True)
class StatusCounter:
    """ExpStatSN of one connection."""

    exp_stat_sn: int

    def advance(self, stat_sn: int, pdu: str) -> bool:
        """Take the StatSN of a PDU that carries a status; False for a duplicate to be dropped.

        A gap means a lost status, which ErrorRecoveryLevel 0 can't mend: ProtocolViolation.
        """
        if stat_sn == self.exp_stat_sn:
            self.exp_stat_sn = serial.add(stat_sn, 1)
            return True
        if serial.less(stat_sn, self.exp_stat_sn):
            return False
        raise ProtocolViolation(
            pdu, f"StatSN {stat_sn:#x} where {self.exp_stat_sn:#x} was due", section="4.2.2.2"
        )
