"""What all PDUs share: opcodes, the reserved tag, the shape of a PDU class (RFC 7143 §11.2)."""

import enum
from typing import ClassVar, Final, Protocol, Self

BHS_BYTES: Final = 48
"""Length of the Basic Header Segment (RFC 7143 §11.2.1)."""

NO_TAG: Final = 0xFFFF_FFFF
"""The reserved value of Initiator Task Tag and Target Transfer Tag."""

IMMEDIATE: Final = 0x40
FINAL: Final = 0x80

Buffer = bytes | bytearray | memoryview


class Opcode(enum.IntEnum):
    """RFC 7143 §11.2.1.2; initiator opcodes below 0x20, target opcodes from 0x20."""

    NOP_OUT = 0x00
    SCSI_COMMAND = 0x01
    TASK_MANAGEMENT_REQUEST = 0x02
    LOGIN_REQUEST = 0x03
    TEXT_REQUEST = 0x04
    DATA_OUT = 0x05
    LOGOUT_REQUEST = 0x06
    SNACK_REQUEST = 0x10
    NOP_IN = 0x20
    SCSI_RESPONSE = 0x21
    TASK_MANAGEMENT_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    R2T = 0x31
    ASYNC_MESSAGE = 0x32
    REJECT = 0x3F


class LoginStage(enum.IntEnum):
    """CSG and NSG (RFC 7143 §11.12.3)."""

    SECURITY = 0
    OPERATIONAL = 1
    FULL_FEATURE = 3


class Pdu(Protocol):
    """One PDU. `data` is the data segment without padding."""

    name: ClassVar[str]
    """As the RFC writes it, for error messages."""
    initiator_task_tag: int
    data: Buffer
    ahs: Buffer

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        """The BHS with these lengths (AHS in 4-byte words, data in bytes)."""


class UnpackablePdu(Pdu, Protocol):
    """A PDU type that RFC 7143 §11 defines."""

    opcode: ClassVar[Opcode]

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        """The PDU that these 48 bytes describe; its data segment is still empty."""


def lengths(ahs_words: int, data_length: int) -> int:
    """TotalAHSLength and DataSegmentLength as the one 32-bit word they share in the BHS."""
    return ahs_words << 24 | data_length
