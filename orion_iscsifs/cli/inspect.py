"""`orion-iscsifs inspect`: what a LUN is, what it can do, and who has reserved it.

docs/operations.md describes the JSON document. The LUN is not locked, registered with or changed.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from orion_iscsifs import url
from orion_iscsifs.cli.mount import hide_arguments, settings
from orion_iscsifs.cli.report import size, warn
from orion_iscsifs.config import MountConfig
from orion_iscsifs.config.places import create_private, state_dir
from orion_iscsifs.errors import LunNotFound, UsageError

if TYPE_CHECKING:
    from orion_iscsifs.initiator.inspection import Inspection, Reservations
    from orion_iscsifs.initiator.probe import LunInfo
    from orion_iscsifs.scsi.alua import PortGroup
    from orion_iscsifs.scsi.inquiry import Designator
    from orion_iscsifs.scsi.reservation import Registration

_PROVISIONING: Final = {0: "not reported", 1: "resource", 2: "thin"}
_ASSOCIATIONS: Final = {0: "logical unit", 1: "target port", 2: "target device"}


@click.command()
@click.argument("source", metavar="URL")
@click.option("-o", "options", multiple=True, metavar="OPT,…", help="options as of a mount")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def inspect(source: str, options: tuple[str, ...], as_json: bool) -> None:
    """Show identity, capacity, limits, reservations and paths of a LUN, or of a target's LUNs."""
    parsed = url.parse(source)
    hide_arguments(f"inspect {parsed.redacted()}")
    if parsed.target is None:
        raise UsageError(
            f"{parsed.redacted()}: no target is named",
            advice=f"`orion-iscsifs discover {parsed.portal}` lists them",
        )
    config, warnings = settings(parsed, options)
    for warning in warnings:
        warn(warning)
    logging.getLogger("orion_iscsifs").addHandler(logging.NullHandler())
    parameters, found = _ask(parsed, config)
    _complain(found, parsed.lun)
    if as_json:
        luns = [_lun(each) for each in found]
        document = {"version": 1, "target": parsed.target, "session": parameters, "luns": luns}
        click.echo(json.dumps(document, indent=2))
    else:
        _print(parsed.target, parameters, found)


def _complain(found: "list[Inspection]", asked: int | None) -> None:
    """A LUN that was asked for by its number and can't be read is a failure."""
    if asked is not None and found[0].error is not None:
        raise found[0].error
    if not found:
        raise LunNotFound("the target shows no LUN to this initiator name")


def _ask(source: url.Source, config: MountConfig) -> "tuple[dict[str, Any], list[Inspection]]":
    import msgspec
    import trio

    from orion_iscsifs.initiator.dial import Nexus, Portal
    from orion_iscsifs.initiator.identity import hold_isid
    from orion_iscsifs.initiator.inspection import Inspection, inspect_luns
    from orion_iscsifs.initiator.session import open_session

    folder = create_private(state_dir())
    assert source.target is not None
    name = source.target
    # A target that goes away meanwhile is not waited for as a mount would wait.
    patience_s = config.session.login_timeout_s
    session_config = msgspec.structs.replace(config.session, replacement_timeout_s=patience_s)

    async def ask() -> tuple[dict[str, Any], list[Inspection]]:
        with hold_isid(folder, name) as isid:
            nexus = Nexus(target_name=name, isid=isid, config=session_config)
            async with open_session(Portal(source.host, source.port), nexus) as session:
                found = await inspect_luns(session, source.lun)
                parameters = dataclasses.asdict(session.parameters)
                return {"portal": str(session.portal), "parameters": parameters}, found

    return trio.run(ask)


# -- JSON ------------------------------------------------------------------------------------------


def _lun(found: "Inspection") -> dict[str, Any]:
    return {
        "lun": found.number,
        "error": None if found.error is None else found.error.line,
        "serial": found.serial or None,
        "designators": [_designator(one) for one in found.designators],
        "vpd_pages": found.pages,
        "rotation_rate": found.rotation_rate,
        **(_facts(found.info) if found.info is not None else {}),
        "reservations": _reservations(found.reservations),
        "alua": _alua(found),
        "commands": None
        if found.commands is None
        else [
            {"opcode": one.opcode, "service_action": one.service_action} for one in found.commands
        ],
    }


def _designator(one: "Designator") -> dict[str, Any]:
    from orion_iscsifs.scsi.inquiry import DesignatorType

    known = one.kind in set(DesignatorType)
    kind = DesignatorType(one.kind).name.lower() if known else f"type {one.kind}"
    association = _ASSOCIATIONS.get(one.association, str(one.association))
    return {"association": association, "type": kind, "value": one.text}


def _facts(info: "LunInfo") -> dict[str, Any]:
    identity, capacity, limits = info.identity, info.capacity, info.limits
    return {
        "name": info.name or None,
        "vendor": identity.vendor,
        "product": identity.product,
        "revision": identity.revision,
        "size_bytes": capacity.size_bytes,
        "blocks": capacity.blocks,
        "block_size": capacity.block_bytes,
        "physical_block_size": capacity.physical_block_bytes,
        "lowest_aligned_lba": capacity.lowest_aligned_lba,
        "write_protected": info.mode.write_protected or info.mode.software_write_protect,
        "limits": dataclasses.asdict(limits),
        "provisioning": {
            "type": _PROVISIONING.get(info.provisioning.provisioning_type, "unknown"),
            "enabled": capacity.provisioning,
            "unmap": info.provisioning.unmap,
            "write_same_16_unmap": info.provisioning.write_same_16_unmap,
            "write_same_10_unmap": info.provisioning.write_same_10_unmap,
            "reads_zeroes": info.reads_zeroes,
        },
        "caching": {
            "write_cache": info.mode.write_cache,
            "read_cache": info.mode.read_cache,
            "dpofua": info.mode.dpofua,
        },
    }


