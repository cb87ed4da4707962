"""What the user sees: one line per error, the right exit code, a traceback only with --debug."""

import enum
import sys
import traceback
from dataclasses import dataclass
from typing import Final

import click

from orion_iscsifs.errors import OrionError, UsageError

PROGRAM: Final = "orion-iscsifs"


class Exit(enum.IntEnum):
    """INTERFACE §4."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    MOUNT_FAILED = 32
    """mount(8)'s code for a failed mount."""


class Failed(OrionError):
    """A command failed, with an exit code of its own."""

    def __init__(self, message: str, code: int, *, advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.code = code


@dataclass(slots=True)
class Verbosity:
    """Set once by `main`."""

    debug: bool = False


verbosity = Verbosity()


def say(text: str) -> None:
    """One line for the user, on stderr: stdout belongs to results."""
    click.echo(f"{PROGRAM}: {one_line(text)}", err=True)


def warn(text: str) -> None:
    say(f"warning: {text}")


def one_line(text: str) -> str:
    return " ".join(text.split())


def size(count_bytes: int | None) -> str:
    """A size for people: `64M`, `1.5G`; `-` if it is not known."""
    if count_bytes is None:
        return "-"
    value, unit = float(count_bytes), "B"
    for larger in ("K", "M", "G", "T"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + unit


def orion_error(error: BaseException) -> OrionError | None:
    """The error itself, or the first of ours in an exception group."""
    if isinstance(error, OrionError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(orion_error, error.exceptions)), None)
    return None


def describe(error: BaseException) -> str:
    """The one line for any exception."""
    known = orion_error(error)
    if known is not None:
        return known.line
    if isinstance(error, BaseExceptionGroup):
        return describe(error.exceptions[0])
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror}"
    return f"internal error: {type(error).__name__}: {error} (run it with --debug and report it)"


def exit_code(error: BaseException, *, failure: int = Exit.FAILED) -> int:
    """`failure` is the command's own code for what is not the user's mistake."""
    known = orion_error(error)
    if isinstance(known, Failed):
        return known.code
    if isinstance(known, UsageError):
        return Exit.USAGE
    return failure


def report(error: BaseException, *, failure: int = Exit.FAILED) -> int:
    """Print the line (and the traceback with --debug); returns the exit code."""
    if verbosity.debug:
        traceback.print_exception(error, file=sys.stderr)
    say(describe(error))
    return exit_code(error, failure=failure)
