"""ErrorRecoveryLevel 1: SNACKs, damaged PDUs, recovery R2Ts."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from orion_iscsifs.errors import DigestError
from orion_iscsifs.protocol.framing import Damaged, encode
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    R2T,
    DataIn,
    DataOut,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    RejectReason,
    ScsiCommand,
    ScsiResponse,
    SnackRequest,
    SnackType,
)
from orion_iscsifs.scsi import cdb, sense
from orion_iscsifs.scsi.sense import sense_of_response
from orion_iscsifs.target import Fault, RamDevice, Running, serve
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from tests.target.client import OFFER, SIZE, TUR, Client, config, logged_in

CRC = ("CRC32C",)
LEVEL_1 = replace(
    OFFER,
    error_recovery_level=1,
    header_digest=CRC,
    data_digest=CRC,
    max_recv_data_segment_length=1024,
    max_burst_length=4096,
    first_burst_length=2048,
    max_outstanding_r2t=1,
)
LIMITS = Limits(error_recovery_level=1)
LENGTH = 10240


@asynccontextmanager
async def level_1(
    limits: Limits = LIMITS, **changes: object
) -> AsyncIterator[tuple[RamDevice, Running, Client]]:
    offer = replace(LEVEL_1, **changes)  # type: ignore[arg-type]
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        logged_in(running, offer=offer) as client,
    ):
        client.framer.keep_damaged = True
        client.acknowledging = True
        disk.view[:LENGTH] = os.urandom(LENGTH)
        yield disk, running, client


async def read_all(client: Client) -> list[DataIn]:
    """A read of LENGTH bytes in ten Data-In, four a sequence; nothing of it is acknowledged."""
    await client.send(client.command(cdb.read(0, LENGTH // 512), read=LENGTH))
    client.acknowledging = False
    pdus = [await client.expect(DataIn) for _ in range(10)]
    assert pdus[-1].has_status
    return pdus


def snack(
    kind: int, tag: int = NO_TAG, *, beg: int = 0, run: int = 0, ttt: int = NO_TAG, lun: int = 0
) -> SnackRequest:
    return SnackRequest(kind, tag, ttt, lun=lun, beg_run=beg, run_length=run)


async def send_damaged(client: Client, pdu: Pdu) -> None:
    """With one bit of its data segment inverted after the digest was computed."""
    wire = bytearray(b"".join(encode(pdu, header_digest=True, data_digest=True)))
    wire[-5] ^= 1
    await client.stream.send_all(wire)


def out(command: ScsiCommand, r2t: R2T | None, data: bytes, step: int = 1024) -> list[DataOut]:
    """The Data-Out PDUs of a burst; `data` is that of the whole command."""
    if r2t is None:
        start, end, tag = len(command.data), 2048, NO_TAG
    else:
        start, tag = r2t.buffer_offset, r2t.target_transfer_tag
        end = start + r2t.desired_data_transfer_length
    return [
        DataOut(
            command.lun,
            command.initiator_task_tag,
            tag,
            sn,
            offset,
            offset + step >= end,
            data=data[offset : min(offset + step, end)],
        )
        for sn, offset in enumerate(range(start, end, step))
    ]


# -- Data SNACK ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beg", "run", "expected"),
    [(3, 2, [3, 4]), (8, 0, [8, 9]), (0, 1, [0]), (0, 0, list(range(10)))],
)
async def test_data_snack_brings_replicas(beg: int, run: int, expected: list[int]) -> None:
    async with level_1() as (_, running, client):
        pdus = await read_all(client)
        await client.send(
            snack(SnackType.DATA_OR_R2T, pdus[0].initiator_task_tag, beg=beg, run=run)
        )
        for data_sn in expected:
            again = await client.expect(DataIn)
            again.exp_cmd_sn, again.max_cmd_sn = pdus[data_sn].exp_cmd_sn, pdus[data_sn].max_cmd_sn
            assert again == pdus[data_sn]
        assert running.stats.snacks == 1
        await client.send(NopOut(0x55))
        await client.expect(NopIn)


async def test_snacks_for_what_is_not_there_are_protocol_errors() -> None:
    async with level_1() as (_, _running, client):
        pdus = await read_all(client)
        tag = pdus[0].initiator_task_tag
        for wrong in (
            snack(SnackType.DATA_OR_R2T, tag, beg=9, run=2),
            snack(SnackType.DATA_OR_R2T, tag, beg=11),
            snack(SnackType.DATA_OR_R2T, 0xABC, beg=0, run=1),
            snack(SnackType.STATUS, beg=client.exp_stat_sn + 5, run=1),
            snack(SnackType.STATUS, beg=pdus[-1].stat_sn - 1, run=1),
            snack(SnackType.R_DATA, tag, ttt=NO_TAG),
        ):
            await client.send(wrong)
            reject = await client.expect(Reject)
            assert reject.reason == RejectReason.PROTOCOL_ERROR
            assert bytes(reject.data) == wrong.pack(0, 0)
        await client.send(snack(7))
        assert (await client.expect(Reject)).reason == RejectReason.INVALID_PDU_FIELD


async def test_acknowledged_status_ends_the_claim_to_data() -> None:
    async with level_1() as (_, running, client):
        pdus = await read_all(client)
        client.acknowledging = True
        await client.send(snack(SnackType.DATA_OR_R2T, pdus[0].initiator_task_tag, beg=1, run=1))
        assert (await client.expect(Reject)).reason == RejectReason.PROTOCOL_ERROR
        channel = running.sessions[0].live[0]
        assert channel.finished == {}
        assert [kept.pdu.stat_sn for kept in channel.kept] == [pdus[-1].stat_sn + 1]


async def test_kept_answers_are_bounded() -> None:
    async with level_1(replace(LIMITS, retained_bytes_max=LENGTH)) as (_, running, client):
        first = await read_all(client)
        for _ in range(3):
            await read_all(client)
        client.acknowledging = False
        assert len(running.sessions[0].live[0].kept) <= 2
        await client.send(snack(SnackType.STATUS, beg=first[-1].stat_sn, run=1))
        assert (await client.expect(Reject)).reason == RejectReason.SNACK_REJECT


async def test_level_0_knows_no_snack_and_no_a_bit() -> None:
    async with level_1(Limits()) as (_, _running, client):
        pdus = await read_all(client)
        assert not any(pdu.acknowledge for pdu in pdus)
        await client.send(snack(SnackType.STATUS))
        assert (await client.expect(Reject)).reason == RejectReason.COMMAND_NOT_SUPPORTED


# -- DataACK ---------------------------------------------------------------------------------------


async def test_data_ack_once_a_burst() -> None:
    async with level_1() as (_, running, client):
        pdus = await read_all(client)
        asking = [pdu for pdu in pdus if pdu.acknowledge]
        assert [pdu.data_sn for pdu in asking] == [3, 7], "each 4096 bytes, MaxBurstLength"
        assert all(pdu.target_transfer_tag != NO_TAG for pdu in asking)
        tag = pdus[0].initiator_task_tag
        await client.send(snack(SnackType.DATA_ACK, ttt=asking[0].target_transfer_tag, beg=4))
        await client.send(snack(SnackType.DATA_OR_R2T, tag, beg=3, run=1))
        reject = await client.expect(Reject)
        assert (reject.reason, reject.data_sn) == (RejectReason.PROTOCOL_ERROR, 10)
        # BegRun 0 with RunLength 0: all that is unacknowledged.
        await client.send(snack(SnackType.DATA_OR_R2T, tag))
        assert [(await client.expect(DataIn)).data_sn for _ in range(6)] == [4, 5, 6, 7, 8, 9]
        assert running.stats.data_acks == 1
        await client.send(snack(SnackType.DATA_ACK, ttt=0x999, beg=4))
        assert (await client.expect(Reject)).reason == RejectReason.INVALID_DATA_ACK


# -- R-Data SNACK ----------------------------------------------------------------------------------


async def test_r_data_snack_sends_all_anew_and_tags_the_response() -> None:
    async with level_1() as (disk, _running, client):
        pdus = await read_all(client)
        tag = pdus[0].initiator_task_tag
        await client.send(snack(SnackType.R_DATA, tag, ttt=0x1234))
        data, status = await client.answer()
        assert data == bytes(disk.view[:LENGTH])
        assert isinstance(status, ScsiResponse)
        assert (status.snack_tag, status.stat_sn) == (0x1234, pdus[-1].stat_sn)
        assert status.exp_data_sn == 10
        # A Status SNACK brings the latest response, tag included (§11.16.3).
        await client.send(snack(SnackType.STATUS, beg=status.stat_sn, run=1))
        assert (await client.expect(ScsiResponse)).snack_tag == 0x1234


# -- Status SNACK ----------------------------------------------------------------------------------


async def test_status_snack_brings_every_kind_of_numbered_answer() -> None:
    async with level_1() as (_, running, client):
        await client.run(TUR)
        client.acknowledging = False
        first = client.exp_stat_sn
        _, one = await client.run(TUR)
        await client.send(NopOut(0x55, data=b"echo"))
        two = await client.expect(NopIn)
        running.sessions[0].send_async_message(255, vcode=7)
        three = await client.receive()
        await client.send(snack(SnackType.STATUS, beg=first, run=3))
        assert [await client.receive() for _ in range(3)] == [one, two, three]
        await client.send(snack(SnackType.STATUS))
        found = [await client.receive() for _ in range(4)]
        assert found[-3:] == [one, two, three], "and the one that nothing has acknowledged"


async def test_a_lost_status_is_recovered() -> None:
    async with level_1() as (_, running, client):
        running.targets[0].faults.add(Fault(act=Act.LOSE_STATUS))
        lost = client.command(TUR)
        await client.send(lost)
        client.acknowledging = False
        _, after = await client.run(TUR)
        await client.send(snack(SnackType.STATUS, beg=after.stat_sn - 1, run=1))
        found = await client.expect(ScsiResponse)
        assert found.initiator_task_tag == lost.initiator_task_tag
        assert found.stat_sn == after.stat_sn - 1


# -- damaged PDUs ----------------------------------------------------------------------------------


async def test_a_damaged_command_is_discarded_and_retried() -> None:
    async with level_1() as (disk, running, client):
        command = client.command(cdb.write(0, 1), write=512, data=b"w" * 512)
        before = bytes(disk.view[:512])
        await send_damaged(client, command)
        reject = await client.expect(Reject)
        assert reject.reason == RejectReason.DATA_DIGEST_ERROR
        assert bytes(reject.data) == command.pack(0, 512)
        assert reject.exp_cmd_sn == command.cmd_sn
        assert bytes(disk.view[:512]) == before
        await client.send(command, command)  # the duplicate is ignored
        assert (await client.expect(ScsiResponse)).status == 0
        assert bytes(disk.view[:512]) == b"w" * 512
        await client.send(NopOut(0x55))
        await client.expect(NopIn)
        assert running.stats.digest_errors == 1


async def test_damaged_solicited_data_is_asked_for_again() -> None:
    payload = os.urandom(4096)
    async with level_1(initial_r2t=True, immediate_data=False) as (disk, _running, client):
        command = client.command(cdb.write(0, 8), write=4096)
        await client.send(command)
        r2t = await client.expect(R2T)
        outs = out(command, r2t, payload)
        await client.send(outs[0])
        await send_damaged(client, outs[1])
        await client.send(*outs[2:])
        assert (await client.expect(Reject)).reason == RejectReason.DATA_DIGEST_ERROR
        again = await client.expect(R2T)
        assert (again.r2t_sn, again.buffer_offset) == (1, 1024)
        assert again.desired_data_transfer_length == 1024
        assert again.target_transfer_tag != r2t.target_transfer_tag
        await client.send(*out(command, again, payload))
        assert (await client.expect(ScsiResponse)).status == 0
        assert bytes(disk.view[:4096]) == payload


@pytest.mark.parametrize("lost", [0, 1])
async def test_lost_unsolicited_data_is_asked_for_again(lost: int) -> None:
    payload = os.urandom(2048)
    async with level_1(immediate_data=False) as (disk, _running, client):
        command = client.command(cdb.write(0, 4), write=2048, final=False)
        outs = out(command, None, payload, step=512)
        await client.send(command, *[pdu for pdu in outs if pdu.data_sn != lost])
        again = await client.expect(R2T)
        assert (again.r2t_sn, again.buffer_offset) == (0, 512 * lost)
        assert again.desired_data_transfer_length == 512
        await client.send(*out(command, again, payload))
        assert (await client.expect(ScsiResponse)).status == 0
        assert bytes(disk.view[:2048]) == payload


async def test_duplicate_data_is_dropped() -> None:
    payload = os.urandom(4096)
    async with level_1(initial_r2t=True, immediate_data=False) as (disk, _running, client):
        command = client.command(cdb.write(0, 8), write=4096)
        await client.send(command)
        outs = out(command, await client.expect(R2T), payload)
        await client.send(outs[0], outs[1], outs[1], outs[0], *outs[2:])
        assert (await client.expect(ScsiResponse)).status == 0
        assert bytes(disk.view[:4096]) == payload


async def test_without_recovery_r2ts_damaged_data_fails_the_write() -> None:
    limits = replace(LIMITS, recovery_r2ts=False)
    async with level_1(limits, initial_r2t=True, immediate_data=False) as (disk, _, client):
        command = client.command(cdb.write(0, 8), write=4096)
        before = bytes(disk.view[:4096])
        await client.send(command)
        outs = out(command, await client.expect(R2T), bytes(4096))
        await send_damaged(client, outs[0])
        assert (await client.expect(Reject)).reason == RejectReason.DATA_DIGEST_ERROR
        await client.send(*outs[1:])
        status = await client.expect(ScsiResponse)
        assert sense_of_response(status.data) == sense.PROTOCOL_SERVICE_CRC_ERROR
        assert bytes(disk.view[:4096]) == before


async def test_a_damaged_header_costs_the_connection_at_any_level() -> None:
    async with level_1() as (_, running, client):
        wire = bytearray(
            b"".join(encode(client.command(TUR), header_digest=True, data_digest=True))
        )
        wire[20] ^= 1
        await client.stream.send_all(wire)
        assert await client.closed()
        assert running.stats.protocol_errors == 1


# -- time-outs and R2T SNACK -----------------------------------------------------------------------


@pytest.mark.parametrize("with_data", [False, True])
async def test_data_that_does_not_come_is_asked_for_again(with_data: bool) -> None:
    payload = os.urandom(4096)
    limits = replace(LIMITS, sequence_timeout_s=0.05)
    async with level_1(limits, initial_r2t=True, immediate_data=False) as (disk, running, client):
        command = client.command(cdb.write(0, 8), write=4096)
        await client.send(command)
        first = await client.expect(R2T)
        if with_data:
            await client.send(out(command, first, payload)[0])
        again = await client.expect(R2T)
        if with_data:
            assert (again.r2t_sn, again.buffer_offset) == (1, 1024)
        else:
            assert (again.r2t_sn, again.target_transfer_tag) == (0, first.target_transfer_tag)
        await client.send(*out(command, again, payload))
        while isinstance(status := await client.receive(), R2T):
            pass  # the machine was slow, and it was asked once more
        assert isinstance(status, ScsiResponse)
        assert status.status == 0
        assert bytes(disk.view[:4096]) == payload
        assert running.stats.sequence_timeouts >= 1


async def test_a_lost_r2t_is_resent_on_a_snack() -> None:
    payload = os.urandom(8192)
    async with level_1(initial_r2t=True, immediate_data=False) as (disk, running, client):
        running.targets[0].faults.add(Fault(act=Act.LOSE_R2T, number=1))
        command = client.command(cdb.write(0, 16), write=8192)
        await client.send(command)
        await client.send(*out(command, await client.expect(R2T), payload))
        with trio.move_on_after(0.05):
            await client.receive()
        await client.send(snack(SnackType.DATA_OR_R2T, command.initiator_task_tag, beg=1, run=1))
        lost = await client.expect(R2T)
        assert (lost.r2t_sn, lost.buffer_offset) == (1, 4096)
        await client.send(*out(command, lost, payload))
        assert (await client.expect(ScsiResponse)).status == 0
        assert bytes(disk.view[:8192]) == payload


# -- faults of this level --------------------------------------------------------------------------


async def test_lost_and_damaged_data_in() -> None:
    async with level_1() as (_, running, client):
        faults = running.targets[0].faults
        faults.add(Fault(act=Act.LOSE_DATA_IN, number=2))
        faults.add(Fault(act=Act.CORRUPT_DATA_IN, number=5))
        await client.send(client.command(cdb.read(0, LENGTH // 512), read=LENGTH))
        seen = [(await client.expect(DataIn)).data_sn for _ in range(9)]
        assert seen == [0, 1, 3, 4, 5, 6, 7, 8, 9]
        await client.send(client.command(cdb.read(0, LENGTH // 512), read=LENGTH))
        client.acknowledging = False
        kinds = [type(await client.receive()) for _ in range(10)]
        assert kinds == [DataIn] * 5 + [Damaged] + [DataIn] * 4


async def test_snacks_refused_and_ignored() -> None:
    async with level_1() as (_, running, client):
        faults = running.targets[0].faults
        tag = (await read_all(client))[0].initiator_task_tag
        faults.add(Fault(act=Act.SNACK_IGNORED))
        faults.add(Fault(act=Act.SNACK_REFUSED, opcode=SnackType.DATA_OR_R2T))
        wanted = snack(SnackType.DATA_OR_R2T, tag, beg=1, run=1)
        await client.send(wanted, wanted, wanted)
        assert (await client.expect(Reject)).reason == RejectReason.SNACK_REJECT
        assert (await client.expect(DataIn)).data_sn == 1


async def test_a_digest_error_is_an_error_for_those_who_do_not_recover() -> None:
    async with level_1() as (_, running, client):
        client.framer.keep_damaged = False
        running.targets[0].faults.add(Fault(act=Act.CORRUPT_DATA_IN))
        await client.send(client.command(cdb.read(0, 2), read=1024))
        with pytest.raises(DigestError):
            await client.receive()
