"""Mount points: what is mounted where, whether we may mount here, and unmounting. No pyfuse3.

Nothing here waits for a hanging daemon for longer than it says: see `fuse/apart.py`.
"""

import enum
import errno
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orion_iscsifs.errors import BusyError, MountError
from orion_iscsifs.fuse import apart

SUBTYPE: Final = "orion-iscsifs"
FS_TYPE: Final = f"fuse.{SUBTYPE}"
FUSE_DEVICE: Final = Path("/dev/fuse")
_FUSE_CONF: Final = Path("/etc/fuse.conf")
UNMOUNT_S: Final = 30.0
"""How long an unmount may take: the kernel first writes back what programs have mapped."""
_HOLDERS_SHOWN_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of /proc/self/mountinfo."""

    mountpoint: str
    device: str
    """`major:minor`."""
    fs_type: str
    source: str


def mounted() -> list[Mounted]:
    """Every mount of this process's namespace, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [parse_mountinfo(line) for line in lines if " - " in line]


def parse_mountinfo(line: str) -> Mounted:
    """See proc_pid_mountinfo(5)."""
    left, _, right = line.partition(" - ")
    fields, (fs_type, source) = left.split(" "), right.split(" ")[:2]
    return Mounted(_unescape(fields[4]), fields[2], fs_type, _unescape(source))


def _unescape(text: str) -> str:
    for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escaped, plain)
    return text


def ours() -> list[Mounted]:
    """The mounts of this project."""
    return [mount for mount in mounted() if mount.fs_type == FS_TYPE]


def topmost(mountpoint: str) -> Mounted | None:
    """What is mounted there last, whatever it is."""
    return next((m for m in reversed(mounted()) if m.mountpoint == mountpoint), None)


def find(mountpoint: str) -> Mounted | None:
    """Our mount at this path, if it is the topmost there."""
    mount = topmost(mountpoint)
    return mount if mount is not None and mount.fs_type == FS_TYPE else None


def resolve(path: str) -> str:
    """Absolute, without links. Never asks a dead mount: its own name is not looked into."""
    folder, name = os.path.split(os.path.abspath(path))
    plain = os.path.join(_realpath(folder), name)
    return plain if topmost(plain) is not None else _realpath(plain)


def _realpath(path: str) -> str:
    if not any(mount.fs_type.startswith("fuse") for mount in mounted()):
        return os.path.realpath(path)
    try:
        return apart.ask("realpath", path)
    except apart.NoAnswer:
        raise MountError(
            f"{path}: a mount on the way there does not answer",
            advice="`orion-iscsifs status` shows the state of ours",
        ) from None


class Health(enum.Enum):
    """Whether somebody answers for a mount."""

    ALIVE = enum.auto()
    DEAD = enum.auto()
    """The daemon has ended: the kernel answers ENOTCONN for it."""
    SILENT = enum.auto()
    """There is a daemon, and it did not answer within `apart.ANSWER_S`."""


def health(mountpoint: str) -> Health:
    """Ask the mount itself for a sign of life."""
    try:
        apart.ask("alive", mountpoint)
    except apart.NoAnswer:
        return Health.SILENT
    except OSError as error:
        if error.errno in {errno.ENOTCONN, errno.ECONNABORTED}:
            return Health.DEAD
    return Health.ALIVE


def is_dead(mountpoint: str) -> bool:
    """Whether a mount's daemon has died."""
    return health(mountpoint) is Health.DEAD


# -- may we mount here? --------------------------------------------------------------------------


def check(path: str, *, allow_other: bool = False) -> str:
    """The resolved mount point, or `MountError` with what is wrong with it."""
    mountpoint = resolve(path)
    if (mount := find(mountpoint)) is not None:
        raise _in_the_way(mountpoint, mount)
    try:
        is_folder = stat.S_ISDIR(os.stat(mountpoint).st_mode)
    except FileNotFoundError:
        raise MountError(
            f"mount point {mountpoint}: does not exist", advice=f"mkdir {mountpoint}"
        ) from None
    except OSError as error:
        raise MountError(f"mount point {mountpoint}: {error.strerror}") from None
    if not is_folder:
        raise MountError(f"mount point {mountpoint}: is not a directory", advice="give a folder")
    if os.getuid() != 0:
        _check_unprivileged(mountpoint, allow_other=allow_other)
    _check_device()
    return mountpoint


