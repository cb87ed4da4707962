"""unpack(pack(pdu)) for arbitrary fields, and arbitrary bytes as headers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.pdu import (
    PDU_TYPES,
    R2T,
    AsyncMessage,
    DataIn,
    DataOut,
    LoginRequest,
    LoginResponse,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    Opcode,
    Pdu,
    Reject,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    TaskManagementRequest,
    TaskManagementResponse,
    TextRequest,
    TextResponse,
    data_segment_length,
    unpack,
)

U8 = st.integers(0, 0xFF)
U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)
U64 = st.integers(0, (1 << 64) - 1)
FLAG = st.booleans()
STAGE = st.integers(0, 3)
ISID = st.binary(min_size=6, max_size=6)
CDB = st.binary(min_size=16, max_size=16)

PDUS: st.SearchStrategy[Pdu] = st.one_of(
    st.builds(NopOut, U32, U32, U64, FLAG, U32, U32),
    st.builds(NopIn, U32, U32, U64, U32, U32, U32),
    st.builds(ScsiCommand, U64, U32, CDB, U32, FLAG, FLAG, FLAG, st.integers(0, 7), FLAG, U32, U32),
    st.builds(ScsiResponse, U32, U8, U8, FLAG, FLAG, FLAG, FLAG, U32, U32, U32, U32, U32, U32, U32),
    st.builds(TaskManagementRequest, st.integers(0, 0x7F), U32, U64, U32, FLAG, U32, U32, U32, U32),
    st.builds(TaskManagementResponse, U32, U8, U32, U32, U32),
    st.builds(LoginRequest, ISID, U32, FLAG, FLAG, STAGE, STAGE, U8, U8, U16, U16, U32, U32),
    st.builds(
        LoginResponse, ISID, U32, FLAG, FLAG, STAGE, STAGE, U8, U8, U16, U32, U32, U32, U8, U8
    ),
    st.builds(TextRequest, U32, FLAG, FLAG, U64, U32, FLAG, U32, U32),
    st.builds(TextResponse, U32, FLAG, FLAG, U64, U32, U32, U32, U32),
    st.builds(DataOut, U64, U32, U32, U32, U32, FLAG, U32),
    st.builds(
        DataIn, U32, U32, U32, FLAG, FLAG, FLAG, FLAG, FLAG, U8, U64, U32, U32, U32, U32, U32
    ),
    st.builds(R2T, U64, U32, U32, U32, U32, U32, U32, U32, U32),
    st.builds(SnackRequest, st.integers(0, 15), U32, U32, U64, U32, U32, U32),
    st.builds(LogoutRequest, U32, st.integers(0, 0x7F), U16, FLAG, U32, U32),
    st.builds(LogoutResponse, U32, U8, U32, U32, U32, U16, U16),
    # The Initiator Task Tag of these two is fixed at ffffffff.
    st.builds(AsyncMessage, U8, U8, U16, U16, U16, U64, st.just(0xFFFF_FFFF), U32, U32, U32),
    st.builds(Reject, U8, U32, U32, U32, U32),
)


@given(pdu=PDUS, ahs_words=U8, data_length=st.integers(0, (1 << 24) - 1))
def test_round_trip(pdu: Pdu, ahs_words: int, data_length: int) -> None:
    packed = pdu.pack(ahs_words, data_length)
    assert unpack(packed) == pdu
    assert packed[4] == ahs_words
    assert data_segment_length(packed) == data_length


@given(bhs=st.binary(min_size=48, max_size=48))
def test_any_header_is_a_pdu_or_a_violation(bhs: bytes) -> None:
    try:
        pdu = unpack(bhs)
    except ProtocolViolation:
        assert bhs[0] & 0x3F not in PDU_TYPES
    else:
        assert pdu.opcode == bhs[0] & 0x3F
        assert pdu.data == b""


@pytest.mark.parametrize("opcode", sorted(set(range(64)) - set(Opcode)))
def test_unknown_opcode(opcode: int) -> None:
    with pytest.raises(ProtocolViolation, match=r"unknown opcode .*§11\.2\.1\.2"):
        unpack(bytes([opcode]) + bytes(47))


def test_every_opcode_is_known() -> None:
    assert set(PDU_TYPES) == {int(opcode) for opcode in Opcode}
