"""Several connections in one session: joining, order, allegiance, loss, logout."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import trio

from orion_iscsifs.errors import LoginError
from orion_iscsifs.protocol.pdu import (
    R2T,
    AsyncMessage,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    LogoutResponseCode,
    NopIn,
    NopOut,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.protocol.states import SessionState
from orion_iscsifs.scsi import cdb
from orion_iscsifs.target import Fault, RamDevice, Running, serve
from orion_iscsifs.target.allegiance import CLEARED_BY_ISCSI
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.portals import Portal
from orion_iscsifs.target.settings import Limits
from tests.target.client import (
    IQN,
    ISID,
    OFFER,
    SIZE,
    TUR,
    Client,
    config,
    data_out,
    dialled,
    joined,
    logged_in,
)

MANY = replace(OFFER, max_connections=4)
LIMITS = Limits(max_connections=4)
RECOVERING = replace(MANY, error_recovery_level=2, default_time2wait=0, max_outstanding_r2t=1)
RECOVERY = Limits(max_connections=4, error_recovery_level=2)


@asynccontextmanager
async def pair(
    limits: Limits = LIMITS, *, level: int = 0, retain_s: int = 20
) -> AsyncIterator[tuple[RamDevice, Running, Client, Client]]:
    """A session of two connections, CIDs 0 and 1."""
    offer = replace(
        RECOVERING if level == 2 else MANY, error_recovery_level=level, default_time2retain=retain_s
    )
    if level:
        offer = replace(offer, max_outstanding_r2t=1)
    limits = replace(limits, error_recovery_level=level)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer) as one,
        joined(running, one, 1, offer=offer) as two,
    ):
        yield disk, running, one, two


async def eventually(condition: object, timeout_s: float = 30.0) -> None:
    """Until a callable is true."""
    assert callable(condition)
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.005)


def logout(client: Client, reason: int, cid: int = 0, exp_stat_sn: int = 0) -> LogoutRequest:
    return LogoutRequest(0x700, reason, cid, cmd_sn=client.cmd_sn, exp_stat_sn=exp_stat_sn)


async def ordered(client: Client) -> None:
    """What was sent on this connection before has been handled."""
    await client.send(NopOut(0x701))
    while not isinstance(await client.receive(), NopIn):
        pass


# -- joining ---------------------------------------------------------------------------------------


async def test_connections_join_a_session_by_its_tsih() -> None:
    async with pair() as (_, running, one, two):
        assert one.login is not None
        assert two.login is not None
        assert one.login.tsih == two.login.tsih
        assert len(running.sessions) == 1
        assert [channel.cid for channel in running.sessions[0].live] == [0, 1]
        assert running.stats.joined == 1
        for client in (two, one, two):
            _, status = await client.run(TUR)
            assert status.status == 0


async def test_one_connection_too_many() -> None:
    async with pair(Limits(max_connections=2)) as (_, running, one, _two):
        with pytest.raises(LoginError) as refused:
            async with joined(running, one, 2):
                pass
        assert (refused.value.status_class, refused.value.status_detail) == (2, 0x06)
        _, status = await one.run(TUR)
        assert status.status == 0


async def test_an_unknown_tsih_and_another_initiator_port() -> None:
    async with pair() as (_, running, one, _two):
        assert one.login is not None
        tsih = one.login.tsih
        for asked, isid in ((tsih + 1, ISID), (tsih, b"\x80other")):
            async with dialled(running) as stranger:
                with pytest.raises(LoginError) as refused:
                    await stranger.log_in(IQN, tsih=asked, cid=5, offer=MANY, isid=isid)
                assert (refused.value.status_class, refused.value.status_detail) == (2, 0x0A)


async def test_another_portal_group_can_not_take_part() -> None:
    portals = [Portal("127.0.0.1", 0, 1), Portal("127.0.0.1", 0, 2)]
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], portals, limits=LIMITS) as running,
        logged_in(running, offer=MANY) as one,
        dialled(running, portal=1) as other,
    ):
        assert one.login is not None
        with pytest.raises(LoginError) as refused:
            await other.log_in(IQN, tsih=one.login.tsih, cid=1, offer=MANY)
        assert (refused.value.status_class, refused.value.status_detail) == (2, 0x08)


# -- order and allegiance --------------------------------------------------------------------------


async def test_cmd_sn_order_goes_across_connections() -> None:
    async with pair() as (disk, _, one, two):
        first = one.command(cdb.write(0, 1), write=512, data=b"1" * 512)
        second = two.command(cdb.write(0, 1), write=512, data=b"2" * 512)
        await two.send(second)
        await ordered(two)
        assert bytes(disk.view[:512]) == bytes(512), "its predecessor is missing"
        await one.send(first)
        assert (await one.expect(ScsiResponse)).initiator_task_tag == first.initiator_task_tag
        # Its own answer comes on its own connection, with that connection's StatSN.
        assert (await two.expect(ScsiResponse)).initiator_task_tag == second.initiator_task_tag
        assert bytes(disk.view[:512]) == b"2" * 512


async def test_data_belongs_to_the_connection_of_its_command() -> None:
    async with pair() as (disk, running, one, two):
        command = two.command(cdb.write(0, 8), write=4096)
        await two.send(command)
        r2t = await two.expect(R2T)
        data = data_out(command, b"d" * 4096, ttt=r2t.target_transfer_tag)
        await one.send(data)
        await ordered(one)
        assert running.stats.late_data_out == 1
        assert bytes(disk.view[:4096]) == bytes(4096)
        await two.send(data)
        assert (await two.expect(ScsiResponse)).status == 0
        assert bytes(disk.view[:4096]) == b"d" * 4096


async def test_a_tag_is_unique_over_the_session() -> None:
    async with pair() as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE))
        silent = one.command(TUR)
        await one.send(silent)
        await ordered(one)
        again = two.command(TUR)
        again.initiator_task_tag = silent.initiator_task_tag
        await two.send(again)
        assert (await two.expect(Reject)).reason == RejectReason.TASK_IN_PROGRESS


async def test_stat_sn_is_counted_per_connection() -> None:
    async with pair() as (_, _running, one, two):
        _, before = await two.run(TUR)
        for _ in range(3):
            await one.run(TUR)
        _, after = await two.run(TUR)
        assert after.stat_sn == before.stat_sn + 1


# -- loss ------------------------------------------------------------------------------------------


async def test_the_others_hear_of_a_lost_connection_and_live_on() -> None:
    async with pair() as (_, running, one, two):
        await two.stream.aclose()
        message = await one.expect(AsyncMessage)
        assert (message.async_event, message.parameter1) == (2, 1)
        assert (message.parameter2, message.parameter3) == (2, 20)
        assert running.stats.lost_connections == 1
        _, status = await one.run(TUR)
        assert status.status == 0
        await one.stream.aclose()
        await eventually(lambda: not running.sessions)


async def test_logout_of_a_lost_connection_terminates_its_commands() -> None:
    async with pair() as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, cid=1))
        await two.send(two.command(TUR))
        await ordered(two)
        await two.stream.aclose()
        await one.expect(AsyncMessage)
        assert len(running.sessions[0].tasks) == 1
        await one.send(logout(one, LogoutReason.CLOSE_CONNECTION, cid=1))
        reply = await one.expect(LogoutResponse)
        assert reply.response == LogoutResponseCode.CLOSED
        assert running.sessions[0].tasks == {}
        assert await one.sense(TUR) == CLEARED_BY_ISCSI
        await one.send(logout(one, LogoutReason.CLOSE_CONNECTION, cid=1))
        assert (await one.expect(LogoutResponse)).response == LogoutResponseCode.CID_NOT_FOUND


async def test_nobody_logs_a_lost_connection_out() -> None:
    async with pair(replace(LIMITS, default_time2wait=0), retain_s=1) as (_, running, one, two):
        running.sessions[0].channels[1].times_s = (0, 1)
        running.targets[0].faults.add(Fault(act=Act.SILENCE, cid=1))
        await two.send(two.command(TUR))
        await ordered(two)
        await two.stream.aclose()
        await one.expect(AsyncMessage)
        await eventually(lambda: not running.sessions[0].tasks)
        assert list(running.sessions[0].channels) == [0]
        assert await one.sense(TUR) == CLEARED_BY_ISCSI


@pytest.mark.parametrize("how", ["logout", "new connection"])
async def test_unacknowledged_commands_are_discarded_at_logout(how: str) -> None:
    async with pair() as (disk, running, one, two):
        first = one.command(cdb.write(0, 1), write=512, data=b"1" * 512)
        second = two.command(cdb.write(0, 1), write=512, data=b"2" * 512)
        await two.send(second)
        await ordered(two)
        async with AsyncExitStack() as stack:
            if how == "logout":
                await one.send(logout(one, LogoutReason.CLOSE_CONNECTION, cid=1))
                assert (await one.expect(LogoutResponse)).response == LogoutResponseCode.CLOSED
            else:
                await stack.enter_async_context(joined(running, one, 1, offer=MANY))
            assert await two.closed()
            assert running.sessions[0].tasks == {}
            await one.send(first)
            assert (await one.expect(ScsiResponse)).status == 0
            assert bytes(disk.view[:512]) == b"1" * 512
            # The hole is there: a retry with the same CmdSN fills it (§7.2.1).
            await one.send(second)
            assert (await one.expect(ScsiResponse)).status == 0
            assert bytes(disk.view[:512]) == b"2" * 512


async def test_a_connection_is_reinstated_below_level_2() -> None:
    async with pair() as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, cid=1))
        silent = two.command(TUR)
        await two.send(silent)
        await ordered(two)
        async with joined(running, one, 1, offer=MANY) as again:
            assert await two.closed()
            assert running.sessions[0].tasks == {}
            assert len(running.sessions[0].live) == 2
            assert await again.sense(TUR) == CLEARED_BY_ISCSI
            _, status = await one.run(TUR)
            assert status.status == 0


async def test_reinstatement_of_the_only_connection_keeps_the_session() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as one,
    ):
        session = running.sessions[0]
        async with joined(running, one, 0) as again:
            assert await one.closed()
            assert running.sessions == [session]
            _, status = await again.run(TUR)
            assert status.status == 0


# -- logout ----------------------------------------------------------------------------------------


async def test_logout_of_the_session_closes_every_connection() -> None:
    async with pair() as (_, running, one, two):
        await two.send(logout(two, LogoutReason.CLOSE_SESSION))
        assert (await two.expect(LogoutResponse)).response == LogoutResponseCode.CLOSED
        assert await one.closed()
        assert await two.closed()
        assert running.sessions == []


async def test_logout_of_one_connection_leaves_the_other() -> None:
    async with pair() as (_, running, one, two):
        await two.send(logout(two, LogoutReason.CLOSE_CONNECTION, cid=1))
        assert (await two.expect(LogoutResponse)).response == LogoutResponseCode.CLOSED
        assert await two.closed()
        _, status = await one.run(TUR)
        assert status.status == 0
        await one.send(logout(one, LogoutReason.CLOSE_CONNECTION))
        assert (await one.expect(LogoutResponse)).response == LogoutResponseCode.CLOSED
        assert await one.closed()
        assert running.sessions == []


async def test_recovery_logout_needs_level_2() -> None:
    async with pair() as (_, _running, one, _two):
        await one.send(logout(one, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, cid=1))
        reply = await one.expect(LogoutResponse)
        assert reply.response == LogoutResponseCode.RECOVERY_NOT_SUPPORTED
        await one.send(logout(one, 9))
        assert (await one.expect(Reject)).reason == RejectReason.INVALID_PDU_FIELD


async def test_abort_has_to_come_on_the_commands_connection() -> None:
    async with pair() as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, cid=1))
        silent = two.command(TUR)
        await two.send(silent)
        await ordered(two)
        abort = TaskManagementRequest(
            TaskManagementFunction.ABORT_TASK,
            0x900,
            referenced_task_tag=silent.initiator_task_tag,
            cmd_sn=one.cmd_sn,
            ref_cmd_sn=silent.cmd_sn,
        )
        await one.send(abort)
        reply = await one.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_REJECTED
        await two.send(abort)
        reply = await two.expect(TaskManagementResponse)
        assert reply.response == TmfResponseCode.FUNCTION_COMPLETE


# -- level 2: the session without a connection -----------------------------------------------------


async def test_a_session_waits_for_a_connection_and_goes_on() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=RECOVERY) as running,
        logged_in(running, offer=RECOVERING) as one,
    ):
        session = running.sessions[0]
        await one.stream.aclose()
        await eventually(lambda: session.state is SessionState.FAILED)
        async with joined(running, one, 7, offer=RECOVERING) as again:
            assert session.state is SessionState.LOGGED_IN
            assert running.sessions == [session]
            _, status = await again.run(TUR)
            assert status.status == 0
            await again.send(logout(again, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY))
            reply = await again.expect(LogoutResponse)
            assert reply.response == LogoutResponseCode.CLOSED
            assert (reply.time2wait_s, reply.time2retain_s) == (0, 20)
            assert list(session.channels) == [7]


async def test_a_session_does_not_wait_for_ever() -> None:
    offer = replace(RECOVERING, default_time2retain=1)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=RECOVERY) as running,
        logged_in(running, offer=offer) as one,
    ):
        started = trio.current_time()
        await one.stream.aclose()
        await eventually(lambda: not running.sessions)
        assert trio.current_time() - started >= 1, "it has waited for as long as was agreed"
        assert running.stats.timed_out_sessions == 1


async def test_stop_does_not_wait_for_sessions_that_wait() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=RECOVERY) as running,
        logged_in(running, offer=RECOVERING) as one,
    ):
        await one.stream.aclose()
        await eventually(lambda: not running.sessions[0].live)
        with trio.fail_after(10):  # half of Time2Retain
            await running.stop()
        assert running.sessions == []
