"""SCSI commands that only tell what the unit is, how large, what it can do (SPC-4, SBC-3)."""

from typing import TYPE_CHECKING, Final

from orion_iscsifs import __version__
from orion_iscsifs.block.device import Buffer
from orion_iscsifs.scsi import alua, capacity, inquiry, mode, sense
from orion_iscsifs.scsi import cdb as cdbs
from orion_iscsifs.scsi.cdb import ServiceAction
from orion_iscsifs.scsi.inquiry import DesignatorType, DeviceType, VpdPage
from orion_iscsifs.scsi.lun import encode_report_luns
from orion_iscsifs.scsi.malformed import field
from orion_iscsifs.scsi.provisioning import LbaStatus, ProvisioningStatus, encode_lba_status
from orion_iscsifs.scsi.sense import SenseData
from orion_iscsifs.target.access import access_of
from orion_iscsifs.target.backing import ExtentDevice
from orion_iscsifs.target.commands import (
    COMPARE_AND_WRITE_BLOCKS_MAX,
    UNMAP_DESCRIPTORS_MAX,
    WRITE_SAME_BYTES_MAX,
    Result,
)
from orion_iscsifs.target.unit import GOOD, LogicalUnit, Outcome, Refused

if TYPE_CHECKING:
    from orion_iscsifs.target.session import Session

VENDOR: Final = "ORION"
PRODUCT: Final = "iSCSI disk"
_REVISION: Final = "".join(c for c in __version__ if c.isdigit())[:4].ljust(4, "0")
_SOLID_STATE: Final = 1
_THIN: Final = 2


def _cut(data: bytes, allocation_length: int) -> Outcome:
    return Outcome(data=data[:allocation_length])


def unit_ready(_unit: LogicalUnit, _cdb: bytes, _data: Buffer) -> Result:
    return GOOD


