"""Task management functions."""

import pytest

from orion_iscsifs.protocol.pdu import (
    R2T,
    NopIn,
    NopOut,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi import cdb, sense
from orion_iscsifs.scsi.lun import encode_lun
from orion_iscsifs.target import Fault, RamDevice, Running, serve
from orion_iscsifs.target.faults import Act
from tests.target.client import SIZE, TUR, config, data_out, logged_in


def abort(cmd_sn: int, tag: int, *, ref_cmd_sn: int = 0) -> TaskManagementRequest:
    return TaskManagementRequest(
        TaskManagementFunction.ABORT_TASK,
        0x900,
        referenced_task_tag=tag,
        cmd_sn=cmd_sn,
        ref_cmd_sn=ref_cmd_sn,
    )


async def manage(running: Running, request: TaskManagementRequest) -> int:
    async with logged_in(running) as client:
        await client.send(request)
        return (await client.expect(TaskManagementResponse)).response


@pytest.mark.parametrize(
    ("function", "lun", "code"),
    [
        (TaskManagementFunction.ABORT_TASK, 0, TmfResponseCode.TASK_DOES_NOT_EXIST),
        (TaskManagementFunction.ABORT_TASK_SET, 0, TmfResponseCode.FUNCTION_COMPLETE),
        (TaskManagementFunction.ABORT_TASK_SET, 9, TmfResponseCode.LUN_DOES_NOT_EXIST),
        (TaskManagementFunction.CLEAR_ACA, 0, TmfResponseCode.FUNCTION_NOT_SUPPORTED),
        (TaskManagementFunction.CLEAR_TASK_SET, 0, TmfResponseCode.FUNCTION_COMPLETE),
        (TaskManagementFunction.LOGICAL_UNIT_RESET, 9, TmfResponseCode.LUN_DOES_NOT_EXIST),
        (TaskManagementFunction.TARGET_WARM_RESET, 0, TmfResponseCode.FUNCTION_COMPLETE),
        (
            TaskManagementFunction.TASK_REASSIGN,
            0,
            TmfResponseCode.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED,
        ),
        (TaskManagementFunction.QUERY_TASK, 0, TmfResponseCode.FUNCTION_NOT_SUPPORTED),
        (77, 0, TmfResponseCode.FUNCTION_NOT_SUPPORTED),
    ],
)
async def test_functions_without_tasks(function: int, lun: int, code: int) -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running:
        request = TaskManagementRequest(function, 0x900, lun=encode_lun(lun), cmd_sn=2)
        assert await manage(running, request) == code


async def test_abort_of_a_write_that_waits_for_data() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        command = client.command(cdb.write(0, 8), write=4096)
        await client.send(command)
        r2t = await client.expect(R2T)
        await client.send(abort(client.cmd_sn, command.initiator_task_tag))
        reply = await client.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_COMPLETE
        late = data_out(command, b"l" * 4096, ttt=r2t.target_transfer_tag)
        await client.send(late, client.command(TUR))
        assert (await client.expect(ScsiResponse)).status == 0
        assert running.stats.late_data_out == 1
        assert bytes(disk.view[:4096]) == bytes(4096)


async def test_abort_of_a_command_that_never_came_plugs_the_gap() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        lost, after = client.command(TUR), client.command(TUR)
        await client.send(after)
        await client.send(abort(client.cmd_sn, lost.initiator_task_tag, ref_cmd_sn=lost.cmd_sn))
        kinds = [await client.receive() for _ in range(2)]
        assert {type(pdu) for pdu in kinds} == {ScsiResponse, TaskManagementResponse}
        assert client.exp_cmd_sn == client.cmd_sn


async def test_lun_reset_ends_everybodys_tasks() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as one,
        logged_in(running, isid=b"\x80other") as two,
    ):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, times=2))
        for client in (one, two):
            await client.send(client.command(TUR), NopOut(0x55))
            await client.expect(NopIn)
        assert [len(session.tasks) for session in running.sessions] == [1, 1]
        await one.send(TaskManagementRequest(TaskManagementFunction.LOGICAL_UNIT_RESET, 0x900))
        assert (await one.expect(TaskManagementResponse)).response == 0
        assert [len(session.tasks) for session in running.sessions] == [0, 0]
        for client in (one, two):
            assert await client.sense(TUR) == sense.LUN_RESET


async def test_cold_reset_drops_every_session() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as one,
        logged_in(running, isid=b"\x80other") as two,
    ):
        await one.send(TaskManagementRequest(TaskManagementFunction.TARGET_COLD_RESET, 0x900))
        assert await one.closed()
        assert await two.closed()
