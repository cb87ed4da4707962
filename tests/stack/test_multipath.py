"""Several paths through the whole stack: the embedded target behind proxies that fail."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import PathPolicy, ReserveMode
from orion_iscsifs.errors import OrionError, ReplacementTimedOut
from orion_iscsifs.multipath.paths import PathRecord
from orion_iscsifs.scsi.alua import AccessState
from orion_iscsifs.stack import open_stack
from orion_iscsifs.target import RamDevice, Running, TargetConfig, serve
from orion_iscsifs.testing.netsim import Direction, TcpProxy
from orion_iscsifs.url import parse
from tests.stack.paths import (
    IQN,
    SIZE,
    mount,
    mounted,
    read,
    states,
    two_paths,
    until,
    until_access,
)

BOTH = ("active", "active")


async def test_both_paths_are_used_and_shown() -> None:
    async with two_paths() as paths, mounted(paths, policy=PathPolicy.ROUND_ROBIN) as (stack, lun):
        await until(stack, *BOTH)
        for block in range(8):
            await lun.write(block * 4096, bytes([block]) * 4096)
        assert [await read(lun, block * 4096) for block in range(8)] == [
            bytes([block]) * 4096 for block in range(8)
        ]
        status = stack.status()
        assert status["state"] == "ok"
        assert [path["portal"] for path in status["paths"]] == [p.portal for p in paths.proxies]
        assert {path["lun"] for path in status["paths"]} == {"lun1"}
        assert all(path["latency_us"]["p50"] for path in status["paths"])
        assert len({session["isid"] for session in status["sessions"]}) == 2
        assert min(session["counters"]["commands"] for session in status["sessions"]) > 6


async def test_one_lost_path_costs_nothing_and_is_used_again_when_it_is_back() -> None:
    async with two_paths((1, 1)) as paths, mounted(paths) as (stack, lun):
        await until(stack, *BOTH)
        paths.proxies[0].refuse()
        with trio.fail_after(5):
            for block in range(16):
                await lun.write(block * 4096, b"x" * 4096)
        await until(stack, "failed", "active")
        assert stack.status()["state"] == "degraded"
        paths.proxies[0].accept()
        await until(stack, *BOTH)
        assert stack.status()["state"] == "ok"
        assert bytes(paths.disk.view[: 16 * 4096]) == b"x" * 16 * 4096


async def _client(lun: BlockDevice, base: int, rng: random.Random, stop: trio.Event) -> bytearray:
    """Random requests to an area of its own; what it must hold in the end."""
    model = bytearray(1 << 20)
    while not stop.is_set():
        length = rng.choice((512, 4096, 60000 // 512 * 512))
        offset = rng.randrange((len(model) - length) // 512) * 512
        if rng.random() < 0.6:
            content = rng.randbytes(length)
            await lun.write(base + offset, content)
            model[offset : offset + length] = content
        else:
            assert await read(lun, base + offset, length) == model[offset : offset + length]
    return model


@pytest.mark.parametrize("groups", [(1, 1), (1, 2)])
async def test_data_stay_right_while_paths_come_and_go(groups: tuple[int, int]) -> None:
    rng = random.Random(f"paths {groups}")
    stop = trio.Event()
    models: dict[int, bytearray] = {}
    async with two_paths(groups) as paths, mounted(paths) as (stack, lun):
        await until(stack, *BOTH)

        async def client(number: int) -> None:
            own = random.Random(f"{groups} {number}")
            models[number] = await _client(lun, number << 20, own, stop)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(client, number)
            for _ in range(12):
                await trio.sleep(rng.uniform(0.05, 0.2))
                proxy = rng.choice(paths.proxies)
                rng.choice([proxy.cut, proxy.stall, proxy.refuse])()
                await trio.sleep(rng.uniform(0.05, 0.8))
                proxy.flow()
                proxy.accept()
            stop.set()
        assert sum(session["counters"]["logins"] for session in stack.status()["sessions"]) > 4
        for number, model in models.items():
            assert bytes(paths.disk.view[number << 20 : (number + 1) << 20]) == model


async def _late_write(groups: tuple[int, int], reserve: ReserveMode = ReserveMode.OFF) -> bytes:
    """A write is caught on the way, its path is lost, a newer one is made; then the first arrives.

    What the disk holds in the end.
    """
    async with (
        two_paths(groups) as paths,
        mounted(paths, policy=PathPolicy.FAILOVER, reserve=reserve) as (stack, lun),
    ):
        await until(stack, *BOTH)
        first, second = paths.proxies
        first.stall()
        async with trio.open_nursery() as nursery:

            async def write(content: bytes) -> None:
                await lun.write(0, content * 4096)

            nursery.start_soon(write, b"1")
            await until(stack, "failed", "active")
            newer = False
            with trio.move_on_after(3):
                # Where nothing proves the first one over, this waits until the path is back.
                while bytes(paths.disk.view[:1]) != b"1":
                    await trio.sleep(0.01)
                await write(b"2")
                newer = True
            first.flow()
        if not newer:
            await write(b"2")
        # All that is still on the way has arrived when the target has closed the old connections.
        await until(stack, *BOTH)
        await trio.sleep(0.2)
        assert second.connections_accepted >= 1
        return bytes(paths.disk.view[:4096])


@pytest.mark.parametrize("reserve", [ReserveMode.OFF, ReserveMode.AUTO])
@pytest.mark.parametrize("groups", [(1, 1), (1, 2)])
async def test_a_late_write_does_not_overtake_a_newer_one(
    groups: tuple[int, int], reserve: ReserveMode
) -> None:
    assert await _late_write(groups, reserve) == b"2" * 4096


async def test_without_the_proof_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: the late write is really on its way, and arrives."""
    monkeypatch.setattr(PathRecord, "holds_back", lambda self, changed: False)
    assert await _late_write((1, 2)) == b"1" * 4096


