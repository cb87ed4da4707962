"""Several connections and the recovery levels, as the whole data path meets them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from orion_iscsifs.config import CacheMode, DigestPreference
from orion_iscsifs.initiator import dial as dial_module
from orion_iscsifs.initiator import supervisor as supervisor_module
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, Route
from orion_iscsifs.scsi.sense import SenseData, SenseKey
from orion_iscsifs.target import Fault, Running
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from tests.world import compare_with_model, mount, world

LIMITS = Limits(
    max_connections=4,
    error_recovery_level=2,
    default_time2retain=10,
    max_recv_data_segment_length=8192,
    first_burst_length=8192,
    max_burst_length=65536,
)
DIGESTS = {"header_digest": DigestPreference.CRC32C, "data_digest": DigestPreference.CRC32C}

# What costs the session at level 0 and a PDU at level 1.
LOST = [
    Fault(act=act, number=number)
    for act in (Act.CORRUPT_DATA_IN, Act.LOSE_DATA_IN, Act.DUPLICATE_DATA_IN)
    for number in (0, 1)
] + [
    Fault(act=Act.CORRUPT_DATA_DIGEST),
    Fault(act=Act.LOSE_STATUS),
    Fault(act=Act.DUPLICATE_STATUS),
    Fault(act=Act.LOSE_R2T),
    Fault(act=Act.DUPLICATE_R2T),
    Fault(act=Act.LOSE_COMMAND),
    Fault(act=Act.ASK_DATA_ACK),
    Fault(act=Act.SEPARATE_STATUS),
    Fault(act=Act.SNACK_REFUSED),
]
# What costs a connection, or only time.
OTHERS = [
    Fault(act=Act.DROP),
    Fault(act=Act.DROP_AFTER),
    Fault(act=Act.DROP_OTHERS),
    Fault(act=Act.DROP_SESSION),
    Fault(act=Act.SILENCE),
    Fault(act=Act.DELAY, delay_s=0.05),
    Fault(act=Act.ANSWER_AFTER_ABORT),
    Fault(act=Act.REJECT, code=0x05),
    Fault(act=Act.PING),
    Fault(act=Act.NOP_FLOOD, number=20),
    Fault(act=Act.CLOSE_WINDOW, delay_s=0.05),
    Fault(act=Act.STALE_MAX_CMD_SN, number=3),
    Fault(act=Act.INVALID_MAX_CMD_SN),
    Fault(act=Act.CORRUPT_HEADER_DIGEST),
    Fault(act=Act.ANSWER, status=2, sense=SenseData(SenseKey.UNIT_ATTENTION, 0x29, 0)),
    Fault(act=Act.ASYNC_MESSAGE, async_event=1, parameters=(0, 0, 3)),
    Fault(act=Act.ASYNC_MESSAGE, async_event=3, parameters=(0, 0, 3)),
    Fault(act=Act.ASYNC_MESSAGE, async_event=4, parameters=(0, 0, 3)),
]
SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 52))]


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("orion_iscsifs.initiator.recovering._ASK_AGAIN_S", 0.1)


def _cut_one(running: Running) -> None:
    """One connection of the session breaks; the others do not know."""
    for session in running.sessions:
        if session.live:
            session.live[0].drop()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
async def test_faults_never_change_what_is_read(seed: int, connections: int, level: int) -> None:
    """As in test_stack, with everything that RFC 7143 §7 knows how to recover from."""
    config = mount(
        CacheMode.NONE,
        command_timeout_s=0.8,
        replacement_timeout_s=60,
        noop_interval_s=0.5,
        connections=connections,
        erl=level,
        **DIGESTS,
    )
    async with world(config, limits=LIMITS) as parts:
        running = parts[0]

        async def cut() -> None:
            _cut_one(running)

        async def restart() -> None:
            await running.restart()

        with trio.fail_after(100):
            hits = await compare_with_model(
                parts,
                [*LOST, *OTHERS],
                [cut, cut, restart],
                seed=f"{seed} {connections} {level}",
            )
        assert hits > 3, "the target did misbehave"


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("level", [1, 2])
async def test_lost_pdus_cost_neither_a_connection_nor_a_command(
    level: int, connections: int
) -> None:
    """Recovery within commands and within the connection (§7.1.4.1, §7.1.4.2)."""
    config = mount(
        CacheMode.NONE, noop_interval_s=0.5, connections=connections, erl=level, **DIGESTS
    )
    faults = [fault for fault in LOST if fault.act is not Act.SNACK_REFUSED]
    async with world(config, limits=LIMITS) as parts:
        hits = await compare_with_model(parts, faults, [], seed=f"lost {level} {connections}")
        counters = parts[2].sessions[0].counters
        assert hits > 3, "the target did misbehave"
        assert (counters.logins, counters.connections_lost) == (1, 0)
        assert counters.task_management == 0


@pytest.mark.parametrize("connections", [1, 3])
async def test_at_level_2_a_lost_connection_costs_no_command(connections: int) -> None:
    """Connection recovery (§7.1.4.3): the session lasts, its commands are reassigned."""
    config = mount(CacheMode.NONE, connections=connections, erl=2)
    async with world(config, limits=LIMITS) as parts:
        running, _, stack = parts

        async def cut() -> None:
            _cut_one(running)

        faults = [Fault(act=Act.DELAY, delay_s=0.02)]
        counters = stack.sessions[0].counters
        with trio.fail_after(100):
            await compare_with_model(
                parts,
                faults,
                [cut],
                seed=f"cut {connections}",
                requests=240,
                enough=lambda: counters.connections_lost > 3 and counters.commands_reassigned > 0,
            )
        assert counters.logins == 1
        assert counters.connections_lost > 3
        assert counters.commands_reassigned > 0


async def test_three_connections_share_the_commands() -> None:
    async with world(mount(CacheMode.NONE, connections=3), limits=LIMITS) as parts:
        running, _, stack = parts
        session = stack.sessions[0]
        with trio.fail_after(5):
            while len(session.connections) < 3:
                await trio.sleep(0.01)
        script = running.targets[0].faults
        for _ in range(6):
            script.add(Fault(act=Act.DELAY, delay_s=0.2))
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(stack.files["lun1"].write, number * 4096, b"x" * 4096)
            await trio.sleep(0.1)
            shares = [len(connection.tasks) for connection in session.connections]
        assert shares == [2, 2, 2]
        status = stack.status()["sessions"][0]
        assert [entry["cid"] for entry in status["connections"]] == [0, 1, 2]
        assert {entry["state"] for entry in status["connections"]} == {"logged-in"}


async def test_a_target_with_fewer_connections_is_used_as_far_as_it_goes() -> None:
    limits = replace(LIMITS, max_connections=2)
    async with world(mount(CacheMode.NONE, connections=4), limits=limits) as (_, _disk, stack):
        session = stack.sessions[0]
        with trio.fail_after(5):
            while len(session.connections) < 2:
                await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert len(session.connections) == 2
        await stack.files["lun1"].write(0, b"x" * 512)


async def test_a_session_goes_on_over_a_connection_that_joins_during_its_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At level 2 the session outlives its last connection, whoever comes first afterwards."""
    joined, may_join = trio.Event(), trio.Event()
    real = dial_module.dial

    async def dial(portal: Portal | Route, nexus: Nexus, **arguments: Any) -> LoggedIn:
        logged_in = await real(portal, nexus, **arguments)
        if arguments.get("cid") == 1:
            joined.set()
            await may_join.wait()
        return logged_in

    monkeypatch.setattr(supervisor_module, "dial", dial)
    limits = replace(LIMITS, default_time2wait=1)
    config = mount(CacheMode.NONE, connections=2, erl=2)
    async with world(config, limits=limits) as (running, _, stack):
        session = stack.sessions[0]
        with trio.fail_after(10):
            await joined.wait()
            running.sessions[0].live[0].drop()
            while stack.status()["state"] != "recovering":
                await trio.sleep(0.01)
            may_join.set()
            await stack.files["lun1"].write(0, b"x" * 512)
        assert session.counters.logins == 1
        assert stack.status()["state"] == "ok"
