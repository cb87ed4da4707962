"""Outages at awkward moments: idle, at logout, during cancellation, again and again."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from orion_iscsifs.errors import ConnectionLost, ProtocolViolation
from orion_iscsifs.initiator import supervisor as supervisor_module
from orion_iscsifs.initiator.connection import CommandTimedOut
from orion_iscsifs.initiator.dial import Nexus
from orion_iscsifs.initiator.inbound import Inbound
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.session import open_session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import (
    R2T,
    DataIn,
    LogoutRequest,
    NopIn,
    NopOut,
    Pdu,
    ScsiCommand,
    ScsiResponse,
)
from orion_iscsifs.scsi import cdb
from tests.initiator.peer import (
    CONFIG,
    ISID,
    LUN,
    TARGET,
    PlayedConnection,
    PlayedTarget,
    Running,
    answer,
    played_session,
    unit_ready,
    until,
)


async def test_an_outage_that_nobody_noticed_is_over_with_its_login() -> None:
    """Each outage has the whole replacement_timeout, also if no I/O came between two of them."""
    async with (
        played_session(replacement_timeout_s=0.4) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        peer.cut()
        again = await (await target.accept()).login()
        await until(lambda: session.state is State.LOGGED_IN)
        await trio.sleep(0.5)
        running = Running(nursery, session, unit_ready())
        await again.expect(ScsiCommand)
        again.cut()
        await answer(await (await target.accept()).login())
        assert (await running.done()).status == 0


async def test_a_target_that_hangs_up_instead_of_answering_the_logout() -> None:
    """That is the end of the session too; nobody logs in again to log out."""
    target = PlayedTarget()
    nexus = Nexus(target_name=TARGET, isid=ISID, config=CONFIG)

    async def play() -> None:
        connection = await (await target.accept()).login()
        await connection.expect(LogoutRequest)
        connection.cut()
        with trio.move_on_after(0.3):
            await target.accept()
            pytest.fail("a new connection while the session is being closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        started = trio.current_time()
        async with open_session(target.portal, nexus) as session:
            pass
        assert trio.current_time() - started < 2
        assert session.state is State.CLOSED
    target.close()


async def test_a_cancelled_session_still_logs_out() -> None:
    """Whoever cancels a mount, its session must not be left behind at the target."""
    target = PlayedTarget()
    nexus = Nexus(target_name=TARGET, isid=ISID, config=CONFIG)
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        logged_out = trio.Event()

        async def play() -> None:
            connection = await (await target.accept()).login()
            await connection.serve_logout()
            logged_out.set()

        nursery.start_soon(play)
        with trio.fail_after(3), scope:
            async with open_session(target.portal, nexus):
                scope.cancel()
                await trio.sleep_forever()
        with trio.fail_after(1):
            await logged_out.wait()
    target.close()


async def test_a_cancelled_write_goes_when_its_connection_does() -> None:
    """It waits for its buffer only, which a dead connection does not hold."""
    async with (
        played_session(replacement_timeout_s=-1, logout=False) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        gone = trio.Event()
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await session.execute(Task(LUN, cdb.write(0, 1), write_from=memoryview(bytes(9))))
            assert scope.cancelled_caught
            gone.set()

        nursery.start_soon(cancelled)
        await peer.expect(ScsiCommand)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not gone.is_set()
        target.close()
        with trio.fail_after(2):
            await gone.wait()
        assert session.state is State.RECOVERING


async def test_nothing_is_sent_from_a_buffer_that_was_handed_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A logout that times out fails the writes in flight while the socket is full of them."""
    monkeypatch.setattr(supervisor_module, "LOGOUT_TIMEOUT_S", 0.1)
    data = bytearray(32 << 20)
    async with played_session(logout=False) as (session, peer, _):
        failed = trio.Event()

        async def write() -> None:
            task = Task(LUN, cdb.write(0, 1), write_from=memoryview(data))
            with pytest.raises(ConnectionLost, match="closed"):
                await session.execute(task)
            data[:] = b"\xff" * len(data)
            failed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            command = await peer.expect(ScsiCommand)
            tag = command.initiator_task_tag
            for index in range(1024):
                offset = 16384 * index
                await peer.reply(R2T(LUN, tag, 1 + index, index, offset, 16384), advance=False)
            await trio.sleep(0.1)
            await session.supervisor.logout()
            await failed.wait()
        got = bytearray()
        while True:
            try:
                piece = peer.wire._sock.recv(1 << 20)
            except BlockingIOError:
                await peer.wire.wait_readable()
                continue
            except ConnectionResetError:
                break
            if not piece:
                break
            got += piece
        assert len(got) > 100_000
        assert b"\xff" * 64 not in got


