"""A session in the full-feature phase against targets that mean no good.

The target is played over loopback TCP. Whatever it sends: a typed error that names PDU and section,
no byte outside of a reader's own buffer, none in it after its command has ended, and the session
goes on with the next, honest connection.
"""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from orion_iscsifs.errors import ConnectionLost, OrionError, ProtocolViolation
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.initiator.task import Task
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.pdu import (
    BHS_BYTES,
    NO_TAG,
    PDU_TYPES,
    R2T,
    DataIn,
    LoginResponse,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    ScsiCommand,
    ScsiResponse,
    TextResponse,
    unpack,
)
from orion_iscsifs.scsi import cdb
from tests.hostile.wire import check_violation, encoded
from tests.initiator.peer import PlayedConnection, PlayedTarget, Running, played_session, until

LUN = 0x0001_0000_0000_0000
READ_BYTES = 1000
WRITE_BYTES = 12000


@pytest.fixture(autouse=True)
def _no_internal_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A target's bytes never wake a bug: those are caught, and logged with a traceback."""
    caplog.set_level(logging.WARNING)
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def reading(buffer: memoryview | None = None) -> Task:
    return Task(LUN, cdb.read(0, 1), read_into=buffer or memoryview(bytearray(READ_BYTES)))


def writing() -> Task:
    return Task(LUN, cdb.write(0, 1), write_from=memoryview(bytes(WRITE_BYTES)))


# -- one wrong PDU ---------------------------------------------------------------------------------

Wrong = Callable[[int], Pdu]
"""Given the Initiator Task Tag of the command in flight, the PDU that answers it."""

TO_A_READ: dict[str, tuple[Wrong, type[Pdu], str]] = {
    "a tag that nobody has": (lambda tag: DataIn(tag + 7, data=b"x"), DataIn, "11.2.1.8"),
    "more than was asked for": (lambda tag: DataIn(tag, data=bytes(1001)), DataIn, "11.7.6"),
    "a hole": (lambda tag: DataIn(tag, buffer_offset=8, data=b"x"), DataIn, "11.7.6"),
    "a hole at the end": (
        lambda tag: DataIn(tag, buffer_offset=0xFFFF_FFFF, data=b"x"),
        DataIn,
        "11.7.6",
    ),
    "DataSN": (lambda tag: DataIn(tag, 5, data=b"x"), DataIn, "11.7.5"),
    "DataSN of nothing": (lambda tag: DataIn(tag, 5), DataIn, "11.7.5"),
    "R2T": (lambda tag: R2T(LUN, tag, 1, 0, 8, 0), R2T, "11.8"),
    "ExpDataSN": (lambda tag: ScsiResponse(tag, exp_data_sn=3), ScsiResponse, "11.4.8"),
    "an answer to no text": (lambda tag: TextResponse(tag), TextResponse, "11.2.1.8"),
    "an answer to no logout": (lambda tag: LogoutResponse(tag + 1), LogoutResponse, "11.2.1.8"),
    "an answer to no ping": (lambda tag: NopIn(tag), NopIn, "11.2.1.8"),
    "login again": (lambda tag: LoginResponse(bytes(6), tag), LoginResponse, "11.1"),
    "an initiator's PDU": (lambda tag: NopOut(tag), NopOut, "11.1"),
    "an initiator's command": (lambda tag: ScsiCommand(LUN, tag, bytes(16)), ScsiCommand, "11.1"),
}  # fmt: skip
TO_A_WRITE: dict[str, tuple[Wrong, type[Pdu], str]] = {
    "Data-In": (lambda tag: DataIn(tag, data=b"x"), DataIn, "11.7"),
    "Data-In of nothing": (lambda tag: DataIn(tag), DataIn, "11.7"),
    "R2T of nothing": (lambda tag: R2T(LUN, tag, 1, 0, 8192, 0), R2T, "11.8.4"),
    "R2T beyond the data": (lambda tag: R2T(LUN, tag, 1, 0, 8192, 3809), R2T, "11.8.4"),
    "R2T far away": (lambda tag: R2T(LUN, tag, 1, 0, 0xFFFF_FF00, 512), R2T, "11.8.4"),
    "R2T over MaxBurstLength": (lambda tag: R2T(LUN, tag, 1, 0, 0, 16385), R2T, "11.8.4"),
    "R2T without a tag": (lambda tag: R2T(LUN, tag, NO_TAG, 0, 8192, 8), R2T, "11.8.5"),
    "R2TSN": (lambda tag: R2T(LUN, tag, 1, 9, 8192, 8), R2T, "11.8.2"),
}  # fmt: skip


