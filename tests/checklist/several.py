"""What the tests of sessions with several connections share."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.login import Offer
from orion_iscsifs.protocol.pdu import (
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    TaskManagementFunction,
    TaskManagementRequest,
    TaskManagementResponse,
)
from orion_iscsifs.scsi import cdb
from tests.initiator.peer import (
    LUN,
    PlayedConnection,
    PlayedTarget,
    offer,
    played_session,
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
    if reason is LogoutReason.CLOSE_CONNECTION:
        await peer.pinged()


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