def _reservations(found: "Reservations | None") -> dict[str, Any] | None:
    from orion_iscsifs.scsi.reservation import type_words

    if found is None:
        return None
    holder = found.told.holder
    capabilities = found.capabilities
    return {
        "generation": found.told.generation,
        "persist_through_power_loss": None
        if capabilities is None
        else capabilities.persist_capable,
        "holder": None
        if holder is None
        else {"key": f"{holder.key:#018x}", "type": type_words(holder.kind)},
        "registrations": [_registration(one) for one in found.registrations],
    }


def _registration(one: "Registration") -> dict[str, Any]:
    return {
        "key": f"{one.key:#018x}",
        "initiator": one.initiator.name or None,
        "isid": None if one.initiator.isid is None else one.initiator.isid.hex(),
        "holder": one.is_holder,
        "relative_target_port": one.relative_port or None,
    }


def _alua(found: "Inspection") -> dict[str, Any] | None:
    if found.port_groups is None:
        return None
    return {
        "own_group": found.own_group,
        "own_port": found.own_port,
        "groups": [_group(group) for group in found.port_groups.groups],
    }


def _group(group: "PortGroup") -> dict[str, Any]:
    return {
        "tag": group.tag,
        "state": group.access.words,
        "preferred": group.preferred,
        "ports": list(group.ports),
    }


# -- text ------------------------------------------------------------------------------------------


def _print(target: str, session: dict[str, Any], found: "Iterable[Inspection]") -> None:
    from rich.table import Table

    from orion_iscsifs.cli.tables import console

    out = console()
    out.print(f"{target} at {session['portal']}")
    for lun in found:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for name, text in _rows(lun):
            table.add_row(name, text)
        out.print()
        out.print(table)
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in session["parameters"].items():
        if value is not None:
            table.add_row(name, str(value))
    out.print()
    out.print("Negotiated:")
    out.print(table)


def _rows(lun: "Inspection") -> Iterator[tuple[str, str]]:
    yield f"LUN {lun.number}", "" if lun.error is None else lun.error.line
    if lun.info is not None:
        yield from _identity_rows(lun, lun.info)
        yield from _ability_rows(lun.info)
    yield from _reservation_rows(lun.reservations)
    if lun.port_groups is not None:
        for group in lun.port_groups.groups:
            own = ", this path" if group.tag == lun.own_group else ""
            preferred = ", preferred" if group.preferred else ""
            yield "access (ALUA)", f"group {group.tag}: {group.access.words}{preferred}{own}"
    elif lun.info is not None:
        yield "access (ALUA)", "none: every path alike"
    if lun.commands is not None:
        yield "commands", " ".join(sorted({f"{one.opcode:02X}h" for one in lun.commands}))


def _identity_rows(lun: "Inspection", info: "LunInfo") -> Iterator[tuple[str, str]]:
    identity, capacity = info.identity, info.capacity
    yield "product", f"{identity.vendor} {identity.product} {identity.revision}".strip()
    yield "serial number", lun.serial or "-"
    for one in lun.designators:
        told = _designator(one)
        yield "designator", f"{told['type']} {told['value']} ({told['association']})"
    block, physical = capacity.block_bytes, capacity.physical_block_bytes
    kind = "512e" if block == 512 and physical == 4096 else "4Kn" if block == 4096 else ""
    yield "capacity", f"{size(capacity.size_bytes)} ({capacity.size_bytes} bytes)"
    yield "blocks", f"{block} bytes, physical {physical}" + (f" ({kind})" if kind else "")
    protected = info.mode.write_protected or info.mode.software_write_protect
    yield "write-protected", "yes" if protected else "no"
    if lun.rotation_rate:
        solid = lun.rotation_rate == 1
        yield "medium", "solid state" if solid else f"{lun.rotation_rate} rpm"


def _ability_rows(info: "LunInfo") -> Iterator[tuple[str, str]]:
    limits, block = info.limits, info.capacity.block_bytes
    for name, blocks in (
        ("longest transfer", limits.transfer_blocks_max),
        ("best transfer", limits.optimal_transfer_blocks),
        ("transfer granularity", limits.optimal_transfer_granularity),
        ("longest UNMAP", limits.unmap_blocks_max),
        ("UNMAP granularity", limits.optimal_unmap_granularity),
        ("longest WRITE SAME", limits.write_same_blocks_max),
    ):
        yield name, size(blocks * block) if blocks else "not reported"
    said = info.provisioning
    can = [form.value for form in info.discard_forms()]
    kind = _PROVISIONING.get(said.provisioning_type, "unknown")
    zeroes = "reads zeroes after it" if info.reads_zeroes else "content undefined after it"
    yield "provisioning", kind if not can else f"{kind}; {', '.join(can)}; {zeroes}"
    cache = "volatile write cache" if info.mode.write_cache else "no volatile write cache"
    yield "caching", cache + (", FUA" if info.mode.dpofua else "")


def _reservation_rows(found: "Reservations | None") -> Iterator[tuple[str, str]]:
    told = _reservations(found)
    if told is None:
        yield "reservation", "not supported"
        return
    holder = told["holder"]
    yield "reservation", "none" if holder is None else f"{holder['type']}, key {holder['key']}"
    for one in told["registrations"]:
        who = one["initiator"] or "an initiator that the device does not name"
        yield "registered", f"{who}, key {one['key']}" + (", holder" if one["holder"] else "")
