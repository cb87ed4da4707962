"""What outlives a worker: descriptors that its supervisor holds for the one that comes after it.

A mount is served by a worker process. Its parent, the supervisor (`cli/supervisor.py`), does no I/O
of its own; it holds what must not end with a worker: the FUSE device, the control socket, the locks
of the ISIDs and of the LUNs, and what the kernel was told (`fuse/handover.py`). Each has a name. A
worker hands a descriptor over as soon as it has it (`keep`), and takes it back when it has ended in
order (`release`). A worker that takes over is born with all of them and asks for them by their
names (`inherit`).

On the wire: one `SOCK_SEQPACKET` message for each, JSON, with the descriptor beside it. A message
that was sent is read by the supervisor even if the worker dies right after.

Without a supervisor, or when this mount is not to be taken over, `keep` and `release` do nothing
but close what is released, and nothing is inherited.
"""

import json
import os
import socket
from array import array
from typing import Any, Final

MESSAGE_BYTES_MAX: Final = 16384
NOTE_BYTES_MAX: Final = 1024
_ANCILLARY_BYTES: Final = socket.CMSG_LEN(array("i").itemsize)

FUSE: Final = "fuse"
"""The FUSE device: as long as it is kept there is a mount to be served."""
STATE: Final = "state"
"""A memory file: `fuse/handover.py`."""
CONTROL: Final = "control"
"""The listening control socket."""
ISID: Final = "isid/"
"""And target, qualifier, path: the lock of `initiator.identity.hold_isid`."""
GROUP: Final = "group/"
"""And target, qualifier: the target portal group of that session, a note."""
CLAIM: Final = "claim/"
"""And the LUN: the lock of `initiator.claim.hold_lun`."""


class Custody:
    """A worker's side. One per process, as there is one mount per process."""

    def __init__(self) -> None:
        self._line: socket.socket | None = None
        self._keeps = False
        self._inherited: dict[str, int] = {}
        self._heirlooms: frozenset[str] = frozenset()
        self.is_takeover = False
        """An earlier worker has died; this one has not said `resumed` yet."""
        self.takeovers = 0
        """How many workers this mount has had before."""
        self.supervisor_pid: int | None = None

    def attach(
        self, line: socket.socket, inherited: dict[str, int], *, keeps: bool, takeovers: int
    ) -> None:
        """In a new worker. `keeps`: this mount may be taken over."""
        self._line, self._keeps, self.takeovers = line, keeps, takeovers
        self._inherited, self._heirlooms = dict(inherited), frozenset(inherited)
        self.is_takeover = takeovers > 0
        self.supervisor_pid = os.getppid()

    def keep(self, name: str, descriptor: int) -> None:
        """From now on the supervisor has it too, in place of what had the name before."""
        if self._keeps:
            self.tell([descriptor], keep=name)

    def note(self, name: str, text: str) -> None:
        """As `keep`, of a few words."""
        file = os.memfd_create("orion-iscsifs")
        try:
            os.write(file, text.encode())
            self.keep(name, file)
        finally:
            os.close(file)

    def noted(self, name: str) -> str | None:
        """What an earlier worker has noted; None: nothing."""
        file = self._inherited.get(name)
        return None if file is None else os.pread(file, NOTE_BYTES_MAX, 0).decode()

    def inherit(self, name: str) -> int | None:
        """What an earlier worker has kept; it is the caller's now, who releases or closes it."""
        return self._inherited.pop(name, None)

    def peek(self, name: str) -> int | None:
        """As `inherit`, and it stays where it is."""
        return self._inherited.get(name)

    def waiting(self, prefix: str) -> list[str]:
        """Names that were kept and that nobody has asked for yet."""
        return sorted(name for name in self._inherited if name.startswith(prefix))

    def heirlooms(self, prefix: str) -> list[str]:
        """Every name that this worker was born with, asked for or not."""
        return sorted(name for name in self._heirlooms if name.startswith(prefix))

    def release(self, name: str, descriptor: int) -> None:
        """It is no longer needed, and closed.

        During a takeover what was inherited goes back instead, for the next try.
        """
        if self.is_takeover and name in self._heirlooms:
            self._inherited[name] = descriptor
            return
        self.drop(name)
        os.close(descriptor)

    def drop(self, name: str) -> None:
        """The supervisor has it no longer; ours is untouched."""
        if self._keeps:
            self.tell(drop=name)

    def forbid(self, why: str) -> None:
        """From now on this mount must not be taken over any more."""
        self.tell(forbid=why)

    def resumed(self) -> None:
        """The takeover is complete: the kernel's requests are answered again."""
        self.is_takeover = False

    def tell(self, descriptors: list[int] | None = None, **message: Any) -> None:  # noqa: ANN401
        """A message to the supervisor; nothing without one. Raises OSError if it has gone."""
        if self._line is not None:
            socket.send_fds(self._line, [json.dumps(message).encode()], descriptors or [])


def receive(line: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The supervisor's side: the next message and its descriptors; None: there is none now.

    Raises EOFError when the worker has closed its end.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        # Not `socket.recv_fds`: it forgets the flags.
        data, ancillary, _, _ = line.recvmsg(MESSAGE_BYTES_MAX, _ANCILLARY_BYTES, flags)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        data, ancillary = b"", []
    if not data:
        raise EOFError
    message: dict[str, Any] = json.loads(data)
    descriptors = array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content)
    return message, list(descriptors)


custody: Final = Custody()
