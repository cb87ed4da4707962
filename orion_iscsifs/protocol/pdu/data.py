"""Data-Out, Data-In, R2T and SNACK: the movement of data."""

import enum
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from orion_iscsifs.protocol.pdu.base import FINAL, NO_TAG, Buffer, Opcode, lengths

DATA_OUT_HEADER: Final = Struct(">BBHIQII4xI4xII4x")


@dataclass(slots=True)
class DataOut:
    """RFC 7143 §11.7. TTT ffffffff: unsolicited; otherwise the TTT and LUN of the R2T."""

    opcode: ClassVar[Opcode] = Opcode.DATA_OUT
    name: ClassVar[str] = "SCSI Data-Out"

    lun: int
    initiator_task_tag: int
    target_transfer_tag: int = NO_TAG
    data_sn: int = 0
    buffer_offset: int = 0
    final: bool = False
    exp_stat_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return DATA_OUT_HEADER.pack(
            Opcode.DATA_OUT,
            FINAL if self.final else 0,
            0,
            lengths(ahs_words, data_length),
            self.lun,
            self.initiator_task_tag,
            self.target_transfer_tag,
            self.exp_stat_sn,
            self.data_sn,
            self.buffer_offset,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        _, flags, _, _, lun, itt, ttt, exp_stat_sn, data_sn, offset = DATA_OUT_HEADER.unpack_from(
            bhs
        )
        return cls(lun, itt, ttt, data_sn, offset, bool(flags & FINAL), exp_stat_sn)


_DATA_IN: Final = Struct(">BBBBIQIIIIIIII")


@dataclass(slots=True)
class DataIn:
    """RFC 7143 §11.7. Status and residual count only when `has_status` (the S bit)."""

    opcode: ClassVar[Opcode] = Opcode.DATA_IN
    name: ClassVar[str] = "SCSI Data-In"

    initiator_task_tag: int
    data_sn: int = 0
    buffer_offset: int = 0
    final: bool = False
    acknowledge: bool = False
    overflow: bool = False
    underflow: bool = False
    has_status: bool = False
    status: int = 0
    lun: int = 0
    target_transfer_tag: int = NO_TAG
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    residual_count: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        flags = self.final << 7 | self.acknowledge << 6
        flags |= self.overflow << 2 | self.underflow << 1 | self.has_status
        return _DATA_IN.pack(
            Opcode.DATA_IN,
            flags,
            0,
            self.status,
            lengths(ahs_words, data_length),
            self.lun,
            self.initiator_task_tag,
            self.target_transfer_tag,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            self.data_sn,
            self.buffer_offset,
            self.residual_count,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        (
            _,
            flags,
            _,
            status,
            _,
            lun,
            itt,
            ttt,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            data_sn,
            buffer_offset,
            residual_count,
        ) = _DATA_IN.unpack_from(bhs)
        # Positional: this runs once for every block that is read.
        return cls(
            itt,
            data_sn,
            buffer_offset,
            flags & 0x80 != 0,
            flags & 0x40 != 0,
            flags & 4 != 0,
            flags & 2 != 0,
            flags & 1 != 0,
            status,
            lun,
            ttt,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            residual_count,
        )


_R2T: Final = Struct(">BBHIQIIIIIIII")


@dataclass(slots=True)
class R2T:
    """RFC 7143 §11.8: the target asks for `desired_data_transfer_length` bytes of a write."""

    opcode: ClassVar[Opcode] = Opcode.R2T
    name: ClassVar[str] = "Ready To Transfer"

    lun: int
    initiator_task_tag: int
    target_transfer_tag: int
    r2t_sn: int = 0
    buffer_offset: int = 0
    desired_data_transfer_length: int = 0
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _R2T.pack(
            Opcode.R2T,
            FINAL,
            0,
            lengths(ahs_words, data_length),
            self.lun,
            self.initiator_task_tag,
            self.target_transfer_tag,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            self.r2t_sn,
            self.buffer_offset,
            self.desired_data_transfer_length,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        fields = _R2T.unpack_from(bhs)
        _, _, _, _, lun, itt, ttt, stat_sn, exp_cmd_sn, max_cmd_sn, r2t_sn, offset, desired = fields
        return cls(lun, itt, ttt, r2t_sn, offset, desired, stat_sn, exp_cmd_sn, max_cmd_sn)


class SnackType(enum.IntEnum):
    """RFC 7143 §11.16.1."""

    DATA_OR_R2T = 0
    STATUS = 1
    DATA_ACK = 2
    R_DATA = 3


_SNACK: Final = Struct(">BBHIQII4xI8xII")


@dataclass(slots=True)
class SnackRequest:
    """RFC 7143 §11.16."""

    opcode: ClassVar[Opcode] = Opcode.SNACK_REQUEST
    name: ClassVar[str] = "SNACK Request"

    type: int
    initiator_task_tag: int = NO_TAG
    target_transfer_tag: int = NO_TAG
    lun: int = 0
    exp_stat_sn: int = 0
    beg_run: int = 0
    run_length: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _SNACK.pack(
            Opcode.SNACK_REQUEST,
            FINAL | self.type,
            0,
            lengths(ahs_words, data_length),
            self.lun,
            self.initiator_task_tag,
            self.target_transfer_tag,
            self.exp_stat_sn,
            self.beg_run,
            self.run_length,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        _, flags, _, _, lun, itt, ttt, exp_stat_sn, beg_run, run_length = _SNACK.unpack_from(bhs)
        return cls(flags & 0x0F, itt, ttt, lun, exp_stat_sn, beg_run, run_length)
