"""One writer: what a LUN that is mounted read-write holds as long as it is mounted.

First the lock of this host (`initiator.claim`), which may have to wait for the last flush of an
older mount; then the device's persistent reservation (`initiator.reservation`) against other hosts.
A read-only mount, or one with `reserve=off`, takes neither.

A worker that takes a mount over goes on with the reservation of the one before, or not at all: if
somebody else may have written meanwhile, what the kernel still has to write may not be written.
While it is still trying, the registrations stay at the device.

A reservation may also outlast the mount (`Exclusive.stay`): it proves to the next one that nobody
else has written meanwhile.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from orion_iscsifs.config import MountConfig, ReserveMode
from orion_iscsifs.config.places import create_private, state_dir
from orion_iscsifs.custody import custody
from orion_iscsifs.errors import PathInaccessible, ReservationConflict
from orion_iscsifs.initiator.claim import Claim, hold_lun
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.keys import LunKeys
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.probe import identify
from orion_iscsifs.initiator.reservation import Reservation
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.standing import Seen

_PATIENCE_MIN_S = 10.0


class Exclusive:
    """The claim of one disk, and its reservation on each path."""

    def __init__(self, claim: Claim, config: MountConfig, keys: LunKeys) -> None:
        self._claim = claim
        self._config = config
        self._keys = keys
        self._living: set[int] = set()
        self._reservations: list[Reservation] = []
        self._listeners: list[Callable[[], None]] = []
        self._stays = False
        self._given_back = False

    async def join(self, disk: LunDevice) -> Reservation:
        """Over one more path, the first or a further one. Raises BusyError or a DeviceError."""
        reservation = Reservation(
            disk.session, disk.number, self._keys, self._config.reserve, self._living
        )
        reservation.on_generation = self._tell
        self._reservations.append(reservation)
        try:
            await reservation.take(resumes=self._claim.was_reserved)
            if reservation.is_held:
                self._claim.reserved()
            # The disk may have been another mount's until now. A path in standby can't tell.
            with suppress(PathInaccessible):
                await disk.refresh()
        except BaseException:
            self._reservations.remove(reservation)
            if not custody.is_takeover:
                await reservation.release()
            raise
        reservation.watch(disk)
        return reservation

    @property
    def first(self) -> Reservation:
        """On the path that the disk was opened on."""
        return self._reservations[0]

    async def release(self) -> None:
        """On every path. The keys of those that are lost are withdrawn by way of another one."""
        living = [one for one in self._reservations if one.is_reachable]
        for lost in self._reservations:
            if lost not in living and living:
                await living[0].withdraw(lost)
        while self._reservations:
            await self._reservations.pop().release()

    @property
    def is_held(self) -> bool:
        """The device keeps all others from writing."""
        return self.first.is_held

    def stay(self) -> None:
        """Leave the reservation at the device when the mount ends, unless it is `give_back`."""
        self._stays = True

    def give_back(self) -> None:
        """The reservation ends with the mount in any case: another host is to have the LUN."""
        self._given_back = True

    async def end(self) -> None:
        """The mount has ended."""
        if self._stays and not self._given_back:
            while self._reservations:
                self._reservations.pop().leave()
        else:
            await self.release()

    @property
    def generation(self) -> int:
        """PRGENERATION, as far as we have seen it; -1: the LUN is not reserved."""
        return max(one.generation for one in self._reservations)

    def on_generation(self, listener: Callable[[], None]) -> None:
        """Call `listener` when that changes."""
        self._listeners.append(listener)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def unmounting(self) -> None:
        """A new mount of this host may wait for this one from now on."""
        self._claim.unmounting()

    def status(self) -> dict[str, Any] | None:
        """`reservation` of INTERFACE §7: that of the first path, unless another one is lost."""
        found = [reservation.status() for reservation in self._reservations]
        lost = [status for status in found if status["state"] == "lost"]
        return next(iter(lost or found), None)


def wanted(config: MountConfig) -> bool:
    """Whether this mount is to be the only writer."""
    return config.reserve.mode is not ReserveMode.OFF and not config.fuse.read_only


async def open_disk(session: Session, number: int, config: MountConfig) -> LunDevice:
    """The disk; raises LunNotFound, NotADisk, or another DeviceError.

    One that is reserved for another initiator even against reading is taken over with `preempt`,
    and is otherwise refused in words that name who has it (BusyError).
    """
    read_only = config.fuse.read_only
    try:
        return await LunDevice.open(session, number, read_only=read_only)
    except ReservationConflict:
        if not wanted(config):
            raise
        name = await identify(LogicalUnit(session, number))
        await _reservation(session, number, name, config).take()
    return await LunDevice.open(session, number, read_only=read_only)


@asynccontextmanager
async def hold(disk: LunDevice, config: MountConfig, mountpoint: str) -> AsyncIterator[Exclusive]:
    """`disk` is ours alone for the time of the body; raises BusyError or a DeviceError."""
    timeout_s = config.session.replacement_timeout_s
    patience_s = float("inf") if timeout_s < 0 else max(timeout_s, _PATIENCE_MIN_S)
    name = lun_name(disk)
    async with hold_lun(
        create_private(state_dir()), name, mountpoint, patience_s=patience_s
    ) as claim:
        exclusive = Exclusive(claim, config, LunKeys.load(create_private(state_dir()), name))
        try:
            await exclusive.join(disk)
            yield exclusive
        finally:
            if not custody.is_takeover:
                await exclusive.end()


async def look(disk: LunDevice, config: MountConfig) -> Seen | None:
    """The LUN's reservation, for a mount that takes none; None: the device has none to tell of."""
    return await _reservation(disk.session, disk.number, disk.info.name, config).look()


def _reservation(session: Session, number: int, name: str, config: MountConfig) -> Reservation:
    keys = LunKeys.load(create_private(state_dir()), _name(session, number, name))
    return Reservation(session, number, keys, config.reserve)


def lun_name(disk: LunDevice) -> str:
    """What tells this LUN from all others: its designator, or else where it is."""
    return _name(disk.session, disk.number, disk.info.name)


def _name(session: Session, number: int, name: str) -> str:
    """What tells this LUN from all others: its designator, or else where it is."""
    return name or f"{session.nexus.target_name} LUN {number}"
