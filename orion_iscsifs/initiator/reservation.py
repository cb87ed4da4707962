"""The persistent reservation of one LUN over one path: no other host writes while we may.

`standing` decides; here is who asks the device and does it. Every PERSISTENT RESERVE OUT may be
sent twice (the answer to the first one may be lost with its connection), and another host may act
at the same time: so nothing is concluded from an answer, the device is asked again after each step.

After every new login, and when the device speaks of preempted reservations or answers RESERVATION
CONFLICT, the standing is checked before anything is written. A reservation that is lost stays lost:
writes fail with ReservationConflict, reads go on, and what is unwritten stays.
"""

import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

import trio

from orion_iscsifs.config import ReserveConfig, ReserveMode
from orion_iscsifs.errors import (
    BusyError,
    DeviceError,
    NotSupported,
    OrionError,
    ReservationConflict,
    ScsiError,
)
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.keys import LunKeys
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.standing import (
    OUR_TYPE,
    Act,
    Own,
    Seen,
    Step,
    foreign_key,
    is_lost,
    next_step,
)
from orion_iscsifs.scsi import reservation as codec
from orion_iscsifs.scsi.reservation import InAction, OutAction, OutParameters
from orion_iscsifs.scsi.sense import SenseKey

log = logging.getLogger(__name__)

_STEPS_MAX: Final = 64
_RACE_S: Final = 3.0
"""How long a host that lost the race for a reservation may take to withdraw its key."""
_RACE_STEP_S: Final = 0.1
_IN_BYTES: Final = 2048
_IN_BYTES_MAX: Final = 0xFFFF

_T = TypeVar("_T")


