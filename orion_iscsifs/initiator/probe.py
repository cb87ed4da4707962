"""What a logical unit is and what it can do: asked once at mount, again when it says so."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.errors import DeviceError, LunNotFound, NotADisk
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.scsi import cdb, inquiry, mode
from orion_iscsifs.scsi.capacity import Capacity, decode_capacity_10, decode_capacity_16
from orion_iscsifs.scsi.inquiry import (
    BlockLimits,
    Designator,
    Provisioning,
    StandardInquiry,
    VpdPage,
)
from orion_iscsifs.scsi.lun import decode_lun, decode_report_luns, report_luns_length
from orion_iscsifs.scsi.mode import ModeParameters
from orion_iscsifs.scsi.provisioning import Form, Granules

log = logging.getLogger(__name__)

TRANSFER_BYTES_MAX: Final = 1 << 20
"""Our own limit for one READ or WRITE when the device states none or a larger one."""
_ALLOCATION_BYTES: Final = 252
_REPORT_LUNS_BYTES: Final = 8 + 256 * 8
_REPORT_LUNS_BYTES_MAX: Final = 8 + 16384 * 8
"""All that one level of addressing can name (SAM-5 §4.7)."""
_QUALIFIERS_ABSENT: Final = frozenset({1, inquiry.QUALIFIER_NOT_CAPABLE})
"""001b: nothing is connected here, as LIO says of a LUN that is not mapped (SPC-4 §6.6.2)."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LunInfo:
    """A disk, as it describes itself."""

    identity: StandardInquiry
    capacity: Capacity
    mode: ModeParameters
    limits: BlockLimits
    provisioning: Provisioning
    name: str = ""
    """What tells this disk from others: its designator (page 83h), else its serial number."""

    def is_other_disk(self, now: "LunInfo") -> bool:
        """Whether `now` describes a disk that can't be this one. A missing name proves nothing."""
        renamed = bool(self.name and now.name) and self.name != now.name
        return renamed or self.capacity.block_bytes != now.capacity.block_bytes

    @property
    def transfer_bytes_max(self) -> int:
        """Longest READ or WRITE: the device's limit, or ours."""
        stated = self.limits.transfer_blocks_max * self.capacity.block_bytes
        most = min(stated or TRANSFER_BYTES_MAX, TRANSFER_BYTES_MAX)
        return most - most % self.capacity.block_bytes

    @property
    def transfer_alignment_bytes(self) -> int:
        """Parts of a long transfer begin at multiples of this, counted from the start of the first
        aligned physical block (SBC-3 §4.6): the device's OPTIMAL TRANSFER LENGTH GRANULARITY."""
        granularity = self.limits.optimal_transfer_granularity * self.capacity.block_bytes
        aligned = max(granularity, self.capacity.physical_block_bytes)
        return aligned if aligned <= self.transfer_bytes_max else self.capacity.block_bytes

    @property
    def granules(self) -> Granules:
        return Granules.of(self.limits.optimal_unmap_granularity, self.limits.unmap_alignment)

    @property
    def reads_zeroes(self) -> bool:
        """LBPRZ: what is unmapped reads as zeroes."""
        return self.capacity.reads_zeroes or self.provisioning.reads_zeroes

    @property
    def _fits_10(self) -> bool:
        return self.capacity.blocks <= 1 << 32

    def discard_forms(self) -> list[Form]:
        """The commands that the device says it takes, the best first."""
        said, fits = self.provisioning, self._fits_10
        if not self.capacity.provisioning:
            return []
        forms = {
            Form.UNMAP: said.unmap,
            Form.WRITE_SAME_16_UNMAP: said.write_same_16_unmap,
            Form.WRITE_SAME_10_UNMAP: said.write_same_10_unmap and fits,
        }
        return [form for form, takes in forms.items() if takes]

    def zero_forms(self) -> list[Form]:
        """The same for zeroes that can be relied on."""
        unmapping = [form for form in self.discard_forms() if form is not Form.UNMAP]
        if not (self.limits.write_same_blocks_max or unmapping):
            return []  # Nothing says that it has WRITE SAME at all.
        plain = [Form.WRITE_SAME_16] + [Form.WRITE_SAME_10] * self._fits_10
        return (unmapping if self.reads_zeroes else []) + plain

    def geometry(self, *, read_only: bool) -> Geometry:
        block = self.capacity.block_bytes
        optimal = self.limits.optimal_transfer_blocks * block
        granularity = self.granules.blocks * block
        return Geometry(
            size_bytes=self.capacity.size_bytes,
            logical_block_bytes=block,
            physical_block_bytes=self.capacity.physical_block_bytes,
            optimal_transfer_bytes=min(optimal or TRANSFER_BYTES_MAX, self.transfer_bytes_max),
            transfer_bytes_max=self.transfer_bytes_max,
            alignment_bytes=self.capacity.lowest_aligned_lba * block,
            discard_granularity_bytes=granularity if self.discard_forms() else 0,
            discard_alignment_bytes=self.granules.alignment * block,
            zeroes_after_discard=self.reads_zeroes,
            read_only=read_only or self.mode.write_protected or self.mode.software_write_protect,
            write_cache=self.mode.write_cache,
            fua=self.mode.dpofua,
        )


