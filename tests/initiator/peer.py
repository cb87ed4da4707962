"""A target that the test plays by hand: real loopback TCP, every PDU chosen by the test."""

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.session import Session, open_session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.initiator.wire import Wire
from orion_iscsifs.protocol.framing import Framer, encode
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.login import Offer, TargetAccess, TargetLogin
from orion_iscsifs.protocol.pdu import (
    LoginRequest,
    LoginResponse,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    ScsiCommand,
    ScsiResponse,
)
from orion_iscsifs.scsi import cdb

ISID = bytes.fromhex("80abcdef0000")
TARGET = "iqn.2026-11.org.example:played"
CONFIG = SessionConfig(
    initiator_name="iqn.2026-11.org.example:tester",
    noop_interval_s=0,
    command_timeout_s=4,
    login_timeout_s=5,
    replacement_timeout_s=5,
)
OFFER = Offer(
    initial_r2t=False,
    max_recv_data_segment_length=4096,
    max_burst_length=16384,
    first_burst_length=8192,
    max_outstanding_r2t=4,
    default_time2wait=0,
)
_P = TypeVar("_P", bound=Pdu)


TSIH = 7
LUN = 0x0001_0000_0000_0000


@dataclass
class Numbers:
    """What all connections of a played session share."""

    exp_cmd_sn: int = 1
    max_cmd_sn: int = 32


class PlayedConnection:
    """The target's end of one connection. `reply` fills in the sequence numbers."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.wire = Wire(sock, Framer(data_segment_length_max=1 << 20), "played initiator")
        self.received: list[Pdu] = []
        self.stat_sn = 0
        self.numbers = Numbers()
        self.parameters = Parameters()
        self.access = TargetAccess()
        self.login_request: LoginRequest | None = None

    @property
    def exp_cmd_sn(self) -> int:
        return self.numbers.exp_cmd_sn

    @exp_cmd_sn.setter
    def exp_cmd_sn(self, number: int) -> None:
        self.numbers.exp_cmd_sn = number & 0xFFFF_FFFF

    @property
    def max_cmd_sn(self) -> int:
        return self.numbers.max_cmd_sn

    @max_cmd_sn.setter
    def max_cmd_sn(self, number: int) -> None:
        self.numbers.max_cmd_sn = number & 0xFFFF_FFFF

    async def login(
        self, offer: Offer = OFFER, window: int = 32, *, joins: "PlayedConnection | None" = None
    ) -> Self:
        """Let the initiator in; `joins`: into the session of that connection."""
        login = TargetLogin(
            offer=offer,
            lookup=lambda _name: self.access,
            portal_group_tag=1,
            random_bytes=os.urandom,
            assign_tsih=lambda _login: TSIH,
            find_session=None if joins is None else lambda _login: joins.parameters,
        )
        if joins is not None:
            self.numbers = joins.numbers
        while not login.done:
            request = await self.expect(LoginRequest)
            if self.login_request is None:
                self.login_request = request
            if self.login_request is request and joins is None:
                # ExpCmdSN of a new session starts at the CmdSN of its first Login Request.
                self.exp_cmd_sn = request.cmd_sn
                self.max_cmd_sn = (request.cmd_sn + window - 1) & 0xFFFF_FFFF
            await self.reply(login.receive(request))
        self.parameters = login.parameters
        self.wire.framer.header_digest = login.parameters.header_digest
        self.wire.framer.data_digest = login.parameters.data_digest
        return self

    async def next(self) -> Pdu:
        """The next PDU, of whatever kind."""
        with trio.fail_after(5):
            while not self.received:
                self.received += await self.wire.receive()
        pdu = self.received.pop(0)
        if not getattr(pdu, "immediate", True):
            self.exp_cmd_sn += 1
            self.max_cmd_sn += 1
        return pdu

    async def next_of(self, kind: type[_P]) -> _P:
        """The next PDU of this kind; pings that come before it are answered."""
        while True:
            pdu = await self.next()
            if not isinstance(pdu, NopOut) or kind is NopOut:
                assert isinstance(pdu, kind), f"{pdu} where a {kind.name} was due"
                return pdu
            await self.reply(NopIn(pdu.initiator_task_tag, data=bytes(pdu.data)))

    async def expect(self, kind: type[_P]) -> _P:
        """The next PDU, which is of this kind."""
        pdu = await self.next()
        assert isinstance(pdu, kind), f"{pdu} where a {kind.name} was due"
        return pdu

    async def pinged(self) -> None:
        """The next PDU is a ping; it is answered."""
        ping = await self.expect(NopOut)
        await self.reply(NopIn(ping.initiator_task_tag, data=bytes(ping.data)))

    async def nothing(self, seconds: float = 0.05) -> None:
        """No PDU comes for so long."""
        with trio.move_on_after(seconds):
            while not self.received:
                self.received += await self.wire.receive()
        assert not self.received, f"unexpected: {self.received}"

    async def reply(self, pdu: Any, *, advance: bool = True) -> None:
        """Send a PDU with the sequence numbers that are due; `advance`: it uses up a StatSN."""
        pdu.stat_sn, pdu.exp_cmd_sn, pdu.max_cmd_sn = self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn
        if advance:
            self.stat_sn = (self.stat_sn + 1) & 0xFFFF_FFFF
        await self.send(pdu)

    async def damage(self, pdu: Any, *, advance: bool = True, where: int = -1) -> None:
        """As `reply`, with one byte of the stream wrong: by default, the last of the digest."""
        pdu.stat_sn, pdu.exp_cmd_sn, pdu.max_cmd_sn = self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn
        if advance:
            self.stat_sn = (self.stat_sn + 1) & 0xFFFF_FFFF
        framer = self.wire.framer
        pieces = encode(pdu, header_digest=framer.header_digest, data_digest=framer.data_digest)
        stream = bytearray(b"".join(pieces))
        stream[where] ^= 0x5A
        await self.wire.send([stream])

    async def send(self, pdu: Pdu) -> None:
        framer = self.wire.framer
        await self.wire.send(
            encode(pdu, header_digest=framer.header_digest, data_digest=framer.data_digest)
        )

    async def open_window(self, commands: int) -> None:
        self.max_cmd_sn = (self.exp_cmd_sn + commands - 1) & 0xFFFF_FFFF
        await self.reply(NopIn(), advance=False)

    async def refuse_login(self, status: int, text: bytes = b"") -> LoginRequest:
        """Answer the next Login Request with Status-Class and -Detail, and hang up.

        The sequence numbers of such a response mean nothing (RFC 7143 §11.13.4), so they are wild.
        """
        request = await self.expect(LoginRequest)
        response = LoginResponse(request.isid, request.initiator_task_tag, data=text)
        response.status_class, response.status_detail = status >> 8, status & 0xFF
        response.stat_sn, response.exp_cmd_sn, response.max_cmd_sn = 0xABCDEF, 0x77777777, 0x10
        await self.send(response)
        self.cut()
        return request

    async def serve_logout(self) -> None:
        while not self.received or not isinstance(self.received[0], LogoutRequest):
            # Pings may still be under way.
            self.received = self.received[1:] or await self.wire.receive()
        request = await self.expect(LogoutRequest)
        await self.reply(LogoutResponse(request.initiator_task_tag))

    def cut(self) -> None:
        self.wire.close()


class PlayedTarget:
    """A listener on a loopback port of its own."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.setblocking(False)
        self.portal = Portal("127.0.0.1", self._listener.getsockname()[1])
        self._accepted: list[PlayedConnection] = []

    async def accept(self) -> PlayedConnection:
        with trio.fail_after(5):
            while True:
                await trio.lowlevel.wait_readable(self._listener)
                try:
                    connection = PlayedConnection(self._listener.accept()[0])
                except BlockingIOError:
                    continue
                self._accepted.append(connection)
                return connection

    @property
    def latest(self) -> PlayedConnection:
        return self._accepted[-1]

    def close(self) -> None:
        self._listener.close()
        for connection in self._accepted:
            connection.wire.close()


