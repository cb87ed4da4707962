"""A logical unit: a device, its identity, and the sessions that want to hear of its changes."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry
from orion_iscsifs.errors import OrionError, OutOfRange, WriteProtected
from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.capacity import Capacity
from orion_iscsifs.scsi.lun import decode_lun, encode_lun
from orion_iscsifs.scsi.sense import SenseData, Status
from orion_iscsifs.target.backing import InlineDevice

_NAA_LOCALLY_ASSIGNED: Final = 3


@dataclass(slots=True)
class Outcome:
    """How a SCSI command ended. `data` is Data-In."""

    status: int = Status.GOOD
    sense: SenseData | None = None
    data: Buffer = b""


GOOD: Final = Outcome()
"""Shared: nobody changes an Outcome once it is made."""


def check_condition(reason: SenseData) -> Outcome:
    return Outcome(Status.CHECK_CONDITION, reason)


class Refused(Exception):
    """Ends a command early with CHECK CONDITION; never leaves `catalog`."""

    def __init__(self, reason: SenseData) -> None:
        super().__init__(reason.describe())
        self.reason = reason


def sense_of(error: OrionError, *, writing: bool) -> SenseData:
    """What a device's refusal looks like on the wire."""
    if isinstance(error, WriteProtected):
        return sense.WRITE_PROTECTED
    if isinstance(error, OutOfRange):
        return sense.LBA_OUT_OF_RANGE
    return sense.WRITE_ERROR if writing else sense.UNRECOVERED_READ_ERROR


AttentionListener = Callable[[int, SenseData], None]
"""Told the number of the unit and the unit attention condition that it establishes."""


@dataclass(slots=True, eq=False)
class LogicalUnit:
    """`serial` and `naa` derive from the target's name and the number: stable across restarts."""

    number: int
    target_name: str
    device: BlockDevice
    transfer_bytes_max: int
    siblings: "Units"
    inline: InlineDevice | None = field(init=False)
    serial: str = field(init=False)
    naa: bytes = field(init=False)
    capacity: Capacity = field(init=False)
    block_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(f"{self.target_name},{self.number}".encode()).digest()
        self.serial = digest[:8].hex()
        self.naa = bytes((_NAA_LOCALLY_ASSIGNED << 4 | digest[8] & 0x0F,)) + digest[9:16]
        self.inline = self.device if isinstance(self.device, InlineDevice) else None
        self._adopt(self.device.geometry)
        self.device.on_geometry_change(self._geometry_changed)

    @property
    def geometry(self) -> Geometry:
        return self.device.geometry

    @property
    def provisioning(self) -> bool:
        """UNMAP and friends; they always leave zeroes (`write_zeroes`), hence LBPRZ."""
        return self.geometry.discard_granularity_bytes > 0

    def _adopt(self, geometry: Geometry) -> None:
        ratio = max(1, geometry.physical_block_bytes // geometry.logical_block_bytes)
        self.block_bytes = geometry.logical_block_bytes
        self.capacity = Capacity(
            blocks=geometry.size_bytes // geometry.logical_block_bytes,
            block_bytes=geometry.logical_block_bytes,
            blocks_per_physical_exponent=ratio.bit_length() - 1,
            provisioning=self.provisioning,
            reads_zeroes=self.provisioning,
        )

    def _geometry_changed(self, geometry: Geometry) -> None:
        self._adopt(geometry)
        self.siblings.announce(self.number, sense.CAPACITY_CHANGED)


class Units:
    """The logical units of one target, found by their 64-bit LUN."""

    def __init__(
        self, target_name: str, devices: Mapping[int, BlockDevice], transfer_bytes_max: int
    ) -> None:
        self.by_number = {
            number: LogicalUnit(number, target_name, device, transfer_bytes_max, self)
            for number, device in sorted(devices.items())
        }
        self._by_lun = {encode_lun(number): unit for number, unit in self.by_number.items()}
        self.listeners: list[AttentionListener] = []
        """One of each session."""

    def find(self, lun: int) -> LogicalUnit | None:
        unit = self._by_lun.get(lun)
        if unit is None:
            # An initiator may use flat addressing for a small number too.
            number = decode_lun(lun)
            unit = None if number is None else self.by_number.get(number)
        return unit

    def announce(self, number: int, attention: SenseData) -> None:
        """Establish a unit attention condition for every session."""
        for listener in self.listeners:
            listener(number, attention)