async def report_luns(unit: LogicalUnit) -> list[int]:
    """The numbers of all logical units of the target (SPC-4 §6.33), in its order.

    Addresses of more than one level are left out: nothing here can name them.
    """
    size = _REPORT_LUNS_BYTES
    while True:
        data = await _ask(unit, "REPORT LUNS", cdb.report_luns(size), size)
        needed = report_luns_length(data)
        if needed <= size or size == _REPORT_LUNS_BYTES_MAX:
            luns = decode_report_luns(data)
            unnamed = [f"{lun:016x}" for lun in luns if decode_lun(lun) is None]
            if unnamed:
                log.info("LUNs with addresses of another kind are left out: %s", unnamed[:8])
            numbers = (decode_lun(lun) for lun in luns)
            return [number for number in numbers if number is not None]
        size = min(needed, _REPORT_LUNS_BYTES_MAX)


async def identify(unit: LogicalUnit) -> str:
    """`LunInfo.name` alone: a device tells it whoever has reserved it (SPC-4 table 51)."""
    await _standard_inquiry(unit)
    return await _name(unit, await _pages(unit))


async def probe(unit: LogicalUnit) -> LunInfo:
    """Everything about the unit; raises LunNotFound, NotADisk, or a command's DeviceError."""
    identity = await _standard_inquiry(unit)
    await unit.command("TEST UNIT READY", cdb.test_unit_ready())
    pages = await _pages(unit)
    limits = BlockLimits()
    if VpdPage.BLOCK_LIMITS in pages:
        limits = await _optional(unit, VpdPage.BLOCK_LIMITS, inquiry.decode_block_limits, limits)
    provisioning = Provisioning()
    if VpdPage.LOGICAL_BLOCK_PROVISIONING in pages:
        provisioning = await _optional(
            unit,
            VpdPage.LOGICAL_BLOCK_PROVISIONING,
            inquiry.decode_provisioning,
            provisioning,
        )
    return LunInfo(
        identity=identity,
        capacity=await read_capacity(unit),
        mode=await _mode(unit),
        limits=limits,
        provisioning=provisioning,
        name=await _name(unit, pages),
    )


async def _standard_inquiry(unit: LogicalUnit) -> StandardInquiry:
    """Raises LunNotFound or NotADisk."""
    identity = inquiry.decode_inquiry(await _ask(unit, "INQUIRY", cdb.inquiry()))
    if identity.qualifier in _QUALIFIERS_ABSENT:
        raise LunNotFound(
            f"LUN {unit.number}: the target has no such LUN",
            advice="mount the target without a LUN to see all of its disks",
        )
    if not identity.is_disk:
        raise NotADisk(
            f"LUN {unit.number}: not a disk (peripheral device type {identity.device_type:#04x})",
            advice="mount another LUN, or the target without one to see its disks",
        )
    return identity


async def _pages(unit: LogicalUnit) -> frozenset[int]:
    """Which vital product data pages there are."""
    return await _optional(
        unit, VpdPage.SUPPORTED, inquiry.decode_supported_pages, frozenset[int]()
    )


async def _name(unit: LogicalUnit, pages: frozenset[int]) -> str:
    if VpdPage.DEVICE_IDENTIFICATION in pages:
        designators = await _optional(
            unit, VpdPage.DEVICE_IDENTIFICATION, inquiry.decode_designators, list[Designator]()
        )
        best = inquiry.best_designator(designators)
        if best is not None:
            return best.text
    if VpdPage.UNIT_SERIAL_NUMBER in pages:
        return await _optional(unit, VpdPage.UNIT_SERIAL_NUMBER, inquiry.decode_serial_number, "")
    return ""


async def read_capacity(unit: LogicalUnit) -> Capacity:
    """READ CAPACITY(16); devices that do not know it get READ CAPACITY(10)."""
    try:
        data = await _ask(unit, "READ CAPACITY(16)", cdb.read_capacity_16(), 32)
        return decode_capacity_16(data)
    except DeviceError as refused:
        data = await _ask(unit, "READ CAPACITY(10)", cdb.read_capacity_10(), 8)
        capacity = decode_capacity_10(data)
        if capacity is None:
            raise refused from None
        return capacity


async def _mode(unit: LogicalUnit) -> ModeParameters:
    """The caching page and write protection; a device that hides them gets cautious defaults."""
    command = cdb.mode_sense_6(mode.ALL_PAGES)
    try:
        return mode.decode_mode_sense_6(await _ask(unit, "MODE SENSE(6)", command, 255))
    except DeviceError:
        return ModeParameters()


async def _optional(
    unit: LogicalUnit, page: VpdPage, decode: Callable[[bytes], _T], default: _T
) -> _T:
    """A vital product data page that the device may lack or get wrong."""
    try:
        command = cdb.inquiry(page, _ALLOCATION_BYTES)
        return decode(await _ask(unit, f"INQUIRY page {page:02X}h", command))
    except DeviceError:
        return default


async def _ask(
    unit: LogicalUnit, what: str, command: bytes, size: int = _ALLOCATION_BYTES + 3
) -> bytes:
    """The data that a command returns, as far as it came."""
    buffer = bytearray(size)
    count = await unit.read(what, command, memoryview(buffer))
    return bytes(buffer[:count])