class Running:
    """A task that is being executed in the background of a test."""

    def __init__(self, nursery: trio.Nursery, session: Session, task: Task) -> None:
        self.task = task
        self._done = trio.Event()
        nursery.start_soon(self._run, session)

    async def _run(self, session: Session) -> None:
        await session.execute(self.task)
        self._done.set()

    async def done(self) -> Task:
        with trio.fail_after(5):
            await self._done.wait()
        return self.task


@asynccontextmanager
async def played_session(
    offer: Offer = OFFER,
    *,
    window: int = 32,
    logout: bool = True,
    stat_sn: int = 0,
    access: TargetAccess | None = None,
    **changes: Any,
) -> AsyncIterator[tuple[Session, PlayedConnection, PlayedTarget]]:
    """A session that is logged in to a played target; the end of the body logs out.

    `stat_sn` is that of the first Login Response, `access` what the first login has to prove.
    """
    target = PlayedTarget()
    config = SessionConfig(**{**_fields(CONFIG), **changes})
    nexus = Nexus(target_name=TARGET, isid=ISID, config=config)
    try:
        async with trio.open_nursery() as nursery:
            accepted: list[PlayedConnection] = []

            async def accept() -> None:
                connection = await target.accept()
                connection.stat_sn = stat_sn
                connection.access = access or connection.access
                accepted.append(await connection.login(offer, window))

            nursery.start_soon(accept)
            async with open_session(target.portal, nexus) as session:
                await trio.testing.wait_all_tasks_blocked()
                yield session, accepted[0], target
                if logout:
                    nursery.start_soon(target.latest.serve_logout)
            nursery.cancel_scope.cancel()
    finally:
        target.close()


def _fields(config: SessionConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def offer(**changes: Any) -> Offer:
    return replace(OFFER, **changes)


async def until(condition: Callable[[], bool]) -> None:
    """Wait, bounded, for something that happens on another task."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.002)


def unit_ready() -> Task:
    return Task(LUN, cdb.test_unit_ready())


async def answer(peer: PlayedConnection) -> ScsiCommand:
    """Take one command and say GOOD."""
    command = await peer.expect(ScsiCommand)
    await peer.reply(ScsiResponse(command.initiator_task_tag))
    return command
