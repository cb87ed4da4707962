"""Writes over connections that come and go at random, against a model of the target.

The model carries commands out in the order of CmdSN, keeps what it was not told to drop, and
fails the test for whatever RFC 7143 forbids an initiator: a retry that differs from its command, a
request on a connection that it has logged out, two commands under one CmdSN, a tag used twice.
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator import supervisor as supervisor_module
from orion_iscsifs.initiator.dial import Nexus
from orion_iscsifs.initiator.session import Session, open_session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.pdu import (
    LoginRequest,
    LogoutReason,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    ScsiCommand,
    ScsiResponse,
)
from orion_iscsifs.scsi import cdb
from tests.initiator.levels import joinable
from tests.initiator.peer import (
    CONFIG,
    ISID,
    LUN,
    TARGET,
    PlayedConnection,
    PlayedTarget,
)

CONNECTIONS = 3
CALLERS = 6
WRITES = 15
WINDOW = 8


@dataclass
class Model:
    """One session of a target at level 0. Every answer is late, or lost with its connection."""

    target: PlayedTarget
    chance: random.Random
    nursery: trio.Nursery
    leading: PlayedConnection | None = None
    live: dict[int, PlayedConnection] = field(default_factory=dict)
    waiting: dict[int, tuple[int, ScsiCommand]] = field(default_factory=dict)
    """By CmdSN: what came before its turn, and its CID."""
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    done: dict[int, ScsiCommand] = field(default_factory=dict)
    """What was carried out in this session, by tag."""
    cuts: int = 0
    sessions: int = 0
    complaints: list[str] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            self.nursery.start_soon(self._serve, await self.target.accept())

    async def _serve(self, peer: PlayedConnection) -> None:
        with suppress(OrionError, trio.TooSlowError):
            while not peer.received:
                peer.received += await peer.wire.receive()
            request = peer.received[0]
            assert isinstance(request, LoginRequest)
            await peer.login(
                joinable(CONNECTIONS), WINDOW, joins=self.leading if request.tsih else None
            )
            if not request.tsih:
                self._begin(peer)
            self.live[request.cid] = peer
            while self.live.get(request.cid) is peer:
                pdus, peer.received = peer.received or await peer.wire.receive(), []
                for pdu in pdus:
                    await self._handle(request.cid, peer, pdu)

    def _begin(self, peer: PlayedConnection) -> None:
        """A new session: the old one and its commands are gone."""
        for other in self.live.values():
            other.cut()
        self.leading, self.live = peer, {}
        self.waiting, self.done = {}, {}
        self.sessions += 1

    @property
    def numbers(self) -> PlayedConnection:
        """Whoever has the session's numbering."""
        assert self.leading is not None
        return self.leading

    async def _handle(self, cid: int, peer: PlayedConnection, pdu: Pdu) -> None:
        match pdu:
            case ScsiCommand():
                self._take(cid, pdu)
                await self._carry_out()
            case LogoutRequest() if pdu.reason == LogoutReason.CLOSE_CONNECTION:
                self._log_out(pdu.cid)
                await peer.reply(LogoutResponse(pdu.initiator_task_tag))
            case LogoutRequest():
                await peer.reply(LogoutResponse(pdu.initiator_task_tag))
            case NopOut():
                await peer.reply(NopIn(pdu.initiator_task_tag, data=bytes(pdu.data)))
            case _:
                self.complaints.append(f"unexpected: {pdu}")

    def _take(self, cid: int, command: ScsiCommand) -> None:
        due = self.numbers.exp_cmd_sn
        if serial.less(command.cmd_sn, due) or serial.less(self.numbers.max_cmd_sn, command.cmd_sn):
            self.complaints.append(f"CmdSN {command.cmd_sn} outside the window at {due}")
        if command.initiator_task_tag in self.done:
            self.complaints.append(f"the tag {command.initiator_task_tag} is used again")
        old = self.waiting.get(command.cmd_sn)
        if old is not None:
            self.complaints.append(f"CmdSN {command.cmd_sn} comes twice: {old[1]}, {command}")
        command.data = bytes(command.data)
        self.waiting[command.cmd_sn] = (cid, command)

    def _log_out(self, cid: int) -> None:
        """What has not been acknowledged is discarded (§11.14); nothing else is left of it."""
        gone = self.live.pop(cid, None)
        if gone is not None:
            gone.cut()
        self.waiting = {sn: held for sn, held in self.waiting.items() if held[0] != cid}

    async def _carry_out(self) -> None:
        while (held := self.waiting.pop(self.numbers.exp_cmd_sn, None)) is not None:
            cid, command = held
            self.numbers.exp_cmd_sn += 1
            self.numbers.max_cmd_sn = self.numbers.exp_cmd_sn + WINDOW - 1
            self.done[command.initiator_task_tag] = command
            self.blocks[command.cdb] = bytes(command.data)
            self.nursery.start_soon(self._answer, self.live.get(cid), command)

    async def _answer(self, peer: PlayedConnection | None, command: ScsiCommand) -> None:
        await trio.sleep(self.chance.random() * 0.004)
        if peer is None or peer not in self.live.values():
            return
        # Never the last one, so that the session lasts; sometimes all, so that it does not.
        kind = self.chance.random()
        if kind < 0.06 and len(self.live) > 1:
            self._cut(peer)
        elif kind < 0.07:
            for other in list(self.live.values()):
                self._cut(other)
        else:
            with suppress(OrionError):
                await peer.reply(ScsiResponse(command.initiator_task_tag))

    def _cut(self, peer: PlayedConnection) -> None:
        self.cuts += 1
        self.live = {cid: one for cid, one in self.live.items() if one is not peer}
        peer.wire.shutdown()


def versions(block: int) -> Iterator[bytes]:
    for number in range(WRITES):
        yield f"block {block}, version {number}".encode()


@pytest.mark.checklist(2, "4.2.2.1")
@pytest.mark.checklist(8, "11.2.1.8")
@pytest.mark.checklist(37, "7.1.4.3")
@pytest.mark.parametrize("seed", range(6))
async def test_nothing_is_lost_or_comes_too_late(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each caller reads back its own last write, whatever became of the connections."""
    monkeypatch.setattr(supervisor_module, "FIRST_CMD_SN", 0xFFFF_FFF0)
    monkeypatch.setattr(supervisor_module, "_JOIN_BACKOFF_FIRST_S", 0.005)
    target = PlayedTarget()
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}
    config = SessionConfig(**{**fields, "connections": CONNECTIONS})
    nexus = Nexus(target_name=TARGET, isid=ISID, config=config)
    async with trio.open_nursery() as nursery:
        model = Model(target, random.Random(seed), nursery)
        nursery.start_soon(model.run)

        async def caller(session: Session, block: int) -> None:
            request = cdb.write(block, 1)
            for data in versions(block):
                task = Task(LUN, request, write_from=memoryview(data))
                await session.execute(task)
                assert task.status == 0
                wire = request.ljust(16, b"\0")
                assert model.blocks[wire] == data, "answered before, or overtaken by an old write"

        async with open_session(target.portal, nexus) as session:
            with trio.fail_after(20):
                async with trio.open_nursery() as callers:
                    for block in range(CALLERS):
                        callers.start_soon(caller, session, block)
            assert not session.tasks
            assert session.counters.connections_lost >= model.cuts > 0
        nursery.cancel_scope.cancel()
    target.close()
    assert model.complaints == []
