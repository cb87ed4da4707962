"""A LUN that is another one, another size or missing when the target is back."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio

from orion_iscsifs.block.device import Geometry
from orion_iscsifs.errors import ConnectionLost, DeviceError, ReplacementTimedOut
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.protocol.pdu import ScsiCommand
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import SenseData, SenseKey
from tests.initiator.peer import PlayedConnection, PlayedTarget, offer, played_session, until
from tests.initiator.test_lun import BLOCK_BYTES, Answer, Disk

NO_SUCH_LUN = SenseData(SenseKey.ILLEGAL_REQUEST, 0x25, 0)


class World:
    """A device and the disk behind it, which a test replaces while the target is away."""

    def __init__(self, target: PlayedTarget, disk: Disk) -> None:
        self.target = target
        self.disk = disk
        self.back = trio.Event()

    async def serve(self, peer: PlayedConnection) -> None:
        while True:
            with suppress(ConnectionLost):
                await self.disk.serve(peer)
                return
            await self.back.wait()
            peer = await (await self.target.accept()).login(OFFER)


OFFER = offer(
    max_recv_data_segment_length=1 << 20, first_burst_length=1 << 20, max_burst_length=1 << 20
)


@asynccontextmanager
async def world(disk: Disk, **changes: Any) -> AsyncIterator[tuple[World, LunDevice]]:
    async with (
        played_session(OFFER, first_burst_length_bytes=1 << 20, **changes) as (
            session,
            peer,
            target,
        ),
        trio.open_nursery() as nursery,
    ):
        played = World(target, disk)
        nursery.start_soon(played.serve, peer)
        device = await LunDevice.open(session, 3, read_only=False)
        yield played, device
        await until(lambda: session.state is State.LOGGED_IN)
        nursery.cancel_scope.cancel()


def named(serial: bytes) -> Disk:
    disk = Disk()
    disk.serial = serial
    return disk


async def test_a_held_write_never_reaches_another_disk() -> None:
    mine, other = named(b"mine"), named(b"other")
    async with world(mine) as (played, device), trio.open_nursery() as nursery:
        refused = trio.Event()

        async def write() -> None:
            with pytest.raises(DeviceError, match=r"LUN 3 is another disk now: other.*was mine"):
                await device.write(0, b"x" * BLOCK_BYTES)
            refused.set()

        played.target.latest.wire.shutdown()
        played.disk = other
        await until(lambda: device._unit.session.state is State.RECOVERING)
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        played.back.set()
        with trio.fail_after(3):
            await refused.wait()
        with pytest.raises(DeviceError, match="another disk"):
            await device.read_into(0, memoryview(bytearray(BLOCK_BYTES)))
        with pytest.raises(DeviceError, match="another disk"):
            await device.flush()
        assert not {OpCode.WRITE_10, OpCode.READ_10, OpCode.SYNCHRONIZE_CACHE_10} & {*other.codes()}
        assert bytes(other.content[:1]) == b"\0"


async def test_the_right_disk_is_taken_again() -> None:
    async with world(named(b"mine")) as (played, device):
        mine = played.disk
        played.target.latest.wire.shutdown()
        played.disk = named(b"other")
        played.back.set()
        with pytest.raises(DeviceError, match="another disk"):
            await device.write(0, b"x" * BLOCK_BYTES)
        played.disk.serial = b"mine"  # somebody mends the mapping under the same session
        await device.write(0, b"x" * BLOCK_BYTES)
        assert played.disk is not mine
        assert bytes(played.disk.content[:1]) == b"x"


async def test_a_new_size_is_seen_before_anything_is_sent() -> None:
    disk = named(b"mine")
    async with world(disk) as (played, device):
        seen: list[Geometry] = []
        device.on_geometry_change(seen.append)
        disk.blocks *= 2
        played.back.set()
        played.target.latest.wire.shutdown()
        await device.read_into(0, memoryview(bytearray(BLOCK_BYTES)))
        assert [geometry.size_bytes for geometry in seen] == [2 << 20]


class Late(Disk):
    """Not there yet for the first commands after a login."""

    missing = 0

    def _execute(self, command: ScsiCommand) -> Answer:
        if self.missing:
            self.missing -= 1
            return NO_SUCH_LUN
        return super()._execute(command)


async def test_a_target_that_is_back_before_its_luns_is_waited_for() -> None:
    disk = Late()
    async with world(disk) as (played, device):
        disk.missing = 2
        played.back.set()
        played.target.latest.wire.shutdown()
        await device.write(0, b"x" * BLOCK_BYTES)
        assert bytes(disk.content[:1]) == b"x"


async def test_io_is_not_held_beyond_replacement_timeout_by_the_checks() -> None:
    disk = Late()
    async with world(disk, replacement_timeout_s=0.4) as (played, device):
        disk.missing = 1000
        played.back.set()
        played.target.latest.wire.shutdown()
        with trio.fail_after(3), pytest.raises(ReplacementTimedOut):
            await device.write(0, b"x" * BLOCK_BYTES)
        disk.missing = 0


class ReplacedMeanwhile(Disk):
    """Between INQUIRY and READ CAPACITY another login takes place, to a larger disk."""

    device: LunDevice | None = None

    def _execute(self, command: ScsiCommand) -> Answer:
        if command.cdb[0] == OpCode.SERVICE_ACTION_IN_16 and self.device is not None:
            self.device._unit.session.counters.logins += 1
            return (9999).to_bytes(8, "big") + BLOCK_BYTES.to_bytes(4, "big") + bytes(20)
        return super()._execute(command)


async def test_a_probe_that_spans_a_login_is_worth_nothing() -> None:
    """Its answers may come from two disks: taking them would lift the refusal of the second."""
    disk = ReplacedMeanwhile()
    async with world(disk) as (_, device):
        before = device.geometry
        disk.device = device
        disk.script[OpCode.READ_10] = [SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)]
        await device.read_into(0, memoryview(bytearray(512)))
        assert device.geometry == before
