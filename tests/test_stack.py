"""The whole data path in one process: cache over initiator over loopback TCP to the real target."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import (
    AuthConfig,
    CacheMode,
    ChapAlgorithm,
    ChapCredentials,
    DigestPreference,
    FuseConfig,
    MountConfig,
    Secret,
)
from orion_iscsifs.errors import (
    AuthenticationFailed,
    LunNotFound,
    ReplacementTimedOut,
    TargetNotFound,
)
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.sense import SenseData, SenseKey, Status
from orion_iscsifs.stack import open_stack
from orion_iscsifs.target import Chap, Fault, RamDevice, TargetConfig, serve
from orion_iscsifs.target.faults import Act
from orion_iscsifs.target.settings import Limits
from orion_iscsifs.testing.conformance import BYTE_GRANULAR_CHECKS, Check, check_read_only_device
from orion_iscsifs.url import parse
from tests.world import IQN, SIZE, compare_with_model, mount, session, target, world


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))


@pytest.mark.parametrize("block_bytes", [512, 4096])
@pytest.mark.parametrize("mode", list(CacheMode))
@pytest.mark.parametrize("check", BYTE_GRANULAR_CHECKS, ids=lambda check: check.__name__)
async def test_the_full_stack_keeps_the_contract(
    check: Check, mode: CacheMode, block_bytes: int
) -> None:
    async with world(mount(mode), block_bytes=block_bytes) as (_, _disk, stack):
        await check(stack.files["lun1"], random.Random(1))


async def test_a_read_only_mount() -> None:
    async with target() as (running, _):

        @asynccontextmanager
        async def factory() -> AsyncIterator[BlockDevice]:
            config = MountConfig(session=session(), fuse=FuseConfig(read_only=True))
            async with open_stack(parse(running.url(1)), config) as stack:
                yield stack.files["lun1"]

        await check_read_only_device(factory)


async def test_the_status_counts_what_was_fetched_ahead() -> None:
    async with world(mount()) as (_, _disk, stack):
        buffer = memoryview(bytearray(4096))
        for offset in range(0, 16 * 4096, 4096):
            await stack.files["lun1"].read_into(offset, buffer)
        (shown,) = stack.status()["luns"]
        assert shown["readahead_bytes"] >= shown["readahead_hit_bytes"] > 0
        assert shown["readahead_waste_bytes"] == 0
        assert shown["readahead_window_bytes"] > 0
        assert shown["round_trip_us"] > 0
        assert "bandwidth_bytes_per_s" in shown, "null until enough has come"


async def test_what_was_written_is_on_the_target_when_the_stack_has_closed() -> None:
    content = random.Random(2).randbytes(3 << 20)
    async with target() as (running, disk):
        async with open_stack(parse(running.url(1)), mount()) as stack:
            await stack.files["lun1"].write(512, content)
        assert bytes(disk.view[512 : 512 + len(content)]) == content
        assert running.sessions == [], "logged out"


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("algorithm", list(ChapAlgorithm))
async def test_chap(algorithm: ChapAlgorithm, mutual: bool) -> None:
    theirs = ("target", Secret("a-secret-of-the-target")) if mutual else (None, None)
    chap = Chap(
        user="host",
        secret=Secret("a-secret-of-the-host"),
        mutual_user=theirs[0],
        mutual_secret=theirs[1],
    )
    auth = AuthConfig(
        initiator=ChapCredentials(user="host", secret=Secret("a-secret-of-the-host")),
        target=ChapCredentials(user="target", secret=Secret("a-secret-of-the-target"))
        if mutual
        else None,
        algorithms=(algorithm,),
    )
    async with world(mount(auth=auth), chap=chap) as (running, _, stack):
        await stack.files["lun1"].write(0, b"x" * 100)
        assert len(running.sessions) == 1


@pytest.mark.parametrize(
    ("user", "secret"), [("host", "not-this-secret-at-all"), ("nobody", "a-secret-of-the-host")]
)
async def test_wrong_credentials_are_refused(user: str, secret: str) -> None:
    chap = Chap(user="host", secret=Secret("a-secret-of-the-host"))
    auth = AuthConfig(initiator=ChapCredentials(user=user, secret=Secret(secret)))
    with pytest.raises(AuthenticationFailed) as caught:
        async with world(mount(auth=auth), chap=chap):
            pass
    assert secret not in caught.value.line


async def test_a_short_secret_is_warned_about_once_and_never_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RFC 7143 §9.2.1: 96 bits."""
    chap = Chap(user="host", secret=Secret("eleven byte"))
    auth = AuthConfig(initiator=ChapCredentials(user="host", secret=Secret("eleven byte")))
    async with world(mount(auth=auth), chap=chap) as (running, _, stack):
        running.drop_connections()
        await stack.files["lun1"].write(0, b"x" * 512)
        await stack.files["lun1"].flush()
    warnings = [record.getMessage() for record in caplog.records if "96 bits" in record.msg]
    assert len(warnings) == 1
    assert "chap_user=host" in warnings[0]
    assert "eleven byte" not in caplog.text


