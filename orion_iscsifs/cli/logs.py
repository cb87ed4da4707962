"""Where a daemon's log goes.

In the foreground: stderr. In the background: syslog (so journald) where /dev/log is, else one file
per mount in `STATE/log/`, 1 MiB and one old one at most. Secrets never reach a log: settings hold
them as `Secret`, which formats as `***`, and sources are logged redacted.
"""

import logging
import logging.handlers
import re
import stat
from pathlib import Path
from typing import Final

from orion_iscsifs.cli.report import PROGRAM
from orion_iscsifs.config.places import create_private

SYSLOG_SOCKET: Final = Path("/dev/log")
LOG_BYTES_MAX: Final = 1 << 20


def configure(state: Path, mountpoint: str, *, foreground: bool, debug: bool) -> None:
    """Set up the root logger of this process; another time begins a file that was turned anew."""
    handler: logging.Handler
    if foreground:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(levelname)s: %(message)s"))
    elif _is_socket(SYSLOG_SOCKET):
        handler = _Syslog(str(SYSLOG_SOCKET), facility=_Syslog.LOG_DAEMON)
        handler.ident = f"{PROGRAM}[{mountpoint}]: "
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.handlers.RotatingFileHandler(
            log_file(state, mountpoint), maxBytes=LOG_BYTES_MAX, backupCount=1
        )
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before, root.handlers[:] = root.handlers[:], [handler]
    for one in before:
        one.close()
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    # One line per request at DEBUG: of no use, and far too slow.
    logging.getLogger("pyfuse3").setLevel(logging.INFO)


class _Syslog(logging.handlers.SysLogHandler):
    """A syslog that hangs loses lines, instead of stopping the mount."""

    def _connect_unixsocket(self, address: str) -> None:
        super()._connect_unixsocket(address)  # type: ignore[misc]  # the only place of a socket
        self.socket.setblocking(False)  # type: ignore[attr-defined]


def log_file(state: Path, mountpoint: str) -> Path:
    """The file for a mount point where there is no syslog."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", mountpoint).strip("-") or "root"
    return create_private(state / "log") / f"{name[-100:]}.log"


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False
