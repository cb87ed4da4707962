"""REPORT SUPPORTED OPERATION CODES data (SPC-4 §6.35): what commands a device says it knows.

Many devices lack the command, and some answer nonsense: a decoder here says "not known" then, and
the caller does as if it had never asked.
"""

from dataclasses import dataclass
from typing import Final

from orion_iscsifs.scsi.malformed import Buffer, MalformedData, field

ONE_COMMAND_BYTES: Final = 4 + 16 + 12
"""One command's data with the longest CDB of ours and a command timeouts descriptor."""
_NOT_SUPPORTED: Final = 1
_SUPPORTED: Final = frozenset({3, 5})
"""As a standard has it; in a way of the vendor's own."""
_DESCRIPTOR_BYTES: Final = 8
_TIMEOUTS_BYTES: Final = 12
_COMMANDS_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class SupportedCommand:
    """One command. `supported` None: the device does not know, or its answer makes no sense.

    `usage` is the CDB USAGE DATA: the bits of each byte of the CDB that the device looks at.
    """

    supported: bool | None = None
    usage: bytes = b""

    def looks_at(self, byte: int, bits: int) -> bool:
        """Whether it supports the command with these bits of this byte of the CDB set."""
        known = self.supported is True and byte < len(self.usage)
        return known and self.usage[byte] & bits == bits


UNKNOWN: Final = SupportedCommand()


def decode_one_command(data: Buffer, opcode: int) -> SupportedCommand:
    """The one_command format (SPC-4 §6.35.3), asked for `opcode`."""
    support = field(data, 1, 1) & 7
    if support == _NOT_SUPPORTED:
        return SupportedCommand(supported=False)
    usage = bytes(data[4 : 4 + field(data, 2, 2)])
    # The usage data begins with the operation code itself: anything else is no usage data.
    if support not in _SUPPORTED or not usage or usage[0] != opcode:
        return UNKNOWN
    return SupportedCommand(supported=True, usage=usage)


@dataclass(frozen=True, slots=True, order=True)
class OperationCode:
    """A command of the list of all; `service_action` None: the operation code has none."""

    opcode: int
    service_action: int | None = None


def decode_all_commands(data: Buffer) -> list[OperationCode]:
    """Every complete descriptor of the all_commands format (SPC-4 §6.35.2)."""
    if len(data) < 4:
        raise MalformedData("REPORT SUPPORTED OPERATION CODES", f"{len(data)} bytes")
    end = min(len(data), 4 + field(data, 0, 4))
    found: list[OperationCode] = []
    offset = 4
    while offset + _DESCRIPTOR_BYTES <= end and len(found) < _COMMANDS_MAX:
        flags = data[offset + 5]
        action = field(data, offset + 2, 2) if flags & 1 else None
        found.append(OperationCode(data[offset], action))
        offset += _DESCRIPTOR_BYTES + (_TIMEOUTS_BYTES if flags & 2 else 0)
    return found


def all_commands_length(data: Buffer) -> int:
    """The allocation length that fetches the whole list."""
    return 4 + field(data, 0, 4)