class Reservation:
    """Of one LUN. `take` it, `watch` the disk, then `release` it."""

    def __init__(
        self,
        session: Session,
        number: int,
        keys: LunKeys,
        config: ReserveConfig,
        living: set[int] | None = None,
    ) -> None:
        """`living`: the keys of all paths of this mount to the LUN, shared by their reservations,
        which put them there and take them away."""
        self._disk: LunDevice | None = None
        self._session = session
        self._number = number
        self._config = config
        self._keys = keys
        self.key: Final = keys.of(session.nexus.isid)
        self._living = set[int]() if living is None else living
        self._unit = LogicalUnit(session, number)
        self._state = "off"
        self._aptpl = False
        self.found: Seen | None = None
        """What was there before `take` changed anything; None: not known."""
        self.generation = -1
        """PRGENERATION when it was last seen to be ours; -1: not known."""
        self.on_generation: Callable[[], None] = lambda: None
        """Called when that has changed."""
        self._loss: ReservationConflict | None = None
        self._checking = trio.Lock()
        self._gate = trio.Lock()
        """Held while this path's registration may not come back: another one ends its nexus."""

    @property
    def _own(self) -> Own:
        return Own(self._keys, self.key, frozenset(self._living - {self.key}))

    @property
    def is_held(self) -> bool:
        return self._state == "held"

    def status(self) -> dict[str, Any]:
        """`reservation` of INTERFACE §7."""
        key = f"{self.key:#018x}" if self._state in {"held", "lost"} else None
        return {"state": self._state, "key": key}

    # -- taking and giving back --------------------------------------------------------------

    async def take(self, *, resumes: bool = False) -> None:
        """Register and reserve. Raises BusyError, which names who has it, or a DeviceError.

        A device without persistent reservations is used without one, unless they are required.
        `resumes`: an earlier process of this mount had it; ReservationConflict if it was lost.
        """
        try:
            await self._ask_abilities()
            if resumes:
                await self._check_kept()
            await self._converge(self._unit, preempt=self._config.preempt)
        except (NotSupported, ScsiError) as error:
            if not _means_unsupported(error):
                raise
            self._without(error)
            return
        self._state = "held"
        self._living.add(self.key)

    def watch(self, disk: LunDevice) -> None:
        """From now on `disk` writes only as long as the reservation stands."""
        if self._state == "held":
            self._disk = disk
            disk.unit.reservation_news = self._news
            self._session.checks.append(self._check_after_login)

    def _without(self, error: DeviceError) -> None:
        if self._config.mode is ReserveMode.REQUIRE:
            raise NotSupported(
                f"LUN {self._number}: the device has no persistent reservations",
                advice="mount it without reserve=require",
            ) from error
        self._state = "unsupported"
        log.info("LUN %d is not reserved: %s", self._number, error)

    async def release(self) -> None:
        """Withdraw the key, which ends the reservation. What fails is logged: the key is known to
        be ours at the next mount."""
        if not self.leave():
            return
        try:
            if not self._living:
                await self._end_reservation()
            await self._unregister()
        except OrionError as error:
            log.warning("LUN %d: the reservation is left behind: %s", self._number, error)

    async def look(self) -> Seen | None:
        """What is there, without any change; None: the device has no persistent reservations."""
        try:
            return await self._look(self._unit)
        except (NotSupported, ScsiError) as error:
            if not _means_unsupported(error):
                raise
            return None

    def leave(self) -> bool:
        """Do not look after it any more; at the device it stays. Whether there was one."""
        if self._disk is not None:
            self._session.checks.remove(self._check_after_login)
            self._disk = None
        if self._state != "held":
            return False
        self._state = "off"
        self._living.discard(self.key)
        return True

    @property
    def is_reachable(self) -> bool:
        """Whether the device can be asked on this path now."""
        return self._session.state is State.LOGGED_IN

    async def withdraw(self, lost: "Reservation") -> None:
        """Take back the key of another path, which can't do it itself."""
        if not (self.is_held and lost.is_held):
            return
        lost._state = "off"
        self._living.discard(lost.key)
        try:
            await self._preempt(self._unit, lost.key)
        except OrionError as error:
            log.warning("LUN %d: a key is left behind: %s", self._number, error)

    # -- looking after it --------------------------------------------------------------------

    async def _check_after_login(self) -> None:
        """In `Session.checks`: raises what is the connection's fault only."""
        disk = self._watched
        disk.write_guard = self._prove
        if disk.is_refused or self._loss is not None:
            # Not our disk, or lost for good. The guard is for when it is accepted again.
            return
        unit = LogicalUnit(self._session, self._number, urgent=True)
        try:
            async with self._gate:
                await self._check(unit)
        except DeviceError as error:
            if self._loss is None:
                log.error("LUN %d: its reservation can't be checked: %s", self._number, error)
            disk.unit.fail_held_writes(error)

    async def _news(self) -> None:
        """The device speaks of reservations: prove ours before the next write."""
        self._watched.write_guard = self._prove
        await self._prove()

    @property
    def _watched(self) -> LunDevice:
        assert self._disk is not None
        return self._disk

    async def _prove(self) -> None:
        """Before a write: raises ReservationConflict when the reservation is lost."""
        # The check may have been made while the lock was waited for.
        async with self._checking:
            if self._loss is None and self._watched.write_guard is not None:
                await self._check(self._unit)
        if self._loss is not None:
            raise self._loss.with_traceback(None)

    async def _check(self, unit: LogicalUnit) -> None:
        """Raises ReservationConflict when it is lost by now."""
        seen = await self._look(unit)
        if is_lost(seen, self._own, persistent=self._aptpl):
            key = foreign_key(seen, self._own)
            whom = "another initiator" if key is None else await self._named(unit, key)
            raise self._lost(f"LUN {self._number}: the reservation was taken by {whom}")
        try:
            await self._converge(unit, keep=True)
        except BusyError as error:
            raise self._lost(str(error)) from None
        self._check_loss()
        self._watched.write_guard = None

    async def _check_kept(self) -> None:
        """As after a new login, when the keys of this mount are known from the device alone."""
        seen = await self._look(self._unit)
        ours = frozenset(key for key in seen.keys if self._keys.is_ours(key))
        own = Own(self._keys, self.key, ours - {self.key})
        if is_lost(seen, own, persistent=self._aptpl):
            key = foreign_key(seen, own)
            whom = "another initiator" if key is None else await self._named(self._unit, key)
            raise self._lost(f"LUN {self._number}: the reservation was taken by {whom}")

    def _check_loss(self) -> None:
        """Another check, after a later login, may have found it lost meanwhile."""
        if self._loss is not None:
            raise self._loss.with_traceback(None)

    def _lost(self, what: str) -> ReservationConflict:
        """For good."""
        self._state = "lost"
        self._loss = ReservationConflict(
            what, advice="nothing more is written; umount --force gives up what is unwritten"
        )
        log.error("%s", self._loss.line)
        return self._loss

    async def end_nexus_of(self, lost: "Reservation", epoch: int) -> bool:
        """Take the registration of a path that is lost since login number `epoch`.

        True: what that path had in flight is aborted, and what may still arrive from it ends with
        RESERVATION CONFLICT (SPC-4 §5.13.11.2.6). False: the device can't do that, or there is no
        reservation. Raises an OrionError of this path.
        """
        if not (self.is_held and lost.is_held):
            return False
        async with lost._gate:
            # It may have logged in meanwhile; it can't have registered since, we hold its gate.
            if lost._session.counters.logins != epoch:
                return True
            parameters = OutParameters(key=self.key, service_action_key=lost.key)
            try:
                await self._out(self._unit, OutAction.PREEMPT_AND_ABORT, parameters)
            except (NotSupported, ScsiError) as error:
                if not _means_unsupported(error):
                    raise
                return False
            seen = await self._look(self._unit)
            return lost.key not in seen.keys and self.key in seen.keys

    # -- the device --------------------------------------------------------------------------

    async def _converge(
        self, unit: LogicalUnit, *, preempt: bool = False, keep: bool = False
    ) -> None:
        """Step by step until it is ours; raises BusyError, our key withdrawn, when it can't be."""
        patience = trio.current_time() + _RACE_S
        registered = False
        for _ in range(_STEPS_MAX):
            seen = await self._look(unit)
            self._check_loss()
            self.found = self.found or seen
            step = next_step(
                seen,
                self._own,
                registered=registered,
                preempt=preempt,
                keep=keep,
            )
            if step.act is Act.DONE:
                if seen.generation != self.generation:
                    self.generation = seen.generation
                    self.on_generation()
                return
            if step.act is Act.WAIT and trio.current_time() < patience:
                await trio.sleep(_RACE_STEP_S)
            elif step.act in {Act.WAIT, Act.REFUSE}:
                await self._refuse(unit, step.key, registered=registered)
            elif await self._do(unit, step):
                registered = registered or step.act is Act.REGISTER
        raise BusyError(f"LUN {self._number}: other hosts keep changing its reservation")

    async def _do(self, unit: LogicalUnit, step: Step) -> bool:
        """One change. False: a conflict; the next look tells why."""
        own = self.key
        try:
            if step.act is Act.REGISTER:
                parameters = OutParameters(service_action_key=own, aptpl=self._aptpl)
                await self._out(unit, OutAction.REGISTER_AND_IGNORE_EXISTING_KEY, parameters)
            elif step.act is Act.RESERVE:
                await self._out(unit, OutAction.RESERVE, OutParameters(key=own))
            else:
                await self._preempt(unit, step.key)
        except ReservationConflict as error:
            log.info("%s", error)
            return False
        return True

    async def _preempt(self, unit: LogicalUnit, key: int) -> None:
        """Of another host, its commands too: none of them may land after ours."""
        parameters = OutParameters(key=self.key, service_action_key=key)
        if not self._keys.is_ours(key):
            whom = await self._named(unit, key)
            log.warning("LUN %d: its reservation is taken from %s", self._number, whom)
            try:
                await self._out(unit, OutAction.PREEMPT_AND_ABORT, parameters)
            except (NotSupported, ScsiError) as error:
                if not _means_unsupported(error):
                    raise
                log.info("%s", error)  # tgt has PREEMPT alone
            else:
                return
        await self._out(unit, OutAction.PREEMPT, parameters)

    async def _refuse(self, unit: LogicalUnit, key: int, *, registered: bool) -> None:
        whom = await self._named(unit, key)
        if registered:
            await self._unregister(unit)
        raise BusyError(
            f"LUN {self._number}: reserved by another initiator: {whom}",
            advice="stop it there, mount with -o ro, or take the LUN over with -o preempt",
        )

    async def _end_reservation(self) -> None:
        """While we may: it should end with the last registration, but istgt keeps it, for nobody,
        if it was made in an earlier session. What fails here may still end that way."""
        try:
            await self._out(self._unit, OutAction.RELEASE, OutParameters(key=self.key))
        except (NotSupported, ScsiError, ReservationConflict) as error:
            log.info("%s", error)

    async def _unregister(self, unit: LogicalUnit | None = None) -> None:
        parameters = OutParameters(key=self.key)
        await self._out(unit or self._unit, OutAction.REGISTER, parameters)

    async def _ask_abilities(self) -> None:
        try:
            found = await self._in(
                self._unit, InAction.REPORT_CAPABILITIES, 8, codec.decode_capabilities
            )
        except (NotSupported, ScsiError):
            return  # SPC-2 has reservations, and not this question.
        self._aptpl = found.persist_capable

    async def _look(self, unit: LogicalUnit) -> Seen:
        told = await self._in(unit, InAction.READ_KEYS, _IN_BYTES, codec.decode_keys)
        held = await self._in(unit, InAction.READ_RESERVATION, _IN_BYTES, codec.decode_reservation)
        return Seen(told.keys, held.holder, told.generation)

    async def _named(self, unit: LogicalUnit, key: int) -> str:
        """The holder of a key: `iqn... (key 0x...)`."""
        try:
            found = await self._in(
                unit, InAction.READ_FULL_STATUS, _IN_BYTES, codec.decode_full_status
            )
        except DeviceError:
            registrations: tuple[codec.Registration, ...] = ()
        else:
            registrations = found.registrations
        names = [one.initiator.name for one in registrations if key in (one.key, 0)]
        name = next(filter(None, names), "an initiator that the device does not name")
        return f"{name} (key {key:#018x})"

    async def _in(
        self, unit: LogicalUnit, action: InAction, size: int, decode: Callable[[bytes], _T]
    ) -> _T:
        what = f"PERSISTENT RESERVE IN {action.name.replace('_', ' ')}"
        while True:
            buffer = bytearray(size)
            count = await unit.read(what, codec.reserve_in(action, size), memoryview(buffer))
            data = bytes(buffer[:count])
            longer = codec.in_length(data) if action in _LISTS else 0
            if longer <= size or size == _IN_BYTES_MAX:
                return decode(data)
            size = min(longer, _IN_BYTES_MAX)

    async def _out(self, unit: LogicalUnit, action: OutAction, parameters: OutParameters) -> None:
        kind = OUR_TYPE if action in _TYPED else 0
        data = codec.encode_out(parameters)
        what = f"PERSISTENT RESERVE OUT {action.name.replace('_', ' ')}"
        await unit.send(what, codec.reserve_out(action, kind, len(data)), data)


_LISTS: Final = frozenset({InAction.READ_KEYS, InAction.READ_FULL_STATUS})
_TYPED: Final = frozenset(
    {OutAction.RESERVE, OutAction.RELEASE, OutAction.PREEMPT, OutAction.PREEMPT_AND_ABORT}
)


def _means_unsupported(error: DeviceError) -> bool:
    """INVALID COMMAND OPERATION CODE, or another ILLEGAL REQUEST such as a lack of resources."""
    if isinstance(error, NotSupported):
        return True
    return isinstance(error, ScsiError) and error.sense_key == SenseKey.ILLEGAL_REQUEST
