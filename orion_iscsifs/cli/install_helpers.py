"""`orion-iscsifs install-helpers`: `mount -t`, fstab and `umount` find this program."""

import shutil
import sys
from pathlib import Path
from typing import Final

import click

from orion_iscsifs.cli.report import PROGRAM
from orion_iscsifs.errors import MountError

HELPERS: Final = (
    f"mount.{PROGRAM}",
    f"mount.fuse.{PROGRAM}",
    f"umount.fuse.{PROGRAM}",
)


@click.command()
@click.option(
    "--prefix",
    default="/",
    metavar="DIR",
    show_default=True,
    help="link into DIR/sbin (mount(8) itself looks in /sbin only)",
    type=click.Path(path_type=Path),
)
def install_helpers(prefix: Path) -> None:
    """Link mount(8)'s and umount(8)'s helpers to this program."""
    program = _program()
    folder = prefix / "sbin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in HELPERS:
            _link(folder / name, program)
    except OSError as error:
        raise MountError(
            f"install-helpers: {error.filename or folder}: {error.strerror}",
            advice="run it as root, or give --prefix",
        ) from None


def _link(link: Path, program: Path) -> None:
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise MountError(f"install-helpers: {link}: is a file of somebody else", advice="remove it")
    link.symlink_to(program)
    click.echo(f"{link} -> {program}")


def _program() -> Path:
    """The console script: the one that runs, the one beside this Python, or the one in PATH."""
    candidates = [Path(sys.argv[0]), Path(sys.executable).parent / PROGRAM]
    if found := shutil.which(PROGRAM):
        candidates.append(Path(found))
    for candidate in candidates:
        if candidate.name == PROGRAM and candidate.is_file():
            return candidate.absolute()
    raise MountError(f"install-helpers: the command {PROGRAM} is not installed")
