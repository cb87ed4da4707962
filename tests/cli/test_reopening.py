"""The data path of a mount that is there already: held, tried again, complete or not at all."""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from orion_iscsifs.cli.reopening import MountGone, patience_s, reopened
from orion_iscsifs.config import MountConfig, SessionConfig
from orion_iscsifs.custody import FUSE, Custody
from orion_iscsifs.errors import (
    AuthenticationFailed,
    BusyError,
    ConnectFailed,
    MountError,
    OrionError,
    ReservationConflict,
)
from orion_iscsifs.fuse.handover import disk_of


def disks(**names: str) -> dict[str, str]:
    return {path: disk_of({"name": name}) for path, name in names.items()}


class Stack:
    def __init__(self) -> None:
        self.files: dict[str, object] = {"lun1": object()}
        self.names = {"lun1": "naa.1", "lun2": "naa.2"}
        self.earlier: list[str] = []

    def describe(self, path: str) -> Mapping[str, str]:
        return {"name": self.names[path]}

    async def end_earlier(self) -> list[str]:
        return self.earlier


class Opener:
    """Fails with each of `errors`, one after the other, then opens `stack`."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.tries = 0
        self.stack = Stack()
        self.closed = False

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Stack]:
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        try:
            yield self.stack
        finally:
            self.closed = True


async def test_it_is_tried_until_the_target_is_back(autojump_clock: trio.testing.MockClock) -> None:
    opener = Opener(*[ConnectFailed("refused")] * 20)
    async with reopened(opener, disks(lun1="naa.1"), Custody(), patience_s=120) as stack:
        assert stack is opener.stack
        assert 20 < trio.current_time() < 120
    assert opener.closed


async def test_patience_ends(autojump_clock: trio.testing.MockClock) -> None:
    opener = Opener(*[ConnectFailed("refused")] * 1000)
    with pytest.raises(ConnectFailed):
        async with reopened(opener, {}, Custody(), patience_s=30):
            pass
    assert trio.current_time() <= 30


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (BusyError("mounted elsewhere"), 1),
        (ReservationConflict("taken"), 1),
        (ZeroDivisionError("a bug"), 1),
        (AuthenticationFailed("wrong secret"), 2),
    ],
)
async def test_what_a_retry_is_not_good_for(
    error: Exception, tries: int, autojump_clock: trio.testing.MockClock
) -> None:
    opener = Opener(*[error] * 1000)
    with pytest.raises(type(error)):
        async with reopened(opener, {}, Custody(), patience_s=math.inf):
            pass
    assert opener.tries == tries


async def test_every_earlier_session_is_ended_first(autojump_clock: trio.testing.MockClock) -> None:
    opener = Opener()
    opener.stack.earlier = ["h:3261 eth0"]

    async def second_path() -> None:
        await trio.sleep(7)
        opener.stack.earlier = []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(second_path)
        async with reopened(opener, {}, Custody(), patience_s=60):
            assert trio.current_time() == pytest.approx(7, abs=0.3)
    opener.stack.earlier = ["h:3261 eth0"]
    with pytest.raises(MountError, match=r"path h:3261 eth0 is not ended yet"):
        async with reopened(opener, {}, Custody(), patience_s=5):
            pass


async def test_every_file_has_to_be_there(autojump_clock: trio.testing.MockClock) -> None:
    opener = Opener()
    with pytest.raises(MountError, match="lun2 is not there"):
        async with reopened(opener, disks(lun1="naa.1", lun2="naa.2"), Custody(), patience_s=5):
            pass
    assert opener.closed


async def test_another_disk(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(OrionError, match=r"lun1 is another disk now \(naa.1.*was naa.7"):
        async with reopened(Opener(), disks(lun1="naa.7"), Custody(), patience_s=500):
            pass
    assert trio.current_time() < 1


async def test_nobody_waits_any_longer(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    custody = Custody()
    custody._inherited = {FUSE: 99}
    monkeypatch.setattr(
        "orion_iscsifs.cli.reopening.is_gone", lambda _device: trio.current_time() > 20
    )
    with pytest.raises(MountGone):
        async with reopened(
            Opener(*[ConnectFailed("refused")] * 1000), {}, custody, patience_s=math.inf
        ):
            pass


@pytest.mark.parametrize(("timeout_s", "expected"), [(-1.0, math.inf), (0.0, 10.0), (50.0, 50.0)])
def test_patience(timeout_s: float, expected: float) -> None:
    session = SessionConfig(initiator_name="iqn.a", replacement_timeout_s=timeout_s)
    assert patience_s(MountConfig(session=session)) == expected
