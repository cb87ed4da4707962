"""Commands that a mount uses seldom, as real tgt understands our bytes of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.session import open_session
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.provisioning import encode_unmap
from tests.interop.conftest import TgtDisk

pytestmark = pytest.mark.interop("tgtd", "tgtadm")

BLOCK = 512


@asynccontextmanager
async def unit_of(disk: TgtDisk) -> AsyncIterator[LogicalUnit]:
    config = SessionConfig(initiator_name="iqn.2026-11.org.example:blocks")
    nexus = Nexus(target_name=disk.iqn, isid=b"\x80\0\0\0\0\7", config=config)
    async with open_session(Portal("127.0.0.1", disk.port), nexus) as session:
        unit = LogicalUnit(session, disk.lun)
        await unit.command("TEST UNIT READY", cdb.test_unit_ready())
        yield unit


def block(disk: TgtDisk, lba: int) -> bytes:
    with disk.backing.open("rb") as file:
        file.seek(lba * BLOCK)
        return file.read(BLOCK)


async def write(unit: LogicalUnit, what: str, command: bytes, data: bytes) -> None:
    await unit.write(what, command, memoryview(data))


@pytest.mark.parametrize("sixteen", [False, True])
async def test_write_same(tgt_disk: TgtDisk, sixteen: bool) -> None:
    async with unit_of(tgt_disk) as unit:
        command = cdb.write_same_16(8, 64) if sixteen else cdb.write_same(8, 64)
        await write(unit, "WRITE SAME", command, b"s" * BLOCK)
    assert {block(tgt_disk, lba) for lba in range(8, 72)} == {b"s" * BLOCK}
    assert {block(tgt_disk, 7), block(tgt_disk, 72)} == {bytes(BLOCK)}


async def test_unmap_and_write_same_with_unmap(tgt_disk: TgtDisk) -> None:
    tgt_disk.target.set_thin(tgt_disk.lun)
    async with unit_of(tgt_disk) as unit:
        for lba in (0, 2048):
            await write(unit, "WRITE SAME", cdb.write_same_16(lba, 1024), b"s" * BLOCK)
        full = tgt_disk.backing.stat().st_blocks
        parameters = encode_unmap([(0, 512), (512, 512)])
        # With two descriptors; tgt counts none of the parameter list's bytes as transferred.
        await unit.send("UNMAP", cdb.unmap(len(parameters)), parameters)
        zeroes = cdb.write_same_16(2048, 1024, unmap=True)
        await write(unit, "WRITE SAME", zeroes, bytes(BLOCK))
        assert tgt_disk.backing.stat().st_blocks < full
    assert {block(tgt_disk, lba) for lba in (0, 1023, 2048, 3071)} == {bytes(BLOCK)}
