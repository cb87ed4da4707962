"""One writer on this host."""

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import trio

from orion_iscsifs.errors import BusyError
from orion_iscsifs.initiator.claim import hold_lun

NAME = "naa.1"


async def test_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    async with hold_lun(tmp_path, NAME, "/mnt/a", patience_s=0):
        with pytest.raises(BusyError, match=rf"/mnt/a \(pid {os.getpid()}\)") as caught:
            async with hold_lun(tmp_path, NAME, "/mnt/b", patience_s=60):
                pytest.fail("there are two writers")
        assert "reserve=off" in caught.value.advice


async def test_it_is_free_again_afterwards_and_other_luns_always_were(tmp_path: Path) -> None:
    async with (
        hold_lun(tmp_path, NAME, "/mnt/a", patience_s=0),
        hold_lun(tmp_path, "naa.2", "/mnt/b", patience_s=0) as other,
    ):
        assert other is not None
    async with hold_lun(tmp_path, NAME, "/mnt/b", patience_s=0) as claim:
        assert claim is not None


async def test_one_that_is_unmounting_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    order: list[str] = []

    async def second() -> None:
        async with hold_lun(tmp_path, NAME, "/mnt/b", patience_s=60):
            order.append("second")

    async with (
        trio.open_nursery() as nursery,
        hold_lun(tmp_path, NAME, "/mnt/a", patience_s=0) as claim,
    ):
        claim.unmounting()
        nursery.start_soon(second)
        await trio.sleep(0.3)
        order.append("first ends")
    assert order == ["first ends", "second"]
    assert caplog.text.count("waiting for /mnt/a") == 1


async def test_patience_ends(tmp_path: Path) -> None:
    async with hold_lun(tmp_path, NAME, "/mnt/a", patience_s=0) as claim:
        claim.unmounting()
        with pytest.raises(BusyError, match="/mnt/a"):
            async with hold_lun(tmp_path, NAME, "/mnt/b", patience_s=0.2):
                pytest.fail("there are two writers")


def _hold_for_ever(state: str, ready: str) -> None:
    async def main() -> None:
        async with hold_lun(Path(state), NAME, "/mnt/a", patience_s=0):
            await trio.Path(ready).touch()
            await trio.sleep_forever()

    trio.run(main)


async def test_a_daemon_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("spawn").Process(
        target=_hold_for_ever, args=(str(tmp_path), str(ready)), daemon=True
    )
    process.start()
    deadline = time.monotonic() + 30
    while not await trio.Path(ready).exists():
        assert time.monotonic() < deadline
        await trio.sleep(0.05)
    with pytest.raises(BusyError, match=f"pid {process.pid}"):
        async with hold_lun(tmp_path, NAME, "/mnt/b", patience_s=0):
            pytest.fail("there are two writers")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    async with hold_lun(tmp_path, NAME, "/mnt/b", patience_s=0) as claim:
        assert claim is not None
