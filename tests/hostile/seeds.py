"""Where a fuzzer begins: a few inputs of each property that get somewhere.

All of them are made here, from this project's own encoders. What they spell out is the order in
which each property draws its decisions (see `draw.Draw`).
"""

from collections.abc import Mapping, Sequence
from typing import Final

from orion_iscsifs.config import words
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
)
from orion_iscsifs.protocol.text import encode_text
from orion_iscsifs.scsi import capacity, inquiry, lun, mode, provisioning, sense
from tests.hostile.wire import encoded

_TAG: Final = 0x01020304
_LUN: Final = 0x0102_0000_0000_0000
_ISID: Final = bytes.fromhex("80cafe000001")
_PDUS: Final[Sequence[Pdu]] = (
    NopOut(_TAG, _TAG, _LUN, cmd_sn=5, exp_stat_sn=6, data=b"ping"),
    ScsiCommand(_LUN, _TAG, bytes(range(16)), 512, write=True, data=b"now", ahs=b"\0\1\2\0ab12"),
    TaskManagementRequest(1, _TAG, _LUN, _TAG, cmd_sn=5, exp_stat_sn=6, ref_cmd_sn=4),
    LoginRequest(_ISID, _TAG, True, csg=1, nsg=3, cid=7, data=b"HeaderDigest=None\0"),
    TextRequest(_TAG, lun=_LUN, cmd_sn=5, exp_stat_sn=6, data=b"SendTargets=All\0"),
    DataOut(_LUN, _TAG, _TAG, 3, 512, True, 6, data=bytes(range(100))),
    LogoutRequest(_TAG, cmd_sn=5, exp_stat_sn=6),
    SnackRequest(0, _TAG, _TAG, _LUN, 6),
    NopIn(_TAG, _TAG, _LUN, 5, 6, 7, data=b"ping"),
    ScsiResponse(_TAG, status=2, stat_sn=5, exp_cmd_sn=6, data=b"\0\2\x70\0"),
    TaskManagementResponse(_TAG, 0, 5, 6, 7),
    LoginResponse(_ISID, _TAG, True, csg=1, nsg=3, tsih=9, data=b"HeaderDigest=None\0"),
    TextResponse(_TAG, data=b"TargetName=iqn.x\0TargetAddress=[::1]:3260,1\0"),
    DataIn(_TAG, 1, 512, True, has_status=True, data=bytes(range(101))),
    LogoutResponse(_TAG),
    R2T(_LUN, _TAG, _TAG, 5, 6, 7, 1, 512, 512),
    AsyncMessage(1, 0, 1, 2, 3, stat_sn=5),
    Reject(4, 5, 6, 7, data=bytes(48)),
)  # fmt: skip


# -- wire ------------------------------------------------------------------------------------------


def _framing() -> list[bytes]:
    found = []
    for flags in range(16):
        header_digest, data_digest, keep = bool(flags & 1), bool(flags & 2), bool(flags & 4)
        stream = b"".join(
            encoded(pdu, header_digest=header_digest, data_digest=data_digest)
            for pdu in _PDUS[flags % 7 :: 5]
        )
        switches = bytes((header_digest, data_digest, keep, flags >> 3, 1))
        two_cuts = bytes((2, 0, 0, 0, 9 * flags, 0, 0, 0, 3))
        found.append(switches + two_cuts + b"\1" + stream)
        # The same made of drawn headers: opcode, AHS, segment, nothing damaged.
        drawn = b"".join(map(_drawn, range(5), _PDUS[flags % 7 :: 5]))
        found.append(switches + two_cuts + b"\0" + drawn)
    return found


def _drawn(index: int, pdu: Pdu) -> bytes:
    data = bytes(pdu.data)[:63]
    return pdu.pack(0, 0) + bytes((0, index, 0, 1, len(data))) + data + b"\0\0"


def _text() -> list[bytes]:
    texts = (
        encode_text([("InitiatorName", "iqn.x"), ("AuthMethod", "CHAP,None"), ("X-a.b", "1")]),
        encode_text([("CHAP_C", "0x" + "ab" * 16), ("CHAP_R", "0b" + "QUJD")]),
        encode_text([("HeaderDigest", "CRC32C,None"), ("TargetAlias", "\u00e9")]) + bytes(3),
        b"0x1f",
        b"18446744073709551615",
    )
    return [bytes((0, 0, 0, step, 1)) + text for text in texts for step in (4, 255)]


# -- logins ----------------------------------------------------------------------------------------

_PLAIN: Final = ((0, 0, 0, 0, 0), (0, 0, 0))
_CHAP: Final = ((0, 1, 0, 0, 0, 1), (1, 0, 0))
_MUTUAL: Final = ((0, 1, 0, 0, 1, 2), (1, 1, 0))
_DISCOVERY: Final = ((1, 0, 0, 0, 0), (0, 0, 0))
_JOINS: Final = ((0, 0, 1, 2, 0), (0, 0, 2))
_DIGESTS: Final = ((0, 0, 0, 1, 0), (0, 0, 1))
_MANGLERS: Final = 11