async def test_a_target_that_can_not_prove_itself_is_refused() -> None:
    chap = Chap(
        user="host",
        secret=Secret("a-secret-of-the-host"),
        mutual_user="target",
        mutual_secret=Secret("some-other-secret"),
    )
    auth = AuthConfig(
        initiator=ChapCredentials(user="host", secret=Secret("a-secret-of-the-host")),
        target=ChapCredentials(user="target", secret=Secret("a-secret-of-the-target")),
    )
    with pytest.raises(AuthenticationFailed):
        async with world(mount(auth=auth), chap=chap):
            pass


async def test_an_unknown_target_and_an_absent_lun() -> None:
    async with target() as (running, _):
        host, port = running.portals[0]
        with pytest.raises(TargetNotFound, match=r"iqn\.2026-11\.org\.example:no"):
            async with open_stack(
                parse(f"iscsi://{host}:{port}/iqn.2026-11.org.example:no/1"), mount()
            ):
                pass
        with pytest.raises(LunNotFound, match="LUN 9"):
            async with open_stack(parse(running.url(9)), mount()):
                pass
        assert running.sessions == [], "a failed mount logs out"


async def test_every_disk_of_every_target() -> None:
    async with RamDevice(SIZE) as first, RamDevice(SIZE, block_bytes=4096) as second:
        targets = [
            TargetConfig(iqn=f"{IQN}-a", units={0: first, 300: second}),
            TargetConfig(iqn=f"{IQN}-b", units={7: second}),
        ]
        async with serve(targets) as running:
            host, port = running.portals[0]
            async with open_stack(parse(f"iscsi://{host}:{port}/"), mount()) as stack:
                assert sorted(stack.files) == [f"{IQN}-a/lun0", f"{IQN}-a/lun300", f"{IQN}-b/lun7"]
                assert stack.files[f"{IQN}-a/lun300"].geometry.logical_block_bytes == 4096
                isids = {entry["isid"] for entry in stack.status()["sessions"]}
                assert len(isids) == 1, "different targets see the same initiator port (§10.1.1)"
            async with open_stack(parse(running.url()), mount()) as stack:
                assert list(stack.files) == ["lun0", "lun300"]


async def test_a_target_without_disks_does_not_stop_the_others() -> None:
    async with RamDevice(SIZE) as disk:
        targets = [TargetConfig(iqn=f"{IQN}-a", units={}), TargetConfig(iqn=IQN, units={1: disk})]
        async with serve(targets) as running:
            _, port = running.portals[0]
            # By name: the list holds the address, and the portal that was asked will do.
            async with open_stack(parse(f"iscsi://localhost:{port}/"), mount()) as stack:
                assert list(stack.files) == [f"{IQN}/lun1"]
                assert stack.sessions[0].portal.host == "localhost"
                assert len(stack.sessions) == len(running.sessions) == 1


LIMITS = {
    "small": Limits(
        max_recv_data_segment_length=512,
        first_burst_length=1024,
        max_burst_length=4096,
        max_outstanding_r2t=1,
        command_window=2,
    ),
    "large": Limits(),
}


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("immediate_data", [False, True])
@pytest.mark.parametrize("initial_r2t", [False, True])
@pytest.mark.parametrize("size", list(LIMITS))
async def test_every_negotiation_moves_the_same_bytes(
    size: str, initial_r2t: bool, immediate_data: bool, digests: bool
) -> None:
    limits = replace(
        LIMITS[size], initial_r2t=initial_r2t, immediate_data=immediate_data, digests=digests
    )
    digest = DigestPreference.CRC32C if digests else DigestPreference.NONE
    config = mount(
        CacheMode.NONE,
        header_digest=digest,
        data_digest=digest,
        max_recv_data_segment_length_bytes=1024 if size == "small" else 1 << 20,
    )
    content = random.Random(3).randbytes(1 << 20)
    async with world(config, limits=limits) as (_, disk, stack):
        parameters = stack.sessions[0].parameters
        assert parameters.initial_r2t is initial_r2t
        assert parameters.immediate_data is immediate_data
        assert (parameters.header_digest, parameters.data_digest) == (digests, digests)
        device = stack.files["lun1"]
        await device.write(4096, content)
        assert bytes(disk.view[4096 : 4096 + len(content)]) == content
        buffer = bytearray(len(content))
        await device.read_into(4096, memoryview(buffer))
        assert buffer == content


