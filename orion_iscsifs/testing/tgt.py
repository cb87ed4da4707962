"""A tgt (Linux SCSI target framework) daemon of one's own.

tgtd is controlled by tgtadm through a unix socket whose name carries a *control port*, a number of
our choosing: with one of its own this daemon never meets the system's (control port 0, TCP 3260).
Every change is remembered and made again by `resume()`, since tgtd keeps nothing itself.

The public portal is opened last. A tgtd that listens before its targets are configured answers
"target not found" for a moment; `resume(portal_first=True)` stages that on purpose.

tgt's habits that a test has to know: LUN 0 is a controller, disks start at 1; the defaults are
InitialR2T=Yes and MaxRecvDataSegmentLength=8192; CHAP_A 7 means SHA-1 to it.
"""

import contextlib
import itertools
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from orion_iscsifs.testing.programs import (
    Program,
    ProgramFailed,
    free_port,
    run,
)

SOCKET_FOLDER = Path("/var/run/tgtd")
CONTROL_PORT_MAX = 32767


def free_control_port() -> int:
    """A control port that no tgtd of this host uses. tgtadm takes 0 to 32767; 0 is the system's.

    At random: tgtd makes its lock file a moment later, and other test runs look for one, too.
    """
    first = random.randint(1, CONTROL_PORT_MAX)
    for control in itertools.chain(range(first, CONTROL_PORT_MAX + 1), range(1, first)):
        if not (SOCKET_FOLDER / f"socket.{control}.lock").exists():
            return control
    raise ProgramFailed(f"tgtd: every control port is taken in {SOCKET_FOLDER}")


class TgtTarget:
    """One iSCSI target of a running tgtd. Made by `Tgt.add_target`."""

    def __init__(self, daemon: "Tgt", tid: int, iqn: str) -> None:
        self._daemon = daemon
        self.tid = tid
        self.iqn = iqn

    @property
    def url(self) -> str:
        return f"{self._daemon.portal_url}/{self.iqn}"

    def lun_url(self, lun: int = 1) -> str:
        return f"{self.url}/{lun}"

    def add_lun(self, lun: int, backing: Path, *, block_bytes: int = 512) -> None:
        """Offer the file `backing` as a disk."""
        where = ["--tid", str(self.tid), "--lun", str(lun)]
        how = ["--bstype", "rdwr", "-b", str(backing), "--blocksize", str(block_bytes)]
        self._daemon.configure(["--op", "new", "--mode", "logicalunit", *where, *how])

    def remove_lun(self, lun: int) -> None:
        """Take a LUN away, in mid-use too."""
        where = ["--tid", str(self.tid), "--lun", str(lun)]
        self._daemon.configure(["--op", "delete", "--mode", "logicalunit", *where])

    def set_parameter(self, name: str, value: str) -> None:
        """A negotiation parameter (`InitialR2T`, `HeaderDigest`, ...) for logins from now on."""
        self._update("target", ["--name", name, "--value", value])

    def set_read_only(self, lun: int) -> None:
        self._update("logicalunit", ["--lun", str(lun), "--params", "readonly=1"])

    def set_thin(self, lun: int) -> None:
        """UNMAP and WRITE SAME punch holes into the backing file."""
        self._update("logicalunit", ["--lun", str(lun), "--params", "thin_provisioning=1"])

    def require_chap(self, user: str, secret: str) -> None:
        """Initiators have to prove that they are `user`."""
        self._bind_account(user, secret, outgoing=False)

    def prove_identity(self, user: str, secret: str) -> None:
        """The target proves that it is `user` when asked (mutual CHAP)."""
        self._bind_account(user, secret, outgoing=True)

    def drop_connections(self) -> int:
        """Close every connection of this target from tgtd's side; how many there were."""
        shown = self._daemon.admin(
            ["--op", "show", "--mode", "conn", "--tid", str(self.tid)], may_fail=True
        )
        dropped = 0
        session = ""
        for line in map(str.strip, shown.splitlines()):
            word, _, value = line.partition(":")
            if word == "Session":
                session = value.strip()
            elif word == "Connection":
                where = ["--sid", session, "--cid", value.strip()]
                self._daemon.admin(
                    ["--op", "delete", "--mode", "conn", "--tid", str(self.tid), *where],
                    may_fail=True,
                )
                dropped += 1
        return dropped

    def _update(self, mode: str, rest: list[str]) -> None:
        self._daemon.configure(["--op", "update", "--mode", mode, "--tid", str(self.tid), *rest])

    def _bind_account(self, user: str, secret: str, *, outgoing: bool) -> None:
        account = ["--mode", "account", "--user", user]
        self._daemon.configure(["--op", "new", *account, "--password", secret])
        side = ["--outgoing"] if outgoing else []
        self._daemon.configure(["--op", "bind", *account, "--tid", str(self.tid), *side])


