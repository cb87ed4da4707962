"""Discard and zeroes as commands: which one is sent, and what becomes of the content."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.lun import ZERO_RUN_BYTES_MIN, LunDevice, runs_of_zeroes
from orion_iscsifs.initiator.probe import report_luns
from orion_iscsifs.initiator.session import Session, open_session
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.provisioning import Granules
from orion_iscsifs.scsi.support import SupportedCommand, decode_all_commands, decode_one_command
from orion_iscsifs.target import RamDevice, TargetConfig, serve
from orion_iscsifs.url import parse
from tests.world import IQN
from tests.world import session as session_config

SIZE = 4 << 20


@asynccontextmanager
async def opened(*numbers: int) -> AsyncIterator[tuple[Session, RamDevice]]:
    async with RamDevice(SIZE) as disk:
        config = TargetConfig(iqn=IQN, units=dict.fromkeys(numbers, disk))
        async with serve([config]) as running:
            source = parse(running.url())
            portal = Portal(source.host, source.port)
            nexus = Nexus(target_name=IQN, isid=b"\x80\0\0\0\0\1", config=session_config())
            async with open_session(portal, nexus) as session:
                yield session, disk


def commands(session: Session, device: LunDevice) -> list[int]:
    """The operation codes of what changes the medium, from now on."""
    sent: list[int] = []
    before = session.execute

    async def execute(task: object) -> None:
        sent.append(task.cdb[0])  # type: ignore[attr-defined]
        await before(task)  # type: ignore[arg-type]

    session.execute = execute  # type: ignore[method-assign]
    return sent


async def test_a_thin_disk_gets_unmap_and_write_same_without_data() -> None:
    async with opened(1) as (session, disk):
        device = await LunDevice.open(session, 1, read_only=False)
        assert device.geometry.zeroes_after_discard
        sent = commands(session, device)
        disk.view[:] = b"x" * SIZE
        await device.discard(0, 1 << 20)
        await device.write_zeroes(1 << 20, 1 << 20)
        await device.write(2 << 20, bytes(1 << 20), fua=True)
        assert OpCode.UNMAP in sent
        assert OpCode.WRITE_SAME_16 in sent
        assert OpCode.WRITE_10 not in sent
        assert bytes(disk.view[: 3 << 20]) == bytes(3 << 20)
        assert bytes(disk.view[3 << 20 :]) == b"x" * (1 << 20)


async def test_content_is_as_in_the_model() -> None:
    rng = random.Random(4)
    async with opened(1) as (session, disk):
        device = await LunDevice.open(session, 1, read_only=False)
        model = bytearray(SIZE)
        for number in range(150):
            offset = rng.randrange(SIZE // 512) * 512
            length = min(rng.randrange(1, 600) * 512, SIZE - offset)
            kind = rng.randrange(4)
            if kind == 0:
                await device.discard(offset, length)
                first, last = offset + -offset % 4096, (offset + length) // 4096 * 4096
                if first < last:
                    model[first:last] = bytes(last - first)  # this target always unmaps (LBPRZ)
                continue
            data = bytes(length)
            if kind == 1:
                data = bytes([number % 255 + 1]) * length
            elif kind == 2 and length > 2048:
                data = b"y" * 1024 + bytes(length - 2048) + b"z" * 1024
            if kind == 3:
                await device.write_zeroes(offset, length, may_unmap=bool(number % 2))
            else:
                await device.write(offset, data)
            model[offset : offset + length] = data
        assert bytes(disk.view) == model


async def test_more_than_255_luns_are_found_and_used() -> None:
    async with opened(1, 255, 256, 1000) as (session, disk):
        assert await report_luns(LogicalUnit(session, 1)) == [1, 255, 256, 1000]
        device = await LunDevice.open(session, 1000, read_only=False)
        await device.write(4096, b"w" * 512)
        assert bytes(disk.view[4096:4608]) == b"w" * 512


async def test_a_cancelled_zeroing_is_over_before_the_caller_goes_on() -> None:
    """Without data it still is a write: nothing of it may land after what comes next."""
    async with opened(1) as (session, disk):
        device = await LunDevice.open(session, 1, read_only=False)
        await device.write_zeroes(0, 65536)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.write_zeroes, 0, 65536)
            while not session.tasks:
                await trio.lowlevel.checkpoint()
            (task,) = session.tasks.values()
            assert task.cdb[0] == OpCode.WRITE_SAME_16
            assert task.write_from is not None, "a session waits for writes only"
            assert task.expected_bytes == 0
            nursery.cancel_scope.cancel()
        assert not session.tasks, "it is still under way"
        await device.write(0, b"n" * 65536)
        await device.flush()
        assert bytes(disk.view[:65536]) == b"n" * 65536


def test_runs_of_zeroes() -> None:
    size = ZERO_RUN_BYTES_MIN
    data = bytearray(b"x" * 5 * size)
    data[size : 3 * size] = bytes(2 * size)
    data[4 * size : 5 * size - 1] = bytes(size - 1)
    assert runs_of_zeroes(memoryview(data)) == [(size, 3 * size)]
    assert runs_of_zeroes(memoryview(bytes(size - 1))) == []


@given(
    st.integers(0, 70),
    st.integers(0, 100),
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(1, 90),
)
def test_granules(blocks: int, alignment: int, start: int, length: int, most: int) -> None:
    granules = Granules.of(blocks, alignment)
    pieces = list(granules.cut(start, start + length, most))
    at = start
    for lba, count in pieces:
        assert lba == at
        assert 0 < count <= most
        at += count
        if at < start + length and most >= 2 * granules.blocks:
            assert (at - granules.alignment) % granules.blocks == 0
    assert at == start + length or not pieces
    first, last = granules.inside(start, start + length)
    assert start <= first <= last <= start + length
    if first < last:
        assert (first - granules.alignment) % granules.blocks == 0
        assert (last - granules.alignment) % granules.blocks == 0


def test_supported_operation_codes() -> None:
    usage = bytes([0x93, 0xF9]) + bytes(14)
    known = decode_one_command(bytes([0, 3, 0, 16]) + usage, 0x93)
    assert known.supported
    assert known.looks_at(1, 0x01)
    assert not known.looks_at(1, 0x02)
    assert decode_one_command(bytes([0, 1, 0, 0]), 0x93) == SupportedCommand(supported=False)
    assert (
        decode_all_commands(
            bytes([0, 0, 0, 16])
            + bytes([0x12, 0, 0, 0, 0, 0, 0, 6])
            + bytes([0xA3, 0, 0, 12, 0, 1, 0, 12])
        )
        != []
    )


@given(st.binary(max_size=64))
def test_nonsense_about_a_command_is_not_known(data: bytes) -> None:
    answer = decode_one_command(data, 0x93)
    assert answer.supported in {None, True, False}
    if answer.supported:
        assert answer.usage[0] == 0x93
