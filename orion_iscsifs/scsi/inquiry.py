"""INQUIRY data: standard (SPC-4 §6.6.2) and vital product data pages (SPC-4 §7.8, SBC-3 §6.6)."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.scsi.malformed import Buffer, MalformedData, field


class DeviceType(enum.IntEnum):
    """PERIPHERAL DEVICE TYPE, the ones met behind iSCSI."""

    DISK = 0x00
    TAPE = 0x01
    CD_DVD = 0x05
    MEDIUM_CHANGER = 0x08
    STORAGE_ARRAY_CONTROLLER = 0x0C
    ENCLOSURE = 0x0D
    SIMPLIFIED_DISK = 0x0E
    HOST_MANAGED_ZONED = 0x14
    WELL_KNOWN_LOGICAL_UNIT = 0x1E
    UNKNOWN = 0x1F


class VpdPage(enum.IntEnum):
    SUPPORTED = 0x00
    UNIT_SERIAL_NUMBER = 0x80
    DEVICE_IDENTIFICATION = 0x83
    BLOCK_LIMITS = 0xB0
    BLOCK_DEVICE_CHARACTERISTICS = 0xB1
    LOGICAL_BLOCK_PROVISIONING = 0xB2


QUALIFIER_CONNECTED: Final = 0
QUALIFIER_NOT_CAPABLE: Final = 3
"""With device type 1Fh: no logical unit can be here."""

# SAM-5, SPC-4, SBC-3, iSCSI, "no version claimed" each.
_VERSION_DESCRIPTORS: Final = (0x00A0, 0x0460, 0x04C0, 0x0960)


def _text(data: Buffer, offset: int, length: int) -> str:
    """An ASCII field, without the padding and without bytes that no terminal should see."""
    raw = bytes(data[offset : offset + length]).decode("ascii", "replace")
    return "".join(c if c.isprintable() else " " for c in raw).strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardInquiry:
    device_type: int = DeviceType.DISK
    qualifier: int = QUALIFIER_CONNECTED
    removable: bool = False
    version: int = 6
    """6: SPC-4."""
    command_queuing: bool = True
    tpgs: int = 0
    """Asymmetric access: 0 none, 1 implicit, 2 explicit transitions, 3 both; see `alua`."""
    vendor: str = ""
    product: str = ""
    revision: str = ""

    @property
    def is_disk(self) -> bool:
        """A direct-access block device that is really there."""
        return self.qualifier == QUALIFIER_CONNECTED and self.device_type in {
            DeviceType.DISK,
            DeviceType.SIMPLIFIED_DISK,
        }


def decode_inquiry(data: Buffer) -> StandardInquiry:
    if len(data) < 5:
        raise MalformedData("INQUIRY", f"{len(data)} bytes where at least 5 are due")
    return StandardInquiry(
        device_type=data[0] & 0x1F,
        qualifier=data[0] >> 5,
        removable=bool(data[1] & 0x80),
        version=data[2],
        command_queuing=bool(field(data, 7, 1) & 0x02),
        tpgs=field(data, 5, 1) >> 4 & 3,
        vendor=_text(data, 8, 8),
        product=_text(data, 16, 16),
        revision=_text(data, 32, 4),
    )


def encode_inquiry(inquiry: StandardInquiry) -> bytes:
    data = bytearray(66)
    data[0] = inquiry.qualifier << 5 | inquiry.device_type
    data[1] = inquiry.removable << 7
    data[2] = inquiry.version
    data[3] = 0x12  # HISUP, response data format 2
    data[4] = len(data) - 5
    data[5] = inquiry.tpgs << 4
    data[7] = inquiry.command_queuing << 1
    data[8:16] = inquiry.vendor.encode("ascii").ljust(8)[:8]
    data[16:32] = inquiry.product.encode("ascii").ljust(16)[:16]
    data[32:36] = inquiry.revision.encode("ascii").ljust(4)[:4]
    for index, descriptor in enumerate(_VERSION_DESCRIPTORS):
        data[58 + 2 * index : 60 + 2 * index] = descriptor.to_bytes(2, "big")
    return bytes(data)


# -- vital product data ----------------------------------------------------------------------------


def page_body(data: Buffer, page: int) -> Buffer:
    """What follows the 4-byte header, cut at the shorter of the stated and the real length."""
    if len(data) < 4 or data[1] != page:
        raise MalformedData(f"VPD page {page:02X}h", "the device answered with something else")
    return data[4 : 4 + field(data, 2, 2)]


def encode_page(page: int, body: bytes, *, device_type: int = DeviceType.DISK) -> bytes:
    return bytes((device_type, page)) + len(body).to_bytes(2, "big") + body


def decode_supported_pages(data: Buffer) -> frozenset[int]:
    return frozenset(page_body(data, VpdPage.SUPPORTED))


def encode_supported_pages(pages: Sequence[int]) -> bytes:
    return encode_page(VpdPage.SUPPORTED, bytes(sorted(pages)))


def decode_serial_number(data: Buffer) -> str:
    body = page_body(data, VpdPage.UNIT_SERIAL_NUMBER)
    return _text(body, 0, len(body))


def encode_serial_number(serial: str) -> bytes:
    return encode_page(VpdPage.UNIT_SERIAL_NUMBER, serial.encode("ascii"))


class DesignatorType(enum.IntEnum):
    VENDOR_SPECIFIC = 0
    T10_VENDOR_ID = 1
    EUI_64 = 2
    NAA = 3
    RELATIVE_TARGET_PORT = 4
    TARGET_PORT_GROUP = 5
    LOGICAL_UNIT_GROUP = 6
    MD5 = 7
    SCSI_NAME = 8


@dataclass(frozen=True, slots=True)
class Designator:
    """One designation descriptor of page 83h."""

    kind: int
    value: bytes
    association: int = 0
    """0 logical unit, 1 target port, 2 target device."""
    code_set: int = 1
    """1 binary, 2 ASCII, 3 UTF-8."""

    @property
    def text(self) -> str:
        """Printable and stable: the identity of a LUN across mounts is built from it."""
        if self.code_set == 1:
            return self.value.hex()
        return _text(self.value, 0, len(self.value)).rstrip("\0")


def decode_designators(data: Buffer) -> list[Designator]:
    """Every complete descriptor of page 83h, in the device's order."""
    body = page_body(data, VpdPage.DEVICE_IDENTIFICATION)
    found, offset = [], 0
    while offset + 4 <= len(body):
        length = body[offset + 3]
        value = bytes(body[offset + 4 : offset + 4 + length])
        if len(value) < length:
            break
        flags = body[offset + 1]
        found.append(Designator(flags & 0x0F, value, flags >> 4 & 3, body[offset] & 0x0F))
        offset += 4 + length
    return found