class Tgt:
    """One tgtd process on a TCP port and a control port of its own."""

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.log = folder / f"tgtd-{self.port}.log"
        self._control = str(free_control_port())
        self._settings: list[list[str]] = []
        self._next_tid = 1
        self._program: Program | None = None
        self._start()
        self.open_portal()

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def portal_url(self) -> str:
        return f"iscsi://{self.portal}"

    @property
    def pid(self) -> int:
        if self._program is None:
            raise ProgramFailed("tgtd: not running")
        return self._program.pid

    def add_target(self, iqn: str) -> TgtTarget:
        """A new target, open to every initiator, with no LUN but tgt's controller."""
        tid, self._next_tid = self._next_tid, self._next_tid + 1
        self.configure(["--op", "new", "--mode", "target", "--tid", str(tid), "-T", iqn])
        self.configure(["--op", "bind", "--mode", "target", "--tid", str(tid), "-I", "ALL"])
        return TgtTarget(self, tid, iqn)

    def configure(self, arguments: list[str]) -> None:
        """A tgtadm command that is issued again after a restart."""
        self.admin(arguments)
        self._settings.append(arguments)

    def admin(self, arguments: list[str], *, may_fail: bool = False) -> str:
        """Run tgtadm once and return what it printed."""
        try:
            return run(["tgtadm", "-C", self._control, "--lld", "iscsi", *arguments])
        except ProgramFailed:
            if may_fail:
                return ""
            raise

    def stop(self) -> None:
        """End the daemon at once; sessions see their connection break. Settings are kept."""
        if self._program is None:
            return
        # tgtd shrugs off SIGTERM while a target exists, and an orderly end would say goodbye to
        # the initiators: a broken connection is what a test of recovery wants.
        self._program.stop(signal.SIGKILL)
        self._program = None
        for name in (f"socket.{self._control}", f"socket.{self._control}.lock"):
            (SOCKET_FOLDER / name).unlink(missing_ok=True)

    def resume(self, *, portal_first: bool = False) -> None:
        """Start again after `stop()`, with every target, LUN, account and parameter as before.

        `portal_first`: logins are answered before the targets are back.
        """
        self._start()
        if portal_first:
            self.open_portal()
        for setting in self._settings:
            self.admin(setting)
        if not portal_first:
            self.open_portal()

    def open_portal(self) -> None:
        """Accept connections at `portal`."""
        self.admin(["--op", "new", "--mode", "portal", "--param", f"portal={self.portal}"])

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The daemon stands still (SIGSTOP) inside the block: a silent, not a broken, target."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        """tgtd with a portal that nobody knows, since without any it would take port 3260."""
        waiting_room = f"portal=127.0.0.1:{free_port()}"
        self._program = Program(
            ["tgtd", "-f", "-C", self._control, "--iscsi", waiting_room], log=self.log
        )
        try:
            self._program.wait_until(self._answers)
        except BaseException:
            self.stop()
            raise
        self.admin(["--op", "delete", "--mode", "portal", "--param", waiting_room])

    def _answers(self) -> bool:
        try:
            self.admin(["--op", "show", "--mode", "target"])
        except ProgramFailed:
            return False
        return True
