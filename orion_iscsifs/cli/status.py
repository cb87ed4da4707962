"""`orion-iscsifs status`: every mount of this user, as a table or as JSON (INTERFACE §7)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from orion_iscsifs.cli.report import PROGRAM
from orion_iscsifs.config.places import runtime_dir
from orion_iscsifs.errors import MountError
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.monitor.control import clients
from orion_iscsifs.monitor.status import Status, document, mount_status

_ANSWER_TIMEOUT_S: Final = 10.0


@click.command()
@click.argument("mountpoint", required=False)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show all mounts, or the one at MOUNTPOINT: LUNs, sessions, dirty bytes, errors."""
    found = mounts()
    if mountpoint is not None:
        resolved = mountpoints.resolve(mountpoint)
        found = [mount for mount in found if mount["mountpoint"] == resolved]
        if not found:
            raise MountError(
                f"status {resolved}: no mount there", advice=f"`{PROGRAM} status` lists them all"
            )
    if as_json:
        click.echo(json.dumps(document(found), indent=2))
    else:
        _print(found)


def mounts() -> list[Status]:
    """From each daemon's control socket; mounts without one from the kernel's list."""
    found: dict[str, Status] = {}
    for client in clients(runtime_dir()):
        try:
            answer = client.ask("status", timeout_s=_ANSWER_TIMEOUT_S)["status"]
        except MountError:  # it ended meanwhile, or hangs
            continue
        found[answer["mountpoint"]] = answer
    for mount in mountpoints.ours():
        if mount.mountpoint not in found:
            found[mount.mountpoint] = _without_socket(mount)
    return list(found.values())


def _without_socket(mount: mountpoints.Mounted) -> Status:
    """A dead mount, or another user's."""
    if mountpoints.is_dead(mount.mountpoint):
        state: str | None = "failed"
    else:
        try:
            text = Path(mount.mountpoint, ".orion", "status.json").read_text()
            described: Status = json.loads(text)["mounts"][0]
        except (OSError, ValueError, LookupError):
            state = None
        else:
            return described
    known = mount_status(
        mountpoint=mount.mountpoint, source=mount.source, pid=None, state=state, stack={}
    )
    return {**known, "state": state}


def _print(found: list[Status]) -> None:
    from rich.table import Table

    from orion_iscsifs.cli.tables import console

    out = console()
    if not found:
        out.print("nothing is mounted")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("MOUNTPOINT", "STATE", "LUN", "SIZE", "CACHE", "DIRTY", "ERRORS", "SOURCE"):
        right = title in {"SIZE", "DIRTY", "ERRORS"}
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for mount in found:
        for lun in mount["luns"] or [{}]:
            table.add_row(*_row(mount, lun))
    out.print(table)
    for mount in found:
        for session in mount["sessions"]:
            if session.get("state") != "logged-in" and session.get("last_error"):
                out.print(f"{session['target']}: {session['last_error']}", markup=False)


def _row(mount: Mapping[str, Any], lun: Mapping[str, Any]) -> list[str]:
    return [
        str(mount["mountpoint"]),
        _shown(mount["state"]),
        _shown(lun.get("name")),
        _size(lun.get("size_bytes")),
        _shown(lun.get("cache")),
        _size(lun.get("dirty_bytes")),
        _shown(lun.get("errors")),
        str(mount["source"]),
    ]


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    value, unit = float(size), "B"
    for larger in ("K", "M", "G", "T"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + unit
