"""Every PDU against bytes written down by hand from the figures of RFC 7143 §11.

Each row of hex is one 4-byte row of the figure, so that a wrong offset shows as a wrong row.
"""

from dataclasses import dataclass

import pytest

from orion_iscsifs.protocol.pdu import (
    BHS_BYTES,
    R2T,
    AsyncEvent,
    AsyncMessage,
    Attribute,
    DataIn,
    DataOut,
    LoginRequest,
    LoginResponse,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    ServiceResponse,
    SnackRequest,
    SnackType,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TextRequest,
    TextResponse,
    TmfResponseCode,
    data_segment_length,
    unpack,
)

LUN = 0x0102_0000_0000_0000


@dataclass(frozen=True)
class Golden:
    pdu: Pdu
    rows: str
    ahs_words: int = 0
    data_length: int = 0

    @property
    def bytes(self) -> bytes:
        return bytes.fromhex(self.rows)


GOLDEN = [
    Golden(  # §11.3: I=0; F=1 R=1 W=0 ATTR=1; READ(10), LBA 0x11223344, 8 blocks
        ScsiCommand(
            lun=LUN,
            initiator_task_tag=0xA1A2A3A4,
            cdb=bytes.fromhex("28001122334400000800") + bytes(6),
            expected_data_transfer_length=0x1000,
            read=True,
            cmd_sn=0xB1B2B3B4,
            exp_stat_sn=0xC1C2C3C4,
        ),
        "01c10000 00000000 01020000 00000000 a1a2a3a4 00001000 b1b2b3b4 c1c2c3c4"
        "28001122 33440000 08000000 00000000",
    ),
    Golden(  # §11.3: I=1; F=0 R=0 W=1 ATTR=2; 3 words of AHS, 0x010203 bytes of data
        ScsiCommand(
            lun=LUN,
            initiator_task_tag=1,
            cdb=bytes.fromhex("2a") + bytes(15),
            expected_data_transfer_length=0x00FF_0000,
            write=True,
            final=False,
            attribute=Attribute.ORDERED,
            immediate=True,
            cmd_sn=2,
            exp_stat_sn=3,
        ),
        "41220000 03010203 01020000 00000000 00000001 00ff0000 00000002 00000003"
        "2a000000 00000000 00000000 00000000",
        ahs_words=3,
        data_length=0x010203,
    ),
    Golden(  # §11.4: CHECK CONDITION, U, 18 + 2 bytes of sense
        ScsiResponse(
            initiator_task_tag=0xA1A2A3A4,
            response=ServiceResponse.COMMAND_COMPLETED_AT_TARGET,
            status=0x02,
            underflow=True,
            snack_tag=0x0A0B0C0D,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
            exp_data_sn=0x44444444,
            bidi_read_residual_count=0x55555555,
            residual_count=0x66666666,
        ),
        "21820002 00000014 00000000 00000000 a1a2a3a4 0a0b0c0d 11111111 22222222"
        "33333333 44444444 55555555 66666666",
        data_length=20,
    ),
    Golden(  # §11.4: target failure, o u O set
        ScsiResponse(
            initiator_task_tag=5,
            response=ServiceResponse.TARGET_FAILURE,
            overflow=True,
            bidi_overflow=True,
            bidi_underflow=True,
        ),
        "219c0100 00000000 00000000 00000000 00000005 00000000 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.5: ABORT TASK, immediate
        TaskManagementRequest(
            function=TaskManagementFunction.ABORT_TASK,
            initiator_task_tag=0xA1A2A3A4,
            lun=LUN,
            referenced_task_tag=0xB1B2B3B4,
            cmd_sn=0x11111111,
            exp_stat_sn=0x22222222,
            ref_cmd_sn=0x33333333,
            exp_data_sn=0x44444444,
        ),
        "42810000 00000000 01020000 00000000 a1a2a3a4 b1b2b3b4 11111111 22222222"
        "33333333 44444444 00000000 00000000",
    ),
    Golden(  # §11.5: TASK REASSIGN is 8 (checklist 53), here not immediate
        TaskManagementRequest(
            function=TaskManagementFunction.TASK_REASSIGN, initiator_task_tag=7, immediate=False
        ),
        "02880000 00000000 00000000 00000000 00000007 ffffffff 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.6
        TaskManagementResponse(
            initiator_task_tag=0xA1A2A3A4,
            response=TmfResponseCode.FUNCTION_REJECTED,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
        ),
        "2280ff00 00000000 00000000 00000000 a1a2a3a4 00000000 11111111 22222222"
        "33333333 00000000 00000000 00000000",
    ),
    Golden(  # §11.7: solicited, last of its sequence
        DataOut(
            lun=LUN,
            initiator_task_tag=0xA1A2A3A4,
            target_transfer_tag=0xD1D2D3D4,
            data_sn=0x11111111,
            buffer_offset=0x22222222,
            final=True,
            exp_stat_sn=0x33333333,
        ),
        "05800000 00002000 01020000 00000000 a1a2a3a4 d1d2d3d4 00000000 33333333"
        "00000000 11111111 22222222 00000000",
        data_length=8192,
    ),
    Golden(  # §11.7: unsolicited
        DataOut(lun=0, initiator_task_tag=9),
        "05000000 00000000 00000000 00000000 00000009 ffffffff 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.7: F A O S with status
        DataIn(
            initiator_task_tag=0xA1A2A3A4,
            data_sn=0x11111111,
            buffer_offset=0x22222222,
            final=True,
            acknowledge=True,
            overflow=True,
            has_status=True,
            status=0x08,
            lun=LUN,
            target_transfer_tag=0xD1D2D3D4,
            stat_sn=0x33333333,
            exp_cmd_sn=0x44444444,
            max_cmd_sn=0x55555555,
            residual_count=0x66666666,
        ),
        "25c50008 00001000 01020000 00000000 a1a2a3a4 d1d2d3d4 33333333 44444444"
        "55555555 11111111 22222222 66666666",
        data_length=4096,
    ),
    Golden(  # §11.7: U alone
        DataIn(initiator_task_tag=1, underflow=True),
        "25020000 00000000 00000000 00000000 00000001 ffffffff 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.8
        R2T(
            lun=LUN,
            initiator_task_tag=0xA1A2A3A4,
            target_transfer_tag=0xD1D2D3D4,
            r2t_sn=0x11111111,
            buffer_offset=0x22222222,
            desired_data_transfer_length=0x33333333,
            stat_sn=0x44444444,
            exp_cmd_sn=0x55555555,
            max_cmd_sn=0x66666666,
        ),
        "31800000 00000000 01020000 00000000 a1a2a3a4 d1d2d3d4 44444444 55555555"
        "66666666 11111111 22222222 33333333",
    ),
    Golden(  # §11.9: connection 0x0007 is dropped; Time2Wait 2, Time2Retain 20
        AsyncMessage(
            async_event=AsyncEvent.TARGET_DROPS_CONNECTION,
            async_vcode=0x0B,
            parameter1=7,
            parameter2=2,
            parameter3=20,
            lun=LUN,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
        ),
        "32800000 00000000 01020000 00000000 ffffffff 00000000 11111111 22222222"
        "33333333 020b0007 00020014 00000000",
    ),
    Golden(  # §11.10: F, not immediate
        TextRequest(
            initiator_task_tag=0xA1A2A3A4,
            lun=LUN,
            target_transfer_tag=0xD1D2D3D4,
            cmd_sn=0x11111111,
            exp_stat_sn=0x22222222,
        ),
        "04800000 00000010 01020000 00000000 a1a2a3a4 d1d2d3d4 11111111 22222222"
        "00000000 00000000 00000000 00000000",
        data_length=16,
    ),
    Golden(  # §11.10: C, immediate, TTT reserved
        TextRequest(initiator_task_tag=1, final=False, continued=True, immediate=True),
        "44400000 00000000 00000000 00000000 00000001 ffffffff 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.11
        TextResponse(
            initiator_task_tag=0xA1A2A3A4,
            final=False,
            continued=True,
            lun=LUN,
            target_transfer_tag=0xD1D2D3D4,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
        ),
        "24400000 00000000 01020000 00000000 a1a2a3a4 d1d2d3d4 11111111 22222222"
        "33333333 00000000 00000000 00000000",
    ),
    Golden(  # §11.12: T, CSG 1, NSG 3; always immediate
        LoginRequest(
            isid=bytes.fromhex("800102030405"),
            initiator_task_tag=0xA1A2A3A4,
            transit=True,
            csg=1,
            nsg=3,
            version_max=0x0E,
            version_min=0x0D,
            tsih=0x0607,
            cid=0x0809,
            cmd_sn=0x11111111,
            exp_stat_sn=0x22222222,
        ),
        "43870e0d 00000100 80010203 04050607 a1a2a3a4 08090000 11111111 22222222"
        "00000000 00000000 00000000 00000000",
        data_length=256,
    ),
    Golden(  # §11.12: C
        LoginRequest(isid=bytes(6), initiator_task_tag=1, continued=True),
        "43400000 00002000 00000000 00000000 00000001 00000000 00000000 00000000"
        "00000000 00000000 00000000 00000000",
        data_length=8192,
    ),
    Golden(  # §11.13: status 0203
        LoginResponse(
            isid=bytes.fromhex("800102030405"),
            initiator_task_tag=0xA1A2A3A4,
            transit=True,
            csg=0,
            nsg=1,
            version_max=0x0E,
            version_active=0x0D,
            tsih=0x0607,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
            status_class=2,
            status_detail=3,
        ),
        "23810e0d 00000000 80010203 04050607 a1a2a3a4 00000000 11111111 22222222"
        "33333333 02030000 00000000 00000000",
    ),
    Golden(  # §11.13: C, CSG 1
        LoginResponse(isid=bytes(6), initiator_task_tag=1, continued=True, csg=1),
        "23440000 00000000 00000000 00000000 00000001 00000000 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.14: close connection 0x0809, immediate
        LogoutRequest(
            initiator_task_tag=0xA1A2A3A4,
            reason=LogoutReason.CLOSE_CONNECTION,
            cid=0x0809,
            cmd_sn=0x11111111,
            exp_stat_sn=0x22222222,
        ),
        "46810000 00000000 00000000 00000000 a1a2a3a4 08090000 11111111 22222222"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(
        LogoutRequest(initiator_task_tag=1, reason=LogoutReason.CLOSE_SESSION, immediate=False),
        "06800000 00000000 00000000 00000000 00000001 00000000 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.15
        LogoutResponse(
            initiator_task_tag=0xA1A2A3A4,
            response=LogoutResponseCode.CLEANUP_FAILED,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
            time2wait_s=0x0102,
            time2retain_s=0x0304,
        ),
        "26800300 00000000 00000000 00000000 a1a2a3a4 00000000 11111111 22222222"
        "33333333 00000000 01020304 00000000",
    ),
    Golden(  # §11.16: DataACK
        SnackRequest(
            type=SnackType.DATA_ACK,
            target_transfer_tag=0xD1D2D3D4,
            lun=LUN,
            exp_stat_sn=0x11111111,
            beg_run=0x22222222,
            run_length=0x33333333,
        ),
        "10820000 00000000 01020000 00000000 ffffffff d1d2d3d4 00000000 11111111"
        "00000000 00000000 22222222 33333333",
    ),
    Golden(  # §11.17: the rejected header is the data segment
        Reject(
            reason=RejectReason.INVALID_PDU_FIELD,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
            data_sn=0x44444444,
        ),
        "3f800900 00000030 00000000 00000000 ffffffff 00000000 11111111 22222222"
        "33333333 44444444 00000000 00000000",
        data_length=48,
    ),
    Golden(  # §11.18: a ping
        NopOut(
            initiator_task_tag=0xA1A2A3A4,
            lun=LUN,
            cmd_sn=0x11111111,
            exp_stat_sn=0x22222222,
        ),
        "40800000 00000004 01020000 00000000 a1a2a3a4 ffffffff 11111111 22222222"
        "00000000 00000000 00000000 00000000",
        data_length=4,
    ),
    Golden(  # §11.18: an answer to a NOP-In, here not immediate
        NopOut(target_transfer_tag=0xD1D2D3D4, immediate=False),
        "00800000 00000000 00000000 00000000 ffffffff d1d2d3d4 00000000 00000000"
        "00000000 00000000 00000000 00000000",
    ),
    Golden(  # §11.19
        NopIn(
            initiator_task_tag=0xA1A2A3A4,
            target_transfer_tag=0xD1D2D3D4,
            lun=LUN,
            stat_sn=0x11111111,
            exp_cmd_sn=0x22222222,
            max_cmd_sn=0x33333333,
        ),
        "20800000 00000000 01020000 00000000 a1a2a3a4 d1d2d3d4 11111111 22222222"
        "33333333 00000000 00000000 00000000",
    ),
]


def _name(golden: Golden) -> str:
    return golden.pdu.name.replace(" ", "-")


@pytest.mark.parametrize("golden", GOLDEN, ids=_name)
def test_pack(golden: Golden) -> None:
    packed = golden.pdu.pack(golden.ahs_words, golden.data_length)
    assert packed.hex(" ", 4) == golden.bytes.hex(" ", 4)
    assert len(packed) == BHS_BYTES


@pytest.mark.parametrize("golden", GOLDEN, ids=_name)
def test_unpack(golden: Golden) -> None:
    assert unpack(golden.bytes) == golden.pdu
    assert unpack(memoryview(bytearray(golden.bytes))) == golden.pdu
    assert data_segment_length(golden.bytes) == golden.data_length


def test_every_opcode_has_a_golden_header() -> None:
    assert len({type(golden.pdu) for golden in GOLDEN}) == 18