def request_sense(_unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    """No deferred sense is ever kept: sense travels with the status (autosense)."""
    return _cut(sense.encode_sense(SenseData(), descriptor_format=bool(cdb[1] & 1)), cdb[4])


def start_stop_unit(_unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    """A disk that can't be removed: it starts and stops without effect, and never ejects."""
    if cdb[4] & 0x02:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return GOOD


def prevent_allow_medium_removal(_unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    if cdb[4] & 0x02:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return GOOD


# -- identity --------------------------------------------------------------------------------------


def inquire(session: "Session", unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    asked = cdbs.parse_inquiry(cdb)
    if asked.evpd:
        if asked.page == VpdPage.DEVICE_IDENTIFICATION:
            return _cut(_identification(session, unit), asked.allocation_length)
        page = _VPD.get(asked.page)
        if page is None:
            raise Refused(sense.INVALID_FIELD_IN_CDB)
        return _cut(page(unit), asked.allocation_length)
    if asked.page:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    data = inquiry.StandardInquiry(
        vendor=VENDOR, product=PRODUCT, revision=_REVISION, tpgs=access_of(session).tpgs
    )
    return _cut(inquiry.encode_inquiry(data), asked.allocation_length)


def inquire_nothing(cdb: bytes) -> Outcome:
    """INQUIRY to a LUN without a unit: qualifier 3, type 1Fh (SPC-4 §6.6.1)."""
    nothing = inquiry.StandardInquiry(
        device_type=DeviceType.UNKNOWN,
        qualifier=inquiry.QUALIFIER_NOT_CAPABLE,
        vendor=VENDOR,
        product=PRODUCT,
        revision=_REVISION,
    )
    return _cut(inquiry.encode_inquiry(nothing), cdbs.parse_inquiry(cdb).allocation_length)


def _supported_pages(_: LogicalUnit) -> bytes:
    return inquiry.encode_supported_pages((*_VPD, VpdPage.DEVICE_IDENTIFICATION))


def _serial_number(unit: LogicalUnit) -> bytes:
    return inquiry.encode_serial_number(unit.serial)


def _identification(session: "Session", unit: LogicalUnit) -> bytes:
    """The unit, the same through every port, then the port that was asked (SPC-4 §7.8.6)."""
    group = session.portal_group_tag
    vendor_id = VENDOR.ljust(8) + unit.serial
    name = f"{unit.target_name},t,0x{group:04x}".encode()
    return inquiry.encode_designators(
        (
            inquiry.Designator(DesignatorType.NAA, unit.naa),
            inquiry.Designator(DesignatorType.T10_VENDOR_ID, vendor_id.encode(), code_set=2),
            inquiry.Designator(
                DesignatorType.SCSI_NAME,
                name.ljust(-(-(len(name) + 1) // 4) * 4, b"\0"),
                association=1,
                code_set=3,
            ),
            *alua.port_designators(access_of(session).port(group), group),
        )
    )


def _block_limits(unit: LogicalUnit) -> bytes:
    geometry, block = unit.geometry, unit.block_bytes
    unmap = unit.provisioning
    return inquiry.encode_block_limits(
        inquiry.BlockLimits(
            write_same_non_zero=True,
            compare_and_write_blocks_max=COMPARE_AND_WRITE_BLOCKS_MAX if unit.inline else 0,
            optimal_transfer_granularity=max(1, geometry.physical_block_bytes // block),
            transfer_blocks_max=unit.transfer_bytes_max // block,
            optimal_transfer_blocks=geometry.optimal_transfer_bytes // block,
            unmap_blocks_max=0xFFFF_FFFF if unmap else 0,
            unmap_descriptors_max=UNMAP_DESCRIPTORS_MAX if unmap else 0,
            optimal_unmap_granularity=geometry.discard_granularity_bytes // block,
            unmap_alignment=0 if unmap else None,
            write_same_blocks_max=WRITE_SAME_BYTES_MAX // block,
        )
    )


def _characteristics(_: LogicalUnit) -> bytes:
    return inquiry.encode_rotation_rate(_SOLID_STATE)


def _provisioning(unit: LogicalUnit) -> bytes:
    thin = unit.provisioning
    return inquiry.encode_provisioning(
        inquiry.Provisioning(
            unmap=thin,
            write_same_16_unmap=thin,
            write_same_10_unmap=thin,
            reads_zeroes=thin,
            provisioning_type=_THIN if thin else 0,
        )
    )


_VPD: Final = {
    int(VpdPage.SUPPORTED): _supported_pages,
    int(VpdPage.UNIT_SERIAL_NUMBER): _serial_number,
    int(VpdPage.BLOCK_LIMITS): _block_limits,
    int(VpdPage.BLOCK_DEVICE_CHARACTERISTICS): _characteristics,
    int(VpdPage.LOGICAL_BLOCK_PROVISIONING): _provisioning,
}


def report_luns(unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    return list_luns(tuple(unit.siblings.by_number), cdb)


def list_luns(numbers: tuple[int, ...], cdb: bytes) -> Outcome:
    """REPORT LUNS; SELECT REPORT 1 asks for well known units, of which there are none."""
    select_report, allocation_length = cdb[2], field(cdb, 6, 4)
    if select_report > 2 or allocation_length < 16:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    return _cut(encode_report_luns(() if select_report == 1 else numbers), allocation_length)


# -- capacity and mode -----------------------------------------------------------------------------


def read_capacity_10(unit: LogicalUnit, _cdb: bytes, _data: Buffer) -> Result:
    return Outcome(data=capacity.encode_capacity_10(unit.capacity))


def service_action_in(unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    """READ CAPACITY(16) and GET LBA STATUS."""
    action, allocation_length = cdb[1] & 0x1F, field(cdb, 10, 4)
    if action == ServiceAction.READ_CAPACITY_16:
        return _cut(capacity.encode_capacity_16(unit.capacity), allocation_length)
    if action == ServiceAction.GET_LBA_STATUS:
        return _cut(_lba_status(unit, field(cdb, 2, 8)), allocation_length)
    raise Refused(sense.INVALID_FIELD_IN_CDB)


def _lba_status(unit: LogicalUnit, lba: int) -> bytes:
    """One extent at a time; a device that does not know its holes has none."""
    left = unit.capacity.blocks - lba
    if left <= 0:
        raise Refused(sense.LBA_OUT_OF_RANGE)
    holds_data = True
    if isinstance(unit.device, ExtentDevice):
        length, holds_data = unit.device.extent(lba * unit.block_bytes)
        left = length // unit.block_bytes
    status = ProvisioningStatus.MAPPED if holds_data else ProvisioningStatus.DEALLOCATED
    return encode_lba_status([LbaStatus(lba, min(left, 0xFFFF_FFFF), status)])


def mode_sense(unit: LogicalUnit, cdb: bytes, _data: Buffer) -> Result:
    """MODE SENSE(6), (10): caching, control, informational exceptions; nothing is changeable."""
    asked = cdbs.parse_mode_sense(cdb)
    if asked.page_control == 3:
        raise Refused(SenseData(sense.INVALID_FIELD_IN_CDB.key, 0x39, 0x00))
    if asked.subpage not in {0x00, 0xFF}:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    geometry = unit.geometry
    parameters = mode.ModeParameters(
        write_protected=geometry.read_only,
        dpofua=True,
        write_cache=geometry.write_cache,
        software_write_protect=False,
    )
    pages = {
        mode.CACHING_PAGE: mode.caching_page(parameters, changeable=asked.page_control == 1),
        mode.CONTROL_PAGE: mode.control_page(parameters, changeable=asked.page_control == 1),
        mode.INFORMATIONAL_EXCEPTIONS_PAGE: mode.informational_exceptions_page(),
    }
    if asked.page != mode.ALL_PAGES and asked.page not in pages:
        raise Refused(sense.INVALID_FIELD_IN_CDB)
    wanted = pages.values() if asked.page == mode.ALL_PAGES else (pages[asked.page],)
    data = mode.encode_mode_sense(
        parameters,
        b"".join(wanted),
        long_header=asked.long_header,
        block_descriptor=b"" if asked.no_block_descriptors else _descriptor(unit, asked),
    )
    return _cut(data, asked.allocation_length)


def _descriptor(unit: LogicalUnit, asked: cdbs.ModeSense) -> bytes:
    """The block descriptor (SBC-3 §6.5.2), long where asked."""
    blocks = unit.capacity.blocks
    if asked.long_lba_accepted:
        return blocks.to_bytes(8, "big") + bytes(4) + unit.block_bytes.to_bytes(4, "big")
    return min(blocks, 0xFFFF_FFFF).to_bytes(4, "big") + unit.block_bytes.to_bytes(4, "big")