async def twice(peer: PlayedConnection, command: ScsiCommand) -> None:
    tag = command.initiator_task_tag
    await peer.reply(R2T(LUN, tag, 1, 0, 8192, 100), advance=False)
    await peer.reply(R2T(LUN, tag, 2, 1, 8192, 100), advance=False)


async def status_of_a_read(peer: PlayedConnection, command: ScsiCommand) -> None:
    await peer.reply(DataIn(command.initiator_task_tag, final=True, has_status=True))


@pytest.mark.parametrize("misbehave", [twice, status_of_a_read])
async def test_a_command_that_ends_every_connection_fails_in_the_end(
    misbehave: Callable[[PlayedConnection, ScsiCommand], Awaitable[None]],
) -> None:
    """Else it would keep all the others from going on, one login after the other."""
    async with (
        played_session(replacement_timeout_s=-1) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):

        async def play() -> None:
            connection = peer
            for _ in range(3):
                await misbehave(connection, await connection.expect(ScsiCommand))
                connection = await (await target.accept()).login()
            await answer(connection)

        nursery.start_soon(play)
        write = Task(LUN, cdb.write(0, 1), write_from=memoryview(bytes(20000)))
        with trio.fail_after(4), pytest.raises(ProtocolViolation):
            await session.execute(write)
        assert session.counters.connections_lost == 3
        await session.execute(unit_ready())


async def test_a_target_that_ends_each_connection_at_once_is_not_hammered() -> None:
    async with (
        played_session(logout=False) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):

        async def cuts() -> None:
            while True:
                (await (await target.accept()).login()).cut()

        nursery.start_soon(cuts)
        peer.cut()
        await trio.sleep(1)
        assert 4 < session.counters.logins < 12
        nursery.cancel_scope.cancel()


async def test_a_bug_in_the_reader_costs_the_connection_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        await peer.expect(ScsiCommand)

        def broken(_self: Inbound, _exp_cmd_sn: int, _max_cmd_sn: int) -> None:
            monkeypatch.undo()
            raise KeyError("a bug")

        monkeypatch.setattr(Inbound, "_see_window", broken)
        await peer.reply(NopIn(), advance=False)
        await answer(await (await target.accept()).login())
        assert (await running.done()).status == 0
        assert "internal error" in str(session.last_error)


async def test_a_window_that_stays_closed_ends_the_connection() -> None:
    async with (
        played_session(window=1, command_timeout_s=0.2) as (session, peer, target),
        trio.open_nursery() as nursery,
    ):
        peer.max_cmd_sn -= 1
        first = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        peer.max_cmd_sn = command.cmd_sn  # it does not move
        second = Running(nursery, session, unit_ready())
        await peer.reply(ScsiResponse(command.initiator_task_tag))
        await first.done()
        await answer(await (await target.accept()).login())
        await second.done()
        assert isinstance(session.last_error, CommandTimedOut)
        assert "window closed" in str(session.last_error)


async def test_what_comes_right_behind_the_last_login_response_is_kept() -> None:
    """A target may ping, or tell of an event, as soon as it has let us in."""
    target = PlayedTarget()
    nexus = Nexus(target_name=TARGET, isid=ISID, config=CONFIG)

    async def play(done: trio.Event) -> None:
        connection = await target.accept()
        send = connection.send

        async def send_both(pdu: Pdu) -> None:
            if getattr(pdu, "tsih", 0):
                ping = NopIn(target_transfer_tag=5, stat_sn=connection.stat_sn)
                ping.exp_cmd_sn, ping.max_cmd_sn = connection.exp_cmd_sn, connection.max_cmd_sn
                parts = [pdu.pack(0, len(pdu.data)), pdu.data, bytes(-len(pdu.data) % 4)]
                await connection.wire.send([b"".join(map(bytes, parts)) + ping.pack(0, 0)])
            else:
                await send(pdu)

        connection.send = send_both  # type: ignore[method-assign]
        await connection.login()
        connection.send = send  # type: ignore[method-assign]
        assert (await connection.expect(NopOut)).target_transfer_tag == 5
        done.set()
        await connection.serve_logout()

    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play, done)
        async with open_session(target.portal, nexus) as session:
            with trio.fail_after(3):
                await done.wait()
            assert session.counters.connections_lost == 0
    target.close()
