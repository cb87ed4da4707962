"""A raw initiator for tests: every PDU is visible, nothing is retried."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.framing import Framer, encode
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.login import Credentials, InitiatorLogin, Offer, SessionType
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    DataOut,
    LoginResponse,
    NopIn,
    Pdu,
    ScsiCommand,
    ScsiResponse,
)
from orion_iscsifs.protocol.transfer import WriteTransfer
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.lun import encode_lun
from orion_iscsifs.scsi.sense import SenseData, sense_of_response
from orion_iscsifs.target import Chap, Running, TargetConfig

INITIATOR = "iqn.2026-11.org.example:tester"
ISID = bytes.fromhex("80cafe000001")
IQN = "iqn.2026-11.org.example:disk"
SIZE = 1 << 20
TUR = cdb.test_unit_ready()
TIMEOUT_S = 5.0
_P = TypeVar("_P", bound=Pdu)

OFFER = Offer(
    initial_r2t=False,
    immediate_data=True,
    max_recv_data_segment_length=65536,
    max_burst_length=262144,
    first_burst_length=65536,
    max_outstanding_r2t=4,
)


def config(*devices: BlockDevice, chap: Chap | None = None) -> TargetConfig:
    """A target whose LUNs 0, 1, ... are `devices`."""
    return TargetConfig(iqn=IQN, units=dict(enumerate(devices)), chap=chap)


class Numbers:
    """What the connections of one session share."""

    def __init__(self) -> None:
        self.cmd_sn = 1
        self.tag = 0x1000


class Client:
    """One connection in full feature phase. `cmd_sn` is that of the next command.

    `acknowledging`: PDUs that are sent carry the ExpStatSN of all that was received.
    """

    def __init__(self, stream: trio.SocketStream, numbers: Numbers | None = None) -> None:
        self.stream = stream
        self.framer = Framer(data_segment_length_max=1 << 24)
        self.inbox: list[Pdu] = []
        self.numbers = numbers or Numbers()
        self.acknowledging = False
        self.exp_stat_sn = 0
        self.login: InitiatorLogin | None = None
        self.max_cmd_sn = 0
        self.exp_cmd_sn = 0

    @property
    def cmd_sn(self) -> int:
        return self.numbers.cmd_sn

    @cmd_sn.setter
    def cmd_sn(self, value: int) -> None:
        self.numbers.cmd_sn = value

    async def send(self, *pdus: Pdu) -> None:
        """In one segment, as far as TCP goes along."""
        framer = self.framer
        pieces: list[bytes | bytearray | memoryview] = []
        for pdu in pdus:
            if self.acknowledging and hasattr(pdu, "exp_stat_sn"):
                pdu.exp_stat_sn = self.exp_stat_sn
            pieces += encode(
                pdu, header_digest=framer.header_digest, data_digest=framer.data_digest
            )
        await self.stream.send_all(b"".join(pieces))

    async def receive(self) -> Pdu:
        """The next PDU; raises EOFError when the target closed the connection."""
        with trio.fail_after(TIMEOUT_S):
            while not self.inbox:
                place = self.framer.buffers()[0]
                data = await self.stream.receive_some(len(place))
                if not data:
                    raise EOFError
                place[: len(data)] = data
                self.inbox += self.framer.received(len(data))
        pdu = self.inbox.pop(0)
        self.exp_cmd_sn = getattr(pdu, "exp_cmd_sn", self.exp_cmd_sn)
        self.max_cmd_sn = getattr(pdu, "max_cmd_sn", self.max_cmd_sn)
        if _is_numbered(pdu):
            self.exp_stat_sn = serial.add(getattr(pdu, "stat_sn", 0), 1)
        return pdu

    async def expect(self, kind: type[_P]) -> _P:
        pdu = await self.receive()
        assert isinstance(pdu, kind), pdu
        return pdu

    async def closed(self) -> bool:
        """Whether the target hangs up, whatever it still says."""
        try:
            while True:
                await self.receive()
        except (EOFError, trio.BrokenResourceError):
            return True
        except trio.TooSlowError:
            return False

    # -- login --------------------------------------------------------------------------------

    async def log_in(
        self,
        target_name: str | None,
        *,
        offer: Offer = OFFER,
        isid: bytes = ISID,
        tsih: int = 0,
        cid: int = 0,
        exp_stat_sn: int = 0,
        cmd_sn: int = 1,
        session: Parameters | None = None,
        credentials: Credentials | None = None,
        target_credentials: Credentials | None = None,
        session_type: SessionType = "Normal",
    ) -> None:
        """Raises what the initiator's login raises."""
        login = InitiatorLogin(
            initiator_name=INITIATOR,
            target_name=target_name,
            session_type=session_type,
            offer=offer,
            isid=isid,
            tsih=tsih,
            cid=cid,
            exp_stat_sn=exp_stat_sn,
            session=session,
            cmd_sn=cmd_sn,
            initiator_task_tag=0,
            credentials=credentials,
            target_credentials=target_credentials,
            chap_algorithms=(7, 5),
            random_bytes=os.urandom,
        )
        request = login.start()
        while True:
            await self.send(request)
            following = login.receive(await self.expect(LoginResponse))
            if following is None:
                break
            request = following
        self.login, self.cmd_sn = login, cmd_sn
        self.framer.header_digest = login.parameters.header_digest
        self.framer.data_digest = login.parameters.data_digest

    # -- commands -----------------------------------------------------------------------------

    def command(
        self,
        block: bytes,
        *,
        read: int = 0,
        write: int = 0,
        data: bytes = b"",
        lun: int = 0,
        final: bool = True,
        immediate: bool = False,
    ) -> ScsiCommand:
        """The next command in order; `read` and `write` are expected bytes."""
        self.numbers.tag += 1
        pdu = ScsiCommand(
            lun=encode_lun(lun),
            initiator_task_tag=self.numbers.tag,
            cdb=block,
            expected_data_transfer_length=read or write,
            read=read > 0,
            write=write > 0,
            final=final,
            immediate=immediate,
            cmd_sn=self.cmd_sn,
            data=data,
        )
        if not immediate:
            self.cmd_sn = serial.add(self.cmd_sn, 1)
        return pdu

    async def run(
        self, block: bytes, *, read: int = 0, lun: int = 0
    ) -> tuple[bytes, DataIn | ScsiResponse]:
        """Send a command without Data-Out; its data and its status."""
        await self.send(self.command(block, read=read, lun=lun))
        return await self.answer()

    async def answer(self) -> tuple[bytes, DataIn | ScsiResponse]:
        """Data-In in order up to the status."""
        found = bytearray()
        while True:
            pdu = await self.receive()
            if isinstance(pdu, DataIn):
                assert pdu.buffer_offset == len(found)
                found += pdu.data
                if pdu.has_status:
                    return bytes(found), pdu
            else:
                assert isinstance(pdu, ScsiResponse), pdu
                return bytes(found), pdu

    async def sense(self, block: bytes, *, read: int = 0, lun: int = 0) -> SenseData:
        """Run a command that must end with CHECK CONDITION."""
        _, status = await self.run(block, read=read, lun=lun)
        assert isinstance(status, ScsiResponse)
        assert status.status == 2
        return sense_of_response(status.data)

    async def settle(self, *luns: int) -> None:
        """Take the power-on unit attentions."""
        for lun in luns or (0,):
            await self.sense(cdb.test_unit_ready(), lun=lun)

    async def write(self, lba: int, data: bytes, *, lun: int = 0, block: int = 512) -> ScsiResponse:
        """WRITE with immediate, unsolicited and solicited data as negotiated."""
        assert self.login is not None
        transfer = WriteTransfer(memoryview(data), self.login.parameters)
        immediate, first = transfer.immediate_bytes, transfer.first_burst_bytes
        command = self.command(
            cdb.write(lba, len(data) // block),
            write=len(data),
            data=data[:immediate],
            lun=lun,
            final=first == immediate,
        )
        outs: list[Pdu] = list(transfer.unsolicited(command.lun, command.initiator_task_tag))
        await self.send(command, *outs)
        while True:
            pdu = await self.receive()
            if isinstance(pdu, ScsiResponse):
                return pdu
            assert isinstance(pdu, R2T), pdu
            burst = transfer.solicited(pdu)
            assert burst is not None
            await self.send(*burst)

    async def read(self, lba: int, length: int, *, lun: int = 0, block: int = 512) -> bytes:
        data, status = await self.run(cdb.read(lba, length // block), read=length, lun=lun)
        assert status.status == 0
        return data


def _is_numbered(pdu: Pdu) -> bool:
    """Whether it takes a StatSN (RFC 7143 §4.2.2.2)."""
    match pdu:
        case DataIn():
            return pdu.has_status
        case NopIn():
            return pdu.initiator_task_tag != NO_TAG
        case R2T():
            return False
        case _:
            return True


def data_out(
    command: ScsiCommand, data: bytes, *, offset: int = 0, sn: int = 0, ttt: int = 0xFFFFFFFF
) -> DataOut:
    """One final Data-Out."""
    return DataOut(command.lun, command.initiator_task_tag, ttt, sn, offset, True, data=data)


@asynccontextmanager
async def dialled(running: Running, *, portal: int = 0) -> AsyncIterator[Client]:
    """A TCP connection, not logged in."""
    host, port = running.portals[portal]
    async with await trio.open_tcp_stream(host, port) as stream:
        yield Client(stream)


@asynccontextmanager
async def joined(
    running: Running, leader: Client, cid: int, *, offer: Offer = OFFER, exp_stat_sn: int = 0
) -> AsyncIterator[Client]:
    """One more connection of `leader`'s session, or a new one for a CID of it."""
    assert leader.login is not None
    host, port = running.portals[0]
    async with await trio.open_tcp_stream(host, port) as stream:
        client = Client(stream, leader.numbers)
        client.acknowledging = leader.acknowledging
        await client.log_in(
            running.targets[0].iqn,
            offer=offer,
            tsih=leader.login.tsih,
            cid=cid,
            exp_stat_sn=exp_stat_sn,
            cmd_sn=leader.cmd_sn,
            session=leader.login.parameters,
        )
        yield client


@asynccontextmanager
async def logged_in(
    running: Running, *, offer: Offer = OFFER, isid: bytes = ISID, settle: bool = True
) -> AsyncIterator[Client]:
    """A session whose unit attentions have been taken."""
    async with dialled(running) as client:
        await client.log_in(running.targets[0].iqn, offer=offer, isid=isid)
        if settle:
            await client.settle(*running.targets[0].units.by_number)
        yield client
