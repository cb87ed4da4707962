"""One writer, on a real target: tgt has persistent reservations, without PREEMPT AND ABORT."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orion_iscsifs.config import (
    CacheConfig,
    CacheMode,
    FuseConfig,
    MountConfig,
    ReserveConfig,
    ReserveMode,
    SessionConfig,
)
from orion_iscsifs.errors import BusyError, ReservationConflict
from orion_iscsifs.stack import Stack, open_stack
from orion_iscsifs.url import parse
from tests.interop.conftest import TgtDisk

pytestmark = pytest.mark.interop("tgtd", "tgtadm")

PAGE = 4096


class Host:
    """An initiator with a name and a state directory of its own."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._name = name
        self._folder = folder / name
        self._monkeypatch = monkeypatch

    @asynccontextmanager
    async def mount(
        self, url: str, *, read_only: bool = False, **reserve: object
    ) -> AsyncIterator[Stack]:
        self._monkeypatch.setenv("ORION_ISCSIFS_STATE", str(self._folder))
        name = f"iqn.2024-01.org.example:{self._name}"
        config = MountConfig(
            session=SessionConfig(initiator_name=name, replacement_timeout_s=20),
            cache=CacheConfig(mode=CacheMode.WRITEBACK, dirty_age_s=600),
            fuse=FuseConfig(read_only=read_only),
            reserve=ReserveConfig(**reserve),  # type: ignore[arg-type]
        )
        async with open_stack(parse(url), config, f"/mnt/{self._name}") as stack:
            yield stack


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host("one", tmp_path, monkeypatch)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host("two", tmp_path, monkeypatch)


def standing(stack: Stack) -> str:
    reservation = stack.status()["luns"][0]["reservation"]
    return "none" if reservation is None else reservation["state"]


def key(stack: Stack) -> str:
    found: str = stack.status()["luns"][0]["reservation"]["key"]
    return found


async def test_the_second_host_is_refused_until_the_first_has_gone(
    one: Host, two: Host, tgt_disk: TgtDisk
) -> None:
    async with one.mount(tgt_disk.url) as stack:
        assert standing(stack) == "held"
        with pytest.raises(
            BusyError, match=f"reserved by another initiator.*{key(stack)}"
        ) as refused:
            async with two.mount(tgt_disk.url):
                pytest.fail("there are two writers")
        assert "-o preempt" in refused.value.advice
        await stack.files["lun1"].write(0, b"1" * PAGE)
        await stack.files["lun1"].flush()
    async with two.mount(tgt_disk.url) as stack:
        assert standing(stack) == "held"


async def test_the_second_mount_of_a_host_is_refused(one: Host, tgt_disk: TgtDisk) -> None:
    async with one.mount(tgt_disk.url):
        with pytest.raises(BusyError, match=f"/mnt/one.*pid {os.getpid()}"):
            async with one.mount(tgt_disk.url):
                pytest.fail("there are two writers")


async def test_readers_beside_a_writer(one: Host, two: Host, tgt_disk: TgtDisk) -> None:
    async with (
        one.mount(tgt_disk.url) as writer,
        two.mount(tgt_disk.url, read_only=True) as reader,
        one.mount(tgt_disk.url, read_only=True) as another,
    ):
        assert [standing(stack) for stack in (writer, reader, another)] == ["held", "none", "none"]
        await writer.files["lun1"].write(0, b"1" * PAGE)
        await writer.files["lun1"].flush()
        buffer = bytearray(PAGE)
        await reader.files["lun1"].read_into(0, memoryview(buffer))
        assert buffer == b"1" * PAGE


async def test_it_is_registered_again_after_a_new_login(
    one: Host, two: Host, tgt_disk: TgtDisk
) -> None:
    async with one.mount(tgt_disk.url) as stack:
        for content in (b"1", b"2", b"3"):
            assert tgt_disk.target.drop_connections() > 0
            await stack.files["lun1"].write(0, content * PAGE)
            await stack.files["lun1"].flush()
            assert standing(stack) == "held"
            assert tgt_disk.backing.read_bytes()[:1] == content
    async with two.mount(tgt_disk.url) as stack:
        assert standing(stack) == "held", "nothing of it was left behind"


async def test_it_is_taken_again_from_a_target_that_has_forgotten(
    one: Host, two: Host, tgt_disk: TgtDisk
) -> None:
    async with one.mount(tgt_disk.url) as stack:
        tgt_disk.daemon.stop()
        tgt_disk.daemon.resume()
        await stack.files["lun1"].write(0, b"1" * PAGE)
        await stack.files["lun1"].flush()
        assert standing(stack) == "held"
        with pytest.raises(BusyError, match=key(stack)):
            async with two.mount(tgt_disk.url):
                pytest.fail("there are two writers")


async def overtaken(one: Host, two: Host, disk: TgtDisk) -> None:
    """The first host's mount ends with what it could not write."""
    async with one.mount(disk.url) as first:
        await first.files["lun1"].write(0, b"1" * PAGE)
        async with two.mount(disk.url, preempt=True) as second:
            await second.files["lun1"].write(0, b"2" * PAGE)
            await second.files["lun1"].flush()
            with pytest.raises(ReservationConflict, match=key(second)):
                await first.files["lun1"].flush()
            assert standing(first) == "lost"
            assert first.status()["luns"][0]["dirty_bytes"] == PAGE, "nothing is dropped"
        with pytest.raises(ReservationConflict):
            await first.files["lun1"].flush()
        disk.target.drop_connections()
        with pytest.raises(ReservationConflict):
            await first.files["lun1"].flush()
        buffer = bytearray(PAGE)
        await first.files["lun1"].read_into(PAGE, memoryview(buffer))


async def test_taking_over_is_for_good(one: Host, two: Host, tgt_disk: TgtDisk) -> None:
    """Also after the second host has gone: what the first holds unwritten is older than that."""
    with pytest.raises(ReservationConflict, match="taken by") as given_up:
        await overtaken(one, two, tgt_disk)
    assert "umount --force" in given_up.value.advice
    assert tgt_disk.backing.read_bytes()[:1] == b"2"


async def away_meanwhile(one: Host, two: Host, disk: TgtDisk) -> None:
    async with one.mount(disk.url) as first:
        await first.files["lun1"].write(0, b"1" * PAGE)
        async with two.mount(disk.url, preempt=True) as second:
            await second.files["lun1"].write(0, b"2" * PAGE)
        disk.target.drop_connections()
        with pytest.raises(ReservationConflict, match="taken by another initiator"):
            await first.files["lun1"].flush()


async def test_one_that_was_away_while_another_came_and_went(
    one: Host, two: Host, tgt_disk: TgtDisk
) -> None:
    """Nothing is registered any more when it comes back; PRGENERATION tells what happened."""
    with pytest.raises(ReservationConflict):
        await away_meanwhile(one, two, tgt_disk)
    assert tgt_disk.backing.read_bytes()[:1] == b"2"


async def test_without_a_reservation(one: Host, two: Host, tgt_disk: TgtDisk) -> None:
    async with (
        one.mount(tgt_disk.url, mode=ReserveMode.OFF) as first,
        two.mount(tgt_disk.url, mode=ReserveMode.OFF) as second,
    ):
        assert (standing(first), standing(second)) == ("none", "none")
        await first.files["lun1"].write(0, b"1" * PAGE)
        await second.files["lun1"].write(PAGE, b"2" * PAGE)
    assert tgt_disk.backing.read_bytes()[: 2 * PAGE] == b"1" * PAGE + b"2" * PAGE
