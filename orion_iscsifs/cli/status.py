"""`orion-iscsifs status`: every mount of this user, as a table or as JSON (INTERFACE §7).

One mount that hangs must not hide the others, so each is asked in a thread of its own and has a
bounded time to answer.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from orion_iscsifs.cli.report import PROGRAM, size, warn
from orion_iscsifs.config.places import runtime_dir
from orion_iscsifs.errors import MountError
from orion_iscsifs.fuse import apart
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.monitor.control import ControlClient, DaemonSilent, clients, socket_path
from orion_iscsifs.monitor.status import Status, document, mount_status

if TYPE_CHECKING:
    from rich.table import Table

_ANSWER_TIMEOUT_S: Final = 5.0
_NUMBERS: Final = frozenset(
    {"SIZE", "DIRTY", "ERRORS", "CONNECTIONS", "LEVEL", "IN FLIGHT", "P50 us", "P99 us"}
)
_ASKED_AT_ONCE_MAX: Final = 32


@click.command()
@click.argument("mountpoint", required=False)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show all mounts, or the one at MOUNTPOINT: LUNs, sessions, dirty bytes, errors."""
    if mountpoint is None:
        found = mounts()
    else:
        resolved = mountpoints.resolve(mountpoint)
        found = mounts(only=resolved)
        if not found:
            raise MountError(
                f"status {resolved}: no mount there", advice=f"`{PROGRAM} status` lists them all"
            )
    if as_json:
        click.echo(json.dumps(document(found), indent=2))
    else:
        _print(found)


def mounts(*, only: str | None = None) -> list[Status]:
    """From each daemon's control socket; what has none or hangs, from the kernel's list."""
    folder = runtime_dir()
    known = {str(socket_path(folder, mount.mountpoint)): mount for mount in mountpoints.ours()}
    sockets = {str(client.path): client for client in clients(folder)}
    names = [str(socket_path(folder, only))] if only is not None else [*sockets, *known]
    questions = [
        partial(_status, known.get(name), sockets.get(name)) for name in dict.fromkeys(names)
    ]
    with ThreadPoolExecutor(_ASKED_AT_ONCE_MAX) as threads:
        return [status for status in threads.map(_call, questions) if status is not None]


def _call(question: Callable[[], Status | None]) -> Status | None:
    return question()


def _status(mount: mountpoints.Mounted | None, client: ControlClient | None) -> Status | None:
    """None if there is neither a mount nor a daemon (any more)."""
    if client is not None:
        try:
            answer: Status = client.ask("status", timeout_s=_ANSWER_TIMEOUT_S)["status"]
        except DaemonSilent:
            if mount is not None:
                return _silent(mount, client)
        except MountError:  # it ended meanwhile
            pass
        else:
            return answer
    return None if mount is None else _without_socket(mount)


def _silent(mount: mountpoints.Mounted, client: ControlClient | None) -> Status:
    pid = None
    if client is not None:
        try:
            pid = client.pid()
        except OSError:
            pid = None
    process = "its daemon" if pid is None else f"its daemon (process {pid})"
    warn(
        f"{mount.mountpoint}: {process} does not answer within {_ANSWER_TIMEOUT_S:g} s "
        f"(`{PROGRAM} umount --force {mount.mountpoint}` ends it)"
    )
    return _outline(mount, "failed", pid)


def _without_socket(mount: mountpoints.Mounted) -> Status:
    """A dead mount, or another user's."""
    health = mountpoints.health(mount.mountpoint)
    if health is mountpoints.Health.SILENT:
        return _silent(mount, None)
    if health is mountpoints.Health.DEAD:
        return _outline(mount, "failed", None)
    try:
        text = apart.ask("read", os.path.join(mount.mountpoint, ".orion", "status.json"))
        described: Status = json.loads(text)["mounts"][0]
    except (OSError, ValueError, LookupError):
        return _outline(mount, None, None)
    return described


def _outline(mount: mountpoints.Mounted, state: str | None, pid: int | None) -> Status:
    """What the kernel's list alone tells."""
    known = mount_status(
        mountpoint=mount.mountpoint, source=mount.source, pid=pid, state=state, stack={}
    )
    return {**known, "state": state}


def _print(found: list[Status]) -> None:
    from orion_iscsifs.cli.tables import console

    out = console()
    if not found:
        out.print("nothing is mounted")
        return
    luns = _table("MOUNTPOINT", "STATE", "LUN", "SIZE", "CACHE", "DIRTY", "ERRORS", "SOURCE")
    sessions = _table("TARGET", "PORTAL", "SESSION", "CONNECTIONS", "LEVEL")
    paths = _table("LUN", "PATH", "STATE", "ALUA", "IN FLIGHT", "P50 us", "P99 us", "LAST ERROR")
    for mount in found:
        for lun in mount["luns"] or [{}]:
            luns.add_row(*_row(mount, lun))
        for session in mount["sessions"]:
            sessions.add_row(*_session_row(session))
        if len(mount["paths"]) > len(mount["luns"]):
            for path in mount["paths"]:
                paths.add_row(*_path_row(path))
    out.print(luns)
    for table in (sessions, paths):
        if table.row_count:
            out.print()
            out.print(table)
    for mount in found:
        for session in mount["sessions"]:
            if session.get("state") != "logged-in" and session.get("last_error"):
                out.print(f"{session['target']}: {session['last_error']}")


def _table(*titles: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in titles:
        right = title in _NUMBERS
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    return table


def _session_row(session: Mapping[str, Any]) -> list[str]:
    connections = session.get("connections") or [{}]
    up = sum(one.get("state") == "logged-in" for one in connections)
    return [
        _shown(session.get("target")),
        _shown(connections[0].get("portal")),
        _shown(session.get("state")),
        str(up),
        _shown(session.get("error_recovery_level")),
    ]


def _path_row(path: Mapping[str, Any]) -> list[str]:
    latency = path.get("latency_us") or {}
    facts = ("lun", "portal", "state", "alua", "in_flight")
    shown = [_shown(path.get(fact)) for fact in facts]
    return [
        *shown,
        _shown(latency.get("p50")),
        _shown(latency.get("p99")),
        path.get("last_error") or "",
    ]


def _row(mount: Mapping[str, Any], lun: Mapping[str, Any]) -> list[str]:
    return [
        str(mount["mountpoint"]),
        _shown(mount["state"]),
        _shown(lun.get("name")),
        size(lun.get("size_bytes")),
        _shown(lun.get("cache")),
        size(lun.get("dirty_bytes")),
        _shown(lun.get("errors")),
        str(mount["source"]),
    ]


def _shown(value: object) -> str:
    return "-" if value is None else str(value)
