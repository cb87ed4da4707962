"""`orion-iscsifs cache`: the persistent logs and the tiers on the local disk, mounted or not.

DIR is a `log_dir` or `tier_dir`, or the folder of one log or tier in it. docs/operations.md
describes the JSON documents.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orion_iscsifs import url
from orion_iscsifs.cli.mount import hide_arguments, settings
from orion_iscsifs.cli.report import say, size, warn
from orion_iscsifs.cli.stores import examine_all, folders, is_tier
from orion_iscsifs.errors import BusyError, UsageError

if TYPE_CHECKING:
    from orion_iscsifs.config import MountConfig


@click.group()
def cache() -> None:
    """What is kept on the local disk: the logs of `cache=log`, and the tiers of `tier_dir=`."""


@cache.command("list")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def list_stores(folder: str, as_json: bool) -> None:
    """List the logs and tiers in DIR, whose they are, and what is in them."""
    logs, tiers = examine_all(folder)
    if as_json:
        click.echo(json.dumps({"version": 1, "logs": logs, "tiers": tiers}, indent=2))
        return
    if logs or not tiers:
        _show_logs(logs)
    if tiers:
        _show_tiers(tiers)


def _show_logs(logs: list[dict[str, Any]]) -> None:
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


def _show_tiers(tiers: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from orion_iscsifs.cli.tables import console

    table = Table(box=None)
    for title in ("TIER", "LUN", "TARGET", "SIZE", "USED", "STATE", "SEALED"):
        table.add_column(title)
    for tier in tiers:
        table.add_row(
            Path(tier["folder"]).name,
            tier["lun"] or "",
            tier["target"] or "",
            size(tier["size_bytes"]),
            size(tier["used_bytes"]),
            tier["state"],
            "yes" if tier["sealed"] else "no",
        )
    console().print(table)


@cache.command()
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def check(folder: str, as_json: bool) -> int:
    """Read every record of the logs and tiers in DIR; the exit code is 1 if one is damaged.

    No key is needed: the checksums are of what is stored.
    """
    logs, tiers = examine_all(folder, thoroughly=True)
    if as_json:
        click.echo(json.dumps({"version": 1, "logs": logs, "tiers": tiers}, indent=2))
    else:
        _tell_of_logs(logs)
        _tell_of_tiers(tiers)
    return 1 if any(one["state"] == "damaged" for one in logs + tiers) else 0


def _tell_of_logs(logs: list[dict[str, Any]]) -> None:
    for log in logs:
        sealed = ", sealed" if log["sealed"] else ""
        told = log["damage"] or (
            f"{log['state']}{sealed}; {log['records']} records,"
            f" {log['pending_bytes']} bytes are not on the target"
        )
        click.echo(f"{log['folder']}: {told}")


def _tell_of_tiers(tiers: list[dict[str, Any]]) -> None:
    for tier in tiers:
        sealed = ", sealed" if tier["sealed"] else ""
        told = f"{tier['state']}{sealed}"
        if tier["records"] is not None:
            told += f"; {tier['records']} records of {tier['frames']} frames"
        if tier["bad_records"]:
            told += f", {tier['bad_records']} are damaged and will be read from the target"
        if tier["damage"]:
            told += f"; the next mount does not use all of it: {tier['damage']}"
        click.echo(f"{tier['folder']}: {told}")


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
    """Remove the logs and tiers in DIR. A tier holds nothing that the target lacks."""
    from orion_iscsifs.localstore.files import LogError
    from orion_iscsifs.localstore.files import drop as drop_log
    from orion_iscsifs.tier.store import drop as drop_tier

    logs, tiers = examine_all(folder)
    for one in logs + tiers:
        if one["state"] == "in use":
            raise BusyError(f"{one['folder']}: in use by a mount", advice="unmount it first")
    for log in logs:
        if not force and log["state"] not in {"clean", "ended"}:
            raise LogError(
                f"log {log['folder']}: {log['state']}: holds data that the target may lack",
                advice="`orion-iscsifs cache replay` brings it there, --force gives it up",
            )
    for remove, found in ((drop_log, logs), (drop_tier, tiers)):
        for one in found:
            remove(Path(one["folder"]))
            say(f"{one['folder']}: removed")


@cache.command()
@click.argument("folder", metavar="DIR")
@click.option("--key-file", "old", required=True, metavar="FILE", help="the present key; -: stdin")
@click.option("--new-key-file", "new", required=True, metavar="FILE", help="the new one; -: stdin")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def rekey(folder: str, old: str, new: str, as_json: bool) -> None:
    """Give the sealed logs and tiers in DIR another key. The data is not rewritten."""
    from orion_iscsifs.localstore.files import LogError
    from orion_iscsifs.localstore.rekey import change_keys
    from orion_iscsifs.tier.superblock import SEALABLE

    if old == new == "-":
        raise UsageError("cache rekey: both keys from stdin", advice="name a file for one of them")
    keys = _key("--key-file", old), _key("--new-key-file", new)
    found = folders(folder)
    changed = change_keys(found, *keys, kinds=SEALABLE)
    if not changed:
        raise LogError(f"cache rekey: {folder}: nothing in it is sealed")
    if as_json:
        document: dict[str, Any] = {"version": 1, "logs": [], "tiers": []}
        for one in found:
            document["tiers" if is_tier(one) else "logs"].append(
                {"folder": str(one), "rekeyed": one in changed}
            )
        click.echo(json.dumps(document, indent=2))
        return
    for one in found:
        say(f"{one}: {'has the new key' if one in changed else 'is not sealed'}")


def _key(option: str, file: str) -> bytes:
    from orion_iscsifs.cli.keyfiles import read_key
    from orion_iscsifs.config.secrets import without_newline

    return without_newline(f"{option} {file}", read_key(option, file)).reveal()