async def _wrong(task: Task, wrong: tuple[Wrong, type[Pdu], str]) -> None:
    make, kind, section = wrong
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        running = Running(nursery, session, task)
        command = await peer.expect(ScsiCommand)
        pdu = make(command.initiator_task_tag)
        if hasattr(pdu, "stat_sn"):
            await peer.reply(pdu)
        else:
            await peer.send(pdu)
        honest = await (await target.accept()).login()
        error = session.last_error
        assert isinstance(error, ProtocolViolation)
        check_violation(error)
        assert (error.pdu, error.section) == (kind.name, section)
        await _carry_out(honest, task)
        assert (await running.done()).status == 0


async def _carry_out(peer: PlayedConnection, task: Task) -> None:
    """Do what an honest target does for the one command in flight."""
    command = await peer.expect(ScsiCommand)
    tag = command.initiator_task_tag
    if task.read_into is not None:
        await peer.reply(DataIn(tag, data=b"\x11" * len(task.read_into), final=True), advance=False)
    await peer.reply(ScsiResponse(tag))


@pytest.mark.parametrize("what", TO_A_READ)
async def test_a_wrong_answer_to_a_read(what: str) -> None:
    task = reading()
    await _wrong(task, TO_A_READ[what])
    assert task.read_into is not None
    assert bytes(task.read_into) == b"\x11" * READ_BYTES


@pytest.mark.parametrize("what", TO_A_WRITE)
async def test_a_wrong_answer_to_a_write(what: str) -> None:
    await _wrong(writing(), TO_A_WRITE[what])


@pytest.mark.parametrize(
    ("stream", "section"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 2, "11.2.1.2"),
        (DataIn(1).pack(0, 0xFF_FFFF), "13.12"),
        (NopIn().pack(255, 0xFF_FFFF) + bytes(1020), "13.12"),
    ],
)
async def test_a_stream_that_is_none(stream: bytes, section: str) -> None:
    async with played_session() as (session, peer, target):
        await peer.wire.send([stream])
        await (await target.accept()).login()
        await until(lambda: session.counters.logins == 2)
        error = session.last_error
        assert isinstance(error, ProtocolViolation)
        check_violation(error)
        assert error.section == section


# -- buffers ---------------------------------------------------------------------------------------


async def test_nothing_is_written_after_the_command_has_ended() -> None:
    """A response and the beginning of a Data-In for the same command, in one segment."""
    async with played_session() as (session, peer, target), trio.open_nursery() as nursery:
        buffer = bytearray(READ_BYTES)
        running = Running(nursery, session, reading(memoryview(buffer)))
        tag = (await peer.expect(ScsiCommand)).initiator_task_tag
        response = ScsiResponse(tag, stat_sn=peer.stat_sn, exp_cmd_sn=2, max_cmd_sn=33)
        late = DataIn(tag, 0, 0, data=b"\xee" * READ_BYTES, exp_cmd_sn=2, max_cmd_sn=33)
        stream = encoded(late)
        await peer.wire.send([encoded(response) + stream[: BHS_BYTES + 100]])
        await running.done()
        buffer[:] = b"\x55" * READ_BYTES  # it is its owner's again
        await peer.wire.send([stream[BHS_BYTES + 100 :]])
        await (await target.accept()).login()
        await until(lambda: session.counters.logins == 2)
        assert isinstance(session.last_error, ProtocolViolation)
        assert buffer == b"\x55" * READ_BYTES


# -- anything at all -------------------------------------------------------------------------------

_OPCODES = [opcode for opcode in PDU_TYPES if opcode >= 0x20]
_GUARD = b"\xaa" * 64


