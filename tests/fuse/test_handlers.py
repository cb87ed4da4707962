"""One exception, one errno, whatever a handler does; and when the next reader is woken."""

import errno
import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
from pyfuse3 import FUSEError

from orion_iscsifs.errors import ConnectionLost, OutOfRange, WriteProtected
from orion_iscsifs.fuse.handlers import LOG_INTERVAL_S, FailureLog, handler


class Subject:
    def __init__(self) -> None:
        self.blocked = 0
        self.failures = FailureLog(now=lambda: self.now)
        self.now = 0.0
        self.reader_blocks: Callable[[], None] = self._blocks

    def _blocks(self) -> None:
        self.blocked += 1

    def failed(self, operation: str, error: Exception, args: tuple[object, ...]) -> int:
        return self.failures.errno_of(operation, error)

    @handler
    async def at_once(self, value: int) -> int:
        return value + 1

    @handler
    async def later(self, value: int) -> int:
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return value + 1

    @handler
    async def fails(self, error: BaseException, waits: bool) -> None:
        if waits:
            await trio.lowlevel.checkpoint()
        raise error

    @handler
    async def survives(self) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            raise
        return "never"


async def test_results_pass_and_only_a_blocking_handler_wakes_the_next_reader() -> None:
    subject = Subject()
    assert await subject.at_once(1) == 2
    assert subject.blocked == 0
    assert await subject.later(value=1) == 2
    assert subject.blocked == 1


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FUSEError(errno.ENOENT), errno.ENOENT),
        (OutOfRange("x"), errno.ENOSPC),
        (WriteProtected("x"), errno.EROFS),
        (ConnectionLost("x"), errno.EIO),
        (ExceptionGroup("g", [ValueError(), ExceptionGroup("h", [OutOfRange("x")])]), errno.ENOSPC),
        (ValueError("x"), errno.EIO),
        (ExceptionGroup("g", [ValueError()]), errno.EIO),
        (KeyError("x"), errno.EIO),
        (OSError(errno.ENOENT, "of ours, not of the caller"), errno.EIO),
        (AssertionError(), errno.EIO),
        (StopAsyncIteration(), errno.EIO),
    ],
)
async def test_every_exception_becomes_an_errno(
    error: Exception, code: int, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FUSEError) as caught:
        await Subject().fails(error, waits)
    assert caught.value.errno == code


async def test_what_failed_is_logged_once_and_then_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    subject = Subject()

    async def fail(error: Exception) -> None:
        with pytest.raises(FUSEError):
            await subject.fails(error, False)

    for _ in range(5):
        await fail(ConnectionLost("192.0.2.1: gone"))
    assert [record.message for record in caplog.records] == ["fails: 192.0.2.1: gone"]
    subject.now = LOG_INTERVAL_S + 1
    await fail(ConnectionLost("192.0.2.1: gone"))
    assert caplog.records[-1].message == "fails: 192.0.2.1: gone (4 more of these)"
    await fail(ZeroDivisionError("bug"))
    assert caplog.records[-1].exc_info
    assert caplog.records[-1].levelno == logging.ERROR
    before = len(caplog.records)
    await fail(OutOfRange("the caller's doing"))
    assert len(caplog.records) == before
    assert subject.failures.errors == 7


async def test_the_memory_of_logged_failures_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(now=lambda: 0.0)
    for number in range(2000):
        log.errno_of("read", ConnectionLost(f"{number}"))
    assert len(log._seen) <= 256


async def test_cancellation_passes_through() -> None:
    subject = Subject()
    with trio.move_on_after(0.01) as scope:
        await subject.survives()
    assert scope.cancelled_caught


async def test_a_handler_that_is_dropped_is_closed() -> None:
    closed: list[str] = []

    class Dropped(Subject):
        @handler
        async def waits(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                closed.append("yes")

    awaitable: Any = Dropped().waits()
    awaitable.send(None)
    awaitable.close()
    assert closed == ["yes"]
