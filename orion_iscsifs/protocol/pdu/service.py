"""NOP-Out and NOP-In, Async Message, Reject: what keeps a connection honest."""

import enum
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from orion_iscsifs.protocol.pdu.base import FINAL, IMMEDIATE, NO_TAG, Buffer, Opcode, lengths

_NOP_OUT: Final = Struct(">BBHIQIIII16x")


@dataclass(slots=True)
class NopOut:
    """RFC 7143 §11.18. ITT ffffffff: an answer to a NOP-In, or no answer is wanted."""

    opcode: ClassVar[Opcode] = Opcode.NOP_OUT
    name: ClassVar[str] = "NOP-Out"

    initiator_task_tag: int = NO_TAG
    target_transfer_tag: int = NO_TAG
    lun: int = 0
    immediate: bool = True
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _NOP_OUT.pack(
            Opcode.NOP_OUT | (IMMEDIATE if self.immediate else 0),
            FINAL,
            0,
            lengths(ahs_words, data_length),
            self.lun,
            self.initiator_task_tag,
            self.target_transfer_tag,
            self.cmd_sn,
            self.exp_stat_sn,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        op, _, _, _, lun, itt, ttt, cmd_sn, exp_stat_sn = _NOP_OUT.unpack_from(bhs)
        return cls(itt, ttt, lun, bool(op & IMMEDIATE), cmd_sn, exp_stat_sn)


_NOP_IN: Final = Struct(">BBHIQIIIII12x")


@dataclass(slots=True)
class NopIn:
    """RFC 7143 §11.19. TTT other than ffffffff: the target wants an answer."""

    opcode: ClassVar[Opcode] = Opcode.NOP_IN
    name: ClassVar[str] = "NOP-In"

    initiator_task_tag: int = NO_TAG
    target_transfer_tag: int = NO_TAG
    lun: int = 0
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _NOP_IN.pack(
            Opcode.NOP_IN,
            FINAL,
            0,
            lengths(ahs_words, data_length),
            self.lun,
            self.initiator_task_tag,
            self.target_transfer_tag,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        _, _, _, _, lun, itt, ttt, stat_sn, exp_cmd_sn, max_cmd_sn = _NOP_IN.unpack_from(bhs)
        return cls(itt, ttt, lun, stat_sn, exp_cmd_sn, max_cmd_sn)


class AsyncEvent(enum.IntEnum):
    """RFC 7143 §11.9.1."""

    SCSI_EVENT = 0
    TARGET_REQUESTS_LOGOUT = 1
    TARGET_DROPS_CONNECTION = 2
    TARGET_DROPS_ALL_CONNECTIONS = 3
    TARGET_REQUESTS_NEGOTIATION = 4
    TASKS_TERMINATED = 5
    VENDOR_SPECIFIC = 255


_ASYNC_MESSAGE: Final = Struct(">BBHIQI4xIIIBBHHH4x")


@dataclass(slots=True)
class AsyncMessage:
    """RFC 7143 §11.9. Times in Parameter2 and Parameter3 are seconds."""

    opcode: ClassVar[Opcode] = Opcode.ASYNC_MESSAGE
    name: ClassVar[str] = "Asynchronous Message"

    async_event: int
    async_vcode: int = 0
    parameter1: int = 0
    parameter2: int = 0
    parameter3: int = 0
    lun: int = 0
    initiator_task_tag: int = NO_TAG
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _ASYNC_MESSAGE.pack(
            Opcode.ASYNC_MESSAGE,
            FINAL,
            0,
            lengths(ahs_words, data_length),
            self.lun,
            NO_TAG,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            self.async_event,
            self.async_vcode,
            self.parameter1,
            self.parameter2,
            self.parameter3,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        fields = _ASYNC_MESSAGE.unpack_from(bhs)
        _, _, _, _, lun, itt, stat_sn, exp_cmd_sn, max_cmd_sn, event, vcode, p1, p2, p3 = fields
        return cls(event, vcode, p1, p2, p3, lun, itt, stat_sn, exp_cmd_sn, max_cmd_sn)


class RejectReason(enum.IntEnum):
    """RFC 7143 §11.17.1."""

    DATA_DIGEST_ERROR = 0x02
    SNACK_REJECT = 0x03
    PROTOCOL_ERROR = 0x04
    COMMAND_NOT_SUPPORTED = 0x05
    IMMEDIATE_COMMAND_REJECT = 0x06
    TASK_IN_PROGRESS = 0x07
    INVALID_DATA_ACK = 0x08
    INVALID_PDU_FIELD = 0x09
    LONG_OPERATION_REJECT = 0x0A
    NEGOTIATION_RESET = 0x0B
    WAITING_FOR_LOGOUT = 0x0C


_REJECT: Final = Struct(">BBBxI8xI4xIIII8x")


@dataclass(slots=True)
class Reject:
    """RFC 7143 §11.17. `data` is the complete header of the PDU in error."""

    opcode: ClassVar[Opcode] = Opcode.REJECT
    name: ClassVar[str] = "Reject"

    reason: int
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    data_sn: int = 0
    """DataSN or R2TSN; only valid with some reasons."""
    initiator_task_tag: int = NO_TAG
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _REJECT.pack(
            Opcode.REJECT,
            FINAL,
            self.reason,
            lengths(ahs_words, data_length),
            NO_TAG,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            self.data_sn,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        _, _, reason, _, itt, stat_sn, exp_cmd_sn, max_cmd_sn, data_sn = _REJECT.unpack_from(bhs)
        return cls(reason, stat_sn, exp_cmd_sn, max_cmd_sn, data_sn, itt)
