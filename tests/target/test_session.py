"""A session of the embedded target: order of commands, pings, rejects, its end."""

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
    SnackRequest,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.target import Fault, RamDevice, serve
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from tests.target.client import IQN, SIZE, TUR, config, dialled, logged_in

# -- CmdSN -----------------------------------------------------------------------------------------


async def test_commands_run_in_cmd_sn_order() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        commands = [
            client.command(cdb.write(0, 1), write=512, data=bytes((number,)) * 512)
            for number in range(3)
        ]
        await client.send(commands[2], commands[1])
        await client.send(NopOut(0x77, data=b"still here", cmd_sn=client.cmd_sn))
        echo = await client.expect(NopIn)
        assert bytes(echo.data) == b"still here"
        assert echo.exp_cmd_sn == commands[0].cmd_sn
        assert bytes(disk.view[:512]) == bytes(512)
        await client.send(commands[0])
        tags = [(await client.expect(ScsiResponse)).initiator_task_tag for _ in range(3)]
        assert tags == [command.initiator_task_tag for command in commands]
        assert bytes(disk.view[:512]) == b"\2" * 512


async def test_cmd_sn_wraps() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        dialled(running) as client,
    ):
        await client.log_in(IQN, cmd_sn=0xFFFF_FFFE)
        await client.settle()
        for _ in range(4):
            _, status = await client.run(TUR)
            assert status.status == 0
        assert client.cmd_sn == 3
        assert client.exp_cmd_sn == 3


async def test_outside_the_window_nothing_happens() -> None:
    limits = Limits(command_window=4)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running) as client,
    ):
        old, far = client.command(TUR), client.command(TUR)
        old.cmd_sn -= 1
        far.cmd_sn = client.max_cmd_sn + 1
        await client.send(old, far, NopOut(0x77))
        echo = await client.expect(NopIn)
        assert echo.initiator_task_tag == 0x77
        assert echo.max_cmd_sn - echo.exp_cmd_sn == 3


async def test_the_window_closes_and_opens_again() -> None:
    limits = Limits(command_window=4)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running) as client,
    ):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, times=4))
        silent = [client.command(TUR) for _ in range(4)]
        await client.send(*silent, NopOut(0x77))
        echo = await client.expect(NopIn)
        assert echo.max_cmd_sn == echo.exp_cmd_sn - 1
        first = silent[0].initiator_task_tag
        function = TaskManagementFunction.ABORT_TASK
        await client.send(TaskManagementRequest(function, 0x900, referenced_task_tag=first))
        reply = await client.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_COMPLETE
        assert reply.max_cmd_sn == reply.exp_cmd_sn


async def test_immediate_commands_do_not_advance_cmd_sn() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        before = client.exp_cmd_sn
        await client.send(client.command(TUR, immediate=True))
        status = await client.expect(ScsiResponse)
        assert status.exp_cmd_sn == before


# -- pings, rejects, messages ----------------------------------------------------------------------


async def test_a_tag_in_use_is_rejected() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        running.targets[0].faults.add(Fault(act=Act.SILENCE))
        first = client.command(TUR)
        again = replace(first, cmd_sn=client.cmd_sn)
        await client.send(first, again)
        reject = await client.expect(Reject)
        assert reject.reason == RejectReason.TASK_IN_PROGRESS
        assert bytes(reject.data) == again.pack(0, 0)


async def test_what_this_target_does_not_do_is_rejected() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        strays: list[tuple[Pdu, RejectReason]] = [
            (SnackRequest(0), RejectReason.COMMAND_NOT_SUPPORTED),
            (NopIn(), RejectReason.PROTOCOL_ERROR),
        ]
        for stray, reason in strays:
            await client.send(stray)
            assert (await client.expect(Reject)).reason == reason


async def test_the_target_pings_and_hangs_up_on_silence() -> None:
    limits = Limits(ping_interval_s=0.1)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running) as client,
    ):
        ping = await client.expect(NopIn)
        assert ping.target_transfer_tag != 0xFFFF_FFFF
        assert ping.initiator_task_tag == 0xFFFF_FFFF
        await client.send(NopOut(target_transfer_tag=ping.target_transfer_tag))
        await client.expect(NopIn)
        assert await client.closed()


async def test_async_message() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        running.sessions[0].send_async_message(1, (0, 0, 10))
        message = await client.expect(AsyncMessage)
        assert (message.async_event, message.parameter3) == (1, 10)
        await client.send(client.command(TUR))
        assert (await client.expect(ScsiResponse)).stat_sn == message.stat_sn + 1


# -- the end of sessions ---------------------------------------------------------------------------


async def test_reinstatement_ends_the_old_session_before_the_login_is_answered() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running, logged_in(running) as old:
        command = old.command(cdb.write(0, 256), write=131072)
        await old.send(command)
        r2t = await old.expect(R2T)
        assert r2t.desired_data_transfer_length == 131072
        async with logged_in(running) as new:
            assert len(running.sessions) == 1
            assert running.stats.reinstatements == 1
            assert await old.closed()
            assert (await new.write(0, b"new" + bytes(509))).status == 0
            assert bytes(disk.view[:3]) == b"new"


async def test_reinstatement_waits_for_a_write_under_way() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running:
        running.targets[0].faults.add(Fault(act=Act.DELAY, opcode=OpCode.WRITE_10, delay_s=0.2))
        async with logged_in(running) as old:
            await old.send(old.command(cdb.write(0, 1), write=512, data=b"o" * 512))
            await old.send(NopOut(0x55))
            await old.expect(NopIn)
            async with logged_in(running) as new:
                assert (await new.write(0, b"n" * 512)).status == 0
                await trio.sleep(0.3)
                assert await new.read(0, 512) == b"n" * 512


async def test_two_initiator_ports_have_two_sessions() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running),
        logged_in(running, isid=b"\x80other"),
    ):
        assert len(running.sessions) == 2
        assert len({session.tsih for session in running.sessions}) == 2


async def test_stop_and_start_keep_address_and_content() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running:
        portals = list(running.portals)
        async with logged_in(running) as client:
            await client.write(0, b"k" * 512)
            await running.stop()
            assert await client.closed()
        with pytest.raises(OSError, match="attempt"):
            await trio.open_tcp_stream(*portals[0])
        await running.start()
        assert running.portals == portals
        async with logged_in(running) as client:
            assert await client.read(0, 512) == b"k" * 512


async def test_a_caller_sees_its_own_exception() -> None:
    async with RamDevice(SIZE) as disk:
        with pytest.raises(ZeroDivisionError):
            async with serve([config(disk)]) as running, logged_in(running):
                raise ZeroDivisionError
