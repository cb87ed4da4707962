"""MultipathDevice over fake paths: who carries a request, what is repeated, and what waits."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.errors import (
    ConnectionLost,
    MediumError,
    OutOfRange,
    ProtocolViolation,
    ReplacementTimedOut,
    ReservationConflict,
    WriteProtected,
)
from orion_iscsifs.multipath import Access
from orion_iscsifs.multipath.device import MultipathDevice, open_multipath
from orion_iscsifs.scsi.alua import AccessState
from orion_iscsifs.testing.conformance import CHECKS, Check, check_block_device
from orion_iscsifs.testing.memory import MemoryDevice
from tests.multipath.fakes import SIZE_BYTES, FakePath, not_accessible

GEOMETRY = Geometry(size_bytes=SIZE_BYTES, discard_granularity_bytes=4096)


def make_paths(count: int, *, patient: bool = True) -> list[FakePath]:
    disk = MemoryDevice(geometry=GEOMETRY)
    return [FakePath(f"path{number}", disk, patient=patient) for number in range(count)]


@asynccontextmanager
async def joined(paths: Sequence[FakePath], **options: Any) -> AsyncIterator[MultipathDevice]:
    async with open_multipath("lun1", paths[0], **options) as device:
        for path in paths[1:]:
            device.add(path)
        await wait_all_tasks_blocked()
        yield device


async def read(device: BlockDevice, offset: int = 0, length: int = 4096) -> bytes:
    target = bytearray(length)
    await device.read_into(offset, memoryview(target))
    return bytes(target)


def states(device: MultipathDevice) -> list[str]:
    return [path["state"] for path in device.status()]


@pytest.mark.parametrize("check", CHECKS)
async def test_the_promises_of_a_block_device(check: Check) -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[BlockDevice]:
        memory = MemoryDevice(geometry=GEOMETRY)
        async with open_multipath("lun1", Straight(memory)) as device:
            device.add(Straight(memory))
            yield device

    await check_block_device(factory, checks=[check])


class Straight(FakePath):
    """A path with nothing between it and the disk."""

    def __init__(self, disk: MemoryDevice) -> None:
        super().__init__("straight", disk)

    @property
    def device(self) -> Any:
        return self.disk


async def test_both_paths_carry_requests() -> None:
    first, second = paths = make_paths(2)
    async with joined(paths) as device:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(read, device)
        assert first.served.count("read") >= 5
        assert second.served.count("read") >= 5
        assert [path["portal"] for path in device.status()] == ["path0", "path1"]
        assert all(path["latency_us"]["p50"] is not None for path in device.status())


async def test_a_read_lost_with_its_path_is_read_on_the_other() -> None:
    first, second = paths = make_paths(2)
    async with joined(paths) as device:
        first.disk.poke(0, b"x" * 4096)
        first.fails = [ConnectionLost("gone")]
        first.lose()
        assert await read(device) == b"x" * 4096
        assert second.served == ["read"]
        assert states(device) == ["failed", "active"]
        assert device.is_degraded
        first.log_in()
        await wait_all_tasks_blocked()
        assert states(device) == ["active", "active"]
        assert not device.is_degraded


async def test_a_lost_write_waits_for_proof_and_then_goes_elsewhere() -> None:
    first, second = paths = make_paths(2, patient=False)
    async with joined(paths) as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.write, 0, b"1" * 512)
        await wait_all_tasks_blocked()
        (carrier,) = [path for path in paths if path.sent]
        other = second if carrier is first else first
        carrier.lose()
        await wait_all_tasks_blocked()
        assert not other.sent, "the first may still land"
        assert carrier.fence_calls
        carrier.log_in()
        await wait_all_tasks_blocked()
        again = [path for path in paths if path.sent]
        assert len(again) == 1
        again[0].deliver(again[0].sent[0])
    assert first.disk.peek(0, 512) == b"1" * 512


async def test_a_newer_write_to_the_range_waits_too_and_others_do_not() -> None:
    first, second = paths = make_paths(2, patient=False)
    impatient = trio.CancelScope()
    async with joined(paths) as device, trio.open_nursery() as nursery:

        async def lost() -> None:
            with impatient:
                await device.write(0, b"1" * 1024)

        nursery.start_soon(lost)
        await wait_all_tasks_blocked()
        carrier, other = (first, second) if first.sent else (second, first)
        carrier.lose()
        impatient.cancel()
        await wait_all_tasks_blocked()
        nursery.start_soon(device.write, 512, b"2" * 512)
        nursery.start_soon(device.write, 4096, b"3" * 512)
        await wait_all_tasks_blocked()
        assert [sent.offset for sent in other.sent] == [4096]
        other.deliver(other.sent[0])
        carrier.deliver(carrier.sent[0])  # as late as it gets
        carrier.fences = True
        with trio.move_on_after(5):
            while not other.sent:
                await trio.sleep(0.01)
        assert [sent.offset for sent in other.sent] == [512]
        other.deliver(other.sent[0])
    assert first.disk.peek(0, 1024) == b"1" * 512 + b"2" * 512


async def test_a_fenced_path_lets_the_write_go_at_once() -> None:
    first, second = paths = make_paths(2, patient=False)
    for path in paths:
        path.fences = True
    async with joined(paths) as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.write, 0, b"1" * 512)
        await wait_all_tasks_blocked()
        carrier, other = (first, second) if first.sent else (second, first)
        carrier.lose()
        await wait_all_tasks_blocked()
        assert not carrier.sent, "the target has ended that nexus"
        assert len(other.sent) == 1
        other.deliver(other.sent[0])


async def test_a_write_without_proof_fails_in_the_end_and_its_range_stays_closed(
    autojump_clock: MockClock,
) -> None:
    paths = make_paths(2, patient=False)
    async with joined(paths, hold_s=10) as device:
        async with trio.open_nursery() as nursery:

            async def fails() -> None:
                with pytest.raises(ReplacementTimedOut, match="may still arrive"):
                    await device.write(0, b"1" * 512)

            nursery.start_soon(fails)
            with trio.fail_after(1):
                while not any(path.sent for path in paths):
                    await trio.sleep(0.01)
            carrier = next(path for path in paths if path.sent)
            carrier.lose()
        assert trio.current_time() >= 10
        with pytest.raises(ReplacementTimedOut, match="may still arrive"):
            await device.write(0, b"2" * 512)
        assert device.status()[paths.index(carrier)]["unproven_writes"] == 1


async def test_without_a_path_requests_wait_and_fail_after_the_time_out(
    autojump_clock: MockClock,
) -> None:
    first, second = paths = make_paths(2)
    async with joined(paths, hold_s=30) as device:
        first.lose()
        second.lose()
        start = trio.current_time()
        with pytest.raises(ReplacementTimedOut, match="no path works for 30 s"):
            await read(device)
        assert trio.current_time() - start == pytest.approx(30)
        with pytest.raises(ReplacementTimedOut):
            await read(device)
        assert trio.current_time() - start == pytest.approx(30), "counted from the loss"
        second.log_in()
        await wait_all_tasks_blocked()
        assert await read(device) == bytes(4096)


@pytest.mark.parametrize(("hold_s", "fails"), [(0.0, True), (-1.0, False)])
async def test_hold_at_its_limits(autojump_clock: MockClock, hold_s: float, fails: bool) -> None:
    paths = make_paths(1)
    async with joined(paths, hold_s=hold_s) as device:
        paths[0].lose()
        if fails:
            with pytest.raises(ReplacementTimedOut):
                await read(device)
            assert trio.current_time() == 0
        else:
            with trio.move_on_after(1e4) as scope:
                await read(device)
            assert scope.cancelled_caught


async def test_a_write_that_was_not_carried_out_goes_elsewhere_without_proof() -> None:
    paths = make_paths(2)
    async with joined(paths) as device:
        for path in paths:
            path.fails = [not_accessible()]
            path.access = replace(path.access, state=AccessState.STANDBY, reported=True)
        paths[1].fails = []
        paths[1].access = replace(path.access, state=AccessState.ACTIVE_OPTIMIZED)
        for _ in range(4):
            await device.write(0, b"1" * 512)
        await wait_all_tasks_blocked()
        assert states(device) == ["standby", "active"]
        assert paths[0].fence_calls == 0


@pytest.mark.parametrize(
    "error",
    [
        MediumError("bad", status=2, sense_key=3, asc=0x11),
        ReservationConflict("taken"),
    ],
)
async def test_what_the_device_refuses_is_not_tried_elsewhere(error: Exception) -> None:
    paths = make_paths(2)
    async with joined(paths) as device:
        for path in paths:
            path.fails = [error]  # type: ignore[list-item]
        with pytest.raises(type(error)):
            await read(device)
        assert sum(len(path.served) for path in paths) == 1
        assert states(device) == ["active", "active"]


async def test_a_request_that_no_path_can_carry_out_fails() -> None:
    paths = make_paths(2)
    async with joined(paths) as device:
        for path in paths:
            path.fails = [ProtocolViolation("SCSI Data-In", "nonsense", section="11.7")] * 50
        with pytest.raises(ProtocolViolation):
            await read(device)
        assert sum(len(path.served) for path in paths) < 10


async def test_a_path_to_another_disk_is_not_used() -> None:
    first, second = paths = make_paths(2)
    async with joined(paths) as device:
        second.is_refused = True
        second.fails = [ReservationConflict("another disk")]
        second.lose()
        second.log_in()
        first.access = replace(first.access, reported=True)
        second.check = _refuses  # type: ignore[method-assign]
        for _ in range(10):
            await read(device)
        await wait_all_tasks_blocked()
        assert states(device) == ["active", "failed"]
        assert "read" not in second.served


async def _refuses() -> Any:
    raise ReservationConflict("another disk")


async def test_standby_paths_carry_nothing_until_one_is_activated() -> None:
    first, second = paths = make_paths(2)
    second.access = replace(second.access, state=AccessState.STANDBY, explicit=True, reported=True)
    async with joined(paths) as device:
        for _ in range(6):
            await read(device)
        assert states(device) == ["active", "standby"]
        assert "read" not in second.served
        assert second.activations == 0, "not before it is needed"
        first.lose()
        await wait_all_tasks_blocked()
        assert second.activations == 1
        assert states(device) == ["failed", "active"]
        await read(device)


async def test_a_path_that_the_target_serves_by_itself_is_found_first() -> None:
    """No transition is asked for before it is known that the target serves no path at all."""
    first, second = paths = make_paths(2)
    for path, state in zip(paths, (AccessState.ACTIVE_OPTIMIZED, AccessState.STANDBY), strict=True):
        path.access = Access(state, explicit=True, reported=True)
    async with joined(paths) as device:
        first.access, second.access = second.access, first.access
        assert await read(device) == bytes(4096)
        await wait_all_tasks_blocked()
        assert states(device) == ["standby", "active"]
        assert first.activations == second.activations == 0


async def test_optimized_paths_come_first_and_get_io_back() -> None:
    first, second = paths = make_paths(2)
    first.access = replace(first.access, state=AccessState.ACTIVE_NON_OPTIMIZED, reported=True)
    second.access = replace(second.access, reported=True)
    async with joined(paths) as device:
        for _ in range(6):
            await read(device)
        assert "read" not in first.served
        second.lose()
        await read(device)
        assert first.served == ["read"]
        second.log_in()
        await wait_all_tasks_blocked()
        await read(device)
        assert first.served == ["read"]


async def test_a_path_that_is_lost_often_is_set_aside_for_a_while(
    autojump_clock: MockClock,
) -> None:
    first, second = paths = make_paths(2)
    async with joined(paths) as device:
        for _ in range(3):
            second.lose()
            second.log_in()
            await trio.sleep(0.1)
        assert states(device) == ["active", "marginal"]
        second.served.clear()
        for _ in range(6):
            await read(device)
        assert second.served == []
        first.lose()
        await read(device)
        assert second.served == ["read"], "better than nothing"
        first.log_in()
        await trio.sleep(120)
        assert states(device) == ["active", "active"]


async def test_the_geometry_is_what_every_path_can_do() -> None:
    first, second = paths = make_paths(2)
    second.geometry = replace(GEOMETRY, transfer_bytes_max=65536, discard_granularity_bytes=8192)
    seen: list[int] = []
    async with joined(paths) as device:
        assert device.geometry.transfer_bytes_max == 65536
        assert device.geometry.discard_granularity_bytes == 8192
        device.on_geometry_change(lambda geometry: seen.append(geometry.size_bytes))
        grown = replace(GEOMETRY, size_bytes=2 * SIZE_BYTES)
        first.resize(grown)
        await wait_all_tasks_blocked()
        assert seen == [], "the other path does not know yet"
        assert second.refreshes == 1
        second.resize(grown)
        assert seen == [2 * SIZE_BYTES]
        second.resize(replace(grown, read_only=True))
        with pytest.raises(WriteProtected):
            await device.write(0, bytes(512))
        with pytest.raises(OutOfRange):
            await read(device, 2 * SIZE_BYTES)


async def test_a_flush_lost_with_its_path_is_done_on_the_other() -> None:
    first, second = paths = make_paths(2)
    async with joined(paths) as device:
        first.fails = [ConnectionLost("gone")]
        first.lose()
        await device.flush()
        assert second.served == ["flush"]
