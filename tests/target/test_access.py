"""ALUA at the target: states of portal groups, who hears of changes, what is still answered."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from orion_iscsifs.protocol.pdu import ScsiResponse
from orion_iscsifs.scsi import alua, cdb, inquiry, sense
from orion_iscsifs.scsi.alua import AccessState, ChangedBy, PortGroups, Wish
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.inquiry import VpdPage
from orion_iscsifs.scsi.sense import SenseData, SenseKey, sense_of_response
from orion_iscsifs.target import Portal, RamDevice, Running, serve
from orion_iscsifs.target.access import STATE_CHANGED, SUPPORTED, Access
from tests.target.client import IQN, SIZE, TUR, Client, config, dialled

HERE = "127.0.0.1"
TWO_GROUPS = [Portal(HERE, 0, 1), Portal(HERE, 0, 7)]
REFUSED = {
    AccessState.TRANSITIONING: SenseData(SenseKey.NOT_READY, 0x04, 0x0A),
    AccessState.STANDBY: SenseData(SenseKey.NOT_READY, 0x04, 0x0B),
    AccessState.UNAVAILABLE: SenseData(SenseKey.NOT_READY, 0x04, 0x0C),
    AccessState.OFFLINE: SenseData(SenseKey.NOT_READY, 0x04, 0x0C),
}


@asynccontextmanager
async def two_paths() -> AsyncIterator[tuple[Running, Client, Client]]:
    """A session through each of two portal groups, 1 and 7."""
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], TWO_GROUPS) as running,
        dialled(running) as first,
        dialled(running, portal=1) as second,
    ):
        for client in (first, second):
            await client.log_in(IQN)
            await client.settle()
        yield running, first, second


async def groups(client: Client, *, extended: bool = False) -> PortGroups:
    data, status = await client.run(alua.report_target_port_groups(extended=extended), read=4096)
    assert status.status == 0
    return alua.decode_port_groups(data)


async def change(client: Client, *wishes: Wish) -> ScsiResponse:
    data = alua.encode_wishes(wishes)
    block = alua.set_target_port_groups(len(data))
    await client.send(client.command(block, write=len(data), data=data))
    return await client.expect(ScsiResponse)


async def status(client: Client, block: bytes = TUR, *, read: int = 0) -> int:
    return (await client.run(block, read=read))[1].status


# -- what is told ----------------------------------------------------------------------------------


async def test_every_group_is_reported_and_knows_its_port() -> None:
    async with two_paths() as (running, first, second):
        running.targets[0].access.preferred = 7
        reported = await groups(first)
        assert reported == await groups(second)
        assert [(g.tag, g.access, g.preferred, g.ports) for g in reported.groups] == [
            (1, AccessState.ACTIVE_OPTIMIZED, False, (1,)),
            (7, AccessState.ACTIVE_OPTIMIZED, True, (2,)),
        ]
        assert {group.supported for group in reported.groups} == {SUPPORTED}
        running.targets[0].access.implicit_transition_time_s = 9
        assert (await groups(first, extended=True)).implicit_transition_time_s == 9
        short = alua.report_target_port_groups(4)
        assert alua.port_groups_length((await first.run(short, read=4))[0]) == 28


async def test_a_path_names_its_port_and_group_and_the_one_unit() -> None:
    async with two_paths() as (_, first, second):
        units, places = [], []
        for client in (first, second):
            data, _status = await client.run(cdb.inquiry(VpdPage.DEVICE_IDENTIFICATION), read=255)
            found = inquiry.decode_designators(data)
            units.append([d for d in found if d.association == 0])
            places.append((alua.relative_target_port(found), alua.target_port_group(found)))
            data, _status = await client.run(cdb.inquiry(), read=255)
            assert inquiry.decode_inquiry(data).tpgs == alua.TPGS_BOTH
        assert units[0] == units[1] != []
        assert places == [(1, 1), (2, 7)]


@pytest.mark.parametrize("opcode", [OpCode.MAINTENANCE_IN, OpCode.MAINTENANCE_OUT])
async def test_the_commands_are_reported(opcode: OpCode) -> None:
    async with two_paths() as (_, client, _other):
        block = cdb.report_supported_operation_codes(opcode, alua.SERVICE_ACTION)
        data, _status = await client.run(block, read=4096)
        assert data[1] & 7 == 3
        assert data[4] == opcode
        assert data[5] & alua.SERVICE_ACTION == alua.SERVICE_ACTION
        everything, _status = await client.run(cdb.report_supported_operation_codes(), read=4096)
        entries = {everything[at : at + 4] for at in range(4, len(everything), 8)}
        assert bytes((opcode, 0, 0, alua.SERVICE_ACTION)) in entries


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("state", REFUSED, ids=lambda state: state.name)
async def test_one_group_refuses_and_the_other_serves(state: AccessState) -> None:
    async with two_paths() as (running, first, second):
        assert (await first.write(0, b"x" * 512)).status == 0
        running.targets[0].access.set(1, state)
        for client in (first, second):
            assert await client.sense(TUR) == STATE_CHANGED
        # What would be refused for another reason too is not ready above all.
        reads = [(cdb.read(0, 1), 512), (cdb.read(SIZE, 1), 512)]
        for block, length in (*reads, (TUR, 0), (cdb.read_capacity_16(), 32)):
            assert await first.sense(block, read=length) == REFUSED[state]
        beyond = await first.write(SIZE, b"y" * 512)
        assert sense_of_response(beyond.data) == REFUSED[state]
        refused = await first.write(0, b"y" * 131072)
        assert sense_of_response(refused.data) == REFUSED[state]
        assert await second.read(0, 512) == b"x" * 512
        for block in (cdb.inquiry(), cdb.report_luns(), cdb.request_sense()):
            assert await status(first, block, read=255) == 0
        assert (await groups(first)).groups[0].state == state
        running.targets[0].access.set(1, AccessState.ACTIVE_NON_OPTIMIZED)
        assert await first.sense(TUR) == STATE_CHANGED
        assert await first.read(0, 512) == b"x" * 512
        assert not running.targets[0].access.restricted


async def test_standby_answers_more_than_unavailable() -> None:
    async with two_paths() as (running, first, _):
        sensing = cdb.mode_sense_6(0x3F)
        running.targets[0].access.set(1, AccessState.STANDBY)
        assert await first.sense(TUR) == STATE_CHANGED
        assert await status(first, sensing, read=255) == 0
        running.targets[0].access.set(1, AccessState.UNAVAILABLE)
        assert await first.sense(TUR) == STATE_CHANGED
        assert await first.sense(sensing, read=255) == REFUSED[AccessState.UNAVAILABLE]


async def test_an_unchanged_state_is_no_news() -> None:
    async with two_paths() as (running, first, _):
        running.targets[0].access.set(1, AccessState.ACTIVE_OPTIMIZED)
        assert await status(first) == 0
        assert running.targets[0].access.changes == 0


async def test_a_transition_takes_its_time(autojump_clock: trio.testing.MockClock) -> None:
    heard: list[object] = []
    access = Access([1, 2], heard.append)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.transition, 2, AccessState.STANDBY, 5)
        await trio.sleep(1)
        assert access.states[2] is AccessState.TRANSITIONING
        assert access.restricted
        assert heard == []
    assert trio.current_time() - began == pytest.approx(5)
    assert (access.states[2], heard, access.changes) == (AccessState.STANDBY, [None], 1)
    assert access.report().groups[1].status_code == ChangedBy.DEVICE


async def test_a_later_change_takes_the_place_of_a_transition(
    autojump_clock: trio.testing.MockClock,
) -> None:
    access = Access([1], lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.transition, 1, AccessState.STANDBY, 5)
        await trio.sleep(1)
        access.set(1, AccessState.ACTIVE_NON_OPTIMIZED)
    assert access.states[1] is AccessState.ACTIVE_NON_OPTIMIZED
    assert not access.restricted


async def test_a_cancelled_transition_is_over(autojump_clock: trio.testing.MockClock) -> None:
    access = Access([1], lambda _: None)
    with trio.move_on_after(1):
        await access.transition(1, AccessState.UNAVAILABLE, 5)
    assert access.states[1] is AccessState.UNAVAILABLE


# -- SET TARGET PORT GROUPS ------------------------------------------------------------------------


async def test_an_initiator_changes_states_and_the_others_hear_of_it() -> None:
    async with two_paths() as (running, first, second):
        wishes = (Wish(1, AccessState.STANDBY), Wish(7, AccessState.ACTIVE_NON_OPTIMIZED))
        assert (await change(first, *wishes)).status == 0
        assert await second.sense(TUR) == STATE_CHANGED
        assert await first.sense(TUR) == REFUSED[AccessState.STANDBY]
        reported = await groups(second)
        assert [group.access for group in reported.groups] == [wish.state for wish in wishes]
        assert {g.status_code for g in reported.groups} == {ChangedBy.SET_TARGET_PORT_GROUPS}
        # The way back goes through the very path that is in standby.
        assert (await change(first, Wish(1, AccessState.ACTIVE_OPTIMIZED))).status == 0
        assert await status(first) == 0
        assert running.targets[0].access.changes == 3


async def test_a_slow_explicit_change() -> None:
    async with two_paths() as (running, first, second):
        access = running.targets[0].access
        access.set(7, AccessState.STANDBY)
        for client in (first, second):
            assert await client.sense(TUR) == STATE_CHANGED
        access.explicit_delay_s = 0.05
        assert (await change(second, Wish(7, AccessState.ACTIVE_OPTIMIZED))).status == 0
        assert await status(second) == 0
        assert await first.sense(TUR) == STATE_CHANGED


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wish(2, AccessState.STANDBY), sense.INVALID_FIELD_IN_PARAMETER_LIST),
        (Wish(1, AccessState.TRANSITIONING), sense.INVALID_FIELD_IN_PARAMETER_LIST),
        (Wish(1, AccessState.OFFLINE), sense.INVALID_FIELD_IN_PARAMETER_LIST),
        (Wish(1, 9), sense.INVALID_FIELD_IN_PARAMETER_LIST),
    ],
    ids=["unknown group", "transitioning", "offline", "reserved"],
)
async def test_wishes_that_are_refused(wish: Wish, reason: SenseData) -> None:
    async with two_paths() as (running, first, _):
        refused = await change(first, Wish(7, AccessState.STANDBY), wish)
        assert sense_of_response(refused.data) == reason
        assert running.targets[0].access.changes == 0


async def test_wishes_of_a_wrong_length_or_where_none_are_taken() -> None:
    async with two_paths() as (running, first, _):
        block = alua.set_target_port_groups(6)
        await first.send(first.command(block, write=6, data=bytes(6)))
        answer = await first.expect(ScsiResponse)
        assert sense_of_response(answer.data) == sense.PARAMETER_LIST_LENGTH_ERROR
        assert await status(first, alua.set_target_port_groups(0)) == 0
        running.targets[0].access.tpgs = alua.TPGS_IMPLICIT
        refused = await change(first, Wish(7, AccessState.STANDBY))
        assert sense_of_response(refused.data) == sense.INVALID_FIELD_IN_CDB
        unknown = bytes((OpCode.MAINTENANCE_OUT, 0x05)) + bytes(14)
        assert await first.sense(unknown) == sense.INVALID_FIELD_IN_CDB
        format_2 = bytes((OpCode.MAINTENANCE_IN, 0x4A)) + bytes(14)
        assert await first.sense(format_2) == sense.INVALID_FIELD_IN_CDB
