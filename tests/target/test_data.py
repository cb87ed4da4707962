"""How data moves: bursts, segments, digests, and what goes wrong with them."""

import itertools
import os
from dataclasses import replace

import pytest

from orion_iscsifs.errors import DigestError, LoginError
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.login import Offer
from orion_iscsifs.protocol.pdu import NO_TAG, R2T, DataIn, DataOut, ScsiResponse
from orion_iscsifs.scsi import cdb, sense
from orion_iscsifs.scsi.sense import sense_of_response
from orion_iscsifs.target import Fault, RamDevice, serve
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from tests.target.client import IQN, OFFER, SIZE, config, data_out, dialled, logged_in

BOTH = (False, True)
CRC = ("CRC32C",)


def offer(initial_r2t: bool, immediate_data: bool) -> Offer:
    return replace(
        OFFER,
        initial_r2t=initial_r2t,
        immediate_data=immediate_data,
        max_recv_data_segment_length=4096,
        max_burst_length=20480,
        first_burst_length=8192,
    )


@pytest.mark.parametrize(("initial_r2t", "immediate"), list(itertools.product(BOTH, BOTH)))
@pytest.mark.parametrize("length", [512, 4096, 8192, 8704, 100 * 512, 256 * 512])
async def test_writes_and_reads_of_every_kind(
    initial_r2t: bool, immediate: bool, length: int
) -> None:
    limits = Limits(max_recv_data_segment_length=4096)
    payload = os.urandom(length)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer(initial_r2t, immediate)) as client,
    ):
        assert client.login is not None
        agreed = client.login.parameters
        assert (agreed.initial_r2t, agreed.immediate_data) == (initial_r2t, immediate)
        status = await client.write(3, payload)
        assert (status.status, status.underflow, status.overflow) == (0, False, False)
        assert bytes(disk.view[1536 : 1536 + length]) == payload
        assert await client.read(3, length) == payload


async def test_r2ts_obey_burst_length_and_their_number() -> None:
    wish = replace(offer(True, False), max_outstanding_r2t=2)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=wish) as client,
    ):
        command = client.command(cdb.write(0, 100), write=51200)
        await client.send(command)
        first, second = await client.expect(R2T), await client.expect(R2T)
        assert (first.r2t_sn, first.buffer_offset) == (0, 0)
        assert first.desired_data_transfer_length == 20480
        assert (second.r2t_sn, second.buffer_offset) == (1, 20480)
        # The second burst first: R2Ts may be answered in any order of arrival.
        await client.send(
            data_out(command, b"2" * 20480, offset=20480, ttt=second.target_transfer_tag)
        )
        third = await client.expect(R2T)
        assert (third.buffer_offset, third.desired_data_transfer_length) == (40960, 10240)
        assert len({r.target_transfer_tag for r in (first, second, third)} | {NO_TAG}) == 4
        await client.send(
            data_out(command, b"1" * 20480, ttt=first.target_transfer_tag),
            data_out(command, b"3" * 10240, offset=40960, ttt=third.target_transfer_tag),
        )
        assert (await client.expect(ScsiResponse)).status == 0
        assert bytes(disk.view[:51200]) == b"1" * 20480 + b"2" * 20480 + b"3" * 10240


async def test_data_in_is_cut_into_segments_and_sequences() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=offer(False, True)) as client,
    ):
        await client.send(client.command(cdb.read(0, 100), read=51200))
        pdus = [await client.expect(DataIn) for _ in range(13)]
        assert [p.data_sn for p in pdus] == list(range(13))
        assert [len(p.data) for p in pdus] == [4096] * 12 + [2048]
        # MaxBurstLength 20480: F ends a sequence, every five segments.
        assert [i for i, p in enumerate(pdus) if p.final] == [4, 9, 12]
        assert [p.has_status for p in pdus] == [False] * 12 + [True]


@pytest.mark.parametrize(("header", "data"), list(itertools.product(BOTH, BOTH)))
async def test_digests(header: bool, data: bool) -> None:
    wish = replace(
        OFFER, header_digest=CRC if header else ("None",), data_digest=CRC if data else ("None",)
    )
    payload = os.urandom(150 * 512)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=wish) as client,
    ):
        assert (client.framer.header_digest, client.framer.data_digest) == (header, data)
        assert (await client.write(0, payload)).status == 0
        assert await client.read(0, len(payload)) == payload


async def test_a_target_that_insists_on_digests() -> None:
    wish = replace(OFFER, header_digest=("None", *CRC), data_digest=(*CRC, "None"))
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=Limits(digests=True)) as running,
        logged_in(running, offer=wish) as client,
    ):
        assert client.framer.header_digest
        assert client.framer.data_digest
        async with dialled(running) as other:
            with pytest.raises(LoginError):
                await other.log_in(IQN, offer=OFFER)
        async with dialled(running) as other:
            await other.log_in(None, session_type="Discovery")


