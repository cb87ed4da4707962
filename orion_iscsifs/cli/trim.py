"""`orion-iscsifs trim`: tell the target that a range of a LUN is not needed any more."""

import json
import os
from contextlib import suppress

import click

from orion_iscsifs.cli.report import PROGRAM, say, size
from orion_iscsifs.config.places import runtime_dir
from orion_iscsifs.config.values import size_bytes
from orion_iscsifs.errors import MountError, UsageError
from orion_iscsifs.fuse import mountpoint as mountpoints
from orion_iscsifs.monitor.control import ControlClient, socket_path


@click.command()
@click.argument("file", metavar="MOUNTPOINT/lunN")
@click.option("--offset", default="0", metavar="N", help="first byte (K, M, G, T suffixes)")
@click.option("--length", default=None, metavar="N", help="bytes; by itself: to the end")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def trim(file: str, offset: str, length: str | None, as_json: bool) -> None:
    """Discard a range of the LUN behind a device file: its content is lost."""
    try:
        start = 0 if offset == "0" else size_bytes(offset)
        count = None if length is None else size_bytes(length)
    except ValueError as error:
        raise UsageError(f"trim {file}: --offset, --length: {error}") from None
    mountpoint, name = _place(file)
    client = ControlClient(socket_path(runtime_dir(), mountpoint))
    if not client.is_alive():
        raise MountError(f"trim {file}: no running mount there")
    request = {"file": name, "offset": start, "length": count}
    try:
        *_, answer = client.request("trim", on=request)
    except MountError as error:
        raise MountError(f"trim {file}: {error}") from None
    finally:
        # Also after a failure: a part may be gone.
        _forget_pages(file)
    if as_json:
        known = ("asked_bytes", "discarded_bytes", "granularity_bytes")
        click.echo(json.dumps({"version": 1, "file": file, **{key: answer[key] for key in known}}))
        return
    asked, done = answer["asked_bytes"], answer["discarded_bytes"]
    click.echo(f"{file}: {size(done)} discarded ({done} bytes)")
    if done < asked:
        unit = answer["granularity_bytes"]
        say(f"{asked - done} bytes at the ends were kept: only whole {unit}-byte units can go")


def _forget_pages(file: str) -> None:
    """The kernel's page cache must not go on showing what has been discarded.

    It is asked from here, since a daemon that waits for its own kernel may wait for itself. Pages
    that a program has mapped stay.
    """
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _place(file: str) -> tuple[str, str]:
    """The mount point and the file's name in it."""
    resolved = mountpoints.resolve(file)
    above = [m.mountpoint for m in mountpoints.ours() if resolved.startswith(f"{m.mountpoint}/")]
    if not above:
        raise UsageError(
            f"trim {file}: not a device file of a mount", advice=f"`{PROGRAM} status` lists them"
        )
    mountpoint = max(above, key=len)
    return mountpoint, resolved[len(mountpoint) + 1 :]
