"""A stunnel of one's own: TLS in front of a target that has none.

It listens on a port of its own at 127.0.0.1 and forwards to `backend`. With `clients` it demands a
certificate that this authority has signed.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

from orion_iscsifs.testing.certificates import Pair
from orion_iscsifs.testing.programs import Program, free_port, listens

PROGRAM = "stunnel4"


class Stunnel:
    """One stunnel process; a context manager that ends it."""

    def __init__(
        self, folder: Path, backend: int, pair: Pair, *, clients: Path | None = None
    ) -> None:
        self.port = free_port()
        self.log = folder / f"stunnel-{self.port}.log"
        self._settings = folder / f"stunnel-{self.port}.conf"
        self._backend = backend
        self._pair = pair
        self._clients = clients
        self._program = self._start()

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, iqn: str, lun: int = 1, *, scheme: str = "iscsis", host: str = "") -> str:
        return f"{scheme}://{host or '127.0.0.1'}:{self.port}/{iqn}/{lun}"

    def stop(self) -> None:
        self._program.stop()

    def resume(self, pair: Pair | None = None) -> None:
        """Start again on the same port after `stop()`, perhaps with another certificate."""
        self._pair = pair or self._pair
        self._program = self._start()

    def _start(self) -> Program:
        lines = ["foreground = yes", "pid =", "debug = warning", "[iscsi]"]
        lines += [f"accept = {self.portal}", f"connect = 127.0.0.1:{self._backend}"]
        lines += [f"cert = {self._pair.cert}", f"key = {self._pair.key}", "TIMEOUTclose = 0"]
        if self._clients is not None:
            lines += [f"CAfile = {self._clients}", "verifyChain = yes"]
        self._settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
        program = Program([PROGRAM, self._settings], log=self.log)
        try:
            program.wait_until(lambda: listens(self.port))
        except BaseException:
            program.stop()
            raise
        return program

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
