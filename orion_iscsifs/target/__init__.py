"""The embedded iSCSI target: the other role of `protocol/`, over any `BlockDevice`.

`serve()` is the whole API for a program; `orion-iscsifs target serve` is the same for a user.

    server.py       the life of it all, the handle that tests hold
    portals.py      listeners, portal groups, what SendTargets says of them
    login.py        one connection from its first byte to full feature phase
    login_faults.py, login_script.py   logins that go wrong on demand, for tests
    connection.py   one TCP connection: bytes in, PDUs out, many of each per wake-up
    session.py      what the connections of a session have in common; lists its parts
    channel.py      one connection of it; ordering.py, execution.py, retransmission.py,
                    allegiance.py, fences.py, events.py: the parts
    tasks.py        one SCSI command: its write data, its residuals
    management.py   task management functions
    texts.py        Text Requests: SendTargets
    access.py       asymmetric access: a state for each portal group
    unit.py         a logical unit: a device, its identity, the sessions that use it
    commands.py     SCSI commands that move or change blocks
    inquiries.py    SCSI commands that only tell
    backing.py      files and memory as devices; troubled.py: devices that run full or go bad
    faults.py, mischief.py   misbehaviour on demand, for tests
"""

from orion_iscsifs.target.backing import FileDevice, InlineDevice, RamDevice, open_backing
from orion_iscsifs.target.faults import Fault, Faults
from orion_iscsifs.target.login_faults import LoginAct, LoginFault, LoginFaults, When
from orion_iscsifs.target.portals import Portal
from orion_iscsifs.target.server import Running, serve
from orion_iscsifs.target.settings import Chap, TargetConfig
from orion_iscsifs.target.troubled import FlawedDevice, ThinDevice

__all__ = [
    "Chap",
    "Fault",
    "Faults",
    "FileDevice",
    "FlawedDevice",
    "InlineDevice",
    "LoginAct",
    "LoginFault",
    "LoginFaults",
    "Portal",
    "RamDevice",
    "Running",
    "TargetConfig",
    "ThinDevice",
    "When",
    "open_backing",
    "serve",
]
