"""Every scripted fault does what it says, once, and the session goes on where it can."""

import pytest
import trio

from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    AsyncMessage,
    DataIn,
    LogoutReason,
    LogoutResponse,
    NopIn,
    NopOut,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.target import Fault, RamDevice, Running, serve
from orion_iscsifs.target.faults import Act, Faults, Occasion
from orion_iscsifs.target.settings import Limits
from tests.target.client import SIZE, TUR, Client, config, data_out, joined, logged_in
from tests.target.test_connections import LIMITS, MANY, logout, ordered
from tests.target.test_retransmission import LENGTH, level_1

READ = cdb.read(0, LENGTH // 512)


def script(running: Running, act: Act, **fields: object) -> Faults:
    faults = running.targets[0].faults
    faults.add(Fault(act=act, **fields))  # type: ignore[arg-type]
    return faults


# -- the script ------------------------------------------------------------------------------------


def test_a_fault_waits_counts_and_filters() -> None:
    faults = Faults()
    faults.add(Fault(act=Act.SILENCE, opcode=OpCode.READ_10, cid=1, after=1, times=2))
    faults.add(Fault(act=Act.SNACK_IGNORED))
    taken = [
        faults.take(opcode, cid) is not None
        for opcode, cid in ((0x28, 1), (0x2A, 1), (0x28, 0), (0x28, 1), (0x28, 1), (0x28, 1))
    ]
    assert taken == [False, False, False, True, True, False]
    assert faults.hits == 2
    assert faults.take(0, 0, Occasion.TASK_MANAGEMENT) is None
    assert faults.take(3, 0, Occasion.SNACK) is not None
    assert not faults


# -- Data-In ---------------------------------------------------------------------------------------


async def data_in(client: Client, count: int) -> list[DataIn]:
    await client.send(client.command(READ, read=LENGTH))
    return [await client.expect(DataIn) for _ in range(count)]


async def test_wrong_data_in() -> None:
    async with level_1() as (_, running, client):
        script(running, Act.DUPLICATE_DATA_IN, number=4)
        numbers = [pdu.data_sn for pdu in await data_in(client, 11)]
        assert numbers == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
        script(running, Act.DATA_SN_GAP, number=8)
        assert [pdu.data_sn for pdu in await data_in(client, 10)][7:] == [7, 9, 10]
        script(running, Act.WRONG_BUFFER_OFFSET, number=1)
        assert [pdu.buffer_offset for pdu in await data_in(client, 3)] == [0, 2048, 2048]
        for _ in range(7):
            await client.expect(DataIn)
        script(running, Act.DATA_IN_BEYOND_END)
        beyond = (await data_in(client, 11))[-1]
        assert (beyond.buffer_offset, beyond.data_sn, len(beyond.data)) == (LENGTH, 10, 512)
        assert (await client.expect(ScsiResponse)).status == 0
        script(running, Act.ASK_DATA_ACK)
        last = (await data_in(client, 10))[-1]
        assert last.acknowledge
        assert last.has_status
        assert last.target_transfer_tag != NO_TAG


# -- status ----------------------------------------------------------------------------------------


async def test_wrong_status() -> None:
    async with level_1() as (_, running, client):
        script(running, Act.SEPARATE_STATUS)
        await data_in(client, 10)
        assert (await client.expect(ScsiResponse)).exp_data_sn == 10
        script(running, Act.WRONG_EXP_DATA_SN)
        await data_in(client, 10)
        assert (await client.expect(ScsiResponse)).exp_data_sn == 11
        script(running, Act.DUPLICATE_STATUS)
        await client.send(client.command(TUR))
        first, second = await client.expect(ScsiResponse), await client.expect(ScsiResponse)
        assert first == second
        script(running, Act.STAT_SN_JUMP, number=9)
        _, status = await client.run(TUR)
        assert status.stat_sn == first.stat_sn + 10
        script(running, Act.UNKNOWN_TAG)
        await client.send(client.command(TUR))
        assert (await client.expect(ScsiResponse)).initiator_task_tag == 0xDEAD_0000
        assert (await client.expect(ScsiResponse)).status == 0


async def test_wrong_windows() -> None:
    async with level_1() as (_, running, client):
        before = client.max_cmd_sn
        script(running, Act.STALE_MAX_CMD_SN, number=40)
        _, status = await client.run(TUR)
        assert status.max_cmd_sn == before + 1 - 40
        script(running, Act.INVALID_MAX_CMD_SN)
        _, status = await client.run(TUR)
        assert status.max_cmd_sn == status.exp_cmd_sn - 2
        _, status = await client.run(TUR)
        assert status.max_cmd_sn == before + 3


# -- commands --------------------------------------------------------------------------------------


async def test_rejected_and_lost_commands_leave_a_gap() -> None:
    async with level_1() as (_, running, client):
        for act in (Act.REJECT, Act.LOSE_COMMAND):
            script(running, act, code=RejectReason.INVALID_PDU_FIELD)
            command = client.command(TUR)
            await client.send(command, NopOut(0x55, cmd_sn=client.cmd_sn))
            if act is Act.REJECT:
                assert (await client.expect(Reject)).reason == RejectReason.INVALID_PDU_FIELD
            assert (await client.expect(NopIn)).exp_cmd_sn == command.cmd_sn
            await client.send(command)
            assert (await client.expect(ScsiResponse)).status == 0
        script(running, Act.STRAY_REJECT, code=0x7F)
        await client.send(client.command(TUR))
        assert (await client.expect(Reject)).reason == 0x7F
        assert (await client.expect(ScsiResponse)).status == 0


async def test_nop_in_flood_and_wrong_echoes() -> None:
    async with level_1() as (_, running, client):
        script(running, Act.NOP_FLOOD, number=50)
        await client.send(client.command(TUR))
        for _ in range(50):
            ping = await client.expect(NopIn)
            assert (ping.initiator_task_tag, ping.target_transfer_tag) == (NO_TAG, NO_TAG)
        assert (await client.expect(ScsiResponse)).stat_sn == ping.stat_sn
        script(running, Act.PONG_CHANGED)
        script(running, Act.PONG_LOST)
        for number in range(3):
            await client.send(NopOut(0x50 + number, data=b"echo"))
        changed, right = await client.expect(NopIn), await client.expect(NopIn)
        assert (changed.initiator_task_tag, bytes(changed.data)) == (0x50, b"\x9a\x9c\x97\x90")
        assert (right.initiator_task_tag, bytes(right.data)) == (0x52, b"echo")


async def test_an_answer_after_the_abort() -> None:
    async with level_1() as (_, running, client):
        script(running, Act.ANSWER_AFTER_ABORT)
        late = client.command(TUR)
        abort = TaskManagementRequest(
            TaskManagementFunction.ABORT_TASK,
            0x900,
            referenced_task_tag=late.initiator_task_tag,
            cmd_sn=client.cmd_sn,
            ref_cmd_sn=late.cmd_sn,
        )
        await client.send(late, abort)
        assert (await client.expect(TaskManagementResponse)).response == 0
        status = await client.expect(ScsiResponse)
        assert status.initiator_task_tag == late.initiator_task_tag


async def test_only_one_connection_of_a_session_breaks() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=LIMITS) as running,
        logged_in(running, offer=MANY) as one,
        joined(running, one, 1, offer=MANY) as two,
        joined(running, one, 2, offer=MANY) as three,
    ):
        script(running, Act.DROP, cid=2)
        await three.send(three.command(TUR))
        assert await three.closed()
        assert (await one.expect(AsyncMessage)).parameter1 == 2
        script(running, Act.DROP_OTHERS, cid=0)
        assert (await two.expect(AsyncMessage)).parameter1 == 2
        await one.send(one.command(TUR))
        assert await two.closed()
        assert (await one.expect(ScsiResponse)).status == 0
        script(running, Act.DROP_SESSION)
        await one.send(one.command(TUR))
        assert await one.closed()
        with trio.fail_after(30):
            while running.sessions:
                await trio.sleep(0.005)


