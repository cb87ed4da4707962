"""Outages: what was in flight is held, issued again under the same ISID, or fails in time."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from orion_iscsifs.errors import ConnectionLost, ReplacementTimedOut
from orion_iscsifs.initiator.connection import CommandTimedOut
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    AsyncMessage,
    DataIn,
    LoginRequest,
    NopOut,
    ScsiCommand,
    ScsiResponse,
)
from orion_iscsifs.scsi import cdb
from tests.initiator.peer import (
    ISID,
    LUN,
    PlayedConnection,
    PlayedTarget,
    Running,
    answer,
    played_session,
    unit_ready,
    until,
)


@pytest.mark.checklist(36, "6.3.5")
async def test_commands_in_flight_are_issued_again_after_reinstatement() -> None:
    """Checklist 36: the same ISID with TSIH 0; new commands under a fresh CmdSN, in order."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        buffer = bytearray(4)
        read = Running(nursery, session, Task(LUN, cdb.read(1, 1), read_into=memoryview(buffer)))
        await peer.expect(ScsiCommand)
        data = memoryview(bytes(range(200)))
        write = Running(nursery, session, Task(LUN, cdb.write(2, 1), write_from=data))
        command = await peer.expect(ScsiCommand)
        assert bytes(command.data) == data
        peer.cut()
        again = await (await target.accept()).login()
        request = again.login_request
        assert request is not None
        assert (request.isid, request.tsih) == (ISID, 0)
        first, second = await again.expect(ScsiCommand), await again.expect(ScsiCommand)
        assert (first.cdb, second.cdb) == (cdb.read(1, 1), cdb.write(2, 1))
        assert (first.cmd_sn, second.cmd_sn) == (1, 2)
        assert bytes(second.data) == data
        assert session.state is State.LOGGED_IN
        tag = first.initiator_task_tag
        await again.reply(DataIn(tag, data=b"abcd", final=True, has_status=True))
        await again.reply(ScsiResponse(second.initiator_task_tag))
        await read.done()
        await write.done()
        assert bytes(buffer) == b"abcd"
        assert session.counters.commands_retried == 2


async def test_half_a_read_starts_over() -> None:
    """Data that came before the cut counts for nothing: DataSN begins at 0 again."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        buffer = bytearray(8)
        read = Running(nursery, session, Task(LUN, cdb.read(1, 1), read_into=memoryview(buffer)))
        command = await peer.expect(ScsiCommand)
        await peer.reply(DataIn(command.initiator_task_tag, data=b"old!"), advance=False)
        await until(lambda: bytes(buffer[:4]) == b"old!")
        peer.cut()
        again = await (await target.accept()).login()
        tag = (await again.expect(ScsiCommand)).initiator_task_tag
        await again.reply(DataIn(tag, data=b"new data", final=True, has_status=True))
        await read.done()
        assert bytes(buffer) == b"new data"


async def stat_sn_gap(peer: PlayedConnection, command: ScsiCommand) -> None:
    peer.stat_sn += 1
    await peer.reply(ScsiResponse(command.initiator_task_tag))


async def unknown_tag(peer: PlayedConnection, command: ScsiCommand) -> None:
    await peer.reply(ScsiResponse(command.initiator_task_tag + 1))


async def stray_login(peer: PlayedConnection, _command: ScsiCommand) -> None:
    await peer.send(LoginRequest(ISID, 0))


async def garbage(peer: PlayedConnection, _command: ScsiCommand) -> None:
    await peer.wire.send([b"\x3e" * 48])


def asynchronous(event: int) -> Callable[[PlayedConnection, ScsiCommand], Awaitable[None]]:
    async def send(peer: PlayedConnection, _command: ScsiCommand) -> None:
        await peer.reply(AsyncMessage(event, parameter3=5))

    return send


@pytest.mark.parametrize(
    "misbehave",
    [
        pytest.param(stat_sn_gap, id="StatSN gap (checklist 6)"),
        pytest.param(unknown_tag, id="unknown ITT (checklist 8)"),
        pytest.param(stray_login, id="a PDU of the other role"),
        pytest.param(garbage, id="garbage"),
        *(pytest.param(asynchronous(event), id=f"async event {event}") for event in (2, 3, 5)),
    ],
)
@pytest.mark.checklist(6, "4.2.2.2")
@pytest.mark.checklist(8, "11.2.1.8")
async def test_a_broken_connection_is_replaced_and_the_command_done(
    misbehave: Callable[[PlayedConnection, ScsiCommand], Awaitable[None]],
) -> None:
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        await misbehave(peer, await peer.expect(ScsiCommand))
        again = await (await target.accept()).login()
        await answer(again)
        assert (await running.done()).status == 0
        assert session.counters.connections_lost == 1


@pytest.mark.parametrize("event", [0, 255])
@pytest.mark.checklist(50, "11.9.1")
async def test_scsi_and_vendor_events_change_nothing(event: int) -> None:
    """Checklist 50; they use up a StatSN (checklist 5)."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        await peer.reply(AsyncMessage(event))
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


