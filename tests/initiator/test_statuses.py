"""What a logical unit does about the conditions that a device reports."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import LunNotFound, PathInaccessible, ScsiError, SpaceExhausted
from orion_iscsifs.initiator import commands
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.session import open_session
from orion_iscsifs.scsi import cdb, sense
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import SenseData, SenseKey
from orion_iscsifs.target import Fault, RamDevice, Running, TargetConfig, serve
from orion_iscsifs.target.faults import Act

IQN = "iqn.2026-11.org.example:statuses"
STANDBY = SenseData(SenseKey.NOT_READY, 0x04, 0x0B)
STATE_CHANGED = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, 0x06)


@asynccontextmanager
async def unit_of(**changes: float) -> AsyncIterator[tuple[LogicalUnit, Running]]:
    async with (
        RamDevice(1 << 20) as disk,
        serve([TargetConfig(iqn=IQN, units={1: disk})]) as running,
    ):
        config = SessionConfig(initiator_name="iqn.2026-11.org.example:me", **changes)  # type: ignore[arg-type]
        nexus = Nexus(target_name=IQN, isid=b"\x80\0\0\0\0\1", config=config)
        async with open_session(Portal(*running.portals[0]), nexus) as session:
            unit = LogicalUnit(session, 1)
            await unit.command("TEST UNIT READY", cdb.test_unit_ready())
            yield unit, running


def answer(running: Running, reason: SenseData, opcode: int, times: int | None = 1) -> None:
    running.targets[0].faults.add(
        Fault(act=Act.ANSWER, opcode=opcode, status=2, sense=reason, times=times)
    )


async def read(unit: LogicalUnit) -> bytes:
    target = bytearray(512)
    await unit.read_exactly("READ", cdb.read(0, 1), memoryview(target))
    return bytes(target)


async def test_a_stopped_unit_is_started_once() -> None:
    async with unit_of() as (unit, running):
        before = running.stats.commands[OpCode.START_STOP_UNIT]
        answer(running, sense.NOT_READY_STOPPED, OpCode.READ_10, times=3)
        assert await read(unit) == bytes(512)
        assert running.stats.commands[OpCode.START_STOP_UNIT] == before + 1


async def test_one_that_becomes_ready_is_waited_for() -> None:
    async with unit_of() as (unit, running):
        becoming = SenseData(SenseKey.NOT_READY, 0x04, 0x01)
        answer(running, becoming, OpCode.READ_10, times=4)
        start = trio.current_time()
        assert await read(unit) == bytes(512)
        assert trio.current_time() - start > 0.2, "with growing pauses"


async def test_a_unit_on_the_move_is_waited_for_only_when_it_is_known() -> None:
    async with unit_of() as (unit, running):
        answer(running, sense.LUN_NOT_SUPPORTED, OpCode.READ_10, times=3)
        unit.in_use = True
        assert await read(unit) == bytes(512)
        answer(running, sense.LUN_NOT_SUPPORTED, OpCode.READ_10)
        unit.in_use = False
        with pytest.raises(LunNotFound):
            await read(unit)


async def test_a_port_in_standby_is_left_for_another_path_at_once() -> None:
    async with unit_of() as (unit, running):
        news: list[None] = []
        unit.access_news = lambda: news.append(None)
        unit.other_paths = True
        answer(running, STANDBY, OpCode.READ_10)
        with pytest.raises(PathInaccessible, match="standby"):
            await read(unit)
        assert news
        assert await read(unit) == bytes(512)


async def test_without_another_path_a_port_in_standby_is_waited_for_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "_BUSY_PAUSE_MAX_S", 0.05)
    async with unit_of(command_timeout_s=0.3) as (unit, running):
        answer(running, STANDBY, OpCode.READ_10, times=3)
        assert await read(unit) == bytes(512)
        answer(running, STANDBY, OpCode.READ_10, times=None)
        with pytest.raises(PathInaccessible) as refused:
            await read(unit)
        assert "portals=" in refused.value.advice


async def test_a_changed_access_state_is_news_and_the_command_goes_on() -> None:
    async with unit_of() as (unit, running):
        news: list[None] = []
        unit.access_news = lambda: news.append(None)
        answer(running, STATE_CHANGED, OpCode.READ_10)
        assert await read(unit) == bytes(512)
        assert len(news) == 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (sense.SPACE_ALLOCATION_FAILED, SpaceExhausted),
        (sense.INTERNAL_TARGET_FAILURE, ScsiError),
        (SenseData(SenseKey.NOT_READY, 0x3A, 0x00), ScsiError),
    ],
)
async def test_what_does_not_pass_fails_at_once(reason: SenseData, kind: type[Exception]) -> None:
    async with unit_of() as (unit, running):
        answer(running, reason, OpCode.WRITE_10)
        with pytest.raises(kind), trio.fail_after(1):
            await unit.write("WRITE", cdb.write(0, 1), memoryview(bytes(512)))
        await unit.write("WRITE", cdb.write(0, 1), memoryview(bytes(512)))
