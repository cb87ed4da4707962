"""`orion-iscsifs luks`: LUKS volumes on LUNs, and in files.

TARGET is the URL of one LUN, or the path of a file or block device. Passphrases come from files
only: all of a file's content counts, as with cryptsetup's --key-file. docs/encryption.md describes
the JSON document.
"""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from orion_iscsifs import url
from orion_iscsifs.cli.keyfiles import read_key
from orion_iscsifs.cli.mount import hide_arguments, settings
from orion_iscsifs.cli.report import say, size, warn
from orion_iscsifs.errors import UsageError

if TYPE_CHECKING:
    from orion_iscsifs.block.device import BlockDevice
    from orion_iscsifs.crypt.headers import Header
    from orion_iscsifs.crypt.kdf import Kdf
    from orion_iscsifs.crypt.keys import Costs, PbkdfName
    from orion_iscsifs.crypt.volume import Slot

T = TypeVar("T")
_Command = Callable[..., None]

_options = click.option(
    "-o", "options", multiple=True, metavar="OPT,…", help="options as of a mount"
)
_key_file = click.option(
    "--key-file", metavar="FILE", required=True, help="all of it is the passphrase; -: stdin"
)


def _cost_options(command: _Command) -> _Command:
    """What a guess at the passphrase is to cost; the names are cryptsetup's."""
    for option in reversed(
        (
            click.option("--pbkdf", type=click.Choice(["pbkdf2", "argon2id", "argon2i"])),
            click.option("--hash", "hash_name", type=click.Choice(["sha1", "sha256", "sha512"])),
            click.option(
                "--iter-time",
                type=click.IntRange(1, 60_000),
                default=2000,
                metavar="MS",
                help="how long opening is to take on this host (2000)",
            ),
            click.option(
                "--pbkdf-force-iterations",
                "iterations",
                type=click.IntRange(1),
                metavar="N",
                help="so many iterations or passes, without measuring",
            ),
            click.option(
                "--pbkdf-memory",
                "memory",
                type=click.IntRange(1),
                metavar="KIB",
                help="Argon2: memory (1 GiB, at most a quarter of this host's)",
            ),
            click.option(
                "--pbkdf-parallel",
                "lanes",
                type=click.IntRange(1),
                metavar="N",
                help="Argon2: lanes (processors, at most 4)",
            ),
        )
    ):
        command = option(command)
    return command


@click.group()
def luks() -> None:
    """LUKS volumes: make one, change its keys, look at its header.

    TARGET is the URL of one LUN, or the path of a file or block device.
    """


@luks.command("format")
@click.argument("target")
@_options
@_key_file
@click.option("--type", "kind", type=click.Choice(["luks1", "luks2"]), default="luks2")
@click.option("--sector-size", type=click.Choice(["512", "4096"]), help="of the encryption")
@click.option("--key-size", type=click.Choice(["256", "512"]), default="512", help="bits (512)")
@click.option("--label", default="", help="a name that others see (LUKS2)")
@_cost_options
@click.option("--force", is_flag=True, help="although something seems to be there: it is lost")
def format_(
    target: str,
    options: tuple[str, ...],
    key_file: str,
    kind: str,
    sector_size: str | None,
    key_size: str,
    label: str,
    force: bool,
    **costs: object,
) -> None:
    """Make an encrypted volume of TARGET. What was on it is lost."""
    from orion_iscsifs.crypt.manage import Format, format_volume

    version: Literal[1, 2] = 1 if kind == "luks1" else 2
    if len(label.encode()) > 47:
        raise UsageError("luks format: a label has 47 bytes at most")
    how = Format(
        version=version,
        sector_bytes=None if sector_size is None else int(sector_size),
        key_bytes=int(key_size) // 8,
        costs=_costs(costs, "pbkdf2" if version == 1 else "argon2id"),
        label=label,
        force=force,
    )
    passphrase = _passphrase(key_file)

    async def work(device: "BlockDevice") -> "Header":
        return await format_volume(device, passphrase, how)

    header = _run("format", target, options, work, writes=True)
    say(f"{_shown(target)}: a LUKS{header.version} volume, UUID {header.uuid}")


