"""ErrorRecoveryLevel 2: commands that change their connection (RFC 7143 §7.2.2, §11.5)."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from orion_iscsifs.protocol.pdu import (
    R2T,
    AsyncMessage,
    DataIn,
    LogoutReason,
    LogoutResponse,
    LogoutResponseCode,
    NopIn,
    NopOut,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.target import Fault, RamDevice, Running, serve
from orion_iscsifs.target.allegiance import CLEARED_BY_ISCSI
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from tests.target.client import OFFER, SIZE, TUR, Client, config, data_out, joined, logged_in
from tests.target.test_connections import eventually, logout, ordered

LEVEL_2 = replace(
    OFFER,
    max_connections=2,
    error_recovery_level=2,
    default_time2wait=0,
    max_recv_data_segment_length=1024,
    max_burst_length=4096,
    first_burst_length=1024,
    max_outstanding_r2t=1,
)
LIMITS = Limits(max_connections=2, error_recovery_level=2)
LENGTH = 10240
Code = TmfResponseCode


@asynccontextmanager
async def level_2(
    limits: Limits = LIMITS, **changes: object
) -> AsyncIterator[tuple[RamDevice, Running, Client, Client]]:
    offer = replace(LEVEL_2, **changes)  # type: ignore[arg-type]
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer) as one,
    ):
        one.acknowledging = True
        disk.view[:LENGTH] = os.urandom(LENGTH)
        async with joined(running, one, 1, offer=offer) as two:
            yield disk, running, one, two


def reassign(client: Client, tag: int, exp_data_sn: int = 0) -> TaskManagementRequest:
    return TaskManagementRequest(
        TaskManagementFunction.TASK_REASSIGN,
        0x900,
        referenced_task_tag=tag,
        cmd_sn=client.cmd_sn,
        exp_data_sn=exp_data_sn,
    )


async def response(client: Client, request: TaskManagementRequest) -> int:
    await client.send(request)
    return (await client.expect(TaskManagementResponse)).response


async def remove(one: Client, two: Client) -> None:
    """Connection 1 breaks, and connection 0 logs it out for recovery."""
    await two.stream.aclose()
    assert (await one.expect(AsyncMessage)).parameter1 == 1
    await one.send(logout(one, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 1))
    reply = await one.expect(LogoutResponse)
    assert reply.response == LogoutResponseCode.CLOSED


@pytest.mark.parametrize("exp_data_sn", [0, 3, 10])
async def test_a_read_is_finished_on_another_connection(exp_data_sn: int) -> None:
    async with level_2() as (disk, running, one, two):
        command = two.command(cdb.read(0, LENGTH // 512), read=LENGTH)
        await two.send(command)
        for _ in range(10):
            await two.expect(DataIn)
        one.acknowledging = False
        await remove(one, two)
        assert await response(one, reassign(one, command.initiator_task_tag, exp_data_sn)) == 0
        found = bytearray()
        for data_sn in range(exp_data_sn, 10):
            pdu = await one.expect(DataIn)
            assert (pdu.data_sn, pdu.buffer_offset) == (data_sn, data_sn * 1024)
            found += pdu.data
            status: DataIn | ScsiResponse = pdu
        if exp_data_sn == 10:
            status = await one.expect(ScsiResponse)
            assert status.exp_data_sn == 10
        assert bytes(found) == bytes(disk.view[exp_data_sn * 1024 : LENGTH])
        assert (status.status, status.stat_sn) == (0, one.exp_stat_sn - 1)
        assert running.stats.reassigned == 1
        # It is allegiant again, to this connection.
        again = reassign(one, command.initiator_task_tag)
        assert await response(one, again) == Code.TASK_STILL_ALLEGIANT
        assert running.stats.commands[OpCode.READ_10] == 1


@pytest.mark.parametrize("received", [0, 1])
async def test_a_write_goes_on_on_another_connection(received: int) -> None:
    """With `received` the initiator has sent a part of what the R2T asked for."""
    payload = os.urandom(8192)
    async with level_2(initial_r2t=True, immediate_data=False) as (disk, _, one, two):
        command = two.command(cdb.write(0, 16), write=8192)
        await two.send(command)
        first = await two.expect(R2T)
        if received:
            part = data_out(command, payload[:1024], ttt=first.target_transfer_tag)
            part.final = False
            await two.send(part)
            await ordered(two)
        await remove(one, two)
        tag = command.initiator_task_tag
        assert await response(one, reassign(one, tag, exp_data_sn=received)) == 0
        r2t = await one.expect(R2T)
        assert (r2t.r2t_sn, r2t.buffer_offset) == (received, 1024 * received)
        while True:
            start, end = r2t.buffer_offset, r2t.buffer_offset + r2t.desired_data_transfer_length
            data = data_out(command, payload[start:end], offset=start, ttt=r2t.target_transfer_tag)
            await one.send(data)
            pdu = await one.receive()
            if isinstance(pdu, ScsiResponse):
                break
            assert isinstance(pdu, R2T)
            assert pdu.r2t_sn == r2t.r2t_sn + 1
            r2t = pdu
        assert pdu.status == 0
        assert bytes(disk.view[:8192]) == payload


async def test_a_command_ends_while_it_has_no_connection() -> None:
    async with level_2() as (disk, running, one, two):
        delay = Fault(act=Act.DELAY, opcode=OpCode.WRITE_10, delay_s=0.1, cid=1)
        running.targets[0].faults.add(delay)
        command = two.command(cdb.write(0, 1), write=512, data=b"w" * 512)
        await two.send(command)
        await ordered(two)
        await remove(one, two)
        await eventually(lambda: bytes(disk.view[:512]) == b"w" * 512)
        assert await response(one, reassign(one, command.initiator_task_tag)) == 0
        status = await one.expect(ScsiResponse)
        assert (status.initiator_task_tag, status.status) == (command.initiator_task_tag, 0)


async def test_response_codes() -> None:
    async with level_2() as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, times=2))
        mine, theirs = one.command(TUR), two.command(TUR)
        await one.send(mine)
        await two.send(theirs)
        await ordered(two)
        assert await response(one, reassign(one, 0xABC)) == Code.TASK_DOES_NOT_EXIST
        for command in (mine, theirs):
            request = reassign(one, command.initiator_task_tag)
            assert await response(one, request) == Code.TASK_STILL_ALLEGIANT
        await two.stream.aclose()
        await one.expect(AsyncMessage)
        # Lost, but not logged out.
        request = reassign(one, theirs.initiator_task_tag)
        assert await response(one, request) == Code.TASK_STILL_ALLEGIANT


async def test_reinstatement_of_the_connection_frees_its_commands_too() -> None:
    async with level_2() as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.DROP, cid=1))
        dropped = two.command(TUR)
        await two.send(dropped)
        await one.expect(AsyncMessage)
        async with joined(running, one, 1, offer=LEVEL_2) as again:
            assert await response(again, reassign(again, dropped.initiator_task_tag)) == 0
            status = await again.expect(ScsiResponse)
            assert (status.initiator_task_tag, status.status) == (dropped.initiator_task_tag, 0)


async def test_exp_stat_sn_of_the_login_acknowledges_what_the_old_connection_sent() -> None:
    async with level_2() as (_, running, one, two):
        had, lost = two.command(TUR), two.command(TUR)
        await two.send(had)
        stat_sn = (await two.expect(ScsiResponse)).stat_sn
        await two.send(lost)
        await two.expect(ScsiResponse)
        await two.stream.aclose()
        await one.expect(AsyncMessage)
        async with joined(running, one, 1, offer=LEVEL_2, exp_stat_sn=stat_sn + 1) as again:
            gone = await response(again, reassign(again, had.initiator_task_tag))
            assert gone == Code.TASK_DOES_NOT_EXIST
            assert await response(again, reassign(again, lost.initiator_task_tag)) == 0
            found = await again.expect(ScsiResponse)
            assert found.initiator_task_tag == lost.initiator_task_tag


async def test_a_single_connection_recovers_through_a_new_one() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=replace(LIMITS, max_connections=1)) as running,
        logged_in(running, offer=LEVEL_2) as one,
    ):
        running.targets[0].faults.add(Fault(act=Act.DROP_AFTER, opcode=OpCode.WRITE_10))
        command = one.command(cdb.write(0, 1), write=512, data=b"w" * 512)
        await one.send(command)
        assert await one.closed()
        async with joined(running, one, 0, offer=LEVEL_2) as again:
            assert await response(again, reassign(again, command.initiator_task_tag)) == 0
            assert (await again.expect(ScsiResponse)).status == 0
            assert bytes(disk.view[:512]) == b"w" * 512
            assert running.stats.commands[OpCode.WRITE_10] == 1


async def test_a_second_connection_may_come_to_log_the_first_out() -> None:
    """MaxConnections=1 and a target that does not know yet that the connection is dead (§6.3.4)."""
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=replace(LIMITS, max_connections=1)) as running,
        logged_in(running, offer=LEVEL_2) as one,
        joined(running, one, 5, offer=LEVEL_2) as two,
    ):
        await two.send(logout(two, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 0))
        assert (await two.expect(LogoutResponse)).response == LogoutResponseCode.CLOSED
        assert await one.closed()
        _, status = await two.run(TUR)
        assert status.status == 0


async def test_nobody_reassigns_in_time() -> None:
    async with level_2(default_time2retain=1) as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, cid=1))
        silent = two.command(TUR)
        await two.send(silent)
        await ordered(two)
        await remove(one, two)
        assert len(running.sessions[0].tasks) == 1
        await eventually(lambda: not running.sessions[0].tasks)
        request = reassign(one, silent.initiator_task_tag)
        assert await response(one, request) == Code.TASK_DOES_NOT_EXIST
        assert await one.sense(TUR) == CLEARED_BY_ISCSI


async def test_abort_of_a_free_command_on_another_connection() -> None:
    async with level_2() as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, cid=1))
        silent, answered = two.command(TUR), two.command(TUR)
        await two.send(silent, answered)
        await two.expect(ScsiResponse)
        await remove(one, two)
        for command, code in ((silent, 0), (answered, Code.TASK_DOES_NOT_EXIST)):
            request = TaskManagementRequest(
                TaskManagementFunction.ABORT_TASK,
                0x901,
                referenced_task_tag=command.initiator_task_tag,
                cmd_sn=one.cmd_sn,
                ref_cmd_sn=command.cmd_sn,
            )
            await one.send(request)
            if command is answered:
                # Sent, not acknowledged: sent again before the response (§11.5.1).
                again = await one.expect(ScsiResponse)
                assert again.initiator_task_tag == answered.initiator_task_tag
            assert (await one.expect(TaskManagementResponse)).response == code


async def test_what_is_kept_for_reassignment_is_bounded() -> None:
    async with level_2(replace(LIMITS, retained_bytes_max=LENGTH)) as (_, running, one, two):
        fault = Fault(act=Act.DELAY, opcode=OpCode.READ_10, delay_s=0.1, times=3, cid=1)
        running.targets[0].faults.add(fault)
        reads = [two.command(cdb.read(0, LENGTH // 512), read=LENGTH) for _ in range(3)]
        await two.send(*reads)
        await ordered(two)
        await remove(one, two)
        session = running.sessions[0]
        await eventually(lambda: len(session.tasks) == 1)
        [kept] = session.tasks
        for read in reads:
            if read.initiator_task_tag != kept:
                request = reassign(one, read.initiator_task_tag)
                assert await response(one, request) == Code.TASK_DOES_NOT_EXIST


@pytest.mark.parametrize("code", [1, 4, 255])
async def test_faults_of_task_reassign(code: int) -> None:
    async with level_2() as (_, running, one, two):
        faults = running.targets[0].faults
        faults.add(Fault(act=Act.SILENCE, cid=1))
        function = TaskManagementFunction.TASK_REASSIGN
        faults.add(Fault(act=Act.TMF_SILENCE, opcode=function))
        faults.add(Fault(act=Act.TMF_ANSWER, opcode=function, code=code))
        silent = two.command(TUR)
        await two.send(silent)
        await ordered(two)
        await remove(one, two)
        request = reassign(one, silent.initiator_task_tag)
        await one.send(request, NopOut(0x55))
        await one.expect(NopIn)
        assert await response(one, request) == code
        with trio.fail_after(30):
            assert await response(one, request) == Code.FUNCTION_COMPLETE
