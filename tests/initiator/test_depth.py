"""The queue depth of a logical unit: how it is learned, and that it is kept to."""

import pytest
import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.depth import HOLD_S, QueueDepth
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.session import Session, open_session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import Status
from orion_iscsifs.target import Fault, RamDevice, TargetConfig, serve
from orion_iscsifs.target.faults import Act

IQN = "iqn.2026-11.org.example:depth"


def test_a_full_queue_is_as_long_as_what_was_in_it() -> None:
    depth = QueueDepth(128)
    for in_flight in (63, 50, 32):
        depth.task_set_full(in_flight, now=0.0)
    assert depth.limit == 32
    depth.task_set_full(0, now=0.0)
    assert depth.limit == 1


def test_many_busy_answers_are_one_overload() -> None:
    depth = QueueDepth(100)
    for _ in range(10):
        depth.busy(now=1.0)
    assert depth.limit == 75
    depth.busy(now=1.0 + HOLD_S)
    assert depth.limit == 56


def test_it_grows_by_one_a_round_and_not_at_once() -> None:
    depth = QueueDepth(8)
    depth.task_set_full(4, now=0.0)
    for _ in range(100):
        depth.succeeded(now=HOLD_S - 0.1)
    assert depth.limit == 4
    for _ in range(4):
        depth.succeeded(now=HOLD_S)
    assert depth.limit == 5
    for _ in range(1000):
        depth.succeeded(now=HOLD_S + 1)
    assert depth.limit == 8


@pytest.mark.parametrize("depth", [1, 3])
async def test_no_more_commands_than_allowed_are_in_flight(depth: int) -> None:
    most = running = 0

    async with (
        RamDevice(1 << 20) as disk,
        serve([TargetConfig(iqn=IQN, units={1: disk})]) as target,
    ):
        config = SessionConfig(initiator_name="iqn.2026-11.org.example:me", queue_depth=depth)
        nexus = Nexus(target_name=IQN, isid=b"\x80\0\0\0\0\1", config=config)
        async with open_session(Portal(*target.portals[0]), nexus) as session:
            unit, other = LogicalUnit(session, 1), LogicalUnit(session, 1)
            real = session.execute

            async def counted(task: Task) -> None:
                nonlocal most, running
                running += 1
                most = max(most, running)
                await real(task)
                running -= 1

            session.execute = counted  # type: ignore[method-assign]
            order: list[int] = []

            async def ask(of: LogicalUnit, number: int) -> None:
                await of.command("TEST UNIT READY", cdb.test_unit_ready())
                order.append(number)

            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(ask, unit, number)
            assert most == depth
            assert len(order) == 20
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(ask, unit, number)
                    nursery.start_soon(ask, other, number)
            assert most == 2 * depth, "each logical unit has its own"


async def test_a_cancelled_waiter_leaves_the_line() -> None:
    async with (
        RamDevice(1 << 20) as disk,
        serve([TargetConfig(iqn=IQN, units={1: disk})]) as target,
    ):
        config = SessionConfig(initiator_name="iqn.2026-11.org.example:me", queue_depth=1)
        nexus = Nexus(target_name=IQN, isid=b"\x80\0\0\0\0\1", config=config)
        async with open_session(Portal(*target.portals[0]), nexus) as session:
            unit = LogicalUnit(session, 1)
            await unit.command("TEST UNIT READY", cdb.test_unit_ready())
            delay = Fault(act=Act.DELAY, opcode=OpCode.TEST_UNIT_READY, delay_s=0.2)
            target.targets[0].faults.add(delay)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(unit.command, "TEST UNIT READY", cdb.test_unit_ready())
                await trio.sleep(0.05)
                with trio.move_on_after(0.05) as scope:
                    await unit.command("TEST UNIT READY", cdb.test_unit_ready())
                assert scope.cancelled_caught
            with trio.fail_after(2):
                await unit.command("TEST UNIT READY", cdb.test_unit_ready())


async def test_a_short_queue_is_learned_from_the_target() -> None:
    async with (
        RamDevice(1 << 20) as disk,
        serve([TargetConfig(iqn=IQN, units={1: disk})]) as target,
    ):
        session_config = SessionConfig(initiator_name="iqn.2026-11.org.example:me")
        nexus = Nexus(target_name=IQN, isid=b"\x80\0\0\0\0\1", config=session_config)
        async with open_session(Portal(*target.portals[0]), nexus) as session:
            unit = await _ready_unit(session)
            full = Fault(
                act=Act.ANSWER,
                opcode=OpCode.READ_10,
                status=Status.TASK_SET_FULL,
                after=4,
                times=4,
            )
            target.targets[0].faults.add(full)

            async def read() -> None:
                await unit.read_exactly("READ", cdb.read(0, 1), memoryview(bytearray(512)))

            async with trio.open_nursery() as nursery:
                for _ in range(12):
                    nursery.start_soon(read)
            assert 1 <= unit.depth.limit < 12


async def _ready_unit(session: Session) -> LogicalUnit:
    unit = LogicalUnit(session, 1)
    await unit.command("TEST UNIT READY", cdb.test_unit_ready())
    return unit
