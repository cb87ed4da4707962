"""Scripted misbehaviour and unit attentions."""

import pytest

from orion_iscsifs.protocol.pdu import (
    AsyncMessage,
    DataIn,
    NopIn,
    ScsiResponse,
)
from orion_iscsifs.scsi import cdb, sense
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import SenseData
from orion_iscsifs.target import Fault, RamDevice, serve
from orion_iscsifs.target.faults import Act
from tests.target.client import SIZE, TUR, config, logged_in


async def test_scripted_answers() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running:
        faults = running.targets[0].faults
        async with logged_in(running) as client:
            faults.add(Fault(act=Act.ANSWER, opcode=0x28, after=1, status=8))
            assert await client.read(0, 512) == bytes(512)
            _, busy = await client.run(cdb.read(0, 1), read=512)
            assert busy.status == 8
            assert await client.read(0, 512) == bytes(512)
            assert faults.hits == 1
            assert not faults

            reason = SenseData(3, 0x11, 0)
            faults.add(Fault(act=Act.ANSWER, status=2, sense=reason))
            assert await client.sense(cdb.read(0, 1), read=512) == reason

            faults.add(Fault(act=Act.TARGET_FAILURE))
            _, failed = await client.run(TUR)
            assert isinstance(failed, ScsiResponse)
            assert failed.response == 1

            faults.add(Fault(act=Act.PING))
            await client.send(client.command(TUR))
            assert isinstance(await client.receive(), NopIn)
            await client.expect(ScsiResponse)

            faults.add(Fault(act=Act.ASYNC_MESSAGE, async_event=4))
            await client.send(client.command(TUR))
            assert (await client.expect(AsyncMessage)).async_event == 4
            await client.expect(ScsiResponse)

            faults.add(Fault(act=Act.CLOSE_WINDOW, delay_s=0.05))
            before = client.max_cmd_sn
            await client.run(TUR)
            assert client.max_cmd_sn == before
            await client.expect(NopIn)
            assert client.max_cmd_sn == before + 1


@pytest.mark.parametrize("act", [Act.DROP, Act.DROP_AFTER])
async def test_dropped_connections(act: Act) -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running:
        async with logged_in(running) as client:
            running.targets[0].faults.add(Fault(act=act, opcode=OpCode.WRITE_10))
            await client.send(client.command(cdb.write(0, 1), write=512, data=b"d" * 512))
            assert await client.closed()
        written = bytes(disk.view[:512]) == b"d" * 512
        assert written is (act is Act.DROP_AFTER)


async def test_unit_attentions() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running, settle=False) as client,
    ):
        data, _ = await client.run(cdb.inquiry(), read=255)
        assert data[8:13] == b"ORION"
        assert await client.sense(TUR) == sense.POWER_ON
        _, status = await client.run(TUR)
        assert status.status == 0
        disk.resize(2 * SIZE)
        assert await client.sense(TUR) == sense.CAPACITY_CHANGED
        data, _ = await client.run(cdb.read_capacity_16(), read=32)
        assert int.from_bytes(data[:8], "big") == 2 * SIZE // 512 - 1


async def test_residual_of_inquiry() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        data, status = await client.run(cdb.inquiry(allocation_length=36), read=100)
        assert isinstance(status, DataIn)
        assert (len(data), status.underflow, status.residual_count) == (36, True, 64)
