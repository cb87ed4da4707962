"""`orion-iscsifs discover`: which targets a portal names (SendTargets)."""

import json
from typing import TYPE_CHECKING

import click

from orion_iscsifs import url
from orion_iscsifs.cli.mount import hide_arguments, settings
from orion_iscsifs.cli.report import warn
from orion_iscsifs.config.places import create_private, state_dir

if TYPE_CHECKING:
    from orion_iscsifs.initiator.dial import Portal
    from orion_iscsifs.initiator.discovery import DiscoveredTarget


@click.command()
@click.argument("portal")
@click.option("-o", "options", multiple=True, metavar="OPT,…", help="options as of a mount")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def discover(portal: str, options: tuple[str, ...], as_json: bool) -> None:
    """List the targets of PORTAL (host[:port]) with their portals and portal groups."""
    source = url.parse_portal(portal)
    hide_arguments(f"discover {source.portal}")
    found = _ask(source, options)
    if as_json:
        click.echo(json.dumps(_document(source, found), indent=2))
    else:
        _print(source, found)


def _ask(source: url.Source, options: tuple[str, ...]) -> "list[DiscoveredTarget]":
    import trio

    from orion_iscsifs.initiator import discovery
    from orion_iscsifs.initiator.dial import Portal
    from orion_iscsifs.initiator.identity import hold_isid

    config, warnings = settings(source, options)
    for warning in warnings:
        warn(warning)
    with hold_isid(create_private(state_dir()), "discovery") as isid:
        asked = Portal(source.host, source.port)
        return trio.run(discovery.discover, asked, config.session, isid)


def _document(source: url.Source, found: "list[DiscoveredTarget]") -> dict[str, object]:
    return {
        "version": 1,
        "portal": source.portal,
        "targets": [
            {
                "name": target.name,
                "portals": [
                    {"host": p.host, "port": p.port, "group_tag": p.group_tag}
                    for p in target.portals
                ],
            }
            for target in found
        ],
    }


def _print(source: url.Source, found: "list[DiscoveredTarget]") -> None:
    from rich.table import Table

    from orion_iscsifs.cli.tables import console

    out = console()
    if not found:
        out.print(f"{source.portal}: no targets for this initiator name", markup=False)
        return
    table = Table("TARGET", "PORTAL", "GROUP", box=None, pad_edge=False)
    for target in found:
        for portal in target.portals:
            table.add_row(target.name, _address(portal), _group(portal))
    out.print(table)


def _address(portal: "Portal") -> str:
    host = f"[{portal.host}]" if ":" in portal.host else portal.host
    return f"{host}:{portal.port}".replace("[", "\\[")


def _group(portal: "Portal") -> str:
    return "-" if portal.group_tag is None else str(portal.group_tag)
