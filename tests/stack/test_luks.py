"""Encrypted LUNs in a whole data path, over the embedded target in the same process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.config import CacheMode, FuseConfig, LuksConfig, MountConfig
from orion_iscsifs.config.settings import SecretBytes
from orion_iscsifs.crypt.errors import LuksError, NoLuksHeader, WrongPassphrase
from orion_iscsifs.crypt.keys import Costs
from orion_iscsifs.crypt.manage import Format, format_volume
from orion_iscsifs.crypt.opening import Unlocked, open_luks, unlock_luks
from orion_iscsifs.errors import LunNotFound
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.stack import open_stack
from orion_iscsifs.target import RamDevice, Running, TargetConfig, serve
from orion_iscsifs.testing.conformance import read
from orion_iscsifs.url import parse
from tests.world import IQN, mount

MIB = 1 << 20
SIZE = 8 * MIB
PAYLOAD = 2 * MIB
PASSPHRASE = b"of this volume"
PLAIN = b"plaintext that nobody may see..." * 128


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))


def encrypted(
    mode: CacheMode = CacheMode.WRITEBACK,
    passphrase: bytes = PASSPHRASE,
    *,
    read_only: bool = False,
) -> MountConfig:
    config = mount(mode)
    return msgspec.structs.replace(
        config,
        luks=LuksConfig(key_file="/key", passphrase=SecretBytes(passphrase)),
        fuse=FuseConfig(read_only=read_only),
        # Nothing is written back by itself for as long as a test runs.
        cache=msgspec.structs.replace(config.cache, dirty_age_s=600),
    )


@asynccontextmanager
async def target(*, luns: int = 1) -> AsyncIterator[tuple[Running, list[RamDevice]]]:
    """LUN 1 is a LUKS1 volume, the others are empty."""
    disks = [RamDevice(SIZE) for _ in range(luns)]
    how = Format(version=1, costs=Costs(pbkdf="pbkdf2", iterations=1000))
    await format_volume(AlignedDevice(disks[0]), PASSPHRASE, how)
    units = dict(enumerate(disks, 1))
    async with serve([TargetConfig(iqn=IQN, units=units)]) as running:
        yield running, disks


@pytest.mark.parametrize("mode", [CacheMode.NONE, CacheMode.WRITEBACK, CacheMode.LOG])
async def test_the_target_gets_ciphertext(mode: CacheMode) -> None:
    async with target() as (running, disks):
        async with open_stack(parse(running.url(1)), encrypted(mode), "/mnt") as stack:
            device = stack.files["lun1"]
            assert device.geometry.size_bytes == SIZE - PAYLOAD
            await device.write(777, PLAIN)
            await device.flush()
            assert await read(device, 777, len(PLAIN)) == PLAIN
            assert stack.status()["luns"][0]["luks"]
            await stack.drain()
        stored = bytes(disks[0].view)
        assert PLAIN[:16] not in stored
        assert any(stored[PAYLOAD : PAYLOAD + 4096])
        async with open_stack(
            parse(running.url(1)), encrypted(mode, read_only=True), "/mnt"
        ) as stack:
            assert await read(stack.files["lun1"], 777, len(PLAIN)) == PLAIN


async def test_refusals_leave_nothing_open() -> None:
    async with target(luns=2) as (running, disks):
        for lun, passphrase, kind in (
            (1, b"wrong", WrongPassphrase),
            (1, PASSPHRASE + b"\n", WrongPassphrase),
            (2, PASSPHRASE, NoLuksHeader),
        ):
            with pytest.raises(LuksError, match=f"lun{lun}: LUKS") as caught:
                async with open_stack(
                    parse(running.url(lun)), encrypted(passphrase=passphrase), "/mnt"
                ):
                    pass
            assert isinstance(caught.value, kind)
        assert not any(disks[1].view)
        # Nothing of them is left that would be in the way: neither a claim nor a reservation.
        async with open_stack(parse(running.url(1)), encrypted(), "/mnt"):
            pass


async def test_of_a_whole_target_what_is_no_volume_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with target(luns=3) as (running, disks):
        source = parse(running.url(1).rsplit("/", 1)[0])
        async with open_stack(source, encrypted(), "/mnt") as stack:
            assert list(stack.files) == ["lun1"]
        assert "LUN 2 has no file: lun2: LUKS: there is no header" in caplog.text
        assert not any(disks[1].view)
        assert not any(disks[2].view)
        with pytest.raises(LunNotFound):
            async with open_stack(source, encrypted(passphrase=b"wrong"), "/mnt"):
                pass


async def test_growth_gets_through() -> None:
    async with target() as (running, disks):
        async with open_stack(parse(running.url(1)), encrypted(), "/mnt") as stack:
            device = stack.files["lun1"]
            disks[0].resize(2 * SIZE)
            with trio.fail_after(30):
                while device.geometry.size_bytes != 2 * SIZE - PAYLOAD:
                    await trio.sleep(0.05)
                    await stack.units[0].refresh()
            await device.write(2 * SIZE - PAYLOAD - 4096, PLAIN)
            await device.flush()
        assert PLAIN[:16] not in bytes(disks[0].view)


async def leave_a_log(running: Running, config: MountConfig) -> None:
    """Write into the log, and die before the target has any of it."""
    with trio.CancelScope() as killed:
        async with open_stack(parse(running.url(1)), config, "/mnt") as stack:
            log = stack.units[0].log
            assert log is not None
            log.destager._ordered = False  # its own time only
            await stack.files["lun1"].write(4 * MIB, PLAIN)
            await log.store.commit()
            killed.cancel()
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("first", ["raw", "encrypted"])
async def test_a_log_of_the_raw_lun_is_not_replayed_into_the_volume(first: str) -> None:
    """Nor the other way round: the offsets are others, and one of the two is plaintext."""
    raw = msgspec.structs.replace(encrypted(CacheMode.LOG), luks=None)
    one, other = (raw, encrypted(CacheMode.LOG))[:: 1 if first == "raw" else -1]
    async with target() as (running, disks):
        before = bytes(disks[0].view)
        await leave_a_log(running, one)
        with pytest.raises(LogError, match="belongs to another LUN"):
            async with open_stack(parse(running.url(1)), other, "/mnt"):
                pass
        assert bytes(disks[0].view) == before
        # Nothing is lost; that the other mount has come and gone has to be confirmed, as ever.
        cache = msgspec.structs.replace(one.cache, log_force=True)
        forced = msgspec.structs.replace(one, cache=cache)
        async with open_stack(parse(running.url(1)), forced, "/mnt") as stack:
            assert await read(stack.files["lun1"], 4 * MIB, len(PLAIN)) == PLAIN


async def test_a_wrong_passphrase_does_not_cost_the_log() -> None:
    """It is noticed before the mount registers anything, so nothing speaks against the replay."""
    async with target() as (running, _):
        await leave_a_log(running, encrypted(CacheMode.LOG))
        with pytest.raises(WrongPassphrase):
            async with open_stack(
                parse(running.url(1)), encrypted(CacheMode.LOG, b"wrong"), "/mnt"
            ):
                pass
        async with open_stack(parse(running.url(1)), encrypted(CacheMode.LOG), "/mnt") as stack:
            assert await read(stack.files["lun1"], 4 * MIB, len(PLAIN)) == PLAIN


async def test_a_volume_that_was_made_anew_meanwhile_is_unlocked_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the look at the header and the reservation, somebody else may write."""
    async with target() as (running, disks):
        how = Format(version=1, costs=Costs(pbkdf="pbkdf2", iterations=1000), force=True)

        async def unlock_early(*arguments: object) -> Unlocked:
            found = await unlock_luks(AlignedDevice(disks[0]), PASSPHRASE, "lun1")
            await format_volume(AlignedDevice(disks[0]), PASSPHRASE, how)
            return found

        monkeypatch.setattr("orion_iscsifs.stack.unit.unlock_luks", unlock_early)
        async with open_stack(parse(running.url(1)), encrypted(), "/mnt") as stack:
            await stack.files["lun1"].write(0, PLAIN)
            await stack.drain()
        again = await open_luks(disks[0], PASSPHRASE, "lun1")
        assert await read(again, 0, len(PLAIN)) == PLAIN
