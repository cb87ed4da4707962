"""The folders of INTERFACE §1: state that is kept, and control sockets."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from orion_iscsifs.errors import MountError

_NAME = "orion-iscsifs"


def state_dir(environment: Mapping[str, str] = os.environ, *, uid: int | None = None) -> Path:
    """Where the initiator's identity and the logs are kept. Not created here."""
    if override := environment.get("ORION_ISCSIFS_STATE"):
        return Path(override).absolute()
    if (os.getuid() if uid is None else uid) == 0:
        return Path("/var/lib") / _NAME
    home = environment.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / _NAME


def runtime_dir(environment: Mapping[str, str] = os.environ, *, uid: int | None = None) -> Path:
    """Where the control sockets of running mounts are. Not created here."""
    if override := environment.get("ORION_ISCSIFS_RUNTIME"):
        return Path(override).absolute()
    uid = os.getuid() if uid is None else uid
    if uid == 0:
        return Path("/run") / _NAME
    if home := environment.get("XDG_RUNTIME_DIR"):
        return Path(home) / _NAME
    return Path(tempfile.gettempdir()) / f"{_NAME}-{uid}"


def create_private(folder: Path) -> Path:
    """Make the folder, for its owner only, and refuse one that belongs to somebody else."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise MountError(
            f"folder {folder}: can't be made: {error.strerror}",
            advice="ORION_ISCSIFS_STATE and ORION_ISCSIFS_RUNTIME name other folders",
        ) from None
    if owner not in {os.getuid(), 0}:
        raise MountError(f"folder {folder}: belongs to another user", advice="remove it")
    return folder