async def test_in_one_portal_group_a_lost_session_is_ended_over_the_other_path() -> None:
    """Failover then takes no longer than to notice the loss."""
    async with (
        two_paths((1, 1)) as paths,
        mounted(paths, policy=PathPolicy.FAILOVER) as (stack, lun),
    ):
        await until(stack, *BOTH)
        paths.proxies[0].stall()
        with trio.fail_after(5):
            await lun.write(0, b"1" * 4096)
        assert states(stack) == ["failed", "active"]
        paths.proxies[0].flow()
        await until(stack, *BOTH)


async def test_in_another_portal_group_the_reservation_ends_the_lost_session() -> None:
    """PREEMPT AND ABORT of the lost path's registration; it registers again when it is back."""
    async with two_paths() as paths, mounted(paths, policy=PathPolicy.FAILOVER) as (stack, lun):
        await until(stack, *BOTH)
        reservations = paths.running.targets[0].units.by_number[1].reservations
        assert len(reservations.keys) == 2
        paths.proxies[0].stall()
        with trio.fail_after(5):
            await lun.write(0, b"1" * 4096)
        assert states(stack) == ["failed", "active"]
        assert len(reservations.keys) == 1
        paths.proxies[0].flow()
        await until(stack, *BOTH)
        await lun.write(0, b"2" * 4096)
        assert len(reservations.keys) == 2
        assert stack.status()["luns"][0]["reservation"]["state"] == "held"
        paths.proxies[0].refuse()
        await until(stack, "failed", "active")
    assert not reservations.keys, "also those of paths that are lost"


async def test_without_any_proof_the_write_waits_for_its_own_path() -> None:
    async with (
        two_paths() as paths,
        mounted(paths, policy=PathPolicy.FAILOVER, reserve=ReserveMode.OFF) as (stack, lun),
    ):
        await until(stack, *BOTH)
        paths.proxies[0].stall()
        with trio.move_on_after(3) as scope:
            await lun.write(0, b"1" * 4096)
        assert scope.cancelled_caught
        assert states(stack) == ["failed", "active"]
        assert stack.status()["paths"][0]["unproven_writes"] == 1
        assert await read(lun) == bytes(4096), "reads do not wait"
        await lun.write(8192, b"3" * 4096)
        paths.proxies[0].flow()
        with trio.fail_after(10):
            await lun.write(0, b"2" * 4096)