@pytest.mark.checklist(6, "4.2.2.2")
async def test_a_duplicate_status_is_dropped() -> None:
    """Checklist 6."""
    async with played_session() as (session, peer, _), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await answer(peer)
        await running.done()
        peer.stat_sn -= 1
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        running = Running(nursery, session, unit_ready())
        await answer(peer)
        await running.done()
        assert session.counters.connections_lost == 0


async def test_no_answer_to_a_ping_is_the_end_of_the_connection() -> None:
    async with (
        played_session(noop_interval_s=0.05, noop_timeout_s=0.05) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        await peer.expect(NopOut)
        again = await (await target.accept()).login()
        assert "ping" in str(session.last_error)
        running = Running(nursery, session, unit_ready())
        await answer(again)
        await running.done()


async def test_after_replacement_timeout_io_fails_and_comes_back_with_the_target() -> None:
    async with (
        played_session(replacement_timeout_s=0.3, logout=False) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        failed = trio.Event()

        async def fails() -> None:
            started = trio.current_time()
            with pytest.raises(ReplacementTimedOut, match=r"no connection within 0\.3 s"):
                await session.execute(unit_ready())
            assert 0.25 < trio.current_time() - started < 3
            failed.set()

        nursery.start_soon(fails)
        await peer.expect(ScsiCommand)
        port = target.portal.port
        target.close()
        await failed.wait()
        assert session.state is State.FAILED
        with pytest.raises(ReplacementTimedOut):
            await session.execute(unit_ready())
        restarted = PlayedTarget(port)
        try:
            again = await (await restarted.accept()).login()
            await until(lambda: session.state is State.LOGGED_IN)
            running = Running(nursery, session, unit_ready())
            await answer(again)
            await running.done()
        finally:
            restarted.close()
        await until(lambda: session.state is not State.LOGGED_IN)


async def test_replacement_timeout_zero_fails_at_once() -> None:
    async with (
        played_session(replacement_timeout_s=0, logout=False) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):

        async def fails() -> None:
            with pytest.raises(ReplacementTimedOut):
                await session.execute(unit_ready())

        nursery.start_soon(fails)
        await peer.expect(ScsiCommand)
        target.close()


async def test_logging_in_alone_is_no_recovery() -> None:
    """A target that lets us in and then answers nothing runs into replacement_timeout."""
    async with (
        played_session(replacement_timeout_s=0.5, command_timeout_s=0.1, logout=False) as (
            session,
            _peer,
            target,
        ),
        trio.open_nursery() as nursery,
    ):

        async def lets_in() -> None:
            while True:
                connection = await target.accept()
                nursery.start_soon(connection.login)

        nursery.start_soon(lets_in)
        with pytest.raises((ReplacementTimedOut, CommandTimedOut)):
            await session.execute(unit_ready())
        nursery.cancel_scope.cancel()


async def test_a_command_that_is_never_answered_fails_in_the_end() -> None:
    """Others make progress, so the path is fine: after three time-outs it is the command."""
    async with (
        played_session(command_timeout_s=0.1, logout=False) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):

        async def answers_writes_only(connection: PlayedConnection) -> None:
            with suppress(ConnectionLost):
                while True:
                    command = await connection.next()  # or task management, which fails too
                    if isinstance(command, ScsiCommand) and command.write:
                        await connection.reply(ScsiResponse(command.initiator_task_tag))

        async def logins() -> None:
            nursery.start_soon(answers_writes_only, peer)
            while True:
                connection = await target.accept()
                nursery.start_soon(answers_writes_only, await connection.login())

        async def writes(session: Session) -> None:
            while True:
                await session.execute(Task(LUN, cdb.write(0, 1), write_from=memoryview(bytes(10))))
                await trio.sleep(0.02)

        nursery.start_soon(writes, session)
        nursery.start_soon(logins)
        with pytest.raises(CommandTimedOut, match=r"0\.1 s"):
            await session.execute(unit_ready())
        assert session.counters.connections_lost == 3
        nursery.cancel_scope.cancel()