# -- R2T -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "field", "value"),
    [
        (Act.R2T_EMPTY, "desired_data_transfer_length", 0),
        (Act.R2T_TOO_LONG, "desired_data_transfer_length", 262148),
        (Act.R2T_BEYOND_END, "buffer_offset", 4096),
        (Act.R2T_RESERVED_TAG, "target_transfer_tag", NO_TAG),
        (Act.R2T_SN_GAP, "r2t_sn", 1),
    ],
)
async def test_wrong_r2ts(act: Act, field: str, value: int) -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        script(running, act)
        await client.send(client.command(cdb.write(0, 8), write=4096))
        assert getattr(await client.expect(R2T), field) == value


async def test_a_duplicate_r2t() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        script(running, Act.DUPLICATE_R2T)
        command = client.command(cdb.write(0, 8), write=4096)
        await client.send(command)
        first, second = await client.expect(R2T), await client.expect(R2T)
        assert first == second
        await client.send(data_out(command, b"d" * 4096, ttt=first.target_transfer_tag))
        assert (await client.expect(ScsiResponse)).status == 0


# -- task management -------------------------------------------------------------------------------


async def test_task_management_that_is_late_silent_or_refused() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        function = TaskManagementFunction.LOGICAL_UNIT_RESET
        request = TaskManagementRequest(function, 0x900)
        script(running, Act.TMF_ANSWER, opcode=function, code=6)
        script(running, Act.TMF_SILENCE, opcode=function)
        script(running, Act.TMF_DELAY, opcode=function, delay_s=0.1)
        other = TaskManagementRequest(TaskManagementFunction.ABORT_TASK_SET, 0x901)
        await client.send(other)
        assert (await client.expect(TaskManagementResponse)).response == 0
        await client.send(request)
        assert (await client.expect(TaskManagementResponse)).response == 6
        await client.send(request)
        began = trio.current_time()
        await client.send(request)
        assert (await client.expect(TaskManagementResponse)).response == 0
        assert trio.current_time() - began >= 0.09


