"""Several connections, and what happens when one is lost (checks 2, 8, 37, 51, 53, 55)."""

import pytest
import trio

from orion_iscsifs.config import AuthConfig, ChapCredentials, Secret
from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.login import Credentials, TargetAccess
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
    TaskManagementRequest,
    TaskManagementResponse,
)
from orion_iscsifs.scsi import cdb
from tests.checklist.several import (
    acknowledge,
    content,
    logged_out,
    next_login,
    reads,
    two_connections,
)
from tests.initiator.peer import (
    ISID,
    LUN,
    TSIH,
    Running,
    answer,
    offer,
    played_session,
    unit_ready,
)

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
        two_connections(offer(max_connections=2), command_timeout_s=0.6) as (
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
