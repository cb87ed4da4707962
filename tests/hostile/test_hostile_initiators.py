"""The embedded target against initiators that mean no good.

Every attack runs beside a bystander with a session of its own, which must not notice; and no
attack may end in an error that is not a typed one (those are logged with a traceback).
"""

import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import trio

from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.pdu import (
    BHS_BYTES,
    NO_TAG,
    PDU_TYPES,
    DataIn,
    DataOut,
    LoginRequest,
    LogoutRequest,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    TextRequest,
    TextResponse,
    unpack,
)
from orion_iscsifs.protocol.text import TEXT_BYTES_MAX
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.target import RamDevice, serve
from orion_iscsifs.target.server import Running
from orion_iscsifs.target.session import Session
from orion_iscsifs.target.settings import Limits
from tests.hostile.wire import encoded
from tests.target.client import SIZE, Client, config, dialled, logged_in

_BYSTANDER = bytes.fromhex("80cafe00beef")
_PATTERN = bytes(range(256)) * 32
_LIMITS = Limits(login_timeout_s=2.0, send_queue_bytes_max=1 << 20, command_window=16)
_GREEDY_BYTES_MAX = 4 << 20
"""What is read at once before the limit on the queue is looked at again, and the answers to it."""


@dataclass
class Scene:
    running: Running
    bystander: Client

    @property
    def attacked(self) -> Session:
        """The attacker's session."""
        return next(s for s in self.running.sessions if s.isid != _BYSTANDER)

    async def check(self) -> None:
        """The bystander's own session still works, and its data is what it wrote."""
        assert (await self.bystander.write(64, _PATTERN)).status == 0
        assert await self.bystander.read(64, len(_PATTERN)) == _PATTERN
        async with logged_in(self.running, isid=bytes.fromhex("80cafe00f00d")) as newcomer:
            assert await newcomer.read(64, 512) == _PATTERN[:512]


@asynccontextmanager
async def scene(caplog: pytest.LogCaptureFixture, limits: Limits = _LIMITS) -> AsyncIterator[Scene]:
    with caplog.at_level(logging.WARNING):
        async with (
            RamDevice(SIZE) as disk,
            serve([config(disk)], limits=limits) as running,
            logged_in(running, isid=_BYSTANDER) as bystander,
        ):
            played = Scene(running, bystander)
            yield played
            await played.check()
    assert not caplog.records, [record.getMessage() for record in caplog.records]


# -- before the login ------------------------------------------------------------------------------