# -- Async Messages acted out ----------------------------------------------------------------------


async def test_a_logout_that_is_asked_for_and_comes() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        running.sessions[0].act_out(1, (0, 0, 5))
        message = await client.expect(AsyncMessage)
        assert (message.async_event, message.parameter3) == (1, 5)
        _, status = await client.run(TUR)
        assert status.status == 0
        await client.send(logout(client, LogoutReason.CLOSE_CONNECTION))
        assert (await client.expect(LogoutResponse)).response == 0
        assert await client.closed()
        assert running.stats.ignored_events == 0


async def test_a_logout_that_does_not_come_in_time() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        running.sessions[0].act_out(1, (0, 0, 1))
        assert (await client.expect(AsyncMessage)).async_event == 1
        dropped = await client.expect(AsyncMessage)
        assert (dropped.async_event, dropped.parameter1) == (2, 0)
        assert await client.closed()
        assert running.stats.ignored_events == 1


@pytest.mark.parametrize("event", [2, 3])
async def test_announced_drops_happen(event: int) -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=LIMITS) as running,
        logged_in(running, offer=MANY) as one,
        joined(running, one, 1, offer=MANY) as two,
    ):
        script(running, Act.ASYNC_MESSAGE, async_event=event, parameters=(0, 3, 9), cid=1)
        await two.send(two.command(TUR))
        message = await two.expect(AsyncMessage)
        assert (message.async_event, message.parameter2, message.parameter3) == (event, 3, 9)
        assert await two.closed()
        if event == 2:
            assert message.parameter1 == 1
            assert (await one.expect(AsyncMessage)).parameter2 == 3, "what was announced counts"
            await ordered(one)
        else:
            assert await one.closed()


async def test_a_negotiation_that_is_asked_for() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        session = running.sessions[0]
        session.act_out(4, (0, 0, 1))
        assert (await client.expect(AsyncMessage)).async_event == 4
        await client.send(TextRequest(5, cmd_sn=client.cmd_sn, immediate=True))
        assert (await client.expect(TextResponse)).final
        assert session.live[0].text_requests == 1
        session.act_out(4, (0, 0, 1))
        assert (await client.expect(AsyncMessage)).async_event == 4
        assert (await client.expect(AsyncMessage)).async_event == 4, "asked again"
        assert running.stats.ignored_events == 1


async def test_events_that_are_only_said() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=Limits()) as running,
        logged_in(running) as client,
    ):
        for event in (0, 2, 3, 5, 250):
            script(running, Act.ASYNC_EVENT, async_event=event)
            await client.send(client.command(TUR))
            assert (await client.expect(AsyncMessage)).async_event == event
            assert (await client.expect(ScsiResponse)).status == 0
