"""From 48 bytes to a PDU object."""

from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.pdu.base import Buffer, UnpackablePdu
from orion_iscsifs.protocol.pdu.command import (
    ScsiCommand,
    ScsiResponse,
    TaskManagementRequest,
    TaskManagementResponse,
)
from orion_iscsifs.protocol.pdu.data import R2T, DataIn, DataOut, SnackRequest
from orion_iscsifs.protocol.pdu.service import AsyncMessage, NopIn, NopOut, Reject
from orion_iscsifs.protocol.pdu.session import (
    LoginRequest,
    LoginResponse,
    LogoutRequest,
    LogoutResponse,
    TextRequest,
    TextResponse,
)

PDU_TYPES: Final[dict[int, type[UnpackablePdu]]] = {
    int(kind.opcode): kind
    for kind in (
        NopOut,
        ScsiCommand,
        TaskManagementRequest,
        LoginRequest,
        TextRequest,
        DataOut,
        LogoutRequest,
        SnackRequest,
        NopIn,
        ScsiResponse,
        TaskManagementResponse,
        LoginResponse,
        TextResponse,
        DataIn,
        LogoutResponse,
        R2T,
        AsyncMessage,
        Reject,
    )
}


def unpack(bhs: Buffer) -> UnpackablePdu:
    """The PDU whose Basic Header Segment these 48 bytes are; raises ProtocolViolation."""
    kind = PDU_TYPES.get(bhs[0] & 0x3F)
    if kind is None:
        raise ProtocolViolation("PDU", f"unknown opcode {bhs[0] & 0x3F:#04x}", section="11.2.1.2")
    return kind.unpack(bhs)


def data_segment_length(bhs: Buffer) -> int:
    """DataSegmentLength in bytes, without padding (RFC 7143 §11.2.1.6)."""
    return bhs[5] << 16 | bhs[6] << 8 | bhs[7]
