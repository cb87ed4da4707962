"""`orion-iscsifs discover`: which targets a portal names, and with `--luns` what they hold.

Exit code 1 only if the portal itself can't be asked: a target that refuses the login is a row of
the answer. docs/operations.md describes the JSON document.
"""

import json
import logging
from typing import TYPE_CHECKING, Any

import click

from orion_iscsifs import url
from orion_iscsifs.cli.mount import hide_arguments, settings
from orion_iscsifs.cli.report import one_line, size, warn
from orion_iscsifs.config import MountConfig
from orion_iscsifs.config.places import create_private, state_dir

if TYPE_CHECKING:
    from rich.table import Table

    from orion_iscsifs.initiator.portals import DiscoveredTarget
    from orion_iscsifs.initiator.survey import LunReport, TargetReport


@click.command()
@click.argument("portal")
@click.option("-o", "options", multiple=True, metavar="OPT,…", help="options as of a mount")
@click.option("--luns", is_flag=True, help="log in to each target and list its LUNs")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def discover(portal: str, options: tuple[str, ...], luns: bool, as_json: bool) -> None:
    """List the targets of PORTAL (host[:port] or a URL) with their portals and portal groups."""
    source = url.parse_portal(portal)
    hide_arguments(f"discover {source.portal}")
    config, warnings = settings(source, options)
    for warning in warnings:
        warn(warning)
    # What concerns one target is part of the answer; nothing of it goes to stderr unasked.
    logging.getLogger("orion_iscsifs").addHandler(logging.NullHandler())
    found = _ask(source, config, luns=luns)
    if as_json:
        click.echo(json.dumps(_document(source, found, luns=luns), indent=2))
    else:
        _print(source, found, luns=luns)


def _ask(source: url.Source, config: MountConfig, *, luns: bool) -> "list[TargetReport]":
    import trio

    from orion_iscsifs.initiator import discovery
    from orion_iscsifs.initiator.addresses import Portal
    from orion_iscsifs.initiator.identity import hold_isid
    from orion_iscsifs.initiator.survey import TargetReport, survey

    folder = create_private(state_dir())
    asked = Portal(source.host, source.port)

    async def ask() -> list[TargetReport]:
        with hold_isid(folder, "discovery") as isid:
            targets = await discovery.discover(asked, config.session, isid)
        if not luns:
            return [TargetReport(target) for target in targets]
        return await survey(targets, asked, config.session, lambda name: hold_isid(folder, name))

    return trio.run(ask)


# -- JSON ------------------------------------------------------------------------------------------


def _document(source: url.Source, found: "list[TargetReport]", *, luns: bool) -> dict[str, object]:
    targets = [_target(report.target) | (_contents(report) if luns else {}) for report in found]
    return {"version": 1, "portal": source.portal, "targets": targets}


def _target(target: "DiscoveredTarget") -> dict[str, Any]:
    return {
        "name": target.name,
        "portals": [
            {"host": portal.host, "port": portal.port, "group_tag": portal.group_tag}
            for portal in target.portals
        ],
        "left_out": [
            {"address": address.text, "why": address.rule.value} for address in target.left_out
        ],
    }


def _contents(report: "TargetReport") -> dict[str, Any]:
    return {
        "logged_in_at": None if report.portal is None else str(report.portal),
        "error": None if report.error is None else report.error.line,
        "luns": [_lun(lun) for lun in report.luns],
    }


def _lun(lun: "LunReport") -> dict[str, Any]:
    return {
        "lun": lun.number,
        "type": lun.kind,
        "vendor": lun.vendor,
        "product": lun.product,
        "revision": lun.revision,
        "size_bytes": lun.size_bytes,
        "block_size": lun.block_bytes,
        "error": None if lun.error is None else lun.error.line,
    }


# -- tables ----------------------------------------------------------------------------------------


def _print(source: url.Source, found: "list[TargetReport]", *, luns: bool) -> None:
    from orion_iscsifs.cli.tables import console

    out = console()
    if not found:
        out.print(f"{source.portal}: no targets for this initiator name")
        return
    out.print(_portal_table(found))
    if luns:
        out.print()
        out.print(_lun_table(found))


def _portal_table(found: "list[TargetReport]") -> "Table":
    """One row for each portal, those of a portal group together."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("TARGET", "PORTAL", "GROUP"):
        # On a narrow terminal a name takes two lines: a part of it would be of no use.
        table.add_column(title, overflow="fold")
    for report in found:
        for tag, portals in report.target.groups.items():
            for portal in portals:
                group = "-" if tag is None else str(tag)
                table.add_row(report.target.name, str(portal), group)
    return table


def _lun_table(found: "list[TargetReport]") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("TARGET", "LUN", "TYPE", "SIZE", "BLOCK", "PRODUCT", "REMARK"):
        right = title in {"LUN", "SIZE", "BLOCK"}
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for report in found:
        name = report.target.name
        for lun in report.luns:
            table.add_row(name, *_lun_row(lun))
        if not report.luns:
            remark = "no LUNs" if report.error is None else one_line(report.error.line)
            table.add_row(name, "-", "-", "-", "-", "-", remark)
    return table


def _lun_row(lun: "LunReport") -> list[str]:
    return [
        str(lun.number),
        lun.kind,
        size(lun.size_bytes),
        "-" if lun.block_bytes is None else str(lun.block_bytes),
        f"{lun.vendor} {lun.product} {lun.revision}".strip() or "-",
        "" if lun.error is None else one_line(lun.error.line),
    ]