STRANGERS: dict[str, bytes] = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: disk.example\r\nAccept: */*\r\n\r\n" * 2,
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "zeroes": bytes(480),
    "ones": b"\xff" * 2000,
    "noise": random.Random(1).randbytes(10000),
    "16 MiB of login text": LoginRequest(bytes(6), 1).pack(0, 0xFF_FFFF) + bytes(100),
    "the longest AHS": LoginRequest(bytes(6), 1).pack(255, 0) + bytes(255 * 4),
    "a command": encoded(ScsiCommand(0, 1, bytes(16))),
    "a target's PDU": encoded(DataIn(1, data=b"x")),
    "text that is none": encoded(LoginRequest(bytes(6), 1, data=b"\xff\xfe=\0")),
    "no end of text": encoded(LoginRequest(bytes(6), 1, continued=True, data=b"A=" + b"x" * 8190))
    * 20,
}


@pytest.mark.parametrize("what", STRANGERS)
async def test_strangers_are_shown_out(what: str, caplog: pytest.LogCaptureFixture) -> None:
    async with scene(caplog) as played:
        refused = played.running.stats.refused_logins
        async with dialled(played.running) as stranger:
            with suppress(trio.BrokenResourceError):
                await stranger.stream.send_all(STRANGERS[what])
            assert await stranger.closed()
        with trio.fail_after(5):
            while played.running.stats.refused_logins == refused:
                await trio.sleep(0.01)


async def test_one_byte_at_a_time_is_too_slow(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(login_timeout_s=0.3)
    async with scene(caplog, limits) as played, trio.open_nursery() as nursery:
        login = encoded(LoginRequest(bytes(6), 1, csg=1, data=b"InitiatorName=iqn.x\0"))

        async def crawl() -> None:
            async with dialled(played.running) as client:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    for position in range(len(login) - 1):
                        await client.stream.send_all(login[position : position + 1])
                        await trio.sleep(0.02)
                assert await client.closed()

        with trio.fail_after(5):
            async with trio.open_nursery() as crowd:
                for _ in range(20):
                    crowd.start_soon(crawl)
                await trio.sleep(0.1)
                await played.check()
        assert played.running.stats.refused_logins == 20
        nursery.cancel_scope.cancel()


async def test_a_crowd_that_never_logs_in(caplog: pytest.LogCaptureFixture) -> None:
    """More connections than are let in: the surplus is closed, the rest times out."""
    async with scene(caplog, Limits(login_timeout_s=1.0)) as played:
        streams: list[trio.SocketStream] = []
        try:
            while len(streams) < 300:
                streams.append(await trio.open_tcp_stream(*played.running.portals[0]))
            assert (await played.bystander.write(0, b"y" * 512)).status == 0
            with trio.fail_after(5):
                for stream in streams:
                    with suppress(trio.BrokenResourceError):
                        assert await stream.receive_some(1) == b""
        finally:
            for stream in streams:
                await trio.aclose_forcefully(stream)


async def test_logging_in_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    """One initiator port has one session, however often it comes."""
    async with scene(caplog) as played:
        for _ in range(30):
            async with logged_in(played.running):
                assert len(played.running.sessions) == 2
        assert played.running.stats.reinstatements <= 30


# -- floods in the full feature phase --------------------------------------------------------------


async def _flood(client: Client, pdus: list[Pdu], *, times: int, seconds: float = 3.0) -> None:
    """Send without reading anything, until the target stops taking it."""
    wire = b"".join(encoded(pdu) for pdu in pdus)
    with trio.move_on_after(seconds), suppress(trio.BrokenResourceError):
        for _ in range(times):
            await client.stream.send_all(wire)


async def test_pings_without_reading_the_answers(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        session = played.attacked
        await _flood(attacker, [NopOut(5, data=bytes(8192))] * 16, times=10000, seconds=1.0)
        assert session.connection.queued_bytes < _LIMITS.send_queue_bytes_max + _GREEDY_BYTES_MAX
        await played.check()


async def test_reads_without_reading_the_answers(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        session = played.attacked
        command = attacker.command(cdb.read(0, 2048), read=SIZE, immediate=True)
        await _flood(attacker, [command] * 8, times=1000, seconds=1.0)
        assert session.connection.queued_bytes < _LIMITS.send_queue_bytes_max + 2 * SIZE
        await played.check()


async def test_immediate_commands_that_never_send_their_data(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        session = played.attacked
        pdus: list[Pdu] = [
            attacker.command(cdb.write(0, 8), write=4096, immediate=True) for _ in range(500)
        ]
        await attacker.send(*pdus)
        await attacker.send(NopOut(7))
        rejects = 0
        while not isinstance(pdu := await attacker.receive(), NopIn):
            if isinstance(pdu, Reject):
                assert pdu.reason == RejectReason.IMMEDIATE_COMMAND_REJECT
                rejects += 1
        assert rejects == played.running.stats.rejects > 400
        assert len(session.tasks) + rejects == 500


async def test_commands_with_huge_lengths(caplog: pytest.LogCaptureFixture) -> None:
    """ExpectedDataTransferLength and the CDB name any length: memory is taken for neither."""
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        session = played.attacked
        for block in (cdb.write(0, 0xFFFF_FFFF), cdb.unmap(0xFFFF), cdb.read(0, 0xFFFF_FFFF)):
            command = attacker.command(block)
            command.expected_data_transfer_length = 0xFFFF_FFFF
            command.write = block[0] in (0x8A, OpCode.UNMAP)
            command.read = not command.write
            await attacker.send(command)
            await attacker.send(NopOut(7))
            while not isinstance(await attacker.receive(), NopIn):
                pass
            assert sum(len(task.data) for task in session.tasks.values()) <= 0xFFFF


async def test_data_that_nobody_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        for number in range(100):
            stray = DataOut(0, number, number, number, 0xFFFF_0000, True, data=bytes(8192))
            await attacker.send(stray)
        await attacker.send(NopOut(7))
        await attacker.expect(NopIn)
        assert played.running.stats.late_data_out == 100
        assert not played.attacked.tasks


async def test_a_segment_beyond_our_limit(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        await attacker.stream.send_all(DataOut(0, 1).pack(0, 0xFF_FFFF))
        assert await attacker.closed()
        assert played.running.stats.protocol_errors == 1
        assert played.running.stats.last_error == (
            "SCSI Data-Out: DataSegmentLength 16777215 exceeds our MaxRecvDataSegmentLength"
            " 262144 (RFC 7143 §13.12)"
        )


@pytest.mark.checklist(27, "6.1")
async def test_text_without_an_end(caplog: pytest.LogCaptureFixture) -> None:
    """C=1 for ever is cut off at the bound of one text."""
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        tag, sent_bytes = NO_TAG, 0
        while True:
            text = b"A=" + b"x" * 8000
            request = TextRequest(3, False, True, 0, tag, True, attacker.cmd_sn, data=text)
            await attacker.send(request)
            sent_bytes += len(text)
            answer = await attacker.receive()
            if isinstance(answer, Reject):
                break
            assert isinstance(answer, TextResponse)
            assert sent_bytes <= TEXT_BYTES_MAX
            tag = answer.target_transfer_tag
        assert answer.reason == RejectReason.PROTOCOL_ERROR
        assert await attacker.read(0, 512) == bytes(512)


async def test_questions_without_an_end(caplog: pytest.LogCaptureFixture) -> None:
    """F=0 for ever: each request is answered or rejected, nothing piles up, and I/O goes on."""
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        tag = NO_TAG
        for number in range(500):
            text = b"X-a.b%d=1\0" % number
            request = TextRequest(3, False, False, 0, tag, True, attacker.cmd_sn, data=text)
            await attacker.send(request)
            answer = await attacker.receive()
            assert isinstance(answer, TextResponse | Reject)
            assert not isinstance(answer, TextResponse) or not answer.final
            tag = getattr(answer, "target_transfer_tag", NO_TAG)
        assert await attacker.read(0, 512) == bytes(512)


async def test_misplaced_pdus_are_rejected(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(caplog) as played, logged_in(played.running) as attacker:
        strange: list[Pdu] = [
            LoginRequest(bytes(6), 1),
            ScsiResponse(1),
            DataIn(1, data=b"x"),
            NopIn(1),
            SnackRequest(0, 1, 2, 3, 4),
        ]
        for number in range(200):
            await attacker.send(strange[number % len(strange)])
            rejected = (await attacker.expect(Reject)).data
            assert len(rejected) == BHS_BYTES
        assert played.running.stats.rejects == 200


# -- anything at all -------------------------------------------------------------------------------

_OPCODES = [opcode for opcode in PDU_TYPES if opcode < 0x20] + [ScsiCommand.opcode] * 6


def _hostile(dice: random.Random, client: Client) -> bytes:
    """A valid frame with hostile fields; likely values where only those lead anywhere."""
    header = bytearray(dice.randbytes(BHS_BYTES))
    if dice.random() < 0.5:
        header[8:16] = bytes(8)
    if dice.random() < 0.7:
        header[16:20] = dice.randrange(8).to_bytes(4, "big")
    if dice.random() < 0.5:
        header[20:24] = dice.choice((NO_TAG, 0, 1, 2, 512, 4096)).to_bytes(4, "big")
    header[0] = dice.choice((0, 0x40)) | dice.choice(_OPCODES)
    pdu = unpack(header)
    if hasattr(pdu, "cmd_sn") and dice.random() < 0.8:
        pdu.cmd_sn = client.cmd_sn
        client.cmd_sn = (client.cmd_sn + (not header[0] & 0x40)) & 0xFFFF_FFFF
    if isinstance(pdu, ScsiCommand):
        pdu.cdb = bytes((dice.choice(list(OpCode)),)) + dice.choice((bytes(15), dice.randbytes(15)))
        pdu.expected_data_transfer_length = dice.choice((0, 1, 512, 4096, 0xFFFF_FFFF))
    if isinstance(pdu, LogoutRequest) and dice.random() < 0.9:
        pdu.reason = 2  # for recovery: refused, and the session goes on
    if isinstance(pdu, TextRequest):
        if dice.random() < 0.9:
            pdu.target_transfer_tag = NO_TAG
        pdu.data = dice.choice((b"", b"SendTargets=All\0", b"A=b\0", b"X=1\0" * 20))
        if dice.random() < 0.1:
            pdu.data = dice.randbytes(9)
    elif dice.random() < 0.5:
        pdu.data = dice.randbytes(dice.choice((1, 512, 5000)))
    if dice.random() < 0.1:
        pdu.ahs = dice.randbytes(4 * dice.randrange(1, 256))
    return b"".join(bytes(piece) for piece in encode(pdu, header_digest=False, data_digest=False))


async def _read_all(client: Client, watch: Callable[[Pdu], None]) -> None:
    with suppress(EOFError, trio.BrokenResourceError, trio.TooSlowError):
        while True:
            watch(await client.receive())


@pytest.mark.parametrize("seed", range(4))
async def test_hostile_fields(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Sessions of nothing but hostile PDUs: answered, rejected, or ended as a protocol error."""
    dice = random.Random(seed)
    async with scene(caplog) as played:
        answers = 0

        def count(_: Pdu) -> None:
            nonlocal answers
            answers += 1

        for _ in range(8):
            async with logged_in(played.running) as attacker, trio.open_nursery() as nursery:
                nursery.start_soon(_read_all, attacker, count)
                session = played.attacked
                with suppress(trio.BrokenResourceError), trio.fail_after(20):
                    for _ in range(60):
                        await attacker.stream.send_all(_hostile(dice, attacker))
                        assert len(session.tasks) <= _LIMITS.command_window + 32
                    await trio.sleep(0.05)
                nursery.cancel_scope.cancel()
        assert answers > 100
        assert (
            played.running.stats.last_error == "" or "RFC 7143 §" in played.running.stats.last_error
        )
