"""The life of a session on the wire: logins again, redirections, logout (checks 36 to 39, 51)."""

import pytest
import trio

from orion_iscsifs.protocol.pdu import (
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    ScsiCommand,
    ScsiResponse,
)
from tests.initiator.peer import ISID, LUN, Running, answer, played_session, unit_ready


@pytest.mark.checklist(36, "6.3.5")
async def test_every_login_again_has_the_isid_of_the_first() -> None:
    """TSIH 0 and the same name: the target ends what is left of the old session."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        first = peer.login_request
        assert first is not None
        for _ in range(2):
            target.latest.cut()
            running = Running(nursery, session, unit_ready())
            again = await (await target.accept()).login()
            request = again.login_request
            assert request is not None
            assert (request.isid, request.tsih) == (first.isid, 0) == (ISID, 0)
            assert bytes(request.data) == bytes(first.data)
            await answer(again)
            await running.done()


@pytest.mark.checklist(51, "11.14")
async def test_a_session_ends_with_a_logout_and_silence() -> None:
    """Reason 0; what is under way is not followed by anything else."""
    async with (
        trio.open_nursery() as nursery,
        played_session(logout=False) as (_, peer, _target),
    ):

        async def logout() -> None:
            request = await peer.expect(LogoutRequest)
            assert request.reason == LogoutReason.CLOSE_SESSION
            # Not even the answer to a ping follows.
            await peer.reply(NopIn(target_transfer_tag=1, lun=LUN), advance=False)
            await peer.nothing()
            await peer.reply(LogoutResponse(request.initiator_task_tag))

        nursery.start_soon(logout)


@pytest.mark.checklist(51, "11.15")
@pytest.mark.parametrize("code", [1, 2, 3])
async def test_a_logout_that_the_target_could_not_do_ends_the_session_too(code: int) -> None:
    """CID not found, recovery not supported, cleanup failed: nothing is left to wait for."""
    with trio.fail_after(3):
        async with (
            trio.open_nursery() as nursery,
            played_session(logout=False) as (session, peer, _),
        ):
            running = Running(nursery, session, unit_ready())
            await answer(peer)
            await running.done()

            async def logout() -> None:
                request = await peer.expect(LogoutRequest)
                await peer.reply(LogoutResponse(request.initiator_task_tag, response=code))

            nursery.start_soon(logout)
    assert session.state == "closed"


@pytest.mark.checklist(39, "11.13.5")
async def test_a_target_that_is_not_ready_is_asked_again() -> None:
    """Status-Class 3, on a connection of its own each time; what is held waits for it."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, unit_ready())
        command = await peer.expect(ScsiCommand)
        peer.cut()
        times = []
        for status in (0x0301, 0x0302):
            await (await target.accept()).refuse_login(status)
            times.append(trio.current_time())
        again = await (await target.accept()).login()
        times.append(trio.current_time())
        assert times[1] - times[0] > 0.05
        held = await again.expect(ScsiCommand)
        assert held.cdb == command.cdb
        await again.reply(ScsiResponse(held.initiator_task_tag))
        await running.done()
