"""Ending a session from another portal, and listeners of a session's state."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import ConnectFailed, ReplacementTimedOut, TransportError
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.fence import end_nexus
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.session import Session, open_session
from orion_iscsifs.scsi import cdb
from orion_iscsifs.target import Portal as Address
from orion_iscsifs.target import RamDevice, Running, TargetConfig, serve

IQN = "iqn.2026-11.org.example:fence"
ISID = bytes.fromhex("80aabbcc0001")


@asynccontextmanager
async def world(*groups: int) -> AsyncIterator[tuple[Running, list[Portal]]]:
    async with RamDevice(1 << 20) as disk:
        config = TargetConfig(iqn=IQN, units={1: disk})
        portals = [Address("127.0.0.1", 0, group) for group in groups]
        async with serve([config], portals) as running:
            yield running, [Portal(*address) for address in running.portals]


def nexus(**changes: float) -> Nexus:
    config = SessionConfig(initiator_name="iqn.2026-11.org.example:me", **changes)  # type: ignore[arg-type]
    return Nexus(target_name=IQN, isid=ISID, config=config)


async def ready(session: Session) -> None:
    await LogicalUnit(session, 1).command("TEST UNIT READY", cdb.test_unit_ready())


async def test_a_login_in_the_same_portal_group_ends_the_session() -> None:
    async with world(1, 1) as (running, portals), open_session(portals[0], nexus()) as session:
        before = running.sessions[0]
        assert await end_nexus(portals[1], nexus(), 1)
        assert before not in running.sessions
        assert running.stats.reinstatements == 1
        with trio.fail_after(5):
            await ready(session)
        assert session.counters.logins == 2, "it noticed, and logged in again"


async def test_in_another_group_it_is_another_nexus_and_proves_nothing() -> None:
    async with world(1, 2) as (running, portals), open_session(portals[0], nexus()) as session:
        assert not await end_nexus(portals[1], nexus(), 1)
        await ready(session)
        assert session.counters.logins == 1
        with trio.fail_after(5):
            while len(running.sessions) > 1:
                await trio.sleep(0.01)


async def test_without_a_known_group_nothing_is_tried() -> None:
    async with world(1, 1) as (running, portals):
        assert not await end_nexus(portals[1], nexus(), None)
        assert running.stats.logins == 0


async def test_a_portal_that_is_down_is_an_error() -> None:
    async with world(1) as (running, portals):
        await running.stop()
        with pytest.raises(ConnectFailed):
            await end_nexus(portals[0], nexus(), 1)


async def test_a_session_without_patience_fails_at_once_and_comes_back() -> None:
    """As one of several paths has it: nothing is held, and logging in goes on."""
    async with (
        world(1) as (running, portals),
        open_session(portals[0], nexus(replacement_timeout_s=0)) as session,
    ):
        states: list[State] = []
        session.state_listeners.append(lambda: states.append(session.state))
        await ready(session)
        await running.stop()
        with trio.fail_after(5):
            while State.FAILED not in states:
                await trio.sleep(0.01)
            with pytest.raises(ReplacementTimedOut):
                await ready(session)
        assert states == [State.RECOVERING, State.FAILED]
        await running.start()
        with trio.fail_after(10):
            while State.LOGGED_IN not in states:
                await trio.sleep(0.01)
        await ready(session)
        assert states == [State.RECOVERING, State.FAILED, State.LOGGED_IN]
    assert states[-1] is State.CLOSED


async def test_what_is_in_flight_fails_when_the_only_connection_is_lost() -> None:
    async with (
        world(1) as (running, portals),
        open_session(portals[0], nexus(replacement_timeout_s=0)) as session,
        trio.open_nursery() as nursery,
    ):
        failed: list[TransportError] = []

        async def keep_asking() -> None:
            try:
                while True:
                    await ready(session)
            except TransportError as error:
                failed.append(error)

        for _ in range(4):
            nursery.start_soon(keep_asking)
        await trio.sleep(0.05)
        await running.stop()
        with trio.fail_after(5):
            while len(failed) < 4:
                await trio.sleep(0.01)
        await running.start()
