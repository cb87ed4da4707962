"""`orion-iscsifs umount`: returns only when the data is safe and the daemon has exited."""

import click

from orion_iscsifs.cli.unmounting import unmount_safely


@click.command()
@click.argument("mountpoint")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="S", help="seconds")
@click.option("--force", is_flag=True, help="unmount even if busy; give up what can't be written")
@click.option("--release", is_flag=True, help="give the reservation back: another host is next")
def umount(mountpoint: str, timeout_s: float | None, force: bool, release: bool) -> None:
    """Flush MOUNTPOINT, unmount it, and wait until everything is durable on the target.

    A mount with tier_dir= leaves its reservation at the target, so that the next one can trust the
    tier; --release does not.
    """
    unmount_safely(mountpoint, timeout_s=timeout_s, force=force, release=release)
