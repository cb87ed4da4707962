"""`orion-iscsifs flush`: what `sync` would do if it reached a FUSE server."""

import click

from orion_iscsifs.cli.report import PROGRAM
from orion_iscsifs.cli.unmounting import flush_with_progress
from orion_iscsifs.config.places import runtime_dir
from orion_iscsifs.errors import MountError, OrionError
from orion_iscsifs.fuse.mountpoint import resolve
from orion_iscsifs.monitor.control import ControlClient, DaemonSilent, socket_path


@click.command()
@click.argument("mountpoint")
def flush(mountpoint: str) -> None:
    """Return when everything written to MOUNTPOINT so far is durable on the target."""
    resolved = resolve(mountpoint)
    client = ControlClient(socket_path(runtime_dir(), resolved))
    if not client.is_alive():
        raise MountError(
            f"flush {resolved}: no running mount there", advice=f"`{PROGRAM} status` lists them"
        )
    try:
        flush_with_progress(client)
    except DaemonSilent as error:
        raise MountError(
            f"flush {resolved}: {error}",
            advice=f"try again; `{PROGRAM} umount --force {resolved}` ends a daemon that hangs",
        ) from None
    except OrionError as error:
        advice = "what was written stays queued, and is tried again"
        raise MountError(f"flush {resolved}: {error}", advice=advice) from None
