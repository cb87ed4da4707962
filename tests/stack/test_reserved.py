"""One writer among hosts, on a target that has all of SPC-4's persistent reservations."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from orion_iscsifs.config import (
    CacheConfig,
    CacheMode,
    MountConfig,
    ReserveConfig,
    ReserveMode,
    SessionConfig,
)
from orion_iscsifs.errors import BusyError, NotSupported, OrionError, ReservationConflict
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.reservation import Reservation
from orion_iscsifs.initiator.standing import Seen
from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.target import Fault, RamDevice, Running, TargetConfig, serve
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.reservations import RESERVATIONS_RELEASED
from orion_iscsifs.url import parse

IQN = "iqn.2026-11.org.example:shared"
SIZE = 4 << 20


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with (
        RamDevice(SIZE) as disk,
        serve([TargetConfig(iqn=IQN, units={1: disk})]) as running,
    ):
        yield running


class Host:
    """An initiator with a name and a state directory of its own."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = f"iqn.2026-11.org.example:{name}"
        self._folder = folder / name
        self._monkeypatch = monkeypatch

    @asynccontextmanager
    async def mount(
        self, running: Running, cache: CacheMode = CacheMode.NONE, **reserve: object
    ) -> AsyncIterator[Stack]:
        self._monkeypatch.setenv("ORION_ISCSIFS_STATE", str(self._folder))
        config = MountConfig(
            session=SessionConfig(initiator_name=self.name, replacement_timeout_s=10),
            cache=CacheConfig(mode=cache, dirty_age_s=600),
            reserve=ReserveConfig(**reserve),  # type: ignore[arg-type]
        )
        async with open_stack(parse(running.url(1)), config, f"/mnt/{self.name}") as stack:
            yield stack


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host("one", tmp_path, monkeypatch)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host("two", tmp_path, monkeypatch)


async def test_a_second_writer_is_told_who_the_first_is(
    running: Running, one: Host, two: Host
) -> None:
    async with one.mount(running) as stack:
        key = stack.status()["luns"][0]["reservation"]["key"]
        with pytest.raises(BusyError) as refused:
            async with two.mount(running):
                pass
        assert one.name in str(refused.value)
        assert key in str(refused.value)
        await stack.files["lun1"].write(0, b"1" * 512)
    async with two.mount(running) as stack:
        await stack.files["lun1"].write(0, b"2" * 512)
    unit = running.targets[0].units.by_number[1]
    assert (unit.reservations.keys, unit.reservations.kind) == ({}, None)


async def test_taking_over_aborts_what_the_other_has_in_flight(
    running: Running, one: Host, two: Host
) -> None:
    """PREEMPT AND ABORT: the write that the target holds back never reaches the disk."""
    faults = running.targets[0].faults
    async with trio.open_nursery() as nursery, one.mount(running) as first:
        old = first.files["lun1"]
        faults.add(Fault(act=Act.DELAY, opcode=OpCode.WRITE_10, delay_s=1.0))
        outcome: list[OrionError | None] = []

        async def late() -> None:
            try:
                await old.write(0, b"1" * 4096)
            except OrionError as error:
                outcome.append(error)

        nursery.start_soon(late)
        with trio.fail_after(5):
            while not faults.hits:
                await trio.sleep(0.01)
        async with two.mount(running, preempt=True) as second:
            await second.files["lun1"].write(0, b"2" * 4096)
            with pytest.raises(ReservationConflict, match=two.name):
                await old.write(4096, b"1" * 4096)
            assert first.status()["luns"][0]["reservation"]["state"] == "lost"
            target = bytearray(4096)
            await old.read_into(0, memoryview(target))
            assert target == b"2" * 4096, "reading goes on"
            await trio.sleep(1.2)  # the held back write would have been carried out by now
            await second.files["lun1"].read_into(0, memoryview(target))
            assert target == b"2" * 4096
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(4))
async def test_of_two_hosts_at_once_one_wins(
    running: Running, one: Host, two: Host, seed: int
) -> None:
    won: list[str] = []
    lost: list[BusyError] = []
    both = trio.Event()

    async def contend(host: Host) -> None:
        # The state directory is read before the first await of the network.
        try:
            async with host.mount(running):
                won.append(host.name)
                with trio.move_on_after(5):
                    await both.wait()
        except BusyError as error:
            lost.append(error)
            both.set()

    async with trio.open_nursery() as nursery:
        for host in (one, two) if seed % 2 else (two, one):
            nursery.start_soon(contend, host)
            await trio.sleep(0.002 * seed)
    assert len(won) == 1
    assert won[0] in str(lost[0])


@pytest.mark.parametrize("mode", [CacheMode.NONE, CacheMode.WRITEBACK])
async def test_a_restart_of_the_target_changes_nothing(
    running: Running, one: Host, two: Host, mode: CacheMode
) -> None:
    """The registration was made to last (APTPL), and another host stays out."""
    async with one.mount(running, mode) as stack:
        lun = stack.files["lun1"]
        await lun.write(0, b"1" * 4096)
        await running.restart()
        with pytest.raises(BusyError, match=one.name):
            async with two.mount(running):
                pass
        await lun.write(4096, b"2" * 4096)
        await lun.flush()
        assert stack.status()["luns"][0]["reservation"]["state"] == "held"


async def test_reserve_require_needs_a_device_that_can(running: Running, one: Host) -> None:
    faults = running.targets[0].faults
    for opcode in (OpCode.PERSISTENT_RESERVE_IN, OpCode.PERSISTENT_RESERVE_OUT):
        faults.add(
            Fault(act=Act.ANSWER, opcode=opcode, status=2, sense=sense.INVALID_OPCODE, times=None)
        )
    with pytest.raises(NotSupported, match="no persistent reservations"):
        async with one.mount(running, CacheMode.NONE, mode=ReserveMode.REQUIRE):
            pass
    async with one.mount(running) as stack:
        assert stack.status()["luns"][0]["reservation"]["state"] == "unsupported"


async def test_a_check_in_flight_does_not_take_a_lost_reservation_again(
    running: Running, one: Host, two: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check before a write stands still; the one after the next login finds the loss; the first
    goes on, and finds a device that nobody holds any more."""
    held_up, go_on = trio.Event(), trio.Event()
    real, looks = Reservation._look, 0

    async def slow_look(self: Reservation, unit: LogicalUnit) -> Seen:
        nonlocal looks
        if unit is self._unit:
            looks += 1
            if looks == 2:
                held_up.set()
                await go_on.wait()
        return await real(self, unit)

    async with one.mount(running) as first, trio.open_nursery() as nursery:
        monkeypatch.setattr(Reservation, "_look", slow_look)
        refused: list[OrionError] = []

        async def write() -> None:
            try:
                await first.files["lun1"].write(0, b"1" * 512)
            except OrionError as error:
                refused.append(error)

        running.targets[0].announce(1, RESERVATIONS_RELEASED)
        nursery.start_soon(write)
        with trio.fail_after(5):
            await held_up.wait()
        monkeypatch.setattr(Reservation, "_look", real)
        async with two.mount(running, preempt=True) as second:
            await second.files["lun1"].write(0, b"2" * 512)
        running.drop_connections()
        with trio.fail_after(5):
            while first.status()["luns"][0]["reservation"]["state"] != "lost":
                await trio.sleep(0.01)
        go_on.set()
        with trio.fail_after(5):
            while not refused:
                await trio.sleep(0.01)
        assert isinstance(refused[0], ReservationConflict)
        assert not running.targets[0].units.by_number[1].reservations.keys
        assert first.status()["luns"][0]["reservation"]["state"] == "lost"