@pytest.mark.parametrize("where", [30, 200])
async def test_a_damaged_digest_ends_the_session(where: int) -> None:
    wish = replace(OFFER, header_digest=CRC, data_digest=CRC)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=wish) as client,
    ):
        command = client.command(cdb.write(0, 1), write=512, data=b"d" * 512)
        wire = bytearray(b"".join(encode(command, header_digest=True, data_digest=True)))
        wire[where] ^= 1
        await client.stream.send_all(wire)
        assert await client.closed()
        assert running.stats.protocol_errors == 1
        assert bytes(disk.view[:512]) == bytes(512)


@pytest.mark.parametrize("act", [Act.CORRUPT_HEADER_DIGEST, Act.CORRUPT_DATA_DIGEST])
async def test_the_target_damages_a_digest_when_told(act: Act) -> None:
    wish = replace(OFFER, header_digest=CRC, data_digest=CRC)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=wish) as client,
    ):
        running.targets[0].faults.add(Fault(act=act))
        await client.send(client.command(cdb.read(0, 1), read=512))
        with pytest.raises(DigestError):
            await client.receive()


# -- what goes wrong -------------------------------------------------------------------------------


async def answer_to(
    client_offer: Offer, *, data: bytes, final: bool, outs: int = 0
) -> sense.SenseData:
    """The sense of an 8 KiB write that begins with `data` and `outs` empty-handed Data-Outs."""
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=client_offer) as client,
    ):
        command = client.command(cdb.write(0, 16), write=8192, data=data, final=final)
        await client.send(command)
        for _ in range(outs):
            await client.send(data_out(command, b"x" * 512, offset=len(data)))
        status = await client.expect(ScsiResponse)
        assert bytes(disk.view[:8192]) == bytes(8192)
        return sense_of_response(status.data)


async def test_immediate_data_that_was_not_agreed_on() -> None:
    found = await answer_to(offer(True, False), data=b"x" * 512, final=True)
    assert found == sense.UNEXPECTED_UNSOLICITED_DATA


async def test_unsolicited_data_that_was_not_agreed_on() -> None:
    found = await answer_to(offer(True, True), data=b"x" * 512, final=False, outs=1)
    assert found == sense.UNEXPECTED_UNSOLICITED_DATA


async def test_too_little_unsolicited_data() -> None:
    found = await answer_to(offer(False, True), data=b"x" * 512, final=False, outs=1)
    assert found == sense.NOT_ENOUGH_UNSOLICITED_DATA


async def test_a_gap_in_data_sn_fails_the_command_only() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=offer(True, False)) as client,
    ):
        command = client.command(cdb.write(0, 1), write=512)
        await client.send(command)
        tag = (await client.expect(R2T)).target_transfer_tag
        await client.send(data_out(command, b"x" * 512, sn=27, ttt=tag))
        status = await client.expect(ScsiResponse)
        assert sense_of_response(status.data) == sense.PROTOCOL_SERVICE_CRC_ERROR
        assert (await client.write(0, b"y" * 512)).status == 0


async def test_a_refused_write_waits_for_its_unsolicited_data() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, offer=offer(False, True)) as client,
    ):
        command = client.command(cdb.write(SIZE, 4), write=2048, data=b"x" * 512, final=False)
        await client.send(command)
        rest = [
            DataOut(
                command.lun,
                command.initiator_task_tag,
                data_sn=sn,
                buffer_offset=512 * (sn + 1),
                final=sn == 2,
                data=b"x" * 512,
            )
            for sn in range(3)
        ]
        await client.send(*rest[:2])
        probe = client.command(cdb.test_unit_ready())
        await client.send(probe)
        assert (await client.expect(ScsiResponse)).initiator_task_tag == probe.initiator_task_tag
        await client.send(rest[2])
        status = await client.expect(ScsiResponse)
        assert status.initiator_task_tag == command.initiator_task_tag
        assert sense_of_response(status.data).asc == 0x21


async def test_residuals_of_writes() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        await client.send(client.command(cdb.write(0, 1), write=1024, data=b"u" * 1024))
        under = await client.expect(ScsiResponse)
        assert (under.status, under.underflow, under.residual_count) == (0, True, 512)
        assert bytes(disk.view[:1024]) == b"u" * 512 + bytes(512)
        await client.send(client.command(cdb.write(0, 2), write=512, data=b"o" * 512))
        over = await client.expect(ScsiResponse)
        assert (over.status, over.overflow, over.residual_count) == (0, True, 512)
        assert bytes(disk.view[:1024]) == b"o" * 512 + bytes(512)


async def test_a_reader_that_does_not_read_does_not_fill_our_memory() -> None:
    limits = Limits(send_queue_bytes_max=1 << 20)
    async with (
        RamDevice(8 << 20) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running) as client,
    ):
        reads = [client.command(cdb.read(0, 4096), read=2 << 20) for _ in range(32)]
        await client.send(*reads)
        for _ in reads:
            data, _ = await client.answer()
            assert len(data) == 2 << 20
            assert running.sessions[0].connection.queued_bytes <= 4 << 20
