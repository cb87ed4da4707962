"""Task management functions that end many tasks: waits, fences, Async Message 5 (§4.2.3)."""

from dataclasses import replace

import pytest
import trio

from orion_iscsifs.protocol.pdu import (
    R2T,
    AsyncMessage,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi import cdb, sense
from orion_iscsifs.scsi.sense import SenseData, sense_of_response
from orion_iscsifs.target import Fault, RamDevice, serve
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from tests.target.client import OFFER, SIZE, TUR, Client, config, data_out, joined, logged_in
from tests.target.test_connections import LIMITS, MANY, ordered

Function = TaskManagementFunction
FENCES = ("ResponseFence", "RFC3720")
QUICK = Limits(abort_wait_s=0.1)


def many(client: Client, function: int, **changes: int) -> TaskManagementRequest:
    request = TaskManagementRequest(function, 0x900, cmd_sn=client.cmd_sn)
    return replace(request, **changes)  # type: ignore[arg-type]


async def silence(client: Client, seconds: float = 0.05) -> None:
    """Nothing comes for a while."""
    with trio.move_on_after(seconds):
        pdu = await client.receive()
        pytest.fail(f"unexpected {pdu}")


@pytest.mark.parametrize("function", [Function.ABORT_TASK_SET, Function.LOGICAL_UNIT_RESET])
async def test_it_waits_for_data_that_was_asked_for(function: int) -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        command = client.command(cdb.write(0, 8), write=4096)
        await client.send(command)
        r2t = await client.expect(R2T)
        await client.send(many(client, function))
        await silence(client)
        await client.send(data_out(command, b"d" * 4096, ttt=r2t.target_transfer_tag))
        reply = await client.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_COMPLETE
        assert bytes(disk.view[:4096]) == bytes(4096), "the write was ended, not carried out"
        assert running.sessions[0].tasks == {}


async def test_but_not_for_ever() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=QUICK) as running,
        logged_in(running) as client,
    ):
        await client.send(client.command(cdb.write(0, 8), write=4096))
        await client.expect(R2T)
        await client.send(many(client, Function.ABORT_TASK_SET))
        await client.expect(TaskManagementResponse)
        assert running.sessions[0].tasks == {}


async def test_it_waits_for_commands_on_their_way() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, times=2))
        late, here, after = (client.command(TUR) for _ in range(3))
        await client.send(here)
        await client.send(many(client, Function.ABORT_TASK_SET, cmd_sn=after.cmd_sn))
        await silence(client)
        await client.send(late)
        reply = await client.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_COMPLETE
        assert running.sessions[0].tasks == {}
        # What was sent after the function is out of its scope.
        await client.send(after)
        assert (await client.expect(ScsiResponse)).initiator_task_tag == after.initiator_task_tag


async def test_commands_sent_later_live_on() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, times=2))
        early, late = client.command(TUR), client.command(TUR)
        await client.send(early, late)
        await client.send(many(client, Function.ABORT_TASK_SET, cmd_sn=late.cmd_sn))
        await client.expect(TaskManagementResponse)
        assert list(running.sessions[0].tasks) == [late.initiator_task_tag]


async def test_a_target_reset_plugs_the_gaps() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        for _ in range(3):
            client.command(TUR)  # never sent
        await client.send(many(client, Function.TARGET_WARM_RESET))
        reply = await client.expect(TaskManagementResponse)
        assert reply.exp_cmd_sn == client.cmd_sn
        assert await client.sense(TUR) == sense.POWER_ON


async def test_a_task_management_function_can_not_be_aborted() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        await client.send(client.command(cdb.write(0, 8), write=4096))
        await client.expect(R2T)
        await client.send(many(client, Function.ABORT_TASK_SET))
        abort = many(client, Function.ABORT_TASK, initiator_task_tag=1, referenced_task_tag=0x900)
        await client.send(abort)
        reply = await client.expect(TaskManagementResponse)
        assert (reply.initiator_task_tag, reply.response) == (1, 255)


# -- several connections ---------------------------------------------------------------------------


async def test_the_response_waits_for_acknowledgments_on_every_connection() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=LIMITS) as running,
        logged_in(running, offer=MANY) as one,
        joined(running, one, 1, offer=MANY) as two,
    ):
        one.acknowledging = two.acknowledging = True
        await two.run(TUR)
        await one.send(many(one, Function.ABORT_TASK_SET))
        ping = await two.expect(NopIn)
        await silence(one)
        await two.send(NopOut(target_transfer_tag=ping.target_transfer_tag))
        reply = await one.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_COMPLETE


async def test_a_response_fence_holds_what_follows() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=replace(LIMITS, task_reporting=FENCES)) as running,
        logged_in(running, offer=replace(MANY, task_reporting=FENCES)) as one,
        joined(running, one, 1, offer=MANY) as two,
    ):
        one.acknowledging = two.acknowledging = True
        assert running.sessions[0].parameters.task_reporting == "ResponseFence"
        await ordered(one)
        await one.send(NopOut())
        await one.send(many(one, Function.LOGICAL_UNIT_RESET))
        reply = await one.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_COMPLETE
        follower = two.command(cdb.inquiry(), read=36)
        await two.send(follower)
        await silence(two)
        await one.expect(NopIn)
        await one.send(NopOut())  # its ExpStatSN acknowledges the response
        _, status = await two.answer()
        assert status.initiator_task_tag == follower.initiator_task_tag
        # The unit attention that tells of the reset is fenced too.
        await two.send(two.command(TUR))
        told = await two.expect(ScsiResponse)
        assert sense_of_response(told.data) == sense.LUN_RESET
        await one.send(one.command(TUR))
        await silence(one)
        await two.send(NopOut())
        assert (await one.expect(ScsiResponse)).status == 0