async def test_without_any_path_io_waits_and_then_fails() -> None:
    async with (
        two_paths() as paths,
        mounted(paths, session={"replacement_timeout_s": 1.5}) as (stack, lun),
    ):
        await until(stack, *BOTH)
        for proxy in paths.proxies:
            proxy.refuse()
        await until(stack, "failed", "failed")
        assert stack.status()["state"] == "recovering"
        start = trio.current_time()
        with pytest.raises(ReplacementTimedOut, match=r"no path works for 1\.5 s"):
            await read(lun)
        assert 0.5 < trio.current_time() - start < 5
        assert stack.status()["state"] == "failed"
        paths.proxies[1].accept()
        await until(stack, "failed", "active", within_s=20)
        assert await read(lun) == bytes(4096)


async def test_a_path_that_is_down_at_the_mount_is_joined_later() -> None:
    async with two_paths() as paths:
        paths.proxies[1].refuse()
        async with mounted(paths) as (stack, lun):
            assert stack.status()["state"] == "degraded"
            (down,) = [path for path in stack.status()["paths"] if path["state"] == "failed"]
            assert down["portal"] == paths.proxies[1].portal
            assert "refused" in down["last_error"]
            paths.proxies[1].accept()
            await until(stack, *BOTH, within_s=20)
            paths.proxies[0].refuse()
            await until(stack, "failed", "active")
            await lun.write(0, b"1" * 512)


async def test_no_path_at_all_is_one_clear_error() -> None:
    async with two_paths() as paths:
        for proxy in paths.proxies:
            proxy.refuse()
        with pytest.raises(OrionError, match="refused"):
            async with mounted(paths):
                pass
        assert not paths.running.sessions


@asynccontextmanager
async def another_target(disk: RamDevice) -> AsyncIterator[Running]:
    """Of the same name, and another disk."""
    async with serve([TargetConfig(iqn=IQN, units={})]) as running:
        running.targets[0].add_unit(1, disk, identity="another disk")
        yield running


async def test_a_path_that_shows_another_disk_is_never_used() -> None:
    async with (
        two_paths() as paths,
        RamDevice(SIZE) as other,
        another_target(other) as impostor,
    ):
        with TcpProxy(*impostor.portals[0]) as proxy:
            paths.proxies[1].close()
            paths.proxies[1] = proxy
            async with mounted(paths, policy=PathPolicy.ROUND_ROBIN) as (stack, lun):
                await until(stack, "active", "failed")
                assert "is another disk there" in stack.status()["paths"][1]["last_error"]
                for block in range(8):
                    await lun.write(block * 4096, b"1" * 4096)
        assert not any(other.view[: 8 * 4096])


async def test_a_path_that_leads_to_another_disk_after_an_outage_is_not_used() -> None:
    async with (
        two_paths() as paths,
        RamDevice(SIZE) as other,
        another_target(other) as impostor,
        mounted(paths, policy=PathPolicy.ROUND_ROBIN) as (stack, lun),
    ):
        await until(stack, *BOTH)
        paths.proxies[1]._upstream = impostor.portals[0]
        paths.proxies[1].cut()
        with trio.fail_after(20):
            while not impostor.sessions:
                await trio.sleep(0.02)
                await lun.write(0, b"1" * 4096)
        for block in range(16):
            await lun.write(block * 4096, b"1" * 4096)
        await until(stack, "active", "failed")
        assert not any(other.view[: 16 * 4096])


