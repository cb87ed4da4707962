"""`orion-iscsifs cache`: the persistent logs on the local disk, mounted or not.

DIR is a `log_dir`, or the folder of one log in it. docs/operations.md describes the JSON documents.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orion_iscsifs import url
from orion_iscsifs.cli.mount import hide_arguments, settings
from orion_iscsifs.cli.report import say, size, warn
from orion_iscsifs.errors import BusyError, OrionError, UsageError

if TYPE_CHECKING:
    from orion_iscsifs.config import MountConfig
    from orion_iscsifs.localstore.superblock import Superblock


@click.group()
def cache() -> None:
    """The persistent logs of `cache=log`: what is in them, and how to get it out."""


@cache.command("list")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def list_logs(folder: str, as_json: bool) -> None:
    """List the logs in DIR, whose they are, and what is in them."""
    logs = [_examine(path) for path in _folders(folder)]
    if as_json:
        click.echo(json.dumps({"version": 1, "logs": logs}, indent=2))
        return
    from rich.table import Table

    from orion_iscsifs.cli.tables import console

    table = Table(box=None)
    for title in ("LOG", "LUN", "TARGET", "SIZE", "STATE", "SEALED", "NOT ON THE TARGET"):
        table.add_column(title)
    for log in logs:
        table.add_row(
            Path(log["folder"]).name,
            log["lun"] or "",
            log["target"] or "",
            size(log["size_bytes"]),
            log["state"],
            "yes" if log["sealed"] else "no",
            size(log["pending_bytes"] or 0),
        )
    console().print(table)


@cache.command()
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def check(folder: str, as_json: bool) -> int:
    """Read every record of the logs in DIR; the exit code is 1 if one is damaged.

    No key is needed: the checksums are of what is stored.
    """
    logs = [_examine(path) for path in _folders(folder)]
    if as_json:
        click.echo(json.dumps({"version": 1, "logs": logs}, indent=2))
    for log in [] if as_json else logs:
        sealed = ", sealed" if log["sealed"] else ""
        told = log["damage"] or (
            f"{log['state']}{sealed}; {log['records']} records,"
            f" {log['pending_bytes']} bytes are not on the target"
        )
        click.echo(f"{log['folder']}: {told}")
    return 1 if any(log["state"] == "damaged" for log in logs) else 0


@cache.command()
@click.argument("source")
@click.option("-o", "options", multiple=True, metavar="OPT,…", help="options as of the mount")
@click.option("--force", is_flag=True, help="although it is damaged, or may be out of date")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def replay(source: str, options: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Bring what is in the logs of SOURCE's LUNs to the target, without a mount.

    Give the options of the mount, log_dir= among them.
    """
    import msgspec

    from orion_iscsifs.config import CacheMode

    parsed = url.parse(source)
    hide_arguments(f"cache replay {parsed.redacted()}")
    config, warnings = settings(parsed, options)
    for warning in warnings:
        warn(warning)
    if config.cache.log_dir is None:
        raise UsageError("cache replay: where is the log?", advice="add -o log_dir=DIR")
    changed = msgspec.structs.replace(config.cache, mode=CacheMode.LOG, log_force=force)
    replayed = _replay(parsed, msgspec.structs.replace(config, cache=changed))
    if as_json:
        click.echo(json.dumps({"version": 1, "source": parsed.redacted(), "luns": replayed}))
        return
    for lun in replayed:
        click.echo(f"{lun['name']}: {lun['replayed_bytes']} bytes replayed")


def _replay(source: url.Source, config: "MountConfig") -> list[dict[str, Any]]:
    import trio

    from orion_iscsifs.stack import open_stack

    async def run() -> list[dict[str, Any]]:
        async with open_stack(source, config, "cache replay") as stack:
            found = [
                {"name": unit.path, "replayed_bytes": unit.dirty_bytes} for unit in stack.units
            ]
            await stack.drain()
            return found

    logging.getLogger("orion_iscsifs").addHandler(logging.NullHandler())
    return trio.run(run)


@cache.command()
@click.argument("folder", metavar="DIR")
@click.option("--force", is_flag=True, help="although it holds data that the target lacks")
def drop(folder: str, force: bool) -> None:
    """Remove the logs in DIR."""
    from orion_iscsifs.localstore.files import LogError
    from orion_iscsifs.localstore.files import drop as remove

    logs = [_examine(path) for path in _folders(folder)]
    for log in logs:
        if log["state"] == "in use":
            raise BusyError(f"log {log['folder']}: in use by a mount", advice="unmount it first")
        if not force and log["state"] not in {"clean", "ended"}:
            raise LogError(
                f"log {log['folder']}: {log['state']}: holds data that the target may lack",
                advice="`orion-iscsifs cache replay` brings it there, --force gives it up",
            )
    for log in logs:
        remove(Path(log["folder"]))
        say(f"{log['folder']}: removed")


