"""What must not outlive its end: tasks, timers, memory, connections of a session that is over."""

import warnings
from dataclasses import replace

import pytest
import trio
import trio.testing

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.protocol.framing import Damaged
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    DataIn,
    LoginRequest,
    LoginResponse,
    LogoutReason,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    RejectReason,
    ScsiResponse,
    SnackType,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
)
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import LUN_RESET, sense_of_response
from orion_iscsifs.target import Fault, RamDevice, Running, serve
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from tests.target.client import ISID, SIZE, TUR, Client, config, dialled, joined, logged_in
from tests.target.test_abort_many import FENCES, many
from tests.target.test_connections import LIMITS, MANY, eventually, logout, ordered, pair
from tests.target.test_reassign import LEVEL_2, level_2, reassign, remove, response
from tests.target.test_reassign import LIMITS as RECOVERY
from tests.target.test_retransmission import level_1, snack

WRITE = cdb.write(0, 1)
DATA = b"w" * 512


class SlowDisk(RamDevice):
    """Its writes wait for `gate`, and can't be called back: as one that a thread carries out."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.gate = trio.Event()
        self.entered = 0

    def write_now(self, offset: int, source: Buffer) -> bool:
        return False

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        self.entered += 1
        with trio.CancelScope(shield=True):
            await self.gate.wait()
        self.view[offset : offset + len(source)] = source


# -- sessions --------------------------------------------------------------------------------------


async def test_closing_the_session_ends_commands_that_no_connection_has() -> None:
    """A write that waits for its reassignment must not land after the Logout Response (§11.14)."""
    async with level_2() as (disk, running, one, two):
        fault = Fault(act=Act.DELAY, opcode=OpCode.WRITE_10, delay_s=0.15, cid=1)
        running.targets[0].faults.add(fault)
        await two.send(two.command(WRITE, write=512, data=DATA))
        await ordered(two)
        before = bytes(disk.view[:512])
        await remove(one, two)
        await one.send(logout(one, LogoutReason.CLOSE_SESSION))
        assert (await one.expect(LogoutResponse)).response == 0
        assert await one.closed()
        await eventually(lambda: not running.sessions)
        await trio.sleep(0.2)
        assert bytes(disk.view[:512]) == before


async def test_closing_the_session_waits_for_a_write_that_no_connection_has() -> None:
    async with (
        SlowDisk() as disk,
        serve([config(disk)], limits=RECOVERY) as running,
        logged_in(running, offer=LEVEL_2) as one,
        joined(running, one, 1, offer=LEVEL_2) as two,
    ):
        await two.send(two.command(WRITE, write=512, data=DATA))
        await eventually(lambda: disk.entered)
        await remove(one, two)
        await one.send(logout(one, LogoutReason.CLOSE_SESSION))
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.1):
            await one.expect(LogoutResponse)
        disk.gate.set()
        await one.expect(LogoutResponse)
        assert bytes(disk.view[:512]) == DATA


async def test_commands_behind_a_reset_of_the_power_are_not_carried_out() -> None:
    """A cold reset in CmdSN order ends the session with all that is held behind it."""
    async with (
        SlowDisk() as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        session = running.sessions[0]
        reset = many(client, TaskManagementFunction.TARGET_COLD_RESET, cmd_sn=client.cmd_sn)
        reset.immediate = False
        client.cmd_sn += 1
        behind = client.command(WRITE, write=512, data=DATA)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            await client.send(behind, reset)
            assert await client.closed()
        await eventually(lambda: not running.sessions)
        assert (disk.entered, session.execution.running) == (0, 0)


async def test_a_discovery_session_ends_with_its_connection_at_every_level() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)], limits=RECOVERY) as running:
        async with dialled(running) as client:
            keys = ["InitiatorName=iqn.2026-11.org.example:tester", "SessionType=Discovery"]
            keys += ["ErrorRecoveryLevel=2", "DefaultTime2Retain=20"]
            text = "".join(f"{key}\0" for key in keys).encode()
            request = LoginRequest(ISID, 0, transit=True, csg=1, nsg=3, data=text)
            await client.send(request)
            reply = await client.expect(LoginResponse)
            assert reply.transit
            assert b"ErrorRecoveryLevel=0" in bytes(reply.data)
        with trio.fail_after(10):  # half of Time2Retain
            await running.stop()


async def test_a_target_that_stops_takes_no_session_that_was_waiting() -> None:
    """A login waits for the end of the session it replaces while the target stops."""
    async with (
        SlowDisk() as disk,
        serve([config(disk)], limits=RECOVERY) as running,
        logged_in(running, offer=LEVEL_2) as old,
        dialled(running) as new,
        trio.open_nursery() as nursery,
    ):
        await old.send(old.command(WRITE, write=512, data=DATA))
        await eventually(lambda: disk.entered)

        async def log_in() -> None:
            with pytest.raises(EOFError):
                await new.log_in(running.targets[0].iqn, offer=LEVEL_2)

        nursery.start_soon(log_in)
        await eventually(lambda: running.stats.reinstatements)
        nursery.start_soon(running.stop)
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
        with trio.fail_after(10):
            await running.stop()
        assert not running.sessions


# -- connections -----------------------------------------------------------------------------------


async def test_of_two_logins_for_one_cid_the_newer_gets_in() -> None:
    """The second comes while the first waits for the commands of their predecessor (§6.3.4).

    Neither is answered before those have ended, and then only the second.
    """
    async with (
        SlowDisk() as disk,
        serve([config(disk)], limits=LIMITS) as running,
        logged_in(running, offer=MANY) as one,
        joined(running, one, 1, offer=MANY) as two,
        trio.open_nursery() as nursery,
    ):
        await two.send(two.command(WRITE, write=512, data=DATA))
        await eventually(lambda: disk.entered)
        session = running.sessions[0]
        nursery.start_soon(_refused_join, running, one)
        await eventually(lambda: session.joining == 1)
        answered = trio.Event()

        async def join_again() -> None:
            async with joined(running, one, 1, offer=MANY) as client:
                assert bytes(disk.view[:512]) == DATA, "the old command has ended"
                answered.set()
                await ordered(client)
                assert len(session.live) == 2
                session.kill()
                assert await client.closed()

        nursery.start_soon(join_again)
        await eventually(lambda: session.joining == 2)
        assert not answered.is_set()
        disk.gate.set()
        with trio.fail_after(30):
            await answered.wait()


async def test_a_login_waits_for_commands_that_an_earlier_one_did_not_wait_for() -> None:
    """The first gives up; the commands of its predecessor are not forgotten with it."""
    limits = replace(LIMITS, login_timeout_s=1)
    async with (
        SlowDisk() as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=MANY) as one,
        joined(running, one, 1, offer=MANY) as two,
    ):
        await two.send(two.command(WRITE, write=512, data=DATA))
        await eventually(lambda: disk.entered)
        await _refused_join(running, one)
        await _refused_join(running, one)
        disk.gate.set()
        async with joined(running, one, 1, offer=MANY) as client:
            assert bytes(disk.view[:512]) == DATA
            await ordered(client)
        assert not running.sessions[0].ending


async def test_a_login_that_gives_up_does_not_keep_the_session_alive() -> None:
    limits = replace(LIMITS, login_timeout_s=1)  # the other logins have to fit in, too
    async with (
        SlowDisk() as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=replace(MANY, default_time2retain=0)) as one,
        joined(running, one, 1, offer=MANY) as two,
    ):
        session = running.sessions[0]
        await two.send(two.command(WRITE, write=512, data=DATA))
        await eventually(lambda: disk.entered)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused_join, running, one)
            await eventually(lambda: session.joining)
            await one.stream.aclose()
        disk.gate.set()
        await eventually(lambda: not running.sessions)


async def _refused_join(running: Running, leader: Client) -> None:
    with pytest.raises(EOFError):
        async with joined(running, leader, 1, offer=MANY):
            pass


async def test_a_cmd_sn_that_was_aborted_stays_received() -> None:
    """Plugged on a connection that is logged out before its turn comes (§11.6.1)."""
    async with pair() as (_, _running, one, two):
        first, never = one.command(TUR), two.command(TUR)
        abort = TaskManagementRequest(
            TaskManagementFunction.ABORT_TASK,
            0x901,
            referenced_task_tag=never.initiator_task_tag,
            cmd_sn=one.cmd_sn,
            ref_cmd_sn=never.cmd_sn,
        )
        await two.send(abort)
        assert (await two.expect(TaskManagementResponse)).response == 0
        await one.send(logout(one, LogoutReason.CLOSE_CONNECTION, 1))
        await one.expect(LogoutResponse)
        after = one.command(TUR)
        await one.send(first, after)
        assert (await one.expect(ScsiResponse)).initiator_task_tag == first.initiator_task_tag
        assert (await one.expect(ScsiResponse)).initiator_task_tag == after.initiator_task_tag


async def test_time2retain_counts_from_the_last_loss() -> None:
    """A command that was reassigned and lost again has all of its time again (§7.5)."""
    async with level_2(default_time2retain=3) as (_, running, one, two):
        running.targets[0].faults.add(Fault(act=Act.SILENCE, cid=1))
        silent = two.command(TUR)
        await two.send(silent)
        await ordered(two)
        await remove(one, two)
        await trio.sleep(0.5)
        async with joined(running, one, 2, offer=LEVEL_2) as three:
            tag = silent.initiator_task_tag
            assert await response(three, reassign(three, tag)) == 0
            lost_again = trio.current_time()
            await one.send(logout(one, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 2))
            await one.expect(LogoutResponse)
        session = running.sessions[0]
        assert list(session.tasks) == [tag]
        await eventually(lambda: not session.tasks)
        assert trio.current_time() - lost_again >= 3


# -- fences ----------------------------------------------------------------------------------------


async def test_the_fenced_unit_attention_is_not_overtaken_in_its_own_batch() -> None:
    limits = replace(LIMITS, task_reporting=FENCES, abort_wait_s=0.2)
    offer = replace(MANY, task_reporting=FENCES)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer) as one,
        joined(running, one, 1, offer=offer),
    ):
        running.sessions[0].add_attention(0, LUN_RESET)
        first, second = one.command(TUR), one.command(TUR)
        await one.send(first, second)
        answers = [pdu for pdu in [await one.receive() for _ in range(3)] if not is_ping(pdu)]
        while len(answers) < 2:
            pdu = await one.receive()
            answers += [] if is_ping(pdu) else [pdu]
        told, good = answers
        assert isinstance(told, ScsiResponse)
        assert isinstance(good, ScsiResponse)
        assert told.initiator_task_tag == first.initiator_task_tag
        assert sense_of_response(told.data) == LUN_RESET
        assert good.initiator_task_tag == second.initiator_task_tag


def is_ping(pdu: Pdu) -> bool:
    return isinstance(pdu, NopIn) and pdu.initiator_task_tag == NO_TAG


async def test_answers_behind_a_fence_keep_their_place_in_the_window() -> None:
    limits = replace(LIMITS, task_reporting=FENCES, command_window=4)
    offer = replace(MANY, task_reporting=FENCES)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer) as one,
        joined(running, one, 1, offer=offer),
    ):
        session = running.sessions[0]
        session.add_attention(0, LUN_RESET)
        await one.send(*[one.command(cdb.read(0, 1), read=512) for _ in range(12)])
        await ordered(one)
        assert len(session.tasks) == 4
        assert (session.order.max_cmd_sn + 1) & 0xFFFFFFFF == session.order.exp_cmd_sn


async def test_a_fence_waits_once_for_all_that_never_acknowledge() -> None:
    limits = replace(LIMITS, task_reporting=FENCES, abort_wait_s=0.3)
    offer = replace(MANY, task_reporting=FENCES)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer) as one,
        joined(running, one, 1, offer=offer) as two,
        joined(running, one, 2, offer=offer) as three,
        joined(running, one, 3, offer=offer) as four,
    ):
        for client in (one, two, three, four):
            await ordered(client)
        start = trio.current_time()
        await one.send(many(one, TaskManagementFunction.LOGICAL_UNIT_RESET))
        while not isinstance(await one.receive(), TaskManagementResponse):
            pass
        assert trio.current_time() - start < 0.75, "the pings went out at the same time"


# -- memory ----------------------------------------------------------------------------------------


async def test_what_waits_for_an_acknowledgment_does_not_keep_the_data_of_writes() -> None:
    async with level_1(first_burst_length=512) as (_, running, client):
        client.acknowledging = False
        for _ in range(3):
            assert (await client.write(0, bytes(8192))).status == 0
            assert (await client.write(0, bytes(512))).status == 0
        [channel] = running.sessions[0].live
        tasks = [kept.task for kept in channel.kept if kept.task is not None]
        assert len(tasks) >= 6
        assert sum(len(task.data) + len(task.pdu.data) for task in tasks) == 0


async def test_echoes_that_nobody_acknowledges_are_bounded_by_bytes() -> None:
    limits = Limits(error_recovery_level=1, retained_bytes_max=8192)
    async with level_1(limits) as (_, running, client):
        client.acknowledging = False
        for number in range(20):
            await client.send(NopOut(number, data=bytes(1024)))
            await client.expect(NopIn)
        [channel] = running.sessions[0].live
        assert sum(len(kept.pdu.data) for kept in channel.kept) <= 8192
        client.acknowledging = True
        await ordered(client)
        await ordered(client)
        assert not running.sessions[0].retransmission.overfull
        assert len(channel.kept) == 1


async def test_a_tag_that_comes_again_before_the_acknowledgment_leaks_nothing() -> None:
    async with level_2() as (_, running, one, two):
        one.acknowledging = two.acknowledging = False
        read = two.command(cdb.read(0, 2), read=1024)
        again = replace(two.command(cdb.read(0, 2), read=1024))
        again.initiator_task_tag = read.initiator_task_tag
        for command in (read, again):
            await two.send(command)
            await two.answer()
        session = running.sessions[0]
        assert session.retransmission.kept_bytes == 2048
        await remove(one, two)
        assert session.retransmission.kept_bytes == 1024


# -- SNACKs ----------------------------------------------------------------------------------------


async def test_a_data_ack_from_before_a_resegmentation_is_refused() -> None:
    async with level_1() as (_, running, client):
        read = client.command(cdb.read(0, 20), read=10240)
        await client.send(read)
        client.acknowledging = False
        pdus = [await client.expect(DataIn) for _ in range(10)]
        asked = pdus[7]
        assert asked.acknowledge
        [channel] = running.sessions[0].live
        channel.parameters = replace(channel.parameters, max_send_data_segment_length=4096)
        tag = read.initiator_task_tag
        await client.send(snack(SnackType.R_DATA, tag, ttt=0x77))
        anew = [await client.expect(DataIn) for _ in range(3)]
        assert (await client.expect(ScsiResponse)).snack_tag == 0x77
        stale = snack(SnackType.DATA_ACK, ttt=asked.target_transfer_tag, beg=8, lun=asked.lun)
        await client.send(stale)
        assert (await client.expect(Reject)).reason == RejectReason.INVALID_DATA_ACK
        await client.send(snack(SnackType.R_DATA, tag, ttt=0x78))
        again = [await client.expect(DataIn) for _ in range(3)]
        assert [bytes(pdu.data) for pdu in again] == [bytes(pdu.data) for pdu in anew]
        assert (await client.expect(ScsiResponse)).snack_tag == 0x78


async def test_an_r_data_snack_before_the_answer_keeps_its_tag() -> None:
    """Status must not travel in a Data-In, which has no place for a SNACK Tag (§11.16.3)."""
    async with level_1() as (_, running, client):
        fault = Fault(act=Act.DELAY, opcode=OpCode.READ_10, delay_s=0.1)
        running.targets[0].faults.add(fault)
        read = client.command(cdb.read(0, 1), read=512)
        await client.send(read)
        await client.send(snack(SnackType.R_DATA, read.initiator_task_tag, ttt=0x77))
        data = await client.expect(DataIn)
        assert not data.has_status
        assert (await client.expect(ScsiResponse)).snack_tag == 0x77


async def test_a_damaged_status_is_asked_for_again() -> None:
    async with level_1() as (_, running, client):
        running.targets[0].faults.add(Fault(act=Act.CORRUPT_STATUS, opcode=OpCode.READ_10))
        await client.send(client.command(cdb.read(1 << 20, 1), read=512))
        damaged = await client.receive()
        assert isinstance(damaged, Damaged)
        assert isinstance(damaged.pdu, ScsiResponse)
        lost = damaged.pdu.stat_sn
        await client.send(snack(SnackType.STATUS, beg=lost, run=1))
        status = await client.expect(ScsiResponse)
        assert status.stat_sn == lost
        assert sense_of_response(status.data).asc == 0x21
