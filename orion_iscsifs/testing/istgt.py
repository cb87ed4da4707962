"""An istgt daemon of one's own, from Debian's build of 2011.

istgt reads its settings from files once at its start; this module writes them into a folder of the
caller. What is particular to it: disks start at LUN 0, the portal group needs a netmask that admits
the initiator, CHAP secrets live in an "auth group", it negotiates digests when asked for, it
insists on InitialR2T=Yes, and its listen queue is short (2), so that a probe connection is best
avoided.
"""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from orion_iscsifs.testing.programs import Program, free_port, listens

MEBIBYTE = 1 << 20

_GLOBAL = """\
[Global]
  NodeBase "iqn.2007-09.example.istgt"
  PidFile {folder}/istgt.pid
  AuthFile {folder}/auth.conf
  MediaDirectory {folder}
  LogFacility "local7"
  Timeout 30
  NopInInterval 20
  DiscoveryAuthMethod Auto
  MaxSessions 16
  MaxConnections 4
  MaxR2T 32
  MaxOutstandingR2T 16
  DefaultTime2Wait 2
  DefaultTime2Retain 60
  FirstBurstLength 262144
  MaxBurstLength 1048576
  MaxRecvDataSegmentLength 262144
  InitialR2T Yes
  ImmediateData {immediate_data}
  DataPDUInOrder Yes
  DataSequenceInOrder Yes
  ErrorRecoveryLevel 0
[UnitControl]
  AuthMethod Auto
  Netmask 127.0.0.1
[PortalGroup1]
  Portal DA1 127.0.0.1:{port}
[InitiatorGroup1]
  InitiatorName "ALL"
  Netmask 127.0.0.0/8
"""

_UNIT = """\
[LogicalUnit1]
  TargetName {iqn}
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod {auth_method}
  AuthGroup AuthGroup1
  UseDigest Auto
  UnitType Disk
  QueueDepth 32
  BlockLength {block_bytes}
"""


@dataclass(frozen=True, kw_only=True)
class IstgtChap:
    """Credentials: `user` and `secret` of the initiator, the mutual ones of the target."""

    user: str
    secret: str
    mutual_user: str = ""
    mutual_secret: str = ""

    @property
    def method(self) -> str:
        return "CHAP Mutual" if self.mutual_user else "CHAP"


@dataclass(frozen=True, kw_only=True)
class IstgtSettings:
    """One target. `luns` maps a LUN to its backing file; sizes are whole MiB."""

    luns: dict[int, Path] = field(default_factory=dict)
    iqn: str = "iqn.2007-09.example.istgt:disk"
    block_bytes: int = 512
    chap: IstgtChap | None = None
    immediate_data: bool = True


class Istgt:
    """One istgt process with one target; `stop()` and `resume()` keep its port and its files."""

    def __init__(self, folder: Path, settings: IstgtSettings, *, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.settings = settings
        self.log = folder / "istgt.log"
        self._config = folder / "istgt.conf"
        self._write_files(folder)
        self._program: Program | None = None
        self.resume()

    @property
    def iqn(self) -> str:
        return self.settings.iqn

    @property
    def portal_url(self) -> str:
        return f"iscsi://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.portal_url}/{self.iqn}"

    def lun_url(self, lun: int = 0) -> str:
        return f"{self.url}/{lun}"

    def stop(self) -> None:
        """End it at once; an orderly end takes it three seconds and writes nothing more."""
        if self._program is not None:
            self._program.stop(signal.SIGKILL)
            self._program = None

    def resume(self) -> None:
        self._program = Program(["istgt", "-D", "-c", self._config], log=self.log)
        try:
            self._program.wait_until(lambda: listens(self.port))
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _write_files(self, folder: Path) -> None:
        settings = self.settings
        text = _GLOBAL.format(
            folder=folder,
            port=self.port,
            immediate_data="Yes" if settings.immediate_data else "No",
        ) + _UNIT.format(
            iqn=settings.iqn,
            auth_method=settings.chap.method if settings.chap else "None",
            block_bytes=settings.block_bytes,
        )
        for lun, backing in sorted(settings.luns.items()):
            text += f"  LUN{lun} Storage {backing} {backing.stat().st_size // MEBIBYTE}MB\n"
        self._config.write_text(text, encoding="ascii")
        chap = settings.chap or IstgtChap(user="nobody", secret="unused-unused")  # noqa: S106
        words = [chap.user, chap.secret]
        if chap.mutual_user:
            words += [chap.mutual_user, chap.mutual_secret]
        account = " ".join(f'"{word}"' for word in words)
        secrets = folder / "auth.conf"
        secrets.touch(mode=0o600)
        secrets.write_text(f"[AuthGroup1]\n  Auth {account}\n", encoding="ascii")