@luks.command("add-key")
@click.argument("target")
@_options
@_key_file
@click.option("--new-key-file", metavar="FILE", required=True, help="the one to add; -: stdin")
@_cost_options
def add_key(
    target: str, options: tuple[str, ...], key_file: str, new_key_file: str, **costs: object
) -> None:
    """Let the passphrase in --new-key-file open TARGET too; --key-file is one that does."""
    from orion_iscsifs.crypt import headers, manage

    if key_file == new_key_file == "-":
        raise UsageError("luks add-key: only one of the two passphrases can come from stdin")
    existing, new = _passphrase(key_file), _passphrase(new_key_file)

    async def work(device: "BlockDevice") -> int:
        header = await headers.load(device)
        _mention(header)
        default: PbkdfName = "pbkdf2" if header.version == 1 else "argon2id"
        _, number = await _explained(
            existing, manage.add_key(device, header, existing, new, _costs(costs, default))
        )
        return number

    number = _run("add-key", target, options, work, writes=True)
    say(f"{_shown(target)}: key slot {number} is in use now")


@luks.command("remove-key")
@click.argument("target")
@_options
@click.option("--slot", type=click.IntRange(0, 31), metavar="N", help="by its number")
@click.option("--key-file", metavar="FILE", help="the one that this passphrase opens; -: stdin")
@click.option("--force", is_flag=True, help="although it is the last one: the data is lost")
def remove_key(
    target: str, options: tuple[str, ...], slot: int | None, key_file: str | None, force: bool
) -> None:
    """Destroy a key slot of TARGET: its passphrase opens it no more."""
    from orion_iscsifs.crypt import headers, manage
    from orion_iscsifs.crypt.errors import LuksError

    if (slot is None) == (key_file is None):
        raise UsageError("luks remove-key: which one?", advice="give --slot or --key-file")
    passphrase = None if key_file is None else _passphrase(key_file)

    async def work(device: "BlockDevice") -> int:
        header = await headers.load(device)
        _mention(header)
        volume = header.volume
        if passphrase is not None:
            found = await _explained(passphrase, manage.slot_of(device, volume, passphrase))
        else:
            named = [one for one in volume.slots if one.number == slot]
            if not named:
                raise LuksError(
                    f"luks remove-key: there is no key in slot {slot}",
                    advice="`orion-iscsifs luks dump` lists them",
                )
            found = named[0]
        await manage.remove_key(device, header, found, force=force)
        return found.number

    number = _run("remove-key", target, options, work, writes=True)
    say(f"{_shown(target)}: key slot {number} is destroyed")


@luks.command()
@click.argument("target")
@_options
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def dump(target: str, options: tuple[str, ...], as_json: bool) -> None:
    """Show the header of TARGET, without any secret. Nothing is locked, reserved or changed."""
    from orion_iscsifs.crypt import headers

    header = _run("dump", target, options, headers.load, writes=False)
    document = _document(header)
    if as_json:
        click.echo(json.dumps({"version": 1, "target": _shown(target), "luks": document}, indent=2))
        return
    for name in ("version", "uuid", "label", "cipher", "key_bits", "sector_bytes"):
        click.echo(f"{name.replace('_', ' ')}: {_printable(str(document[name]))}")
    length = document["payload_size_bytes"]
    click.echo(
        f"payload: from {document['payload_offset_bytes']},"
        f" {'to the end of the device' if length is None else size(length)}"
    )
    if document["damage"]:
        click.echo(f"damage: {document['damage']}")
    for slot in document["slots"]:
        costs = ", ".join(f"{name} {value}" for name, value in slot["kdf"].items())
        click.echo(f"slot {slot['number']}: {costs}")


# -- what they share -------------------------------------------------------------------------------


def _document(header: "Header") -> dict[str, Any]:
    from orion_iscsifs.crypt.luks2 import Luks2
    from orion_iscsifs.crypt.volume import ENCRYPTION

    volume = header.volume
    label = header.label.rstrip(b"\0") if isinstance(header, Luks2) else b""
    return {
        "version": volume.version,
        "uuid": volume.uuid,
        "label": label.decode("utf-8", "replace"),
        "damage": header.damage or None,
        "cipher": ENCRYPTION,
        "key_bits": max((slot.key_bytes * 8 for slot in volume.slots), default=None),
        "sector_bytes": volume.payload.sector_bytes,
        "payload_offset_bytes": volume.payload.offset_bytes,
        "payload_size_bytes": volume.payload.size_bytes,
        "slots": [_slot(slot) for slot in volume.slots],
    }