def _hostile(dice: random.Random, peer: PlayedConnection, tags: list[int]) -> bytes:
    """A valid frame with hostile fields; likely values where only those lead anywhere."""
    header = bytearray(dice.randbytes(BHS_BYTES))
    header[0] = dice.choice(_OPCODES)
    if dice.random() < 0.8:
        header[16:20] = dice.choice([*tags, NO_TAG]).to_bytes(4, "big")
    if dice.random() < 0.5:
        header[20:24] = dice.choice((NO_TAG, 0, 1)).to_bytes(4, "big")
    if dice.random() < 0.9:
        header[24:28] = peer.stat_sn.to_bytes(4, "big")
        header[28:36] = bytes((0, 0, 0, 1, 0, 0, 0, 64))
    if dice.random() < 0.7:
        header[36:48] = bytes((0, 0, 0, dice.randrange(2), *bytes(4), 0, 0, 0, dice.randrange(2)))
    if header[0] == ScsiResponse.opcode and dice.random() < 0.7:
        header[1:4] = (0x80 | dice.choice((0, 2, 4)), 0, dice.choice((0, 2, 8, 0x28)))
    pdu = unpack(header)
    if dice.random() < 0.5 and not isinstance(pdu, R2T):
        pdu.data = dice.randbytes(dice.choice((1, 4, 512, 1000, 1001)))
    return b"".join(bytes(piece) for piece in encode(pdu, header_digest=False, data_digest=False))


class _Reads:
    """Commands whose callers want an outcome, and the memory around their buffers."""

    def __init__(self, session: Session, nursery: trio.Nursery, count: int) -> None:
        self._arena = bytearray(_GUARD * (count + 1) + bytes(READ_BYTES * count))
        self._session = session
        self.outcomes: list[OrionError | int] = []
        step = READ_BYTES + len(_GUARD)
        for start in range(len(_GUARD), len(self._arena), step):
            self._arena[start - len(_GUARD) : start] = _GUARD
            self._arena[start : start + READ_BYTES] = bytes(READ_BYTES)
            nursery.start_soon(self._read, memoryview(self._arena)[start : start + READ_BYTES])
        self._arena[-len(_GUARD) :] = _GUARD
        self._starts = range(0, len(self._arena), step)

    async def _read(self, buffer: memoryview) -> None:
        task = reading(buffer)
        try:
            await self._session.execute(task)
        except OrionError as error:
            self.outcomes.append(error)
        else:
            self.outcomes.append(task.status)
        buffer[:] = b"\x55" * READ_BYTES

    def check(self) -> None:
        """No byte lies outside of the buffers, or in one after its command has ended."""
        for start in self._starts:
            assert self._arena[start : start + len(_GUARD)] == _GUARD
        ended = sum(
            self._arena[start + len(_GUARD) : start + len(_GUARD) + READ_BYTES]
            == b"\x55" * READ_BYTES
            for start in self._starts[:-1]
        )
        assert ended == len(self.outcomes)


async def _torment(dice: random.Random, target: PlayedTarget, first: PlayedConnection) -> None:
    """Connection after connection of noise; each ends with what the initiator can't accept."""
    peer = first
    while True:
        tags = []
        with trio.move_on_after(0.02):
            while True:
                tags.append((await peer.expect(ScsiCommand)).initiator_task_tag)
        try:
            for _ in range(dice.randrange(1, 12)):
                await peer.wire.send([_hostile(dice, peer, tags or [1])])
                await trio.lowlevel.checkpoint()
            await peer.wire.send([b"\xff" * 2048])
        except ConnectionLost:
            pass
        peer = await (await target.accept()).login()


@pytest.mark.parametrize("seed", range(4))
async def test_hostile_fields(seed: int) -> None:
    """Every caller gets an outcome, in bounded time, and no memory but its own is touched."""
    dice = random.Random(seed)
    limits: dict[str, Any] = {"replacement_timeout_s": 20, "command_timeout_s": 2}
    async with played_session(logout=False, **limits) as (session, peer, target):
        async with trio.open_nursery() as nursery:
            reads = _Reads(session, nursery, 8)
            await until(lambda: bool(session.tasks))
            with trio.fail_after(20):
                async with trio.open_nursery() as torment:
                    torment.start_soon(_torment, dice, target, peer)
                    while len(reads.outcomes) < 8:
                        await trio.sleep(0.01)
                        reads.check()
                    torment.cancel_scope.cancel()
            reads.check()
        for outcome in reads.outcomes:
            if isinstance(outcome, ProtocolViolation):
                check_violation(outcome)
        target.latest.cut()
