"""`orion-iscsifs target serve`: the embedded iSCSI target as a program."""

import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config.secrets import length_warnings, read_secret_file
from orion_iscsifs.config.settings import Secret
from orion_iscsifs.config.values import size_bytes
from orion_iscsifs.errors import OrionError, UsageError
from orion_iscsifs.scsi.lun import LUN_MAX
from orion_iscsifs.target import (
    Chap,
    FileDevice,
    Portal,
    RamDevice,
    TargetConfig,
    open_backing,
    serve,
)
from orion_iscsifs.target.portals import bracketed
from orion_iscsifs.target.settings import Limits

DEFAULT_IQN: Final = "iqn.2026-11.org.orion-iscsifs:disk"
DEFAULT_LISTEN: Final = "127.0.0.1:3260"
CONNECTIONS_MAX: Final = 64
FOLLOW_INTERVAL_S: Final = 1.0
_BLOCK_BYTES: Final = (512, 4096)
_LUN_OPTION: Final = re.compile(r"(?:size=.*|ro|block=.*|physical=.*)\Z")
_NAME: Final = re.compile(r"(?:iqn|eui|naa)\.[a-z0-9.:\-]{1,219}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class LunOption:
    """`--lun N=PATH[,size=SIZE][,ro][,block=4096][,physical=512]`; `path` is None for memory."""

    number: int
    path: str | None
    size: int | None
    read_only: bool
    block_bytes: int
    physical_block_bytes: int = 4096


def parse_lun(text: str) -> LunOption:
    """Raises UsageError. Options are taken from the end, so that a path may contain commas."""
    number, equals, rest = text.partition("=")
    if not equals or not re.fullmatch(r"[0-9]{1,5}", number, re.ASCII) or int(number) > LUN_MAX:
        raise UsageError(f"--lun {text}: not N=PATH, with N from 0 to {LUN_MAX}")
    parts = rest.split(",")
    options: dict[str, str] = {}
    while len(parts) > 1 and _LUN_OPTION.match(parts[-1]):
        word, _, value = parts.pop().partition("=")
        options[word] = value
    path: str | None = ",".join(parts)
    size = _size(text, options["size"]) if "size" in options else None
    if path is not None and path.startswith("ram:"):
        size, path = _size(text, path.removeprefix("ram:")), None
    if path == "":
        raise UsageError(f"--lun {text}: the path is empty")
    return LunOption(
        number=int(number),
        path=path,
        size=size,
        read_only="ro" in options,
        block_bytes=_block_bytes(text, "block", options.get("block", "512")),
        physical_block_bytes=_block_bytes(text, "physical", options.get("physical", "4096")),
    )


def _size(text: str, size: str) -> int:
    try:
        return size_bytes(size)
    except ValueError as error:
        raise UsageError(f"--lun {text}: {size!r} {error}") from None


def _block_bytes(text: str, word: str, value: str) -> int:
    if value not in {str(size) for size in _BLOCK_BYTES}:
        raise UsageError(f"--lun {text}: {word}={value} is not 512 or 4096")
    return int(value)


def parse_portal(text: str) -> Portal:
    """`HOST:PORT[,GROUP]`, `[V6]:PORT`, `HOST` (port 3260, portal group 1)."""
    match = re.fullmatch(
        r"(\[[0-9a-fA-F:.%\w]+\]|[^:\[\],]*)(?::([0-9]{1,5}))?(?:,([0-9]{1,5}))?", text, re.ASCII
    )
    port = 3260 if match is None or match[2] is None else int(match[2])
    group = 1 if match is None or match[3] is None else int(match[3])
    if match is None or not match[1] or max(port, group) > 0xFFFF:
        raise UsageError(f"--listen {text}: not HOST:PORT[,GROUP]")
    return Portal(match[1].strip("[]"), port, group)


def _secret(option: str, user: str | None, path: Path | None) -> Secret | None:
    """The secret that belongs to `user`; both or neither are given."""
    if (user is None) != (path is None):
        raise UsageError(f"--{option}-user and --{option}-secret-file belong together")
    if path is None:
        return None
    secret, warnings = read_secret_file(f"--{option}-secret-file", path)
    for warning in [*warnings, *length_warnings(f"--{option}-secret-file", secret)]:
        click.echo(f"orion-iscsifs: warning: {warning}", err=True)
    return secret


def _chap(
    user: str | None,
    secret_file: Path | None,
    mutual_user: str | None,
    mutual_secret_file: Path | None,
) -> Chap | None:
    secret = _secret("chap", user, secret_file)
    mutual = _secret("mutual", mutual_user, mutual_secret_file)
    if user is None or secret is None:
        if mutual is not None:
            raise UsageError("--mutual-user needs --chap-user: a target never proves itself alone")
        return None
    if mutual is not None and mutual == secret:
        raise UsageError("the two secrets are the same", advice="each direction needs its own")
    return Chap(user=user, secret=secret, mutual_user=mutual_user, mutual_secret=mutual)


@click.group()
def target() -> None:
    """The embedded iSCSI target, for trying things out and for tests."""


@target.command("serve")
@click.option(
    "--listen",
    "listen",
    multiple=True,
    default=[DEFAULT_LISTEN],
    show_default=True,
    metavar="HOST:PORT[,GROUP]",
    help="A portal; repeatable. A session stays within a portal group (1, if not given).",
)
@click.option(
    "--iqn", default=DEFAULT_IQN, show_default=True, metavar="NAME", help="The target's iSCSI name."
)
@click.option(
    "--lun",
    "luns",
    multiple=True,
    required=True,
    metavar="N=PATH[,size=SIZE][,ro][,block=4096][,physical=512]",
    help="A logical unit; repeatable. PATH may be ram:SIZE. When a file is resized (truncate -s), "
    "initiators are told within a second.",
)
@click.option("--chap-user", metavar="U", help="Initiators must log in with CHAP as this user.")
@click.option(
    "--chap-secret-file",
    type=click.Path(path_type=Path),
    metavar="F",
    help="Holds the secret of --chap-user.",
)
@click.option("--mutual-user", metavar="U", help="The target proves itself as this user too.")
@click.option(
    "--mutual-secret-file",
    type=click.Path(path_type=Path),
    metavar="F",
    help="Holds the secret of --mutual-user.",
)
@click.option(
    "--max-connections",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Most connections of one session (MC/S).",
)
@click.option(
    "--erl",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Highest ErrorRecoveryLevel: 0, 1 or 2.",
)
@click.option("--digests", is_flag=True, help="Insist on header digests.")
def serve_command(
    listen: tuple[str, ...],
    iqn: str,
    luns: tuple[str, ...],
    chap_user: str | None,
    chap_secret_file: Path | None,
    mutual_user: str | None,
    mutual_secret_file: Path | None,
    max_connections: int,
    erl: int,
    digests: bool,
) -> None:
    """Serve files or memory as iSCSI disks until SIGTERM or Ctrl-C."""
    try:
        if not 1 <= max_connections <= CONNECTIONS_MAX:
            raise UsageError(f"--max-connections {max_connections}: not 1 to {CONNECTIONS_MAX}")
        if erl not in (0, 1, 2):
            raise UsageError(f"--erl {erl}: not 0, 1 or 2")
        if not _NAME.match(iqn):
            raise UsageError(
                f"--iqn {iqn}: not an iSCSI name", advice="iqn.YYYY-MM.reversed.domain:name"
            )
        units = [parse_lun(text) for text in luns]
        if len({unit.number for unit in units}) != len(units):
            raise UsageError("--lun: the same number twice")
        portals = [parse_portal(text) for text in listen]
        chap = _chap(chap_user, chap_secret_file, mutual_user, mutual_secret_file)
        limits = Limits(digests=digests, max_connections=max_connections, error_recovery_level=erl)
        trio.run(_serve, iqn, units, portals, chap, limits)
    except OrionError as error:
        click.echo(f"orion-iscsifs: {error.line}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)


async def _serve(
    iqn: str,
    options: Sequence[LunOption],
    portals: Sequence[Portal],
    chap: Chap | None,
    limits: Limits,
) -> None:
    async with AsyncExitStack() as stack:
        # Devices below, portals above: sessions end before a backing file is flushed and closed.
        units: dict[int, BlockDevice] = {}
        for option in options:
            units[option.number] = await stack.enter_async_context(_device(option))
        config = TargetConfig(iqn=iqn, units=units, chap=chap, lasting_reservations=False)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            running = await stack.enter_async_context(serve([config], portals, limits=limits))
            click.echo(f"ready {running.url()}")
            sys.stdout.flush()
            if len(portals) > 1:
                for (host, port), group in zip(running.portals, running.portal_groups, strict=True):
                    click.echo(f"portal {bracketed(host)}:{port},{group}", err=True)
            async with trio.open_nursery() as nursery:
                files = {number: d for number, d in units.items() if isinstance(d, FileDevice)}
                nursery.start_soon(_follow, files)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()


async def _follow(files: Mapping[int, FileDevice]) -> None:
    """Notice files that are resized behind our back (truncate -s)."""
    while True:
        await trio.sleep(FOLLOW_INTERVAL_S)
        for number, device in files.items():
            if device.follow():
                click.echo(f"lun {number} has {device.geometry.size_bytes} bytes now", err=True)


def _device(option: LunOption) -> RamDevice | FileDevice:
    if option.path is None:
        assert option.size is not None
        if option.size % option.block_bytes:
            raise UsageError(f"--lun {option.number}: {option.size} bytes are not whole blocks")
        return RamDevice(
            option.size,
            block_bytes=option.block_bytes,
            physical_block_bytes=option.physical_block_bytes,
            read_only=option.read_only,
        )
    return open_backing(
        option.path,
        size_bytes=option.size,
        block_bytes=option.block_bytes,
        physical_block_bytes=option.physical_block_bytes,
        read_only=option.read_only,
    )


if __name__ == "__main__":
    target(prog_name="orion-iscsifs target")
