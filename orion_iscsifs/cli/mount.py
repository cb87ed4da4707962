"""`orion-iscsifs mount`: check everything that can be checked in front, then start the daemon."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from orion_iscsifs import url
from orion_iscsifs.cli.report import PROGRAM, Exit, Failed, describe, exit_code, verbosity, warn
from orion_iscsifs.config import MountConfig
from orion_iscsifs.config.build import build
from orion_iscsifs.config.places import create_private, runtime_dir, state_dir
from orion_iscsifs.config.sources import Words, gather, merge, parse_query
from orion_iscsifs.config.words import help_lines
from orion_iscsifs.errors import MountError, UsageError
from orion_iscsifs.monitor.control import lock_path

if TYPE_CHECKING:
    from orion_iscsifs.cli.daemon import OpenStack

EARLIER_DAEMON_S: Final = 30.0
"""How long to wait for the daemon of an earlier mount of the same mount point to finish."""


class _MountCommand(click.Command):
    """Shows the `-o` options after its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Mount options (-o name,name=value,…; also keys of settings files)"):
            for name, text in help_lines():
                formatter.write(f"  {name:<26}  {text}\n")


@click.command(cls=_MountCommand)
@click.argument("source")
@click.argument("mountpoint")
@click.option("-o", "options", multiple=True, metavar="OPT,…", help="mount options, see below")
@click.option("-f", "--foreground", is_flag=True, help="stay in the foreground, log to stderr")
def mount(source: str, mountpoint: str, options: tuple[str, ...], foreground: bool) -> None:
    """Mount SOURCE (iscsi://host[:port][/iqn[/lun]]) on the folder MOUNTPOINT."""
    mount_daemon(source, mountpoint, options, foreground=foreground)


def mount_daemon(
    source_text: str,
    mountpoint: str,
    options: Sequence[str],
    *,
    foreground: bool = False,
    open_stack: "OpenStack | None" = None,
) -> None:
    """Return when the device files are readable (`foreground`: when the mount has ended).

    Raises `UsageError`, or `Failed` with the line and the code to exit with.
    """
    source = url.parse(source_text)
    hide_arguments(f"mount {source.redacted()} {mountpoint}")
    try:
        config, warnings = settings(source, options)
        # Heavy imports only now: a usage error comes at once.
        from orion_iscsifs.fuse.mountpoint import check

        mountpoint = check(mountpoint, allow_other=config.fuse.allow_other)
        for warning in warnings:
            warn(warning)
        with _only_daemon(create_private(runtime_dir()), mountpoint):
            body = _body(source, mountpoint, config, open_stack, foreground=foreground)
            _start(body, foreground=foreground)
    except (Failed, UsageError):
        raise
    except KeyboardInterrupt:
        raise Failed("mount: interrupted", Exit.MOUNT_FAILED) from None
    except Exception as error:
        code = exit_code(error, failure=Exit.MOUNT_FAILED)
        raise Failed(describe(error), code) from error


def settings(source: url.Source, options: Sequence[str]) -> tuple[MountConfig, list[str]]:
    """Everything that is configured for the source, and warnings."""
    from orion_iscsifs.initiator.identity import load_initiator_name

    words: Words = {}
    if source.user is not None:
        words["chap_user"] = source.user
    if source.secret is not None:
        words["chap_secret"] = source.secret
    merge(words, parse_query(source.query))
    return build(gather(options, words), lambda: load_initiator_name(state_dir()), tls=source.tls)


def hide_arguments(title: str) -> None:
    """Give the process a title without secrets, before anything takes time."""
    import setproctitle

    setproctitle.setproctitle(f"{PROGRAM} {title}")


def _start(body: Callable[[Callable[[], None]], None], *, foreground: bool) -> None:
    from orion_iscsifs.cli.daemonize import run_in_background

    if foreground:
        body(lambda: None)
    else:
        run_in_background(body, failure=Exit.MOUNT_FAILED)


def _body(
    source: url.Source,
    mountpoint: str,
    config: MountConfig,
    open_stack: "OpenStack | None",
    *,
    foreground: bool,
) -> Callable[[Callable[[], None]], None]:
    def body(ready: Callable[[], None]) -> None:
        import trio

        from orion_iscsifs.cli import daemon, logs
        from orion_iscsifs.cli.supervisor import Supervisor
        from orion_iscsifs.fuse.hardening import harden

        chosen = open_stack or _real_stack()

        def work(ready: Callable[[], None]) -> None:
            hardening = harden()  # again: a lock does not survive a fork
            served = daemon.Daemon(source, mountpoint, config, chosen, hardening=hardening)
            trio.run(served.run, ready)

        def configure_log() -> None:
            logs.configure(state_dir(), mountpoint, foreground=foreground, debug=verbosity.debug)

        harden()  # the supervisor itself
        lock_path(runtime_dir(), mountpoint).write_text(str(os.getpid()))
        Supervisor(mountpoint, _obstacle(config), work, configure_log, foreground).run(ready)

    return body


def _obstacle(config: MountConfig) -> str | None:
    """Why a new process must not go on with this mount when the present one dies."""
    from orion_iscsifs.fuse import takeover

    if not config.survives_the_worker:
        mode = config.cache.mode.value
        return f"cache={mode} may have had acknowledged writes in memory only"
    return takeover.obstacle(os.uname().release)


def _real_stack() -> "OpenStack":
    from orion_iscsifs.stack import open_stack

    return open_stack


@contextmanager
def _only_daemon(folder: Path, mountpoint: str) -> Iterator[None]:
    """Hold the mount point's lock; the daemon inherits it and holds it until it has ended.

    Supervisor and workers have it; the number of the supervisor's process is written there.

    An earlier daemon may still write back after umount2(2), which waits for nobody. A new mount
    must not read the target before that is done.
    """
    lock = os.open(lock_path(folder, mountpoint), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + EARLIER_DAEMON_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise MountError(
                        f"mount point {mountpoint}: the daemon of an earlier mount still writes",
                        advice=f"{PROGRAM} umount {mountpoint} waits for it",
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        # The daemon's copy of this descriptor keeps the lock.
        os.close(lock)