def _logins(*, target_first: bool) -> list[bytes]:
    found = []
    for initiator, target in (_PLAIN, _CHAP, _MUTUAL, _DISCOVERY, _JOINS, _DIGESTS):
        sides = (target, initiator) if target_first else (initiator, target)
        start = bytes((*sides[0], *sides[1]))
        found.append(start)
        for mangler in range(_MANGLERS):
            honest = bytes(mangler % 4)  # that many exchanges with nothing done to them
            found.append(start + honest + bytes((1, mangler, 3, 5, 7, 11, 13, 17)))
    return found


# -- devices ---------------------------------------------------------------------------------------

_IDENTITY: Final = inquiry.encode_inquiry(
    inquiry.StandardInquiry(vendor="ORION", product="DISK", revision="1")
)
_NAMES: Final = inquiry.encode_designators(
    [
        inquiry.Designator(3, bytes.fromhex("6000000000000001")),
        inquiry.Designator(8, b"iqn.x,t,0x1", 1, 3),
    ]
)
_LIMITS: Final = inquiry.encode_block_limits(
    inquiry.BlockLimits(transfer_blocks_max=2048, unmap_blocks_max=1 << 20, unmap_alignment=8)
)
_THIN: Final = inquiry.encode_provisioning(inquiry.Provisioning(unmap=True, provisioning_type=2))
_PAGES: Final = inquiry.encode_supported_pages(list(inquiry.VpdPage))
_CAPACITY: Final = capacity.Capacity(blocks=1 << 20, block_bytes=512, provisioning=True)
_MODE: Final = mode.ModeParameters(write_protected=True)


def _sense() -> list[bytes]:
    samples = (
        sense.POWER_ON,
        sense.SenseData(3, 0x11, 0, information=123456789),
        sense.SenseData(5, 0x24, 0, deferred=True),
    )
    return [
        segment
        for sample in samples
        for segment in (
            sense.encode_sense(sample),
            sense.encode_sense(sample, descriptor_format=True),
            sense.response_segment(sample),
        )
    ]


def _parameter_data() -> list[bytes]:
    pages = mode.caching_page(_MODE) + mode.control_page(_MODE)
    return [
        capacity.encode_capacity_10(_CAPACITY),
        capacity.encode_capacity_16(_CAPACITY),
        mode.encode_mode_sense(_MODE, pages, long_header=False),
        mode.encode_mode_sense(_MODE, pages, long_header=True, block_descriptor=bytes(16)),
        lun.encode_report_luns([0, 1, 255, 256, 16383]),
        provisioning.encode_unmap([(0, 8), (1 << 40, 1)]),
        provisioning.encode_lba_status([provisioning.LbaStatus(0, 8, 1)]),
    ]


def _probing() -> list[bytes]:
    def answer(data: bytes, *, marked: bool = True) -> bytes:
        data = data[:63]
        return bytes((0, len(data))) + data + (b"\0" if marked else b"")

    pages = mode.encode_mode_sense(_MODE, mode.caching_page(_MODE), long_header=False)
    whole = (
        b"\0"
        + answer(_IDENTITY)
        + b"\0"  # TEST UNIT READY
        + b"".join(map(answer, (_PAGES, _LIMITS, _THIN)))
        + answer(capacity.encode_capacity_16(_CAPACITY))
        + answer(pages, marked=False)
        + answer(_NAMES)
        + answer(lun.encode_report_luns([0, 1, 2]), marked=False)
    )
    return [whole, whole[:90], whole[:150], whole[:250]]


# -- words -----------------------------------------------------------------------------------------


def _addresses() -> list[bytes]:
    values = (b"iqn.2026-11.org.example:disk", b"192.0.2.1:3260,1", b"[2001:db8::1]:860", b"host")
    keys = (0, 1, 1, 1)
    return [
        b"".join(
            bytes((key, len(value))) + value
            for key, value in zip(keys, values[:count], strict=False)
        )
        for count in range(1, len(values) + 1)
    ]


SEEDS: Final[Mapping[str, Sequence[bytes]]] = {
    "framing": _framing(),
    "headers": [*(pdu.pack(1, 5) for pdu in _PDUS), bytes(range(49))],
    "text": _text(),
    "initiator_login": _logins(target_first=False),
    "target_login": _logins(target_first=True),
    "sense_data": _sense(),
    "vital_product_data": [_IDENTITY, _NAMES, _LIMITS, _THIN, _PAGES],
    "parameter_data": _parameter_data(),
    "probing": _probing(),
    "urls": [
        b"\0iscsi://user%25secret@host:3260/iqn.2026-11.org.example:disk/1?header_digest=crc32c",
        b"\3fe80::1%25eth0]:860/eui.0123456789abcdef",
        b"\2iqn.x:y/0",
        b"\0host:0333333333",
    ],
    "secrets": [b"host:3260iqn.x1", b"[::1]?chap_user=me", b"mode=0600"],
    "options": [
        bytes((index,)) + value
        for index, name in enumerate(words.OPTIONS)
        for value in (b"", b"64K", b"5", b"crc32c", name.encode())
    ],
    "addresses": _addresses(),
}
