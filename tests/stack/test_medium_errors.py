"""A bad block costs what lies on it, and nothing beside it."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from orion_iscsifs.config import CacheConfig, CacheMode, MountConfig, SessionConfig
from orion_iscsifs.config.places import state_dir
from orion_iscsifs.errors import MediumError
from orion_iscsifs.stack import open_stack
from orion_iscsifs.target import RamDevice, TargetConfig, serve
from orion_iscsifs.target.troubled import FlawedDevice
from orion_iscsifs.url import parse

IQN = "iqn.2026-11.org.example:flawed"
SIZE = 4 << 20
PAGE = 4096
BAD = 100 * PAGE
"""A page in the middle of a frame of 64 KiB."""


def config(mode: CacheMode) -> MountConfig:
    return MountConfig(
        session=SessionConfig(initiator_name="iqn.2026-11.org.example:me"),
        cache=CacheConfig(
            mode=mode,
            dirty_age_s=600,
            log_dir=str(state_dir() / "logs-of-luns"),
            log_bytes=16 << 20,
        ),
    )


@asynccontextmanager
async def flawed_target(disk: RamDevice) -> AsyncIterator[tuple[FlawedDevice, str]]:
    """A target whose disk has flaws; with it the URL of its LUN 1."""
    flawed = FlawedDevice(disk)
    async with serve([TargetConfig(iqn=IQN, units={1: flawed})]) as running:
        yield flawed, running.url(1)


@pytest.mark.parametrize("mode", list(CacheMode))
async def test_reads_beside_a_bad_block_succeed_and_its_error_names_it(mode: CacheMode) -> None:
    async with RamDevice(SIZE) as disk, flawed_target(disk) as (flawed, url):
        disk.view[:] = b"x" * SIZE
        flawed.spoil(BAD // 512)
        async with open_stack(parse(url), config(mode)) as stack:
            lun = stack.files["lun1"]
            target = bytearray(PAGE)
            for offset in (BAD - PAGE, BAD + PAGE, 0, BAD - 2 * PAGE):
                await lun.read_into(offset, memoryview(target))
                assert target == b"x" * PAGE
            with pytest.raises(MediumError, match=f"at LBA {BAD // 512}") as raised:
                await lun.read_into(BAD, memoryview(target))
            assert raised.value.lba == BAD // 512
            assert "unrecovered read error" in str(raised.value)
            # A stream over it: what lies before and behind comes.
            got = 0
            for offset in range(0, SIZE, PAGE):
                try:
                    await lun.read_into(offset, memoryview(target))
                except MediumError:
                    assert offset == BAD
                else:
                    got += 1
            assert got == SIZE // PAGE - 1


async def test_a_write_back_gets_the_good_parts_through() -> None:
    async with RamDevice(SIZE) as disk, flawed_target(disk) as (flawed, url):
        async with open_stack(parse(url), config(CacheMode.WRITEBACK)) as stack:
            lun = stack.files["lun1"]
            flawed.spoil(BAD // 512, writes=True, reads=False)
            for offset in range(0, 1 << 20, PAGE):
                await lun.write(offset, b"y" * PAGE)
            with pytest.raises(MediumError, match=f"at LBA {BAD // 512}"):
                await lun.flush()
            with trio.move_on_after(5):
                while stack.status()["luns"][0]["dirty_bytes"] > PAGE:
                    await trio.sleep(0.02)
            good = [offset for offset in range(0, 1 << 20, PAGE) if offset != BAD]
            assert all(bytes(disk.view[at : at + PAGE]) == b"y" * PAGE for at in good)
            assert stack.status()["luns"][0]["dirty_bytes"] == PAGE, "kept, and tried again"
            target = bytearray(PAGE)
            await lun.read_into(BAD, memoryview(target))
            assert target == b"y" * PAGE
            flawed.mend()
            with contextlib.suppress(MediumError):
                await lun.flush()  # tells of a try in between
            await lun.flush()
        assert bytes(disk.view[BAD : BAD + PAGE]) == b"y" * PAGE
