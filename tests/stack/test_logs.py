"""Whose log it is, and whether it may be replayed after something else has happened."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from orion_iscsifs.config import CacheMode, FuseConfig, MountConfig, ReserveConfig
from orion_iscsifs.config.places import state_dir
from orion_iscsifs.custody import custody
from orion_iscsifs.errors import BusyError
from orion_iscsifs.localstore import segment
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.target import RamDevice, Running, TargetConfig, serve
from orion_iscsifs.url import parse
from tests.world import IQN, SIZE, mount

OLD, NEW = b"O" * 8192, b"N" * 8192


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))


def lazy(mode: CacheMode = CacheMode.LOG, *, force: bool = False) -> MountConfig:
    """A mount that writes nothing back by itself for as long as these tests run."""
    config = mount(mode)
    cache = msgspec.structs.replace(config.cache, dirty_age_s=600, log_force=force)
    return msgspec.structs.replace(config, cache=cache)


@asynccontextmanager
async def target(*disks: RamDevice) -> AsyncIterator[Running]:
    units = dict(enumerate(disks, 1))
    async with serve([TargetConfig(iqn=IQN, units=units)]) as running:
        yield running


async def leave_a_log(running: Running) -> None:
    """Write and flush into the log, and die before the target has any of it."""
    with trio.CancelScope() as killed:
        async with open_stack(parse(running.url(1)), lazy(), "/mnt") as stack:
            running.targets[0].faults.clear()
            hold = stack.units[0].log
            assert hold is not None
            hold.destager._ordered = False  # its own time only
            await stack.files["lun1"].write(0, NEW)
            await hold.store.commit()
            killed.cancel()
            await trio.lowlevel.checkpoint()


async def image(stack: Stack) -> bytes:
    content = bytearray(8192)
    await stack.files["lun1"].read_into(0, memoryview(content))
    return bytes(content)


async def test_it_is_there_at_once_and_then_on_the_target() -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        disk.view[:8192] = OLD
        await leave_a_log(running)
        assert bytes(disk.view[:8192]) == OLD
        async with open_stack(parse(running.url(1)), lazy(), "/mnt") as stack:
            assert await image(stack) == NEW
            assert stack.status()["luns"][0]["log"]["state"] in {"ok", "replaying"}
        assert bytes(disk.view[:8192]) == NEW
        async with open_stack(parse(running.url(1)), lazy(), "/mnt") as stack:
            assert stack.status()["luns"][0]["dirty_bytes"] == 0


async def test_a_mount_without_the_log_makes_it_stale() -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        await leave_a_log(running)
        async with open_stack(parse(running.url(1)), lazy(CacheMode.WRITEBACK), "/mnt") as stack:
            await stack.files["lun1"].write(0, OLD)
        with pytest.raises(LogError, match="mounted on this host since, without this log"):
            async with open_stack(parse(running.url(1)), lazy(), "/mnt"):
                pass
        assert bytes(disk.view[:8192]) == OLD
        async with open_stack(parse(running.url(1)), lazy(force=True), "/mnt"):
            pass
        assert bytes(disk.view[:8192]) == NEW


async def test_another_host_that_has_come_and_gone_makes_it_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        await leave_a_log(running)
        monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "other"))
        other = msgspec.structs.replace(
            lazy(CacheMode.WRITEBACK), reserve=ReserveConfig(preempt=True)
        )
        async with open_stack(parse(running.url(1)), other, "/mnt") as stack:
            await stack.files["lun1"].write(0, OLD)
        monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))
        with pytest.raises(LogError, match="another initiator may have written"):
            async with open_stack(parse(running.url(1)), lazy(), "/mnt"):
                pass
        assert bytes(disk.view[:8192]) == OLD


async def test_a_target_that_was_restarted_is_no_sign(caplog: pytest.LogCaptureFixture) -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        await leave_a_log(running)
        await running.restart()
        async with open_stack(parse(running.url(1)), lazy(), "/mnt"):
            pass
        assert bytes(disk.view[:8192]) == NEW


async def test_another_luns_log_is_refused() -> None:
    async with RamDevice(SIZE) as disk, RamDevice(SIZE) as other, target(disk, other) as running:
        await leave_a_log(running)
        logs = state_dir() / "logs-of-luns"
        (mine,) = logs.iterdir()
        async with open_stack(parse(running.url(2)), lazy(), "/mnt"):
            pass
        (foreign,) = set(logs.iterdir()) - {mine}
        shutil.rmtree(foreign)
        shutil.copytree(mine, foreign)
        with pytest.raises(LogError, match="belongs to another LUN"):
            async with open_stack(parse(running.url(2)), lazy(), "/mnt"):
                pass
        assert not any(other.view[:8192])


async def test_a_damaged_log_is_refused_and_replayed_up_to_the_damage_by_force() -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        with trio.CancelScope() as killed:
            async with open_stack(parse(running.url(1)), lazy(), "/mnt") as stack:
                log = stack.units[0].log
                assert log is not None
                for number in range(3):
                    await stack.files["lun1"].write(number << 20, bytes([number + 1]) * 4096)
                    await log.store.commit()
                killed.cancel()
                await trio.lowlevel.checkpoint()
        (folder,) = (state_dir() / "logs-of-luns").iterdir()
        path = folder / segment.file_name(0)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"\x02" * 4096, b"\x02" * 4095 + b"\x00"))
        with pytest.raises(LogError, match="from number 1 on are damaged"):
            async with open_stack(parse(running.url(1)), lazy(), "/mnt"):
                pass
        assert not any(disk.view[:4096]), "nothing was replayed"
        async with open_stack(parse(running.url(1)), lazy(force=True), "/mnt"):
            pass
        assert bytes(disk.view[:4096]) == b"\x01" * 4096
        assert not any(disk.view[1 << 20 : (2 << 20) + 4096])


async def test_a_log_in_use_is_busy() -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        config = msgspec.structs.replace(
            lazy(), reserve=ReserveConfig(mode=lazy().reserve.mode.OFF)
        )
        async with open_stack(parse(running.url(1)), config, "/mnt"):
            with pytest.raises(BusyError, match="in use"):
                async with open_stack(parse(running.url(1)), config, "/mnt2"):
                    pass


async def test_a_mount_that_only_reads_refuses_to_hide_what_is_in_the_log() -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        read_only = msgspec.structs.replace(lazy(), fuse=FuseConfig(read_only=True))
        await leave_a_log(running)
        with pytest.raises(LogError, match="does not have yet"):
            async with open_stack(parse(running.url(1)), read_only, "/mnt"):
                pass
        async with open_stack(parse(running.url(1)), lazy(), "/mnt"):
            pass
        async with open_stack(parse(running.url(1)), read_only, "/mnt") as stack:
            assert await image(stack) == NEW
            assert stack.status()["luns"][0]["log"] is None


async def test_a_mount_whose_log_has_failed_is_not_taken_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new worker would find a log that is out of date, and might replay it."""
    told: list[str] = []
    monkeypatch.setattr(custody, "forbid", told.append)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    async with RamDevice(SIZE) as disk, target(disk) as running:
        async with open_stack(parse(running.url(1)), lazy(), "/mnt") as stack:
            await stack.files["lun1"].write(0, OLD)
            assert not told
            with monkeypatch.context() as broken:
                broken.setattr(os, "pwritev", fail)
                await stack.files["lun1"].write(0, NEW)
            assert told == ["its write log has failed"]
        assert bytes(disk.view[:8192]) == NEW
