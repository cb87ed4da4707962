"""mount(8)'s and umount(8)'s helper interfaces (mount(8), "EXTERNAL HELPERS").

    mount.SUFFIX  SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS] [-t TYPE.SUBTYPE]
    umount.SUFFIX MOUNTPOINT [-nlfvr] [-t TYPE.SUBTYPE]

Their exit codes are mount(8)'s: 1 wrong call, 32 failed.
"""

import getopt
from typing import Final

from orion_iscsifs.cli.mount import mount_daemon
from orion_iscsifs.cli.report import Exit, report
from orion_iscsifs.cli.unmounting import unmount_safely
from orion_iscsifs.errors import OrionError, UsageError
from orion_iscsifs.fuse import mountpoint as mountpoints

WRONG_CALL: Final = 1


def run_helper(program: str, words: list[str]) -> int:
    """`program` begins with `mount.` or `umount.`."""
    try:
        if program.startswith("umount."):
            _umount(program, words)
        else:
            _mount(program, words)
    except UsageError as error:
        report(error)
        return WRONG_CALL
    except OrionError as error:
        report(error)
        return Exit.MOUNT_FAILED
    return Exit.DONE


def _mount(program: str, words: list[str]) -> None:
    options, positional = _parse(words, "sfnvo:t:")
    if len(positional) != 2:
        raise UsageError(f"{program}: SOURCE and MOUNTPOINT are needed")
    if any(name == "-f" for name, _ in options):
        return  # mount -f: everything but the mount itself
    source, mountpoint = positional
    mount_daemon(source, mountpoint, [value for name, value in options if name == "-o"])


def _umount(program: str, words: list[str]) -> None:
    options, positional = _parse(words, "nlfvrt:")
    if len(positional) != 1:
        raise UsageError(f"{program}: MOUNTPOINT is needed")
    names = {name for name, _ in options}
    if "-l" in names:
        # The user asked not to wait; the daemon flushes by itself when the last user has gone.
        mountpoints.unmount(mountpoints.resolve(positional[0]), lazy=True)
        return
    unmount_safely(positional[0], force="-f" in names)


def _parse(words: list[str], letters: str) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        return getopt.gnu_getopt(words, letters)
    except getopt.GetoptError as error:
        raise UsageError(str(error)) from None
