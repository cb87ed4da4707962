"""Reserved fields, padding and names: what RFC 7143 §11 and §4.2.7 say of every PDU."""

from dataclasses import fields

import pytest

from orion_iscsifs.protocol.framing import Framer, encode
from orion_iscsifs.protocol.login import Offer, TargetAccess, TargetLogin
from orion_iscsifs.protocol.pdu import (
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
    Pdu,
    Reject,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    TaskManagementRequest,
    TaskManagementResponse,
    TextRequest,
    TextResponse,
    unpack,
)
from orion_iscsifs.url import parse
from tests.protocol.logins import IQN, counting_bytes, initiator, join

BHS_BYTES = 48
Reserved = dict[int, int]
"""Which bits of which byte of a header are reserved."""


def span(first: int, last: int) -> Reserved:
    return dict.fromkeys(range(first, last + 1), 0xFF)


# Bits 0 and 1 of byte 0 are reserved in every PDU of a target (§11.2.1.1), bit 0 in ours.
TO_INITIATOR: list[tuple[Pdu, Reserved]] = [
    (NopIn(7, 9, 3, 1, 2, 3), {1: 0x7F} | span(2, 3) | span(36, 47)),
    (ScsiResponse(7, 0, 2, stat_sn=1, exp_cmd_sn=2, max_cmd_sn=3), {1: 0x61} | span(8, 15)),
    (
        TaskManagementResponse(7, 1, 2, 3, 4),
        {1: 0x7F, 3: 0xFF} | span(8, 15) | span(20, 23) | span(36, 47),
    ),
    (
        LoginResponse(b"abcdef", 7, True, csg=1, nsg=3, tsih=5, stat_sn=6, status_class=2),
        {1: 0x30} | span(20, 23) | span(38, 47),
    ),
    (TextResponse(7, False, True, 3, 4, 5, 6, 7), {1: 0x3F} | span(2, 3) | span(36, 47)),
    (DataIn(7, 1, 2, True, True, has_status=True, status=4), {1: 0x38, 2: 0xFF}),
    (
        LogoutResponse(7, 1, 2, 3, 4, 5, 6),
        {1: 0x7F, 3: 0xFF} | span(8, 15) | span(20, 23) | span(36, 39) | span(44, 47),
    ),
    (R2T(3, 7, 9, 1, 2, 3, 4, 5, 6), {1: 0x7F} | span(2, 3)),
    (AsyncMessage(1, 2, 3, 4, 5, 6), {1: 0x7F} | span(2, 3) | span(20, 23) | span(44, 47)),
    (Reject(4, 1, 2, 3, 5), {1: 0x7F, 3: 0xFF} | span(8, 15) | span(20, 23) | span(40, 47)),
]
FROM_INITIATOR: list[tuple[type[Pdu], Reserved]] = [
    (NopOut, {0: 0x80, 1: 0x7F} | span(2, 3) | span(32, 47)),
    (ScsiCommand, {0: 0x80, 1: 0x18} | span(2, 3)),
    (TaskManagementRequest, {0: 0x80} | span(2, 3) | span(40, 47)),
    (LoginRequest, {0: 0x80, 1: 0x30} | span(22, 23) | span(32, 47)),
    (TextRequest, {0: 0x80, 1: 0x3F} | span(2, 3) | span(32, 47)),
    (DataOut, {0: 0xC0, 1: 0x7F} | span(2, 3) | span(24, 27) | span(32, 35) | span(44, 47)),
    (LogoutRequest, {0: 0x80} | span(2, 3) | span(8, 15) | span(22, 23) | span(32, 47)),
    (SnackRequest, {0: 0xC0, 1: 0x70} | span(2, 3) | span(24, 27) | span(32, 39)),
]
EXTREMES = {"bool": True, "isid": b"\xff" * 6, "cdb": b"\xff" * 16}


@pytest.mark.parametrize(
    ("pdu", "reserved"), TO_INITIATOR, ids=[pdu.name for pdu, _ in TO_INITIATOR]
)
def test_reserved_bits_are_ignored(pdu: Pdu, reserved: Reserved) -> None:
    """§11: whatever a target puts there."""
    header = bytearray(pdu.pack(0, 0))
    assert unpack(bytes(header)) == pdu
    for index, bits in ({0: 0xC0} | reserved).items():
        header[index] |= bits
    assert unpack(bytes(header)) == pdu


def extreme(kind: type[Pdu]) -> Pdu:
    """A PDU with every bit of every field set, as far as the field is wide."""
    widths = {"tsih": 16, "cid": 16, "lun": 64, "csg": 2, "nsg": 2, "attribute": 3}
    widths |= {"version_max": 8, "version_min": 8, "function": 7, "reason": 7, "type": 4}
    values: dict[str, object] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in ("data", "ahs"):
            continue
        if item.type in ("bool", bool):
            values[item.name] = True
        elif item.name in EXTREMES:
            values[item.name] = EXTREMES[item.name]
        else:
            values[item.name] = (1 << widths.get(item.name, 32)) - 1
    return kind(**values)


@pytest.mark.parametrize(
    ("kind", "reserved"), FROM_INITIATOR, ids=[kind.name for kind, _ in FROM_INITIATOR]
)
def test_reserved_bits_are_sent_as_zero(kind: type[Pdu], reserved: Reserved) -> None:
    """§11: no field, however large, reaches them. TotalAHSLength and DataSegmentLength are 0."""
    header = extreme(kind).pack(0, 0)
    assert len(header) == BHS_BYTES
    assert {index: header[index] & bits for index, bits in reserved.items()} == dict.fromkeys(
        reserved, 0
    )
    assert header[4:8] == bytes(4)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_padding_is_zero_and_pads_of_others_are_ignored(length: int) -> None:
    """§11.1; some targets leave old text in theirs, and only DataSegmentLength counts."""
    data = b"\xff" * length
    pieces = encode(NopOut(1, data=data), header_digest=False, data_digest=False)
    stream = b"".join(bytes(piece) for piece in pieces)
    assert stream[BHS_BYTES:] == data + bytes(-length % 4)
    nop = NopIn(1, data=data)
    stream = nop.pack(0, length) + data + b"\xaa" * (-length % 4) + NopIn(2).pack(0, 0)
    framer = Framer(data_segment_length_max=8192)
    framer.buffers()[0][: len(stream)] = stream
    first, second = framer.received(len(stream))
    assert isinstance(first, NopIn)
    assert isinstance(second, NopIn)
    assert (bytes(first.data), first.initiator_task_tag) == (data, 1)
    assert (bytes(second.data), second.initiator_task_tag) == (b"", 2)


def test_names_of_223_bytes() -> None:
    """§4.2.7.1: the longest there are, in a URL and in a login."""
    name = IQN + "a" * (223 - len(IQN))
    assert parse(f"iscsi://192.0.2.1/{name}/0").target == name
    right = TargetLogin(
        offer=Offer(),
        lookup=lambda asked: TargetAccess() if asked == name else None,
        portal_group_tag=1,
        random_bytes=counting_bytes(2),
    )
    left = initiator(target_name=name)
    join(left, right)
    assert left.done
    assert right.target_name == name