async def test_fast_abort_tells_other_connections_and_does_not_wait() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=LIMITS) as running,
        logged_in(running, offer=MANY) as one,
        joined(running, one, 1, offer=MANY) as two,
        logged_in(running, isid=b"\x80other") as third,
        logged_in(running, isid=b"\x80plain") as plain,
    ):
        sessions = running.sessions
        for session in sessions[:2]:
            session.parameters = replace(session.parameters, task_reporting="FastAbort")
        one.acknowledging = two.acknowledging = True
        writes = [one, two, third, plain]
        for client in writes:
            await client.send(client.command(cdb.write(0, 8), write=4096))
            await client.expect(R2T)
        await one.send(many(one, Function.LOGICAL_UNIT_RESET))
        for client in (two, third):
            message = await client.expect(AsyncMessage)
            assert (message.async_event, message.lun) == (5, 0)
        assert [len(session.tasks) for session in sessions] == [0, 0, 0]
        await two.send(NopOut())
        pdus: list[Pdu] = []
        while not pdus or not isinstance(pdus[-1], TaskManagementResponse):
            pdus.append(await one.receive())
            await one.send(NopOut())
        assert not any(isinstance(pdu, AsyncMessage) for pdu in pdus), "the issuing connection"
        # A session that did not agree on FastAbort hears nothing but the unit attention.
        assert await plain.sense(TUR) == sense.LUN_RESET


async def test_clear_task_set_tells_third_parties() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as one,
        logged_in(running, isid=b"\x80other") as two,
    ):
        running.targets[0].faults.add(Fault(act=Act.SILENCE))
        await two.send(two.command(TUR))
        await ordered(two)
        await one.send(many(one, Function.CLEAR_TASK_SET))
        await one.expect(TaskManagementResponse)
        assert await two.sense(TUR) == SenseData(6, 0x2F, 0)
        _, status = await one.run(TUR)
        assert status.status == 0


async def test_a_function_that_waits_keeps_its_tag_and_there_are_not_too_many() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        await client.send(client.command(cdb.write(0, 8), write=4096))
        await client.expect(R2T)
        waiting = [
            many(client, Function.ABORT_TASK_SET, initiator_task_tag=0x900 + number)
            for number in range(33)
        ]
        await client.send(waiting[0], waiting[0])
        assert (await client.expect(Reject)).reason == RejectReason.TASK_IN_PROGRESS
        await client.send(*waiting[1:])
        assert (await client.expect(Reject)).reason == RejectReason.IMMEDIATE_COMMAND_REJECT
        assert len(running.sessions[0].managing) == 32


# -- RFC 7144 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2])
async def test_queries_need_protocol_level_2(level: int) -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=Limits(iscsi_protocol_level=level)) as running,
        logged_in(running, offer=replace(OFFER, iscsi_protocol_level=2)) as client,
    ):
        session = running.sessions[0]
        assert session.parameters.iscsi_protocol_level == level

        async def ask(function: int, tag: int = 0xFFFFFFFF, lun: int = 0) -> int:
            await client.send(many(client, function, referenced_task_tag=tag, lun=lun))
            return (await client.expect(TaskManagementResponse)).response

        if level == 1:
            assert [await ask(query) for query in (9, 10, 11, 12)] == [5] * 4
            return
        assert [await ask(query) for query in (9, 10, 12)] == [0] * 3
        assert [await ask(query, lun=9 << 48) for query in (10, 12)] == [2] * 2
        running.targets[0].faults.add(Fault(act=Act.SILENCE))
        silent = client.command(TUR)
        await client.send(silent)
        assert await ask(9, silent.initiator_task_tag) == 7
        assert await ask(10) == 7
        session.add_attention(0, sense.LUN_RESET)
        assert await ask(12) == 7
        assert await ask(11) == 0
        assert session.tasks == {}
        assert await client.sense(TUR) == sense.LUN_RESET
        assert await client.sense(TUR) == SenseData(6, 0x29, 7)


# -- bounds ----------------------------------------------------------------------------------------


async def test_write_buffers_are_bounded() -> None:
    limits = Limits(write_buffer_bytes_max=8192, first_burst_length=512)
    offer = replace(OFFER, first_burst_length=512)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer) as client,
    ):
        first, second = (client.command(cdb.write(0, 12), write=6144) for _ in range(2))
        await client.send(first, second)
        r2t = await client.expect(R2T)
        full = await client.expect(ScsiResponse)
        assert (full.initiator_task_tag, full.status) == (second.initiator_task_tag, 0x28)
        await client.send(data_out(first, b"1" * 6144, ttt=r2t.target_transfer_tag))
        assert (await client.expect(ScsiResponse)).status == 0
        assert (await client.write(0, b"2" * 6144)).status == 0
        assert (await client.write(0, b"3" * 8704)).status == 0x28
        assert bytes(disk.view[:6144]) == b"2" * 6144


@pytest.mark.parametrize("attribute", [0, 1, 2, 3])
async def test_every_task_attribute_is_taken(attribute: int) -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        command = client.command(cdb.write(0, 1), write=512, data=b"a" * 512)
        command.attribute = attribute
        await client.send(command)
        status = await client.expect(ScsiResponse)
        assert status.status == 0, sense_of_response(status.data)
        assert bytes(disk.view[:512]) == b"a" * 512
