"""One exception, one errno: what every FUSE handler is wrapped in.

pyfuse3 answers only `FUSEError`; anything else ends its loop and leaves the request, and whoever
waits for it, hanging. So no exception leaves a handler but `FUSEError` (and a cancellation, which
means that the mount itself is ending).
"""

import errno
import logging
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from types import coroutine
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

from pyfuse3 import FUSEError

from orion_iscsifs.errors import OrionError

_log = logging.getLogger(__name__)

LOG_INTERVAL_S: Final = 30.0
"""The same failure is logged once in this time; the next line counts what was left out."""
_REMEMBERED_MAX: Final = 256

_USERS_DOING: Final = frozenset(
    {errno.ENOSPC, errno.EROFS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
)
"""Answers to what a program tried, no failure of ours: not worth a line in the log."""

P = ParamSpec("P")
R = TypeVar("R")


class Host(Protocol):
    """What a handler's `self` has to offer."""

    reader_blocks: Callable[[], None]

    def failed(self, operation: str, error: Exception, args: tuple[object, ...]) -> int:
        """The errno for the kernel; the place to log and count."""


H = TypeVar("H", bound=Host)
Handler = Callable[Concatenate[H, P], Coroutine[Any, Any, R]]


def handler(function: Handler[H, P, R]) -> Handler[H, P, R]:
    """Wrap one handler. A generator, not a coroutine: it drives the handler's first step itself.

    Most requests end in that step (a hit, an absorbed write). Only one that doesn't is about to
    block, and only then is another reader of /dev/fuse needed (`fuse/readers.py`).
    """
    name = function.__name__

    @coroutine
    def wrapped(self: H, *args: P.args, **kwargs: P.kwargs) -> Generator[Any, Any, R]:
        steps = function(self, *args, **kwargs)
        try:
            try:
                message = steps.send(None)
            except StopIteration as done:
                return cast("R", done.value)
            self.reader_blocks()
            while True:
                try:
                    answer = yield message
                except BaseException as error:
                    message = steps.throw(error)
                else:
                    message = steps.send(answer)
        except StopIteration as done:
            return cast("R", done.value)
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(self.failed(name, error, args)) from error

    wrapped.__name__ = name
    wrapped.__doc__ = function.__doc__
    return cast("Handler[H, P, R]", wrapped)


@dataclass(slots=True)
class _Seen:
    logged_at: float
    left_out: int = 0


@dataclass(slots=True)
class FailureLog:
    """Turns exceptions into errnos, and logs each kind once in a while."""

    now: Callable[[], float] = time.monotonic
    errors: int = 0
    """How many requests failed that should not have."""
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def errno_of(self, operation: str, error: Exception) -> int:
        """The errno for the kernel. Logs; never raises."""
        known = first_orion_error(error)
        if known is None:
            self.errors += 1
            self._log(operation, f"{type(error).__name__}: {error}", error)
            return errno.EIO
        if known.errno not in _USERS_DOING:
            self.errors += 1
            self._log(operation, known.line, None)
        return known.errno

    def _log(self, operation: str, text: str, traceback_of: Exception | None) -> None:
        now, key = self.now(), f"{operation}: {text}"
        seen = self._seen.get(key)
        if seen is not None and now - seen.logged_at < LOG_INTERVAL_S:
            seen.left_out += 1
            return
        more = f" ({seen.left_out} more of these)" if seen is not None and seen.left_out else ""
        if len(self._seen) >= _REMEMBERED_MAX:
            self._seen.clear()
        self._seen[key] = _Seen(now)
        _log.error("%s%s", key, more, exc_info=traceback_of)


def first_orion_error(error: BaseException) -> OrionError | None:
    """The error itself, or the first of ours inside an exception group; None if there is none."""
    if isinstance(error, OrionError):
        return error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            if (found := first_orion_error(inner)) is not None:
                return found
    return None