def _in_the_way(mountpoint: str, mount: Mounted) -> MountError:
    advice = f"orion-iscsifs umount {mountpoint}"
    state = health(mountpoint)
    if state is Health.SILENT:
        return MountError(
            f"mount point {mountpoint}: busy: {mount.source} is mounted, and does not answer",
            advice=f"{advice} --force",
        )
    if state is Health.DEAD:
        return MountError(f"mount point {mountpoint}: a mount whose daemon died", advice=advice)
    return MountError(f"mount point {mountpoint}: busy: {mount.source} is mounted", advice=advice)


def _check_unprivileged(mountpoint: str, *, allow_other: bool) -> None:
    if not os.access(mountpoint, os.W_OK):
        raise MountError(
            f"mount point {mountpoint}: not yours", advice="only root mounts over others' folders"
        )
    if shutil.which("fusermount3") is None:
        raise MountError("fusermount3: not found", advice="install the package fuse3")
    if allow_other and not _user_allow_other():
        raise MountError(
            "option allow_other: not permitted to users here",
            advice=f"root adds a line `user_allow_other` to {_FUSE_CONF}",
        )


def _user_allow_other() -> bool:
    try:
        lines = _FUSE_CONF.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _check_device() -> None:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountError(
            f"{FUSE_DEVICE}: does not exist: this kernel or container has no FUSE",
            advice="`modprobe fuse`, or start the container with --device /dev/fuse",
        ) from None
    except OSError as error:
        raise MountError(
            f"{FUSE_DEVICE}: {error.strerror}",
            advice="check its permissions (0666 as a rule), and the container's device rules",
        ) from None


# -- unmounting ----------------------------------------------------------------------------------


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount. Raises `BusyError` while it is in use. `lazy` detaches it at once instead."""
    if os.geteuid() == 0:
        _umount2(mountpoint, lazy=lazy)
    else:
        _fusermount(mountpoint, lazy=lazy)


def _umount2(mountpoint: str, *, lazy: bool) -> None:
    try:
        apart.ask("detach" if lazy else "umount", mountpoint, timeout_s=UNMOUNT_S)
    except apart.NoAnswer:
        raise _not_in_time(mountpoint) from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _busy(mountpoint) from None
        raise MountError(f"unmount {mountpoint}: {error.strerror}") from None


def _fusermount(mountpoint: str, *, lazy: bool) -> None:
    program = shutil.which("fusermount3") or "fusermount3"
    arguments = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        code, said = apart.run(arguments, timeout_s=UNMOUNT_S)
    except apart.NoAnswer:
        raise _not_in_time(mountpoint) from None
    except OSError as error:
        raise MountError(f"unmount {mountpoint}: {program}: {error.strerror}") from None
    if code == 0:
        return
    why = " ".join(said.decode(errors="replace").split())
    if "busy" in why.lower():
        raise _busy(mountpoint)
    raise MountError(f"unmount {mountpoint}: {why or 'fusermount3 failed'}")


def _not_in_time(mountpoint: str) -> MountError:
    return MountError(
        f"unmount {mountpoint}: not done after {UNMOUNT_S:g} s: its daemon does not answer",
        advice=f"orion-iscsifs umount --force {mountpoint}",
    )


def _busy(mountpoint: str) -> BusyError:
    who = holders(mountpoint)
    named = f" by {', '.join(who)}" if who else ""
    return BusyError(f"unmount {mountpoint}: in use{named}", advice="end that use first")


def holders(mountpoint: str) -> list[str]:
    """Loop devices and processes that keep the mount busy, as far as we may see them."""
    prefix = mountpoint.rstrip("/") + "/"
    return (_loop_devices(prefix) + _processes(mountpoint, prefix))[:_HOLDERS_SHOWN_MAX]


def _loop_devices(prefix: str) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if backing.read_text().startswith(prefix):
                found.append(f"/dev/{backing.parent.parent.name}")
        except OSError:  # detached meanwhile
            continue
    return found


def _processes(mountpoint: str, prefix: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if folder.name == str(os.getpid()):
            continue  # a command that was called from inside the mount
        try:
            links = [folder / "cwd", *(folder / "fd").iterdir()]
        except OSError:  # it has ended, or it is not ours
            continue
        if any(_points_into(link, mountpoint, prefix) for link in links):
            found.append(f"{_name_of(folder)} (process {folder.name})")
    return found


def _points_into(link: Path, mountpoint: str, prefix: str) -> bool:
    try:
        target = os.readlink(link)
    except OSError:
        return False
    return target == mountpoint or target.startswith(prefix)


def _name_of(folder: Path) -> str:
    try:
        return (folder / "comm").read_text().strip()
    except OSError:
        return "a program"
