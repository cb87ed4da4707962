"""Whose tier it is, and whether it is trusted after something else has happened.

A test changes the target's disk behind everybody's back: what a read returns then tells whether it
came from the tier.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from orion_iscsifs.config import (
    CacheMode,
    FuseConfig,
    MountConfig,
    ReserveConfig,
    ReserveMode,
    SecretBytes,
    TierConfig,
    TierReuse,
)
from orion_iscsifs.config.places import state_dir
from orion_iscsifs.errors import BusyError
from orion_iscsifs.localstore.rekey import change_keys
from orion_iscsifs.localstore.seal import WrongKey
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.stack.unit import Unit
from orion_iscsifs.target import RamDevice, Running
from orion_iscsifs.tier.superblock import SEALABLE
from orion_iscsifs.url import parse
from tests.stack.test_logs import target
from tests.world import SIZE, mount

SPAN = 256 << 10
OLD, NEW = b"O" * SPAN, b"N" * SPAN


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TIERS", str(tmp_path / "tiers"))


def tiered(
    reuse: TierReuse = TierReuse.RESERVATION,
    *,
    mode: CacheMode = CacheMode.WRITEBACK,
    read_only: bool = False,
    reserve: ReserveConfig | None = None,
    key: bytes | None = None,
) -> MountConfig:
    config = mount(mode)
    sealed = {} if key is None else {"key": SecretBytes(key), "key_file": "/the/key"}
    return msgspec.structs.replace(
        config,
        cache=msgspec.structs.replace(config.cache, **sealed),
        tier=TierConfig(folder=os.environ["TIERS"], size_bytes=64 << 20, reuse=reuse),
        fuse=FuseConfig(read_only=read_only),
        reserve=reserve or ReserveConfig(),
    )


@asynccontextmanager
async def disk_of(content: bytes) -> AsyncIterator[tuple[RamDevice, Running]]:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        disk.view[:SPAN] = content
        yield disk, running


async def image(stack: Stack) -> bytes:
    content = bytearray(SPAN)
    await stack.files["lun1"].read_into(0, memoryview(content))
    return bytes(content)


async def seen(running: Running, config: MountConfig) -> bytes:
    """What one mount reads."""
    async with open_stack(parse(running.url(1)), config, "/mnt") as stack:
        return await image(stack)


async def kept(unit: Unit) -> None:
    """Wait until what was read is in the tier."""
    assert unit.tier is not None
    statistics = unit.tier.statistics
    with trio.fail_after(30):
        while not statistics.appended_records or statistics.staged_bytes:
            await trio.sleep(0.02)


@pytest.mark.parametrize("mode", list(CacheMode))
async def test_what_was_read_once_is_local_after_a_remount(mode: CacheMode) -> None:
    config = tiered(mode=mode)
    async with disk_of(OLD) as (disk, running):
        assert await seen(running, config) == OLD
        disk.view[:SPAN] = NEW
        async with open_stack(parse(running.url(1)), config, "/mnt") as stack:
            assert await image(stack) == OLD
            (lun,) = stack.status()["luns"]
            assert lun["tier"]["hits"] > 0
            assert lun["tier"]["misses"] == 0
            assert 0 < lun["tier"]["used_bytes"] <= lun["tier"]["size_bytes"] <= 64 << 20
            assert lun["tier"]["state"] == "ok"


async def test_what_is_written_is_never_read_as_it_was() -> None:
    async with disk_of(OLD) as (disk, running):
        async with open_stack(parse(running.url(1)), tiered(), "/mnt") as stack:
            assert await image(stack) == OLD
            await kept(stack.units[0])
            await stack.files["lun1"].write(4096, NEW[:8192])
            await stack.files["lun1"].flush()
        expected = OLD[:4096] + NEW[:8192] + OLD[12288:]
        assert bytes(disk.view[:SPAN]) == expected
        assert await seen(running, tiered()) == expected


async def test_a_crash_costs_nothing() -> None:
    async with disk_of(OLD) as (disk, running):
        with trio.CancelScope() as killed:
            async with open_stack(parse(running.url(1)), tiered(), "/mnt") as stack:
                assert await image(stack) == OLD
                await kept(stack.units[0])
                await stack.files["lun1"].write(0, NEW[:4096])
                await stack.files["lun1"].flush()
                killed.cancel()
                await trio.lowlevel.checkpoint()
        assert bytes(disk.view[:4096]) == NEW[:4096]
        disk.view[65536:SPAN] = NEW[65536:]
        assert await seen(running, tiered()) == NEW[:4096] + OLD[4096:]


async def test_another_host_that_took_the_lun_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with disk_of(OLD) as (_, running):
        assert await seen(running, tiered()) == OLD
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "other state"))
            elsewhere.setenv("TIERS", str(tmp_path / "other tiers"))
            with pytest.raises(BusyError, match="reserved by another initiator"):
                await seen(running, tiered())
            config = tiered(reserve=ReserveConfig(preempt=True))
            async with open_stack(parse(running.url(1)), config, "/mnt") as stack:
                await stack.files["lun1"].write(0, NEW)
                stack.give_back()
        assert await seen(running, tiered()) == NEW
        assert "what is in it is not used" in caplog.text


@pytest.mark.parametrize("reuse", [TierReuse.RESERVATION, TierReuse.ALWAYS])
async def test_a_mount_of_this_host_without_the_tier(
    reuse: TierReuse, caplog: pytest.LogCaptureFixture
) -> None:
    async with disk_of(OLD) as (_, running):
        assert await seen(running, tiered(reuse)) == OLD
        async with open_stack(parse(running.url(1)), mount(), "/mnt") as stack:
            await stack.files["lun1"].write(0, NEW)
        assert await seen(running, tiered(reuse)) == NEW
        assert "mounted on this host since, without this tier" in caplog.text


@pytest.mark.parametrize(
    ("reuse", "expected"),
    [(TierReuse.RESERVATION, NEW), (TierReuse.ALWAYS, OLD), (TierReuse.NEVER, NEW)],
)
async def test_without_a_reservation_the_user_decides(reuse: TierReuse, expected: bytes) -> None:
    config = tiered(reuse, reserve=ReserveConfig(mode=ReserveMode.OFF))
    async with disk_of(OLD) as (disk, running):
        assert await seen(running, config) == OLD
        disk.view[:SPAN] = NEW
        assert await seen(running, config) == expected


async def test_a_reservation_that_was_given_back_proves_nothing() -> None:
    async with disk_of(OLD) as (disk, running):
        async with open_stack(parse(running.url(1)), tiered(), "/mnt") as stack:
            assert await image(stack) == OLD
            stack.give_back()
        disk.view[:SPAN] = NEW
        assert await seen(running, tiered()) == NEW


async def test_a_target_that_was_restarted_proves_nothing() -> None:
    async with disk_of(OLD) as (disk, running):
        assert await seen(running, tiered()) == OLD
        await running.restart()
        disk.view[:SPAN] = NEW
        assert await seen(running, tiered()) == NEW


async def test_a_mount_that_only_reads_trusts_it_and_leaves_the_proof() -> None:
    async with disk_of(OLD) as (disk, running):
        assert await seen(running, tiered()) == OLD
        disk.view[:SPAN] = NEW
        assert await seen(running, tiered(read_only=True)) == OLD
        assert await seen(running, tiered()) == OLD


async def test_a_tier_that_cant_be_made_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    await trio.Path(os.environ["TIERS"]).write_text("a file where the folder should be")
    async with (
        disk_of(OLD) as (_, running),
        open_stack(parse(running.url(1)), tiered(), "/mnt") as stack,
    ):
        assert await image(stack) == OLD
        assert stack.status()["luns"][0]["tier"] is None
    assert "going on without it" in caplog.text


async def test_a_tier_that_fails_is_not_trusted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    async with disk_of(OLD) as (disk, running):
        async with open_stack(parse(running.url(1)), tiered(), "/mnt") as stack:
            assert await image(stack) == OLD
            await kept(stack.units[0])
            assert list((state_dir() / "tiers").iterdir())
            with monkeypatch.context() as full:
                full.setattr(os, "pwrite", fail)
                full.setattr(os, "pwritev", fail)
                await stack.files["lun1"].write(0, NEW)
                await stack.files["lun1"].flush()
            assert stack.status()["luns"][0]["tier"]["state"] == "failed"
            assert not list((state_dir() / "tiers").iterdir())
            assert await image(stack) == NEW
        assert bytes(disk.view[:SPAN]) == NEW
        disk.view[:SPAN] = OLD
        assert await seen(running, tiered()) == OLD


async def test_a_tier_in_use_is_left_to_its_user(caplog: pytest.LogCaptureFixture) -> None:
    config = tiered(read_only=True)
    async with (
        disk_of(OLD) as (_, running),
        open_stack(parse(running.url(1)), config, "/mnt"),
        open_stack(parse(running.url(1)), config, "/mnt2") as second,
    ):
        assert await image(second) == OLD
        assert second.status()["luns"][0]["tier"] is None
    assert "in use" in caplog.text


# -- sealed ---------------------------------------------------------------------------------------

KEY = b"the key of these tests"
MARKER = b"nobody may read this on the local disk. "
SECRET = (MARKER * (SPAN // len(MARKER) + 1))[:SPAN]


def found_on_disk() -> bool:
    folder = Path(os.environ["TIERS"])
    return any(MARKER in path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_the_marker_is_found_where_nothing_is_sealed() -> None:
    """The control for the next test: with no compression the content is there as it is."""
    config = tiered()
    assert config.tier is not None
    plain = msgspec.structs.replace(config, tier=msgspec.structs.replace(config.tier, level=0))
    async with disk_of(SECRET) as (_, running):
        assert await seen(running, plain) == SECRET
    assert found_on_disk()


@pytest.mark.parametrize("level", [0, 1])
async def test_a_sealed_tier_shows_nothing_and_works(level: int) -> None:
    config = tiered(key=KEY)
    assert config.tier is not None
    sealed = msgspec.structs.replace(config, tier=msgspec.structs.replace(config.tier, level=level))
    async with disk_of(SECRET) as (disk, running):
        assert await seen(running, sealed) == SECRET
        assert not found_on_disk()
        disk.view[:SPAN] = NEW
        assert await seen(running, sealed) == SECRET


async def test_a_key_that_is_wrong_or_missing_is_refused_and_costs_nothing() -> None:
    async with disk_of(OLD) as (disk, running):
        assert await seen(running, tiered(key=KEY)) == OLD
        with pytest.raises(WrongKey, match="the key does not open it"):
            await seen(running, tiered(key=b"another"))
        with pytest.raises(WrongKey, match="is sealed, and there is no key"):
            await seen(running, tiered())
        disk.view[:SPAN] = NEW
        assert await seen(running, tiered(key=KEY)) == OLD


async def test_a_tier_that_was_not_sealed_is_removed_first() -> None:
    config = tiered()
    assert config.tier is not None
    plain = msgspec.structs.replace(config, tier=msgspec.structs.replace(config.tier, level=0))
    async with disk_of(SECRET) as (_, running):
        assert await seen(running, plain) == SECRET
        assert found_on_disk()
        assert await seen(running, tiered(key=KEY)) == SECRET
        assert not found_on_disk()


def rekeyed() -> int:
    folders = list(Path(os.environ["TIERS"]).iterdir())
    return len(change_keys(folders, KEY, b"another", kinds=SEALABLE))


async def test_another_key_without_rewriting_the_tier() -> None:
    async with disk_of(OLD) as (disk, running):
        assert await seen(running, tiered(key=KEY)) == OLD
        assert await trio.to_thread.run_sync(rekeyed) == 1
        with pytest.raises(WrongKey):
            await seen(running, tiered(key=KEY))
        disk.view[:SPAN] = NEW
        assert await seen(running, tiered(key=b"another")) == OLD


async def test_a_log_and_a_tier_in_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes the other's files for its own."""
    config = tiered(mode=CacheMode.LOG, key=KEY)
    assert config.cache.log_dir is not None
    monkeypatch.setenv("TIERS", config.cache.log_dir)
    config = tiered(mode=CacheMode.LOG, key=KEY)
    async with disk_of(OLD) as (disk, running):
        with trio.CancelScope() as killed:
            async with open_stack(parse(running.url(1)), config, "/mnt") as stack:
                assert await image(stack) == OLD
                await kept(stack.units[0])
                write_log = stack.units[0].log
                assert write_log is not None
                write_log.destager._age_s = 600
                await stack.files["lun1"].write(0, NEW[:4096])
                await write_log.store.commit()
                killed.cancel()
                await trio.lowlevel.checkpoint()
        assert await seen(running, config) == NEW[:4096] + OLD[4096:]
        assert bytes(disk.view[:SPAN]) == NEW[:4096] + OLD[4096:]
        disk.view[:SPAN] = NEW
        assert await seen(running, config) == NEW[:4096] + OLD[4096:]
