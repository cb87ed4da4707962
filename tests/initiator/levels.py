"""Played sessions at a recovery level above 0, and of several connections."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from orion_iscsifs.config import DigestPreference
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.pdu import LogoutReason, LogoutRequest, LogoutResponse, NopIn
from orion_iscsifs.scsi import cdb
from tests.initiator.peer import (
    LUN,
    PlayedConnection,
    PlayedTarget,
    offer,
    played_session,
    until,
)

Recovering = tuple[Session, PlayedConnection, PlayedTarget]
Several = tuple[Session, list[PlayedConnection], PlayedTarget]
LEVEL_1 = offer(
    error_recovery_level=1,
    max_outstanding_r2t=1,
    header_digest=("CRC32C",),
    data_digest=("CRC32C",),
)


@asynccontextmanager
async def recovering(**changes: Any) -> AsyncIterator[Recovering]:
    """One connection at level 1, with digests."""
    wish = DigestPreference.CRC32C
    async with played_session(
        LEVEL_1, erl=1, header_digest=wish, data_digest=wish, **changes
    ) as played:
        assert played[0].parameters.error_recovery_level == 1
        yield played


@asynccontextmanager
async def several(count: int, *, level: int = 0, **changes: Any) -> AsyncIterator[Several]:
    """So many connections; at the end they are cut without a logout."""
    offered = joinable(count, level)
    async with played_session(offered, connections=count, erl=level, logout=False, **changes) as (
        session,
        first,
        target,
    ):
        peers = [first]
        while len(peers) < count:
            peers.append(await (await target.accept()).login(offered, joins=first))
        await until(lambda: len(session.connections) == count)
        try:
            yield session, peers, target
        finally:
            target.close()


def joinable(count: int, level: int = 0) -> Any:
    return offer(error_recovery_level=level, max_outstanding_r2t=1, max_connections=count)


def reads(length: int) -> Task:
    return Task(LUN, cdb.read(0, 1), read_into=memoryview(bytearray(length)))


def writes(length: int) -> Task:
    data = bytes(position % 251 for position in range(length))
    return Task(LUN, cdb.write(0, 1), write_from=memoryview(data))


def content(task: Task) -> bytes:
    assert task.read_into is not None
    return bytes(task.read_into)


async def acknowledge(session: Session, peer: PlayedConnection) -> None:
    """Tell the initiator by ExpCmdSN that everything so far was taken."""
    await peer.reply(NopIn(), advance=False)
    await until(lambda: session.window.exp_cmd_sn == peer.exp_cmd_sn)


async def confirm_logout(peer: PlayedConnection, reason: LogoutReason, cid: int) -> None:
    """The next PDU is a logout of this CID for this reason; it is answered well.

    Below level 2 a ping follows that of another connection: is the carrier itself still there?
    """
    request = await peer.expect(LogoutRequest)
    assert (request.reason, request.cid, request.immediate) == (reason, cid, True)
    await peer.reply(LogoutResponse(request.initiator_task_tag))
    assert peer.login_request is not None
    if reason is LogoutReason.CLOSE_CONNECTION and cid != peer.login_request.cid:
        await peer.pinged()
