"""A logical unit: a device, its identity, and the sessions that want to hear of its changes."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import trio

from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry
from orion_iscsifs.errors import MediumError, OrionError, OutOfRange, ScsiError, WriteProtected
from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.capacity import Capacity
from orion_iscsifs.scsi.lun import decode_lun, encode_lun
from orion_iscsifs.scsi.sense import SenseData, SenseKey, Status
from orion_iscsifs.target.backing import InlineDevice, ThresholdDevice
from orion_iscsifs.target.reservations import Reservations

MODE_PARAMETERS_CHANGED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x01)
INQUIRY_DATA_CHANGED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x3F, 0x03)
SOFT_THRESHOLD_REACHED: Final = SenseData(SenseKey.UNIT_ATTENTION, 0x38, 0x07)
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
    if isinstance(error, ScsiError):
        lba = error.lba if isinstance(error, MediumError) else None
        return SenseData(error.sense_key, error.asc, error.ascq, information=lba)
    return sense.WRITE_ERROR if writing else sense.UNRECOVERED_READ_ERROR


AttentionListener = Callable[[int, SenseData], None]
"""Told the number of the unit and the unit attention condition that it establishes."""


@dataclass(slots=True, eq=False)
class LogicalUnit:
    """`serial` and `naa` derive from `identity`: stable across restarts.

    By default that is the target's name and the number.
    """

    number: int
    target_name: str
    device: BlockDevice
    transfer_bytes_max: int
    siblings: "Units"
    identity: str = ""
    running: int = 0
    """Commands of any session that the device is carrying out in a task of their own."""
    removed: bool = False
    reservations: Reservations = field(default_factory=Reservations)
    inline: InlineDevice | None = field(init=False)
    serial: str = field(init=False)
    naa: bytes = field(init=False)
    capacity: Capacity = field(init=False)
    block_bytes: int = field(init=False)
    _geometry: Geometry = field(init=False)
    _idle: trio.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        identity = self.identity or f"{self.target_name},{self.number}"
        digest = hashlib.sha256(identity.encode()).digest()
        self.serial = digest[:8].hex()
        self.naa = bytes((_NAA_LOCALLY_ASSIGNED << 4 | digest[8] & 0x0F,)) + digest[9:16]
        self.inline = self.device if isinstance(self.device, InlineDevice) else None
        self._adopt(self.device.geometry)
        self.device.on_geometry_change(self._geometry_changed)
        if isinstance(self.device, ThresholdDevice):
            self.device.on_threshold(self._threshold_reached)

    @property
    def geometry(self) -> Geometry:
        return self.device.geometry

    @property
    def provisioning(self) -> bool:
        """UNMAP and friends; they always leave zeroes (`write_zeroes`), hence LBPRZ."""
        return self.geometry.discard_granularity_bytes > 0

    def _adopt(self, geometry: Geometry) -> None:
        self._geometry = geometry
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
        old = self._geometry
        self._adopt(geometry)
        if geometry.size_bytes != old.size_bytes:
            self._announce(sense.CAPACITY_CHANGED)
        if geometry.read_only is not old.read_only:
            # The WP bit is in the mode parameter header (SBC-3 §6.5.1).
            self._announce(MODE_PARAMETERS_CHANGED)
        if geometry != replace(old, size_bytes=geometry.size_bytes, read_only=geometry.read_only):
            self._announce(INQUIRY_DATA_CHANGED)

    def _threshold_reached(self) -> None:
        self._announce(SOFT_THRESHOLD_REACHED)

    def _announce(self, attention: SenseData) -> None:
        if not self.removed:
            self.siblings.announce(self.number, attention)

    # -- commands that wait ---------------------------------------------------------------------

    def ended(self) -> None:
        """One of the commands that `running` counts is over."""
        self.running -= 1
        if self._idle is not None and not self.running:
            self._idle.set()

    async def settle(self) -> None:
        """Wait until no command is running; new ones are the caller's business."""
        if self.running:
            if self._idle is None:
                self._idle = trio.Event()
            await self._idle.wait()


class Units:
    """The logical units of one target, found by their 64-bit LUN."""

    def __init__(
        self,
        target_name: str,
        devices: Mapping[int, BlockDevice],
        transfer_bytes_max: int,
        *,
        lasting_reservations: bool = False,
    ) -> None:
        self._lasting_reservations = lasting_reservations
        self._target_name = target_name
        self._transfer_bytes_max = transfer_bytes_max
        self.listeners: list[AttentionListener] = []
        """One of each session."""
        self.by_number: dict[int, LogicalUnit] = {}
        self._by_lun: dict[int, LogicalUnit] = {}
        for number, device in devices.items():
            self.add(number, device)

    def add(self, number: int, device: BlockDevice, identity: str = "") -> LogicalUnit:
        """A new unit; sessions hear of it by REPORTED LUNS DATA HAS CHANGED on the others."""
        assert number not in self.by_number
        unit = LogicalUnit(
            number, self._target_name, device, self._transfer_bytes_max, self, identity
        )
        unit.reservations.lasting = self._lasting_reservations
        self._luns_changed()
        self.by_number = dict(sorted({**self.by_number, number: unit}.items()))
        self._by_lun[encode_lun(number)] = unit
        self.announce(number, sense.POWER_ON)
        return unit

    def remove(self, number: int) -> LogicalUnit:
        """The unit is gone: commands to its number are answered LOGICAL UNIT NOT SUPPORTED."""
        unit = self.by_number.pop(number)
        del self._by_lun[encode_lun(number)]
        unit.removed = True
        self._luns_changed()
        return unit

    def _luns_changed(self) -> None:
        for number in self.by_number:
            self.announce(number, sense.REPORTED_LUNS_CHANGED)

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
