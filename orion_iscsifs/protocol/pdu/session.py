"""Login, Text and Logout: the life of a session."""

import enum
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from orion_iscsifs.protocol.pdu.base import FINAL, IMMEDIATE, NO_TAG, Buffer, Opcode, lengths

_CONTINUE: Final = 0x40

_LOGIN_REQUEST: Final = Struct(">BBBBI6sHIHxxII16x")


@dataclass(slots=True)
class LoginRequest:
    """RFC 7143 §11.12. Always immediate. `isid` is 6 bytes."""

    opcode: ClassVar[Opcode] = Opcode.LOGIN_REQUEST
    name: ClassVar[str] = "Login Request"

    isid: bytes
    initiator_task_tag: int
    transit: bool = False
    continued: bool = False
    csg: int = 0
    nsg: int = 0
    version_max: int = 0
    version_min: int = 0
    tsih: int = 0
    cid: int = 0
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _LOGIN_REQUEST.pack(
            Opcode.LOGIN_REQUEST | IMMEDIATE,
            self.transit << 7 | self.continued << 6 | self.csg << 2 | self.nsg,
            self.version_max,
            self.version_min,
            lengths(ahs_words, data_length),
            self.isid,
            self.tsih,
            self.initiator_task_tag,
            self.cid,
            self.cmd_sn,
            self.exp_stat_sn,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        fields = _LOGIN_REQUEST.unpack_from(bhs)
        _, flags, version_max, version_min, _, isid, tsih, itt, cid, cmd_sn, exp_stat_sn = fields
        return cls(
            isid=isid,
            initiator_task_tag=itt,
            transit=bool(flags & FINAL),
            continued=bool(flags & _CONTINUE),
            csg=flags >> 2 & 3,
            nsg=flags & 3,
            version_max=version_max,
            version_min=version_min,
            tsih=tsih,
            cid=cid,
            cmd_sn=cmd_sn,
            exp_stat_sn=exp_stat_sn,
        )


_LOGIN_RESPONSE: Final = Struct(">BBBBI6sHI4xIIIBB10x")


@dataclass(slots=True)
class LoginResponse:
    """RFC 7143 §11.13. The sequence numbers are valid only with Status-Class 0."""

    opcode: ClassVar[Opcode] = Opcode.LOGIN_RESPONSE
    name: ClassVar[str] = "Login Response"

    isid: bytes
    initiator_task_tag: int
    transit: bool = False
    continued: bool = False
    csg: int = 0
    nsg: int = 0
    version_max: int = 0
    version_active: int = 0
    tsih: int = 0
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    status_class: int = 0
    status_detail: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _LOGIN_RESPONSE.pack(
            Opcode.LOGIN_RESPONSE,
            self.transit << 7 | self.continued << 6 | self.csg << 2 | self.nsg,
            self.version_max,
            self.version_active,
            lengths(ahs_words, data_length),
            self.isid,
            self.tsih,
            self.initiator_task_tag,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            self.status_class,
            self.status_detail,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        (
            _,
            flags,
            version_max,
            version_active,
            _,
            isid,
            tsih,
            itt,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            status_class,
            status_detail,
        ) = _LOGIN_RESPONSE.unpack_from(bhs)
        return cls(
            isid=isid,
            initiator_task_tag=itt,
            transit=bool(flags & FINAL),
            continued=bool(flags & _CONTINUE),
            csg=flags >> 2 & 3,
            nsg=flags & 3,
            version_max=version_max,
            version_active=version_active,
            tsih=tsih,
            stat_sn=stat_sn,
            exp_cmd_sn=exp_cmd_sn,
            max_cmd_sn=max_cmd_sn,
            status_class=status_class,
            status_detail=status_detail,
        )


_TEXT_REQUEST: Final = Struct(">BBHIQIIII16x")


@dataclass(slots=True)
class TextRequest:
    """RFC 7143 §11.10."""

    opcode: ClassVar[Opcode] = Opcode.TEXT_REQUEST
    name: ClassVar[str] = "Text Request"

    initiator_task_tag: int
    final: bool = True
    continued: bool = False
    lun: int = 0
    target_transfer_tag: int = NO_TAG
    immediate: bool = False
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _TEXT_REQUEST.pack(
            Opcode.TEXT_REQUEST | (IMMEDIATE if self.immediate else 0),
            self.final << 7 | self.continued << 6,
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
        op, flags, _, _, lun, itt, ttt, cmd_sn, exp_stat_sn = _TEXT_REQUEST.unpack_from(bhs)
        return cls(
            initiator_task_tag=itt,
            final=bool(flags & FINAL),
            continued=bool(flags & _CONTINUE),
            lun=lun,
            target_transfer_tag=ttt,
            immediate=bool(op & IMMEDIATE),
            cmd_sn=cmd_sn,
            exp_stat_sn=exp_stat_sn,
        )


_TEXT_RESPONSE: Final = Struct(">BBHIQIIIII12x")


@dataclass(slots=True)
class TextResponse:
    """RFC 7143 §11.11."""

    opcode: ClassVar[Opcode] = Opcode.TEXT_RESPONSE
    name: ClassVar[str] = "Text Response"

    initiator_task_tag: int
    final: bool = True
    continued: bool = False
    lun: int = 0
    target_transfer_tag: int = NO_TAG
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _TEXT_RESPONSE.pack(
            Opcode.TEXT_RESPONSE,
            self.final << 7 | self.continued << 6,
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
        fields = _TEXT_RESPONSE.unpack_from(bhs)
        _, flags, _, _, lun, itt, ttt, stat_sn, exp_cmd_sn, max_cmd_sn = fields
        return cls(
            initiator_task_tag=itt,
            final=bool(flags & FINAL),
            continued=bool(flags & _CONTINUE),
            lun=lun,
            target_transfer_tag=ttt,
            stat_sn=stat_sn,
            exp_cmd_sn=exp_cmd_sn,
            max_cmd_sn=max_cmd_sn,
        )


class LogoutReason(enum.IntEnum):
    """RFC 7143 §11.14.1."""

    CLOSE_SESSION = 0
    CLOSE_CONNECTION = 1
    REMOVE_CONNECTION_FOR_RECOVERY = 2


_LOGOUT_REQUEST: Final = Struct(">BBHI8xIHxxII16x")


@dataclass(slots=True)
class LogoutRequest:
    """RFC 7143 §11.14."""

    opcode: ClassVar[Opcode] = Opcode.LOGOUT_REQUEST
    name: ClassVar[str] = "Logout Request"

    initiator_task_tag: int
    reason: int = LogoutReason.CLOSE_SESSION
    cid: int = 0
    immediate: bool = True
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _LOGOUT_REQUEST.pack(
            Opcode.LOGOUT_REQUEST | (IMMEDIATE if self.immediate else 0),
            FINAL | self.reason,
            0,
            lengths(ahs_words, data_length),
            self.initiator_task_tag,
            self.cid,
            self.cmd_sn,
            self.exp_stat_sn,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        op, flags, _, _, itt, cid, cmd_sn, exp_stat_sn = _LOGOUT_REQUEST.unpack_from(bhs)
        return cls(itt, flags & 0x7F, cid, bool(op & IMMEDIATE), cmd_sn, exp_stat_sn)


class LogoutResponseCode(enum.IntEnum):
    """RFC 7143 §11.15.1."""

    CLOSED = 0
    CID_NOT_FOUND = 1
    RECOVERY_NOT_SUPPORTED = 2
    CLEANUP_FAILED = 3


_LOGOUT_RESPONSE: Final = Struct(">BBBxI8xI4xIII4xHH4x")


@dataclass(slots=True)
class LogoutResponse:
    """RFC 7143 §11.15. Times in seconds."""

    opcode: ClassVar[Opcode] = Opcode.LOGOUT_RESPONSE
    name: ClassVar[str] = "Logout Response"

    initiator_task_tag: int
    response: int = LogoutResponseCode.CLOSED
    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0
    time2wait_s: int = 0
    time2retain_s: int = 0
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        return _LOGOUT_RESPONSE.pack(
            Opcode.LOGOUT_RESPONSE,
            FINAL,
            self.response,
            lengths(ahs_words, data_length),
            self.initiator_task_tag,
            self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            self.time2wait_s,
            self.time2retain_s,
        )

    @classmethod
    def unpack(cls, bhs: Buffer) -> Self:
        fields = _LOGOUT_RESPONSE.unpack_from(bhs)
        _, _, response, _, itt, stat_sn, exp_cmd_sn, max_cmd_sn, wait, retain = fields
        return cls(itt, response, stat_sn, exp_cmd_sn, max_cmd_sn, wait, retain)
