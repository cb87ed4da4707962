"""Key files of commands: a name, or `-` for stdin. A secret is never an argument."""

import sys
from pathlib import Path

from orion_iscsifs.cli.report import warn
from orion_iscsifs.config.secrets import KEY_FILE_BYTES_MAX, read_key_file
from orion_iscsifs.errors import UsageError


def read_key(option: str, file: str) -> bytes:
    """All that is in it. Raises UsageError; `option` names it there."""
    if file != "-":
        content, warnings = read_key_file(option, Path(file).expanduser())
        for warning in warnings:
            warn(warning)
        return content.reveal()
    # None: it was closed before the program began.
    found = b"" if sys.stdin is None else sys.stdin.buffer.read(KEY_FILE_BYTES_MAX + 1)
    if not 0 < len(found) <= KEY_FILE_BYTES_MAX:
        raise UsageError(f"{option} -: stdin has to hold 1 to {KEY_FILE_BYTES_MAX} bytes")
    return found
