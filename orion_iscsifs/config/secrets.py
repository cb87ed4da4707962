"""Secrets from files, and what is worth a warning about them."""

import os
import stat
from pathlib import Path
from typing import Final

from orion_iscsifs.config.settings import Secret
from orion_iscsifs.errors import UsageError

SECRET_BYTES_SENSIBLE: Final = 12
"""RFC 7143 §9.2.1: shorter secrets (96 bits) can be guessed from one recorded log-in."""

KEY_FILE_MAX_BYTES: Final = 1 << 20


def read_secret_file(option: str, path: Path) -> tuple[Secret, list[str]]:
    """The first line of the file without its newline, and warnings for the user."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            line = file.readline(4096).rstrip(b"\r\n")
        secret = line.decode()
    except OSError as error:
        raise UsageError(f"{option} {path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {path}: the first line is no UTF-8 text") from None
    if not secret:
        raise UsageError(f"{option} {path}: the first line is empty")
    warnings = []
    if mode & stat.S_IROTH:
        warnings.append(f"{option} {path}: every user can read it (chmod 600 {path})")
    return Secret(secret), warnings


def read_key_file(option: str, path: Path) -> tuple[Secret, list[str]]:
    """All of the file but one newline at its end, and warnings for the user.

    It need not be text; `settings.passphrase` has the bytes.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(KEY_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{option} {path}: can't be read: {error.strerror}") from None
    key, warnings = key_of(f"{option} {path}", content), []
    if mode & stat.S_IROTH:
        warnings.append(f"{option} {path}: every user can read it (chmod 600 {path})")
    return key, warnings


def key_of(what: str, content: bytes) -> Secret:
    """The key that a file with this content holds. Raises UsageError."""
    if len(content) > KEY_FILE_MAX_BYTES:
        raise UsageError(f"{what}: has more than {KEY_FILE_MAX_BYTES} bytes")
    content = content.removesuffix(b"\n")
    if not content:
        raise UsageError(f"{what}: is empty", advice="`head -c 32 /dev/urandom` makes a good key")
    return Secret(content.decode(errors="surrogateescape"))


def length_warnings(what: str, secret: Secret) -> list[str]:
    """RFC 7143 §9.2.1 wants at least 96 bits."""
    if len(secret.reveal().encode()) >= SECRET_BYTES_SENSIBLE:
        return []
    return [f"{what}: shorter than {SECRET_BYTES_SENSIBLE} bytes, easily guessed"]