async def test_access_states_are_followed_when_the_target_changes_them() -> None:
    async with two_paths() as paths:
        access = paths.running.targets[0].access
        access.set(2, AccessState.STANDBY)
        async with mounted(paths) as (stack, lun):
            await until_access(stack, "active/optimized", "standby")
            assert states(stack) == ["active", "standby"]
            assert stack.status()["state"] == "ok"
            await lun.write(0, b"1" * 4096)
            access.set(2, AccessState.ACTIVE_OPTIMIZED)
            access.set(1, AccessState.STANDBY)
            with trio.fail_after(40):
                await lun.write(0, b"2" * 4096)
                await until(stack, "standby", "active", within_s=35)
            access.set(1, AccessState.ACTIVE_NON_OPTIMIZED)
            await until(stack, "active", "active", within_s=50)


async def test_a_transition_is_waited_for() -> None:
    async with two_paths() as paths, mounted(paths) as (stack, lun):
        await until(stack, *BOTH)
        access = paths.running.targets[0].access
        for group in (1, 2):
            access.set(group, AccessState.TRANSITIONING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(lun.write, 0, b"1" * 4096))
            await until(stack, "standby", "standby")
            access.set(2, AccessState.ACTIVE_OPTIMIZED)
        assert bytes(paths.disk.view[:4096]) == b"1" * 4096


async def test_when_only_standby_paths_are_left_one_is_activated() -> None:
    async with two_paths() as paths:
        access = paths.running.targets[0].access
        access.set(2, AccessState.STANDBY)
        async with mounted(paths) as (stack, lun):
            await until_access(stack, "active/optimized", "standby")
            paths.proxies[0].refuse()
            await until(stack, "failed", "active")
            with trio.fail_after(10):
                await lun.write(0, b"1" * 4096)
            assert states(stack) == ["failed", "active"]


async def test_source_addresses_make_paths() -> None:
    async with two_paths((1,)) as paths:
        config = mount(paths, binds=("127.0.0.2", "127.0.0.3"))
        async with open_stack(parse(paths.running.url(1)), config) as stack:
            await until(stack, *BOTH)
            portal = "{}:{}".format(*paths.running.portals[0])
            assert [path["portal"] for path in stack.status()["paths"]] == [
                f"{portal} from 127.0.0.2",
                f"{portal} from 127.0.0.3",
            ]
            locals_ = [
                session["connections"][0]["local"].rpartition(":")[0]
                for session in stack.status()["sessions"]
            ]
            assert locals_ == ["127.0.0.2", "127.0.0.3"]


async def test_every_portal_that_discovery_names() -> None:
    async with two_paths() as paths:
        paths.running.advertise = [f"{p.portal},{n}" for n, p in enumerate(paths.proxies, 1)]
        config = mount(paths, portals=(), all_portals=True)
        for url in (paths.url(), f"iscsi://{paths.proxies[0].portal}/"):
            async with open_stack(parse(url), config) as stack:
                await until(stack, *BOTH)
                assert [path["portal"] for path in stack.status()["paths"]] == [
                    proxy.portal for proxy in paths.proxies
                ]
                assert len(paths.running.sessions) == 2


async def test_two_throttled_paths_carry_nearly_twice_as_much_as_one() -> None:
    """At least 1.8 times; the lines are made slow, so the machine hardly matters."""
    rate = 8 << 20
    seconds: dict[int, float] = {}
    for count in (1, 2):
        async with two_paths((1, 2)[:count]) as paths:
            portals = tuple(proxy.portal for proxy in paths.proxies[1:])
            async with mounted(paths, portals=portals, binds=()) as (stack, lun):
                await until(stack, *["active"] * count)
                for proxy in paths.proxies:
                    proxy.shape(bytes_per_s=rate, direction=Direction.TO_INITIATOR)
                start = trio.current_time()
                async with trio.open_nursery() as nursery:

                    async def reader(first: int) -> None:
                        for at in range(first << 18, SIZE, 8 << 18):
                            await read(lun, at, 1 << 18)

                    for first in range(8):
                        nursery.start_soon(reader, first)
                seconds[count] = trio.current_time() - start
    assert seconds[1] / seconds[2] >= 1.8, seconds
