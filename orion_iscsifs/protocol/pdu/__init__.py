"""The PDUs of RFC 7143 §11, as dataclasses with the RFC's field names.

`unpack(bhs)` turns 48 bytes from the peer into a PDU; `pdu.pack(ahs_words, data_length)` gives the
48 bytes to send. The data segment is the attribute `data`; framing adds padding and digests.
"""

from orion_iscsifs.protocol.pdu.base import BHS_BYTES, NO_TAG, LoginStage, Opcode, Pdu
from orion_iscsifs.protocol.pdu.command import (
    Attribute,
    ScsiCommand,
    ScsiResponse,
    ServiceResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.protocol.pdu.data import R2T, DataIn, DataOut, SnackRequest, SnackType
from orion_iscsifs.protocol.pdu.service import (
    AsyncEvent,
    AsyncMessage,
    NopIn,
    NopOut,
    Reject,
    RejectReason,
)
from orion_iscsifs.protocol.pdu.session import (
    LoginRequest,
    LoginResponse,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.protocol.pdu.unpack import PDU_TYPES, data_segment_length, unpack

__all__ = [
    "BHS_BYTES",
    "NO_TAG",
    "PDU_TYPES",
    "AsyncEvent",
    "AsyncMessage",
    "Attribute",
    "DataIn",
    "DataOut",
    "LoginRequest",
    "LoginResponse",
    "LoginStage",
    "LogoutReason",
    "LogoutRequest",
    "LogoutResponse",
    "LogoutResponseCode",
    "NopIn",
    "NopOut",
    "Opcode",
    "Pdu",
    "R2T",
    "Reject",
    "RejectReason",
    "ScsiCommand",
    "ScsiResponse",
    "ServiceResponse",
    "SnackRequest",
    "SnackType",
    "TaskManagementFunction",
    "TaskManagementRequest",
    "TaskManagementResponse",
    "TextRequest",
    "TextResponse",
    "TmfResponseCode",
    "data_segment_length",
    "unpack",
]