def _printable(text: str) -> str:
    """What a header says, without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _slot(slot: "Slot") -> dict[str, Any]:
    return {
        "number": slot.number,
        "kdf": _kdf(slot.kdf),
        "offset_bytes": slot.offset_bytes,
        "size_bytes": slot.room_bytes,
    }


def _kdf(kdf: "Kdf") -> dict[str, Any]:
    from orion_iscsifs.crypt.kdf import Pbkdf2

    if isinstance(kdf, Pbkdf2):
        return {"type": "pbkdf2", "hash": kdf.hash, "iterations": kdf.iterations}
    return {
        "type": kdf.kind,
        "passes": kdf.time,
        "memory_kib": kdf.memory_kib,
        "lanes": kdf.lanes,
    }


def _costs(words: dict[str, object], default: "PbkdfName") -> "Costs":
    """Of `_cost_options`, whose types click has seen to."""
    from orion_iscsifs.crypt.kdf import ITERATIONS_MIN
    from orion_iscsifs.crypt.keys import PASSES_MIN, Costs

    costs = Costs(
        pbkdf=cast("PbkdfName", words["pbkdf"] or default),
        hash=str(words["hash_name"] or "sha256"),
        iter_time_s=cast("int", words["iter_time"]) / 1000,
        iterations=cast("int | None", words["iterations"]),
        memory_kib=cast("int | None", words["memory"]),
        lanes=cast("int | None", words["lanes"]),
    )
    if costs.pbkdf == "pbkdf2" and (costs.memory_kib or costs.lanes):
        raise UsageError("luks: --pbkdf-memory and --pbkdf-parallel are Argon2's")
    least = ITERATIONS_MIN if costs.pbkdf == "pbkdf2" else PASSES_MIN
    if costs.iterations is not None and costs.iterations < least:
        raise UsageError(f"luks: --pbkdf-force-iterations: {costs.pbkdf} takes {least} at least")
    return costs


def _passphrase(key_file: str) -> bytes:
    return read_key("--key-file", key_file)


async def _explained(passphrase: bytes, work: Awaitable[T]) -> T:
    """With a word about newlines where the passphrase opens nothing."""
    from orion_iscsifs.crypt.errors import WrongPassphrase
    from orion_iscsifs.crypt.opening import newline_advice

    try:
        return await work
    except WrongPassphrase as error:
        raise WrongPassphrase(str(error), advice=newline_advice(passphrase)) from None


def _mention(header: "Header") -> None:
    if header.damage:
        warn(f"LUKS2: {header.damage}: both are written anew")


def _shown(target: str) -> str:
    return url.parse(target).redacted() if "://" in target else target


def _run(
    command: str,
    target: str,
    options: tuple[str, ...],
    work: "Callable[[BlockDevice], Awaitable[T]]",
    *,
    writes: bool,
) -> T:
    """Do it with the device that TARGET names, as its only user if it `writes`."""
    import trio

    hide_arguments(f"luks {command} {_shown(target)}")
    logging.getLogger("orion_iscsifs").addHandler(logging.NullHandler())
    opened = _lun if "://" in target else _file

    async def run() -> T:
        async with opened(target, options, writes=writes) as device:
            return await work(device)

    return trio.run(run)


@asynccontextmanager
async def _lun(
    target: str, options: tuple[str, ...], *, writes: bool
) -> AsyncIterator["BlockDevice"]:
    """The LUN itself, without cache: reserved as for a mount if it is to be written."""
    import msgspec

    from orion_iscsifs.config import CacheMode, MountConfig
    from orion_iscsifs.stack import open_stack

    source = url.parse(target)
    if source.target is None or source.lun is None:
        raise UsageError(
            f"luks {source.redacted()}: no LUN is named", advice="iscsi://host/iqn/lun"
        )
    config, warnings = settings(source, options)
    for warning in warnings:
        warn(warning)

    def alone(mode: CacheMode, *, read_only: bool) -> MountConfig:
        return msgspec.structs.replace(
            config,
            luks=None,
            tier=None,
            cache=msgspec.structs.replace(config.cache, mode=mode),
            fuse=msgspec.structs.replace(config.fuse, read_only=read_only),
        )

    if writes and config.cache.log_dir is not None:
        # A mount that only reads refuses a log with data that the LUN lacks.
        async with open_stack(source, alone(CacheMode.LOG, read_only=True), "luks"):
            pass
    changed = alone(CacheMode.NONE, read_only=config.fuse.read_only or not writes)
    async with open_stack(source, changed, "luks") as stack:
        yield stack.units[0].top


@asynccontextmanager
async def _file(
    target: str, options: tuple[str, ...], *, writes: bool
) -> AsyncIterator["BlockDevice"]:
    from orion_iscsifs.block.align import AlignedDevice
    from orion_iscsifs.cli.image import open_image

    if options:
        raise UsageError(f"luks {target}: -o options are for the URL of a LUN")
    with open_image(target, writable=writes) as image:
        yield AlignedDevice(cast("BlockDevice", image))