@cache.command()
@click.argument("folder", metavar="DIR")
@click.option("--key-file", "old", required=True, metavar="FILE", help="the present key; -: stdin")
@click.option("--new-key-file", "new", required=True, metavar="FILE", help="the new one; -: stdin")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def rekey(folder: str, old: str, new: str, as_json: bool) -> None:
    """Give the sealed logs in DIR another key. The data is not rewritten."""
    from orion_iscsifs.localstore.files import LogError
    from orion_iscsifs.localstore.rekey import change_keys

    if old == new == "-":
        raise UsageError("cache rekey: both keys from stdin", advice="name a file for one of them")
    keys = _key("--key-file", old), _key("--new-key-file", new)
    folders = _folders(folder)
    changed = change_keys(folders, *keys)
    if not changed:
        raise LogError(f"cache rekey: {folder}: no log in it is sealed")
    if as_json:
        logs = [{"folder": str(one), "rekeyed": one in changed} for one in folders]
        click.echo(json.dumps({"version": 1, "logs": logs}, indent=2))
        return
    for one in folders:
        say(f"{one}: {'has the new key' if one in changed else 'is not sealed'}")


def _key(option: str, file: str) -> bytes:
    from orion_iscsifs.config.secrets import KEY_FILE_MAX_BYTES, key_of, read_key_file
    from orion_iscsifs.config.settings import passphrase

    if file == "-":
        content = sys.stdin.buffer.read(KEY_FILE_MAX_BYTES + 1)
        return passphrase(key_of(f"{option} -", content))
    key, warnings = read_key_file(option, Path(file).expanduser())
    for warning in warnings:
        warn(warning)
    return passphrase(key)


def _folders(folder: str) -> list[Path]:
    """The folder itself if it is a log, or else those in it that are."""
    from orion_iscsifs.localstore.superblock import NAMES

    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UsageError(f"cache: {path}: no such folder", advice="name a log_dir, or a log in it")

    def is_log(one: Path) -> bool:
        return any((one / name).exists() for name in NAMES)

    try:
        found = [path] if is_log(path) else sorted(one for one in path.iterdir() if is_log(one))
    except OSError as error:
        raise UsageError(f"cache: {path}: {error.strerror}") from None
    return found


def _examine(folder: Path) -> dict[str, Any]:
    """What is in one log. It is not changed; that of a running mount changes meanwhile."""
    from orion_iscsifs.cache.writelog import recover
    from orion_iscsifs.localstore.files import is_in_use
    from orion_iscsifs.localstore.store import LogStore

    told: dict[str, Any] = {"folder": str(folder), "lun": None, "target": None, "size_bytes": 0}
    told |= {"state": "damaged", "pending_bytes": None, "records": None, "damage": None}
    told |= {"sealed": None}
    in_use = is_in_use(folder)
    try:
        store = LogStore.open(folder, shared=True)
    except OrionError as error:
        return told | {"damage": str(error)}
    try:
        told |= _identity(store.superblock)
        if store.superblock.ended:
            return told | {"state": "ended", "pending_bytes": 0, "damage": None}
        epochs, scan = recover(store, time.monotonic())
        told |= {
            "pending_bytes": 0 if store.superblock.clean else epochs.live.covered_bytes,
            "records": scan.next_seq - scan.needed,
            "flushes": scan.last_epoch,
            "incomplete_end": scan.torn_bytes > 0,
        }
        if in_use:
            return told | {"state": "in use"}
        if store.superblock.clean:
            return told | {"state": "clean"}
        return (
            told
            | {"state": "damaged" if scan.damage else "to be replayed"}
            | ({"damage": scan.damage or None})
        )
    except OrionError as error:
        return told | {"damage": str(error)}
    finally:
        store.close()


def _identity(block: "Superblock") -> dict[str, Any]:
    return {
        "lun": block.lun,
        "target": block.target,
        "size_bytes": block.segments * block.segment_bytes,
        "lun_bytes": block.size_bytes,
        "created": block.created,
        "sealed": block.sealing is not None,
        "reservation_key": f"{block.key:#018x}" if block.key else None,
    }
