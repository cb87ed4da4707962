"""What speaks for and against what an earlier mount has left on the local disk."""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from orion_iscsifs.config import ReserveConfig
from orion_iscsifs.config.places import state_dir
from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator.keys import LunKeys
from orion_iscsifs.initiator.standing import OUR_TYPE, Own, Seen
from orion_iscsifs.scsi.reservation import Holder, ReservationType
from orion_iscsifs.stack import open_stack
from orion_iscsifs.stack.evidence import Evidence, Keeper, Owner
from orion_iscsifs.target import RamDevice, Running
from orion_iscsifs.url import parse
from tests.stack.test_logs import target
from tests.world import SIZE, mount, world

STORE, OTHER = b"S" * 16, b"T" * 16
KEYS = LunKeys(0x0102_0304_0506)
OURS, OLDER = KEYS.base << 16 | 1, KEYS.base << 16 | 2
FOREIGN = 0xABCD_0000_0000_0001
GENERATION = 7


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))


def known(seen: Seen | None, owner: bytes = STORE) -> Evidence:
    return Evidence(owner.hex(), seen, Own(KEYS, OURS))


def held(key: int, *others: int, generation: int = GENERATION) -> Seen:
    return Seen((key, *others), Holder(key, OUR_TYPE), generation)


@pytest.mark.parametrize(
    ("evidence", "generation", "doubt"),
    [
        (known(held(OURS)), GENERATION, ""),
        (known(held(OLDER)), GENERATION, ""),
        (known(held(OURS, OLDER)), GENERATION, ""),
        (known(held(OURS), owner=OTHER), GENERATION, "mounted on this host since"),
        (Evidence("", held(OURS), Own(KEYS, OURS)), GENERATION, "mounted on this host since"),
        (known(None), GENERATION, "no reservation guards"),
        (known(held(OURS)), -1, "no reservation guards"),
        (known(held(FOREIGN)), GENERATION, "another initiator is registered"),
        (known(held(OURS, FOREIGN)), GENERATION, "another initiator is registered"),
        (known(Seen((OURS,), None, GENERATION)), GENERATION, "has not been held since"),
        (known(Seen((), None, GENERATION)), GENERATION, "has not been held since"),
        (
            # Others may write under it without being registered.
            known(Seen((OURS,), Holder(OURS, ReservationType.EXCLUSIVE_ACCESS), GENERATION)),
            GENERATION,
            "has not been held since",
        ),
        # Somebody has come and gone; or the target has forgotten, and counts anew.
        (known(held(OURS, generation=GENERATION + 2)), GENERATION, "registrations have changed"),
        (known(held(OURS, generation=0)), GENERATION, "registrations have changed"),
    ],
)
def test_a_tier_wants_proof(evidence: Evidence, generation: int, doubt: str) -> None:
    assert doubt in evidence.doubt(STORE, generation)
    assert bool(doubt) == bool(evidence.doubt(STORE, generation))


@pytest.mark.parametrize(
    ("evidence", "generation", "objection"),
    [
        (known(held(OURS)), GENERATION, ""),
        (known(None), GENERATION, ""),
        (known(held(OURS)), -1, ""),
        (known(Seen((), None, 0)), GENERATION, ""),
        (known(Seen((), None, GENERATION)), GENERATION, ""),
        (known(held(OURS), owner=OTHER), GENERATION, "without this log"),
        (known(held(FOREIGN)), GENERATION, "is registered"),
        (known(Seen((), None, GENERATION + 1)), GENERATION, "may have written"),
        (known(held(OLDER, generation=GENERATION + 1)), GENERATION, ""),
    ],
)
def test_a_log_wants_a_sign(evidence: Evidence, generation: int, objection: str) -> None:
    assert objection in evidence.objection(STORE, generation)
    assert bool(objection) == bool(evidence.objection(STORE, generation))


async def test_the_note_of_the_owner_is_durable_and_can_be_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    async with world(mount()) as (_, _, stack):
        owner = Owner("tiers", stack.units[0].disk)
        assert owner.known() == ""
        owner.note(STORE)
        assert owner.known() == STORE.hex()
        folder = str(state_dir() / "tiers")
        assert synced[-1] == folder
        assert synced[-2].startswith(folder + "/.")
        synced.clear()
        owner.forget()
        assert owner.known() == ""
        assert synced == [folder]
        owner.forget()


async def test_a_reservation_that_stays_proves_that_nobody_has_written() -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        generation = await _mount_and_stay(running)
        async with open_stack(parse(running.url(1)), mount(), "/mnt") as stack:
            exclusive = stack.units[0].exclusive
            assert exclusive is not None
            found = exclusive.first.found
            assert found is not None
            assert found.holder is not None
            assert found.generation == generation
            assert exclusive.is_held
            exclusive.stay()
            stack.give_back()
        async with open_stack(parse(running.url(1)), mount(), "/mnt") as stack:
            exclusive = stack.units[0].exclusive
            assert exclusive is not None
            assert exclusive.first.found is not None
            assert exclusive.first.found.holder is None, "it was to be given back"


async def test_a_reservation_that_stays_keeps_other_hosts_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RamDevice(SIZE) as disk, target(disk) as running:
        generation = await _mount_and_stay(running)
        monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "another host's state"))
        with pytest.raises(OrionError, match="reserved by another initiator"):
            async with open_stack(parse(running.url(1)), mount(), "/mnt"):
                pass
        taker = msgspec.structs.replace(mount(), reserve=ReserveConfig(preempt=True))
        async with open_stack(parse(running.url(1)), taker, "/mnt"):
            pass
        monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))
        async with open_stack(parse(running.url(1)), mount(), "/mnt") as stack:
            exclusive = stack.units[0].exclusive
            assert exclusive is not None
            assert exclusive.first.found is not None
            assert exclusive.first.found.generation > generation


async def _mount_and_stay(running: Running) -> int:
    """PRGENERATION in the end."""
    async with open_stack(parse(running.url(1)), mount(), "/mnt") as stack:
        exclusive = stack.units[0].exclusive
        assert exclusive is not None
        exclusive.stay()
        return exclusive.generation


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.02)


async def test_the_keeper_follows_registrations_and_survives_the_stores_failure() -> None:
    written: list[dict[str, object]] = []
    broken = trio.Event()

    async def update(**changes: object) -> None:
        if written:
            broken.set()
            raise OrionError("the disk is gone")
        written.append(changes)

    async with world(mount()) as (running, _, stack):
        exclusive = stack.units[0].exclusive
        assert exclusive is not None
        keeper = Keeper(update, exclusive, stack.units[0].disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            running.drop_connections()
            await _until(lambda: len(written) == 1)
            expected = {"generation": exclusive.generation, "key": exclusive.first.key}
            assert written == [{"size_bytes": SIZE, **expected}]
            running.drop_connections()
            with trio.fail_after(30):
                await broken.wait()
        # The nursery has ended by itself: the keeper gave up without an error.