def encode_designators(designators: Sequence[Designator]) -> bytes:
    protocol_iscsi = 5
    body = b"".join(
        bytes(
            (
                (protocol_iscsi << 4 if d.association else 0) | d.code_set,
                (0x80 if d.association else 0) | d.association << 4 | d.kind,
                0,
                len(d.value),
            )
        )
        + d.value
        for d in designators
    )
    return encode_page(VpdPage.DEVICE_IDENTIFICATION, body)


def best_designator(designators: Sequence[Designator]) -> Designator | None:
    """The one that names the logical unit best (SPC-4 §7.8.5)."""
    order = (
        DesignatorType.NAA,
        DesignatorType.EUI_64,
        DesignatorType.SCSI_NAME,
        DesignatorType.T10_VENDOR_ID,
        DesignatorType.VENDOR_SPECIFIC,
    )
    own = [d for d in designators if d.association == 0 and d.value]
    return next((d for kind in order for d in own if d.kind == kind), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLimits:
    """Page B0h; all lengths in logical blocks, 0: not reported."""

    compare_and_write_blocks_max: int = 0
    optimal_transfer_granularity: int = 0
    transfer_blocks_max: int = 0
    optimal_transfer_blocks: int = 0
    unmap_blocks_max: int = 0
    unmap_descriptors_max: int = 0
    optimal_unmap_granularity: int = 0
    unmap_alignment: int | None = None
    write_same_blocks_max: int = 0
    write_same_non_zero: bool = False
    """WSNZ: WRITE SAME must name a number of blocks."""


def decode_block_limits(data: Buffer) -> BlockLimits:
    page_body(data, VpdPage.BLOCK_LIMITS)
    data = data[: 4 + field(data, 2, 2)]
    alignment = field(data, 32, 4)
    return BlockLimits(
        write_same_non_zero=bool(field(data, 4, 1) & 1),
        compare_and_write_blocks_max=field(data, 5, 1),
        optimal_transfer_granularity=field(data, 6, 2),
        transfer_blocks_max=field(data, 8, 4),
        optimal_transfer_blocks=field(data, 12, 4),
        unmap_blocks_max=field(data, 20, 4),
        unmap_descriptors_max=field(data, 24, 4),
        optimal_unmap_granularity=field(data, 28, 4),
        unmap_alignment=alignment & 0x7FFF_FFFF if alignment >> 31 else None,
        write_same_blocks_max=field(data, 36, 8),
    )


def encode_block_limits(limits: BlockLimits) -> bytes:
    alignment = 0 if limits.unmap_alignment is None else 1 << 31 | limits.unmap_alignment
    body = (
        bytes((limits.write_same_non_zero, limits.compare_and_write_blocks_max))
        + limits.optimal_transfer_granularity.to_bytes(2, "big")
        + limits.transfer_blocks_max.to_bytes(4, "big")
        + limits.optimal_transfer_blocks.to_bytes(4, "big")
        + bytes(4)
        + limits.unmap_blocks_max.to_bytes(4, "big")
        + limits.unmap_descriptors_max.to_bytes(4, "big")
        + limits.optimal_unmap_granularity.to_bytes(4, "big")
        + alignment.to_bytes(4, "big")
        + limits.write_same_blocks_max.to_bytes(8, "big")
    )
    return encode_page(VpdPage.BLOCK_LIMITS, body.ljust(60, b"\0"))


def decode_rotation_rate(data: Buffer) -> int:
    """Page B1h: 1 is solid state, 0 not reported, else revolutions per minute."""
    return field(page_body(data, VpdPage.BLOCK_DEVICE_CHARACTERISTICS), 0, 2)


def encode_rotation_rate(rate: int) -> bytes:
    body = rate.to_bytes(2, "big").ljust(60, b"\0")
    return encode_page(VpdPage.BLOCK_DEVICE_CHARACTERISTICS, body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioning:
    """Page B2h."""

    unmap: bool = False
    """LBPU: the UNMAP command."""
    write_same_16_unmap: bool = False
    """LBPWS."""
    write_same_10_unmap: bool = False
    """LBPWS10."""
    reads_zeroes: bool = False
    """LBPRZ."""
    anchor: bool = False
    provisioning_type: int = 0
    """0 not reported, 1 resource, 2 thin."""


def decode_provisioning(data: Buffer) -> Provisioning:
    body = page_body(data, VpdPage.LOGICAL_BLOCK_PROVISIONING)
    flags = field(body, 1, 1)
    return Provisioning(
        unmap=bool(flags & 0x80),
        write_same_16_unmap=bool(flags & 0x40),
        write_same_10_unmap=bool(flags & 0x20),
        # SBC-4 widened LBPRZ to three bits; 1 in any of the forms with the low bit: zeroes.
        reads_zeroes=bool(flags & 0x04),
        anchor=bool(flags & 0x02),
        provisioning_type=field(body, 2, 1) & 7,
    )


def encode_provisioning(provisioning: Provisioning) -> bytes:
    flags = provisioning.unmap << 7 | provisioning.write_same_16_unmap << 6
    flags |= provisioning.write_same_10_unmap << 5 | provisioning.reads_zeroes << 2
    flags |= provisioning.anchor << 1
    body = bytes((0, flags, provisioning.provisioning_type, 0))
    return encode_page(VpdPage.LOGICAL_BLOCK_PROVISIONING, body)
