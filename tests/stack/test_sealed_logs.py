"""cache_key_file=: what is on the local disk, and which log may be used with which key."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from orion_iscsifs.config import CacheMode, MountConfig, Secret
from orion_iscsifs.config.places import state_dir
from orion_iscsifs.config.render import to_toml
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.seal import WrongKey
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.target import RamDevice, Running, TargetConfig, serve
from orion_iscsifs.url import parse
from tests.world import IQN, SIZE, mount

pytestmark = pytest.mark.usefixtures("cheap_keys")

KEY, OTHER = "the key of these tests", "another key"
MARKER = b"PLAIN-TEXT-MARKER"
TEXT = (MARKER + b" and more of it. ") * 40_000
SMALL, LARGE = TEXT[:4096], TEXT[: 1 << 20]


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))


def lazy(key: str | None, **changes: object) -> MountConfig:
    """A mount that writes nothing back by itself for as long as these tests run."""
    config = mount(CacheMode.LOG)
    sealed = {} if key is None else {"key": Secret(key), "key_file": "/the/key"}
    roomy = {"dirty_age_s": 600, "size_bytes": 16 << 20, "dirty_max_bytes": 8 << 20}
    cache = msgspec.structs.replace(config.cache, **roomy, **sealed, **changes)
    return msgspec.structs.replace(config, cache=cache)


@asynccontextmanager
async def target() -> AsyncIterator[tuple[Running, RamDevice]]:
    async with (
        RamDevice(SIZE) as disk,
        serve([TargetConfig(iqn=IQN, units={1: disk})]) as running,
    ):
        yield running, disk


async def leave_a_log(running: Running, key: str | None, *writes: tuple[int, bytes]) -> None:
    """Write and flush into the log, and die before the target has any of it."""
    with trio.CancelScope() as killed:
        async with open_stack(parse(running.url(1)), lazy(key), "/mnt") as stack:
            log = stack.units[0].log
            assert log is not None
            log.destager._ordered = False  # its own time only
            for offset, content in writes:
                await stack.files["lun1"].write(offset, content)
            await log.store.commit()
            killed.cancel()
            await trio.lowlevel.checkpoint()


async def image(stack: Stack, length: int = 4096) -> bytes:
    content = bytearray(length)
    await stack.files["lun1"].read_into(0, memoryview(content))
    return bytes(content)


def on_disk() -> Iterator[tuple[Path, bytes]]:
    """Everything in the log folder and in the state folder."""
    for path in state_dir().rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def holding(content: bytes) -> list[Path]:
    return [path for path, found in on_disk() if content in found]


def unchanged(folder: dict[Path, bytes]) -> bool:
    return folder == {path: found for path, found in on_disk() if path in folder}


def logs() -> dict[Path, bytes]:
    return {path: found for path, found in on_disk() if "logs-of-luns" in path.parts}


async def refuse(
    running: Running, config: MountConfig, error: type[Exception], told: str
) -> Exception:
    before = logs()
    with pytest.raises(error, match=told) as refused:
        async with open_stack(parse(running.url(1)), config, "/mnt"):
            pass
    assert unchanged(before)
    return refused.value


WRITES = [(0, SMALL), (1 << 20, LARGE), (3 << 20, SMALL * 3), (4 << 20, TEXT[: 64 << 10])]


async def test_nothing_that_was_written_is_on_the_local_disk() -> None:
    async with target() as (running, disk):
        await leave_a_log(running, KEY, *WRITES)
        assert not holding(MARKER)
        assert not holding(KEY.encode())
        assert bytes(disk.view[:4096]) != SMALL
        async with open_stack(parse(running.url(1)), lazy(KEY), "/mnt") as stack:
            assert await image(stack) == SMALL
            assert stack.status()["luns"][0]["log"]["sealed"] is True
            await stack.files["lun1"].write(5 << 20, LARGE)
        for offset, content in [*WRITES, (5 << 20, LARGE)]:
            assert bytes(disk.view[offset : offset + len(content)]) == content
        assert not holding(MARKER)


async def test_in_plain_text_it_is_there() -> None:
    """So that the test above can fail."""
    async with target() as (running, _):
        await leave_a_log(running, None, *WRITES)
        assert holding(MARKER)
        async with open_stack(parse(running.url(1)), lazy(None), "/mnt") as stack:
            assert stack.status()["luns"][0]["log"]["sealed"] is False


@pytest.mark.parametrize("clean", [False, True])
async def test_another_key_or_none_is_refused_and_nothing_lost(clean: bool) -> None:
    """Even of a log that is empty: it would go on in plain text, or with the wrong key."""
    async with target() as (running, disk):
        if clean:
            async with open_stack(parse(running.url(1)), lazy(KEY), "/mnt") as stack:
                await stack.files["lun1"].write(0, SMALL)
        else:
            await leave_a_log(running, KEY, (0, SMALL))
        wrong = await refuse(running, lazy(OTHER), WrongKey, "the key does not open it")
        assert isinstance(wrong, WrongKey)
        assert "cache_key_file" in wrong.advice
        missing = await refuse(running, lazy(None), LogError, "sealed, and there is no key")
        assert isinstance(missing, LogError)
        assert "cache_key_file" in missing.advice
        forced = lazy(OTHER, log_force=True)
        await refuse(running, forced, WrongKey, "the key does not open it")
        async with open_stack(parse(running.url(1)), lazy(KEY), "/mnt") as stack:
            assert await image(stack) == SMALL
        assert bytes(disk.view[:4096]) == SMALL


async def test_what_is_in_plain_text_is_not_mixed_with_what_is_sealed() -> None:
    async with target() as (running, disk):
        await leave_a_log(running, None, (0, SMALL))
        refused = await refuse(running, lazy(KEY), LogError, "and is not sealed")
        assert isinstance(refused, LogError)
        assert "cache replay" in refused.advice
        async with open_stack(parse(running.url(1)), lazy(None), "/mnt"):
            pass
        assert bytes(disk.view[:4096]) == SMALL
        assert holding(MARKER), "it is still in the files of the log, which is empty"
        async with open_stack(parse(running.url(1)), lazy(KEY), "/mnt") as stack:
            await stack.files["lun1"].write(8192, SMALL)
            assert not holding(MARKER), "made anew"
        assert bytes(disk.view[8192 : 8192 + 4096]) == SMALL


async def test_a_damaged_sealed_log_is_refused_and_replayed_up_to_there_by_force() -> None:
    """Damaged by somebody who made the checksums right again: nothing of it reaches the target."""
    async with target() as (running, disk):
        await leave_a_log(running, KEY, (0, SMALL), (8192, SMALL), (16384, SMALL))
        ((path, content),) = [(p, c) for p, c in logs().items() if p.name == "wlog-00000000"]
        path.write_bytes(_forged(content, record=1))
        await refuse(running, lazy(KEY), LogError, "record 1 is not what was sealed")
        assert not any(disk.view[:20480])
        async with open_stack(parse(running.url(1)), lazy(KEY, log_force=True), "/mnt"):
            pass
        assert bytes(disk.view[:4096]) == SMALL
        assert not any(disk.view[4096:20480])


def _forged(content: bytes, *, record: int) -> bytes:
    """Another offset for one of the records of 4 KiB."""
    from tests.localstore.sealed import with_checksums

    start = 4096 + record * 4608
    image = bytearray(content[start : start + 64 + 4112])
    image[40:48] = (1 << 20).to_bytes(8, "little")
    changed = with_checksums(bytes(image), 4112)
    return content[:start] + changed + content[start + len(changed) :]


def test_the_key_is_shown_nowhere() -> None:
    config = lazy(KEY)
    shown: list[Callable[[], str]] = [
        lambda: repr(config),
        lambda: str(config),
        lambda: to_toml(config, "iscsi://h/"),
    ]
    assert not any(KEY in one() for one in shown)
    assert 'cache_key_file = "/the/key"' in to_toml(config, "iscsi://h/")
