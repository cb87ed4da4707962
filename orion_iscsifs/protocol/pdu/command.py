"""SCSI Command and Response, task management, NOP, Async Message, Reject."""

import enum
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from orion_iscsifs.protocol.pdu.base import FINAL, IMMEDIATE, NO_TAG, Buffer, Opcode, lengths


class Attribute(enum.IntEnum):
    """Task attribute of a SCSI Command (RFC 7143 §11.3.1.1)."""

    UNTAGGED = 0
    SIMPLE = 1
    ORDERED = 2
    HEAD_OF_QUEUE = 3
    ACA = 4


_SCSI_COMMAND: Final = Struct(">BBHIQIIII16s")


@dataclass(slots=True)
class ScsiCommand:
    """RFC 7143 §11.3. `cdb` is padded to 16 bytes; a longer CDB has its rest in `ahs`."""

    opcode: ClassVar[Opcode] = Opcode.SCSI_COMMAND
    name: ClassVar[str] = "SCSI Command"

    lun: int
    initiator_task_tag: int
    cdb: bytes
    expected_data_transfer_length: int = 0
    read: bool = False
    write: bool = False
    final: bool = True
    attribute: int = Attribute.SIMPLE
    immediate: bool = False
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _SCSI_COMMAND.pack(
            Opcode.SCSI_COMMAND | (IMMEDIATE if self.immediate else 0),
            self.final << 7 | self.read << 6 | self.write << 5 | self.attribute,
            0,
            ahs_words << 24 | data_length,
            self.lun,
            self.initiator_task_tag,
            self.expected_data_transfer_length,
            self.cmd_sn,
            self.exp_stat_sn,
            self.cdb,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        op, flags, _, _, lun, itt, edtl, cmd_sn, exp_stat_sn, cdb = _SCSI_COMMAND.unpack_from(bhs)
        return cls(
            lun=lun,
            initiator_task_tag=itt,
            cdb=cdb,
            expected_data_transfer_length=edtl,
            read=bool(flags & 0x40),
            write=bool(flags & 0x20),
            final=bool(flags & FINAL),
            attribute=flags & 7,
            immediate=bool(op & IMMEDIATE),
            cmd_sn=cmd_sn,
            exp_stat_sn=exp_stat_sn,
        )


class ServiceResponse(enum.IntEnum):
    """Response of a SCSI Response (RFC 7143 §11.4.3)."""

    COMMAND_COMPLETED_AT_TARGET = 0x00
    TARGET_FAILURE = 0x01


_SCSI_RESPONSE: Final = Struct(">BBBBIQIIIIIIII")


@dataclass(slots=True)
class ScsiResponse:
    """RFC 7143 §11.4. `data` is SenseLength, the sense data and the response data."""

    opcode: ClassVar[Opcode] = Opcode.SCSI_RESPONSE
    name: ClassVar[str] = "SCSI Response"

    initiator_task_tag: int
    response: int = ServiceResponse.COMMAND_COMPLETED_AT_TARGET
    status: int = 0
    overflow: bool = False
    underflow: bool = False
    bidi_overflow: bool = False
    bidi_underflow: bool = False
    snack_tag: int = 0
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    exp_data_sn: int = 0
    bidi_read_residual_count: int = 0
    residual_count: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        flags = self.bidi_overflow << 4 | self.bidi_underflow << 3
        flags |= self.overflow << 2 | self.underflow << 1
        return _SCSI_RESPONSE.pack(
            Opcode.SCSI_RESPONSE,
            FINAL | flags,
            self.response,
            self.status,
            lengths(ahs_words, data_length),
            0,
            self.initiator_task_tag,
            self.snack_tag,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            self.exp_data_sn,
            self.bidi_read_residual_count,
            self.residual_count,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        (
            _,
            flags,
            response,
            status,
            _,
            _,
            itt,
            snack_tag,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            exp_data_sn,
            bidi_residual,
            residual,
        ) = _SCSI_RESPONSE.unpack_from(bhs)
        return cls(
            initiator_task_tag=itt,
            response=response,
            status=status,
            overflow=bool(flags & 4),
            underflow=bool(flags & 2),
            bidi_overflow=bool(flags & 16),
            bidi_underflow=bool(flags & 8),
            snack_tag=snack_tag,
            stat_sn=stat_sn,
            exp_cmd_sn=exp_cmd_sn,
            max_cmd_sn=max_cmd_sn,
            exp_data_sn=exp_data_sn,
            bidi_read_residual_count=bidi_residual,
            residual_count=residual,
        )


class TaskManagementFunction(enum.IntEnum):
    """RFC 7143 §11.5.1; 9 to 12 are RFC 7144's."""

    ABORT_TASK = 1
    ABORT_TASK_SET = 2
    CLEAR_ACA = 3
    CLEAR_TASK_SET = 4
    LOGICAL_UNIT_RESET = 5
    TARGET_WARM_RESET = 6
    TARGET_COLD_RESET = 7
    TASK_REASSIGN = 8
    QUERY_TASK = 9
    QUERY_TASK_SET = 10
    I_T_NEXUS_RESET = 11
    QUERY_ASYNC_EVENT = 12


_TMF_REQUEST: Final = Struct(">BBHIQIIIIII8x")


@dataclass(slots=True)
class TaskManagementRequest:
    """RFC 7143 §11.5."""

    opcode: ClassVar[Opcode] = Opcode.TASK_MANAGEMENT_REQUEST
    name: ClassVar[str] = "Task Management Function Request"

    function: int
    initiator_task_tag: int
    lun: int = 0
    referenced_task_tag: int = NO_TAG
    immediate: bool = True
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    ref_cmd_sn: int = 0
    exp_data_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _TMF_REQUEST.pack(
            Opcode.TASK_MANAGEMENT_REQUEST | (IMMEDIATE if self.immediate else 0),
            FINAL | self.function,
            0,
            lengths(ahs_words, data_length),
            self.lun,
            self.initiator_task_tag,
            self.referenced_task_tag,
            self.cmd_sn,
            self.exp_stat_sn,
            self.ref_cmd_sn,
            self.exp_data_sn,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        fields = _TMF_REQUEST.unpack_from(bhs)
        op, flags, _, _, lun, itt, rtt, cmd_sn, exp_stat_sn, ref_cmd_sn, exp_data_sn = fields
        return cls(
            function=flags & 0x7F,
            initiator_task_tag=itt,
            lun=lun,
            referenced_task_tag=rtt,
            immediate=bool(op & IMMEDIATE),
            cmd_sn=cmd_sn,
            exp_stat_sn=exp_stat_sn,
            ref_cmd_sn=ref_cmd_sn,
            exp_data_sn=exp_data_sn,
        )


class TmfResponseCode(enum.IntEnum):
    """RFC 7143 §11.6.1."""

    FUNCTION_COMPLETE = 0
    TASK_DOES_NOT_EXIST = 1
    LUN_DOES_NOT_EXIST = 2
    TASK_STILL_ALLEGIANT = 3
    TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED = 4
    FUNCTION_NOT_SUPPORTED = 5
    FUNCTION_AUTHORIZATION_FAILED = 6
    FUNCTION_SUCCEEDED = 7
    FUNCTION_REJECTED = 255


_TMF_RESPONSE: Final = Struct(">BBBxI8xI4xIII12x")


@dataclass(slots=True)
class TaskManagementResponse:
    """RFC 7143 §11.6."""

    opcode: ClassVar[Opcode] = Opcode.TASK_MANAGEMENT_RESPONSE
    name: ClassVar[str] = "Task Management Function Response"

    initiator_task_tag: int
    response: int = TmfResponseCode.FUNCTION_COMPLETE
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _TMF_RESPONSE.pack(
            Opcode.TASK_MANAGEMENT_RESPONSE,
            FINAL,
            self.response,
            lengths(ahs_words, data_length),
            self.initiator_task_tag,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        _, _, response, _, itt, stat_sn, exp_cmd_sn, max_cmd_sn = _TMF_RESPONSE.unpack_from(bhs)
        return cls(itt, response, stat_sn, exp_cmd_sn, max_cmd_sn)
