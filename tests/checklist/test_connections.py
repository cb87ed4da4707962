"""Several connections, and what happens when one is lost (checks 2, 8, 37, 51, 53, 55)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio

from orion_iscsifs.config import AuthConfig, ChapCredentials, Secret
from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.login import Credentials, Offer, TargetAccess
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    DataOut,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
    TmfResponseCode,
)
from orion_iscsifs.scsi import cdb
from tests.initiator.peer import (
    ISID,
    LUN,
    TSIH,
    PlayedConnection,
    PlayedTarget,
    Running,
    answer,
    offer,
    played_session,
    unit_ready,
    until,
)

Played = tuple[Session, PlayedConnection, PlayedConnection, PlayedTarget]
LEVEL_2 = offer(error_recovery_level=2, max_outstanding_r2t=1, max_connections=2)


@asynccontextmanager
async def two_connections(offered: Offer, **changes: Any) -> AsyncIterator[Played]:
    """A session of two connections; no logout is played, the connections are cut at the end."""
    async with played_session(offered, connections=2, logout=False, **changes) as (
        session,
        first,
        target,
    ):
        second = await (await target.accept()).login(offered, joins=first)
        await until(lambda: len(session.connections) == 2)
        try:
            yield session, first, second, target
        finally:
            target.close()


def reads(length: int) -> Task:
    return Task(LUN, cdb.read(0, 1), read_into=memoryview(bytearray(length)))


def content(task: Task) -> bytes:
    assert task.read_into is not None
    return bytes(task.read_into)


async def logged_out(peer: PlayedConnection, reason: LogoutReason, cid: int) -> None:
    """A logout of another connection, for this reason, is answered well."""
    request = await peer.expect(LogoutRequest)
    assert (request.reason, request.cid, request.immediate) == (reason, cid, True)
    await peer.reply(LogoutResponse(request.initiator_task_tag))


async def reassigned(peer: PlayedConnection, tag: int, code: int = 0) -> TaskManagementRequest:
    """TASK REASSIGN for the command with this tag is confirmed (LIO says 255 for that)."""
    request = await peer.expect(TaskManagementRequest)
    assert (request.function, request.immediate) == (TaskManagementFunction.TASK_REASSIGN, True)
    assert request.referenced_task_tag == tag != request.initiator_task_tag
    await peer.reply(TaskManagementResponse(request.initiator_task_tag, code))
    return request


async def acknowledge(session: Session, peer: PlayedConnection) -> None:
    """Tell the initiator by ExpCmdSN that everything so far was taken."""
    await peer.reply(NopIn(), advance=False)
    await until(lambda: session.window.exp_cmd_sn == peer.exp_cmd_sn)


async def next_login(target: PlayedTarget, offered: Offer) -> PlayedConnection:
    """The next login; connections that are given up before it are passed over."""
    while True:
        connection = await target.accept()
        with suppress(ConnectionLost):
            return await connection.login(offered)


# -- joining --------------------------------------------------------------------------------------


@pytest.mark.checklist(37, "6.3.4")
async def test_a_further_connection_has_the_tsih_and_a_cid_of_its_own() -> None:
    """The same ISID, the current CmdSN, and only the keys that are its own (§13)."""
    async with two_connections(offer(max_connections=2)) as (session, first, second, _):
        leading, joining = first.login_request, second.login_request
        assert leading is not None
        assert joining is not None
        assert (leading.tsih, joining.tsih) == (0, TSIH)
        assert joining.cid != leading.cid
        assert joining.isid == leading.isid == ISID
        assert joining.cmd_sn == session.window.cmd_sn
        assert b"InitiatorName=" in bytes(joining.data)
        assert [connection.cid for connection in session.connections] == [0, 1]


@pytest.mark.checklist(2, "4.2.2.1")
@pytest.mark.checklist(8, "11.2.1.8")
async def test_commands_are_spread_under_one_numbering() -> None:
    """Each connection sees its own in increasing order; together they leave no hole (§4.2.2.1)."""
    async with (
        two_connections(offer(max_connections=2)) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        running = [Running(nursery, session, unit_ready()) for _ in range(6)]
        seen = {
            peer: [await peer.expect(ScsiCommand) for _ in range(3)] for peer in (first, second)
        }
        for commands in seen.values():
            numbers = [command.cmd_sn for command in commands]
            assert numbers == sorted(numbers)
        together = [command for commands in seen.values() for command in commands]
        assert sorted(command.cmd_sn for command in together) == [1, 2, 3, 4, 5, 6]
        assert len({command.initiator_task_tag for command in together}) == 6
        for peer, commands in seen.items():
            for command in commands:
                await peer.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            assert (await task.done()).status == 0


async def test_data_goes_over_the_connection_of_its_command() -> None:
    """Unsolicited, solicited, and what is read: command by command."""
    async with (
        two_connections(offer(max_connections=2)) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        running = []
        for _ in range(2):
            data = memoryview(bytes(12000))
            running.append(Running(nursery, session, Task(LUN, cdb.write(0, 1), write_from=data)))
        for peer in (first, second):
            tag = (await peer.expect(ScsiCommand)).initiator_task_tag
            assert (await peer.expect(DataOut)).initiator_task_tag == tag
            await peer.reply(R2T(LUN, tag, 1, 0, 8192, 3808), advance=False)
            assert (await peer.expect(DataOut)).initiator_task_tag == tag
            await peer.reply(ScsiResponse(tag))
        for task in running:
            assert (await task.done()).status == 0


@pytest.mark.checklist(43, "9.2")
async def test_every_connection_authenticates_in_the_same_way() -> None:
    """§9.2: with CHAP and under the same name; one that needs none is not made."""
    access = TargetAccess(incoming=Credentials(user="me", secret=b"a secret of ours"))
    auth = AuthConfig(initiator=ChapCredentials(user="me", secret=Secret("a secret of ours")))
    offered = offer(max_connections=3)
    async with played_session(offered, connections=3, auth=auth, access=access, logout=False) as (
        session,
        first,
        target,
    ):
        second = await target.accept()
        second.access = access
        await second.login(offered, joins=first)
        third = await target.accept()
        with pytest.raises(ConnectionLost):
            await third.login(offered, joins=first)
        for peer in (second, third):
            assert peer.login_request is not None
            assert b"AuthMethod=CHAP\0" in bytes(peer.login_request.data)
        assert len(session.connections) == 2
        assert session.counters.connections_lost == 0
        target.close()


@pytest.mark.checklist(39, "11.13.5")
async def test_a_target_with_fewer_connections_keeps_the_session() -> None:
    """0206, too many connections: what there is has to do, and it is not asked for ever."""
    async with (
        played_session(offer(max_connections=2), connections=2, logout=False) as (
            session,
            peer,
            target,
        ),
        trio.open_nursery() as nursery,
    ):
        refused = await (await target.accept()).refuse_login(0x0206)
        assert refused.tsih == TSIH
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.8):
            await target.accept()
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0
        assert len(session.connections) == 1
        target.close()


# -- below level 2 --------------------------------------------------------------------------------


@pytest.mark.checklist(51, "11.14")
@pytest.mark.checklist(47, "7.2.1")
async def test_a_lost_connection_is_logged_out_over_another_one() -> None:
    """Reason 1 and its CID. What was not acknowledged is retried with its CmdSN and tag."""
    offered = offer(max_connections=2)
    async with (
        two_connections(offered) as (session, first, second, target),
        trio.open_nursery() as nursery,
    ):
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        kept, lost = await first.expect(ScsiCommand), await second.expect(ScsiCommand)
        second.cut()
        second.exp_cmd_sn = lost.cmd_sn
        await logged_out(first, LogoutReason.CLOSE_CONNECTION, 1)
        again = await first.expect(ScsiCommand)
        assert again.initiator_task_tag == lost.initiator_task_tag
        assert again.cmd_sn == lost.cmd_sn
        for command in (kept, again):
            await first.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            assert (await task.done()).status == 0
        third = await (await target.accept()).login(offered, joins=first)
        assert third.login_request is not None
        assert (third.login_request.cid, third.login_request.tsih) == (1, TSIH)
        assert session.counters.logins == 1


@pytest.mark.checklist(51, "11.14.5")
async def test_what_the_logout_ended_is_issued_anew() -> None:
    """Acknowledged, so the target has ended it: a new tag and a new CmdSN."""
    async with (
        two_connections(offer(max_connections=2)) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        running = [Running(nursery, session, unit_ready()) for _ in range(2)]
        kept, lost = await first.expect(ScsiCommand), await second.expect(ScsiCommand)
        await acknowledge(session, first)
        second.cut()
        await logged_out(first, LogoutReason.CLOSE_CONNECTION, 1)
        again = await first.expect(ScsiCommand)
        assert again.initiator_task_tag not in (kept.initiator_task_tag, lost.initiator_task_tag)
        assert again.cmd_sn == lost.cmd_sn + 1
        for command in (kept, again):
            await first.reply(ScsiResponse(command.initiator_task_tag))
        for task in running:
            assert (await task.done()).status == 0


@pytest.mark.checklist(51, "11.15")
@pytest.mark.checklist(55, "7.5")
async def test_a_logout_that_fails_is_tried_again_after_time2wait() -> None:
    """Response 3, cleanup failed; only then is the session given up."""
    offered = offer(max_connections=2)
    async with (
        two_connections(offered) as (session, first, second, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await first.expect(ScsiCommand)
        second.cut()
        times = []
        for _ in range(3):
            request = await first.expect(LogoutRequest)
            times.append(trio.current_time())
            failed = LogoutResponse(request.initiator_task_tag, response=3, time2wait_s=1)
            await first.reply(failed)
        assert times[1] - times[0] >= 1
        again = await next_login(target, offered)
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(55, "7.5")
async def test_nothing_is_tried_before_time2wait() -> None:
    """DefaultTime2Wait is the larger of both sides' wishes."""
    async with (
        played_session(offer(default_time2wait=1)) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        assert session.parameters.default_time2wait == 1
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        cut_at = trio.current_time()
        peer.cut()
        again = await target.accept()
        assert trio.current_time() - cut_at >= 1
        await answer(await again.login())
        await running.done()


# -- level 2 --------------------------------------------------------------------------------------


@pytest.mark.checklist(53, "7.2.2")
async def test_a_command_moves_to_the_connection_that_is_left() -> None:
    """Logout with reason 2, TASK REASSIGN with the original tag, and the read goes on."""
    async with (
        two_connections(LEVEL_2, erl=2) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await answer(first)
        await running.done()
        blocker = Running(nursery, session, unit_ready())
        blocking = await first.expect(ScsiCommand)
        moved = Running(nursery, session, reads(12))
        tag = (await second.expect(ScsiCommand)).initiator_task_tag
        await second.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await acknowledge(session, first)
        await trio.testing.wait_all_tasks_blocked(0.01)
        second.cut()
        await logged_out(first, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 1)
        request = await reassigned(first, tag)
        assert (request.exp_data_sn, request.ref_cmd_sn) == (1, 0)
        await first.reply(DataIn(tag, 1, 4, data=b"bbbb"), advance=False)
        await first.reply(DataIn(tag, 2, 8, data=b"cccc", final=True, has_status=True))
        task = await moved.done()
        assert (task.status, content(task)) == (0, b"aaaabbbbcccc")
        await first.reply(ScsiResponse(blocking.initiator_task_tag))
        await blocker.done()
        assert session.counters.logins == 1
        assert session.counters.commands_reassigned == 1


@pytest.mark.checklist(53, "11.5")
async def test_a_write_goes_on_where_the_target_wants_it() -> None:
    """After the reassignment the target asks for what it lacks, counting R2TSN on."""
    async with (
        two_connections(LEVEL_2, erl=2) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        blocker = Running(nursery, session, unit_ready())
        blocking = await first.expect(ScsiCommand)
        data = memoryview(bytes(position % 251 for position in range(12000)))
        moved = Running(nursery, session, Task(LUN, cdb.write(0, 1), write_from=data))
        tag = (await second.expect(ScsiCommand)).initiator_task_tag
        await second.expect(DataOut)
        await acknowledge(session, first)
        second.cut()
        await logged_out(first, LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY, 1)
        await reassigned(first, tag)
        await first.reply(R2T(LUN, tag, 5, 0, 0, 12000), advance=False)
        got = bytearray()
        while len(got) < 12000:
            pdu = await first.expect(DataOut)
            assert (pdu.target_transfer_tag, pdu.buffer_offset) == (5, len(got))
            got += pdu.data
        assert got == data
        await first.reply(ScsiResponse(tag))
        await first.reply(ScsiResponse(blocking.initiator_task_tag))
        assert (await moved.done()).status == 0
        await blocker.done()


@pytest.mark.checklist(37, "6.3.4")
@pytest.mark.checklist(53, "7.2.2")
@pytest.mark.parametrize("code", [0, 255])
async def test_the_only_connection_is_reinstated(code: int) -> None:
    """A login with its TSIH and CID, then TASK REASSIGN; the session is the same."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await acknowledge(session, peer)
        peer.cut()
        again = await (await target.accept()).login(LEVEL_2, joins=peer)
        request = again.login_request
        assert request is not None
        assert (request.isid, request.tsih, request.cid) == (ISID, TSIH, 0)
        assert (await reassigned(again, tag, code)).exp_data_sn == 1
        await again.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True, has_status=True))
        assert content(await running.done()) == b"aaaabbbb"
        assert session.counters.logins == 1
        assert session.tsih == TSIH


@pytest.mark.checklist(47, "7.2.1")
@pytest.mark.checklist(53, "7.2.2")
async def test_a_command_that_never_arrived_is_retried_and_not_reassigned() -> None:
    """ExpCmdSN of the new login says so: same tag, same CmdSN."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        lost = await peer.expect(ScsiCommand)
        peer.exp_cmd_sn = lost.cmd_sn
        peer.cut()
        again = await (await target.accept()).login(LEVEL_2, joins=peer)
        command = await again.expect(ScsiCommand)
        assert command.initiator_task_tag == lost.initiator_task_tag
        assert command.cmd_sn == lost.cmd_sn
        await again.reply(ScsiResponse(command.initiator_task_tag))
        assert (await running.done()).status == 0


@pytest.mark.checklist(53, "11.6")
async def test_a_command_that_the_target_forgot_starts_anew() -> None:
    """Response 1, task does not exist; what came before counts for nothing."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, reads(8))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        await peer.reply(DataIn(tag, 0, 0, data=b"old!"), advance=False)
        await acknowledge(session, peer)
        peer.cut()
        again = await (await target.accept()).login(LEVEL_2, joins=peer)
        request = await again.expect(TaskManagementRequest)
        gone = TmfResponseCode.TASK_DOES_NOT_EXIST
        await again.reply(TaskManagementResponse(request.initiator_task_tag, gone))
        command = await again.expect(ScsiCommand)
        assert command.initiator_task_tag != tag
        new = command.initiator_task_tag
        await again.reply(DataIn(new, data=b"new data", final=True, has_status=True))
        assert content(await running.done()) == b"new data"


@pytest.mark.checklist(53, "11.6")
@pytest.mark.parametrize(
    "code",
    [
        TmfResponseCode.TASK_STILL_ALLEGIANT,
        TmfResponseCode.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED,
        TmfResponseCode.FUNCTION_NOT_SUPPORTED,
    ],
)
async def test_a_refused_reassignment_leads_to_a_new_session(code: int) -> None:
    """Only that excludes that the old command is still carried out: fall back to level 0."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await acknowledge(session, peer)
        peer.cut()
        second = await (await target.accept()).login(LEVEL_2, joins=peer)
        request = await second.expect(TaskManagementRequest)
        await second.reply(TaskManagementResponse(request.initiator_task_tag, code))
        third = await (await target.accept()).login(LEVEL_2)
        assert third.login_request is not None
        assert third.login_request.tsih == 0
        await answer(third)
        assert (await running.done()).status == 0
        assert session.counters.logins == 2


@pytest.mark.checklist(55, "7.5")
async def test_after_time2retain_the_session_is_given_up() -> None:
    """The target keeps nothing for longer: a new session instead of a reinstated connection."""
    offered = offer(error_recovery_level=2, max_outstanding_r2t=1, default_time2retain=1)
    async with (
        played_session(offered, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        assert session.parameters.default_time2retain == 1
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await acknowledge(session, peer)
        cut_at = trio.current_time()
        peer.cut()
        while True:
            connection = await target.accept()
            if trio.current_time() - cut_at > 1:
                break
            connection.cut()
        again = await connection.login(offered)
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        await answer(again)
        assert (await running.done()).status == 0


@pytest.mark.checklist(53, "7.2.2")
@pytest.mark.checklist(37, "6.3.4")
async def test_a_session_that_the_target_has_forgotten_is_opened_anew() -> None:
    """020a, session does not exist: recovery falls back to level 0."""
    async with (
        played_session(LEVEL_2, erl=2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)
        await acknowledge(session, peer)
        peer.cut()
        refused = await (await target.accept()).refuse_login(0x020A)
        assert refused.tsih == TSIH
        again = await (await target.accept()).login(LEVEL_2)
        assert again.login_request is not None
        assert again.login_request.tsih == 0
        await answer(again)
        assert (await running.done()).status == 0
        assert session.counters.logins == 2


@pytest.mark.checklist(48, "11.18")
async def test_each_connection_answers_its_own_pings() -> None:
    async with two_connections(offer(max_connections=2)) as (_, first, second, _target):
        for number, peer in enumerate((first, second)):
            await peer.reply(NopIn(target_transfer_tag=number, lun=LUN), advance=False)
            pong = await peer.expect(NopOut)
            assert (pong.target_transfer_tag, pong.initiator_task_tag) == (number, NO_TAG)
            assert pong.exp_stat_sn == peer.stat_sn


@pytest.mark.checklist(52, "11.5")
async def test_an_abort_goes_over_the_connection_of_its_command() -> None:
    """§11.5.1; the other connection hears nothing of it."""
    async with (
        two_connections(offer(max_connections=2), command_timeout_s=0.3) as (
            session,
            first,
            second,
            _,
        ),
        trio.open_nursery() as nursery,
    ):
        patient = Running(nursery, session, Task(LUN, cdb.test_unit_ready(), patience=50.0))
        kept = await first.expect(ScsiCommand)
        running = Running(nursery, session, unit_ready())
        late = await second.expect(ScsiCommand)
        abort = await second.expect(TaskManagementRequest)
        assert abort.referenced_task_tag == late.initiator_task_tag
        await first.nothing()
        await second.reply(TaskManagementResponse(abort.initiator_task_tag))
        again = await second.expect(ScsiCommand)
        await second.reply(ScsiResponse(again.initiator_task_tag))
        await first.reply(ScsiResponse(kept.initiator_task_tag))
        await running.done()
        await patient.done()


@pytest.mark.checklist(54, "11.16")
async def test_a_snack_goes_over_the_connection_of_its_command() -> None:
    """§4.2.5.1; what is sent again comes there too."""
    offered = offer(error_recovery_level=1, max_outstanding_r2t=1, max_connections=2)
    async with (
        two_connections(offered, erl=1) as (session, first, second, _),
        trio.open_nursery() as nursery,
    ):
        blocker = Running(nursery, session, unit_ready())
        blocking = await first.expect(ScsiCommand)
        running = Running(nursery, session, reads(8))
        tag = (await second.expect(ScsiCommand)).initiator_task_tag
        await second.reply(DataIn(tag, 1, 4, data=b"bbbb", final=True), advance=False)
        snack = await second.expect(SnackRequest)
        assert (snack.initiator_task_tag, snack.beg_run, snack.run_length) == (tag, 0, 1)
        await first.nothing()
        await second.reply(DataIn(tag, 0, 0, data=b"aaaa"), advance=False)
        await second.reply(ScsiResponse(tag, exp_data_sn=2))
        assert content(await running.done()) == b"aaaabbbb"
        await first.reply(ScsiResponse(blocking.initiator_task_tag))
        await blocker.done()