FAULTS = [
    Fault(act=Act.DROP),
    Fault(act=Act.DROP_AFTER),
    Fault(act=Act.DELAY, delay_s=0.05),
    Fault(act=Act.SILENCE),
    Fault(act=Act.PING),
    Fault(act=Act.CORRUPT_HEADER_DIGEST),
    Fault(act=Act.CORRUPT_DATA_DIGEST, opcode=OpCode.READ_10),
    Fault(act=Act.CLOSE_WINDOW, delay_s=0.05),
    Fault(act=Act.ANSWER, status=Status.BUSY),
    Fault(act=Act.ANSWER, status=Status.TASK_SET_FULL),
    Fault(act=Act.ANSWER, status=2, sense=SenseData(SenseKey.UNIT_ATTENTION, 0x29, 0)),
    Fault(act=Act.ANSWER, status=2, sense=SenseData(SenseKey.NOT_READY, 0x04, 0x01)),
    Fault(act=Act.ASYNC_MESSAGE, async_event=1, parameters=(0, 0, 3)),
]


SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 106))]


@pytest.mark.parametrize("mode", list(CacheMode))
@pytest.mark.parametrize("seed", SEEDS)
async def test_faults_never_change_what_is_read(seed: int, mode: CacheMode) -> None:
    """Random requests against a model while the target misbehaves in every scripted way."""
    digests = {"header_digest": DigestPreference.CRC32C, "data_digest": DigestPreference.CRC32C}
    config = mount(mode, command_timeout_s=0.5, replacement_timeout_s=30, **digests)
    async with world(config) as parts:
        running = parts[0]

        async def drop() -> None:
            running.drop_connections()

        hits = await compare_with_model(
            parts, FAULTS, [drop, running.restart], seed=f"{seed} {mode}"
        )
        assert hits > 3, "the target did misbehave"


@pytest.mark.parametrize("mode", list(CacheMode))
async def test_an_outage_is_waited_for_under_the_same_isid(mode: CacheMode) -> None:
    async with world(mount(mode)) as (running, disk, stack):
        device = stack.files["lun1"]
        await device.write(0, b"before" * 1000)
        await device.flush()
        before = stack.status()["sessions"][0]
        await running.stop()
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                await device.write(1 << 20, b"during" * 1000)
                await device.flush()

            nursery.start_soon(write)
            await trio.sleep(0.2)
            assert stack.status()["state"] == "recovering"
            await running.start()
        after = stack.status()["sessions"][0]
        assert after["isid"] == before["isid"]
        assert after["counters"]["logins"] == 2
        await stack.drain()  # with a log, a flush is done without the target
        assert bytes(disk.view[1 << 20 :][:6000]) == b"during" * 1000


@pytest.mark.parametrize("mode", list(CacheMode))
async def test_after_replacement_timeout_io_fails_and_nothing_dirty_is_lost(
    mode: CacheMode,
) -> None:
    async with world(mount(mode, replacement_timeout_s=0.3)) as (running, disk, stack):
        device = stack.files["lun1"]
        await running.stop()
        if mode is CacheMode.WRITEBACK:
            await device.write(0, b"kept" * 1024)
            with pytest.raises(ReplacementTimedOut):
                await device.flush()
        elif mode is CacheMode.LOG:
            await device.write(0, b"kept" * 1024)
            await device.flush()
            with pytest.raises(ReplacementTimedOut):
                await stack.drain()
        else:
            with pytest.raises(ReplacementTimedOut):
                await device.write(0, b"kept" * 1024)
        with pytest.raises(ReplacementTimedOut):
            await device.read_into(4 << 20, memoryview(bytearray(4096)))
        assert stack.status()["state"] == "failed"
        await running.start()
        with trio.fail_after(10):
            while stack.status()["state"] != "ok":
                await trio.sleep(0.05)
        if mode is CacheMode.WRITEBACK:
            # A retry in the background may have failed since: the next flush reports that, once.
            with suppress(ReplacementTimedOut):
                await device.flush()
            await device.flush()
            assert bytes(disk.view[:4096]) == b"kept" * 1024
        if mode is CacheMode.LOG:
            await stack.drain()
            assert bytes(disk.view[:4096]) == b"kept" * 1024


async def test_a_session_that_is_lost_while_a_check_writes_is_made_anew() -> None:
    """The check registers the reservation's key again, after a restart that has forgotten it."""
    async with world(mount(CacheMode.WRITETHROUGH)) as (running, disk, stack):
        device = stack.files["lun1"]
        await device.write(0, b"before" * 1000)
        script = running.targets[0].faults
        script.add(Fault(act=Act.SILENCE, opcode=OpCode.PERSISTENT_RESERVE_OUT))
        await running.restart()
        with trio.fail_after(20):
            while not script.hits:
                await trio.sleep(0.01)
            running.drop_connections()
            await device.write(0, b"after!" * 1000)
        assert bytes(disk.view[:6000]) == b"after!" * 1000
