"""The control socket: how `umount`, `flush` and `status` talk to the daemon of a mount.

A Unix socket of mode 0600 per mount, in the runtime folder. JSON lines: a request is
`{"op": …}`; the answers to it are any number of lines without `"ok"`, which tell the progress, and
one with `"ok": true` or `"ok": false, "error": …`. It works also while the mount itself hangs.

The socket outlives a worker (`custody`): who connects while there is none waits for the next.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import trio

from orion_iscsifs.custody import CONTROL, custody
from orion_iscsifs.errors import MountError, OrionError

_log = logging.getLogger(__name__)

REQUEST_BYTES_MAX: Final = 4096
ANSWER_BYTES_MAX: Final = 16 << 20
CONNECT_TIMEOUT_S: Final = 5.0
SILENCE_MAX_S: Final = 15.0
"""A daemon that says nothing for so long hangs: while it works it tells its progress."""
_REQUEST_TIMEOUT_S: Final = 10.0
"""How long a client may take to send its one line."""
_PEER: Final = struct.Struct("3i")

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
Operation = Callable[[Send], Awaitable[Message]]
"""Carries one request out, sends its progress, returns what the last line adds to `ok`."""
OperationOn = Callable[[Message, Send], Awaitable[Message]]
"""The same for an operation that the request says more about: it gets the request, unchecked."""


def socket_path(folder: Path, mountpoint: str) -> Path:
    """One name per mount point; the mount point itself may be too long for a file's name."""
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()
    return folder / f"{digest[:24]}.sock"


def lock_path(folder: Path, mountpoint: str) -> Path:
    """The file that a daemon has locked with flock(2) as long as any process of it lives."""
    return socket_path(folder, mountpoint).with_suffix(".lock")


# -- the daemon's side ---------------------------------------------------------------------------


async def serve(
    path: Path,
    operations: Mapping[str, Operation],
    *,
    operations_on: Mapping[str, OperationOn] = MappingProxyType({}),
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer at `path` until cancelled; the socket is removed then."""
    bound = _bind(path)
    inode = path.lstat().st_ino  # noqa: ASYNC240 (a local file system, and once)
    listener = trio.socket.from_stdlib_socket(bound)
    try:

        async def serve_one(stream: trio.SocketStream) -> None:
            async with stream:
                await _serve_client(stream, operations, operations_on)

        await trio.serve_listeners(
            serve_one, [trio.SocketListener(listener)], task_status=_Ignoring(task_status)
        )
    finally:
        listener.close()
        custody.drop(CONTROL)
        _remove(path, inode)


def _bind(path: Path) -> socket.socket:
    """A listening socket. It gets its name last: a client never finds one that does not listen."""
    if (inherited := custody.inherit(CONTROL)) is not None:
        listener = socket.socket(fileno=inherited)
        listener.listen()  # from now on it is ours that clients see as the peer (unix(7))
        return listener
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    draft = path.with_suffix(".new")
    try:
        draft.unlink(missing_ok=True)
        with _short_name(draft) as name:
            listener.bind(name)
        draft.chmod(stat.S_IRUSR | stat.S_IWUSR)
        listener.listen()
        draft.rename(path)
        custody.keep(CONTROL, listener.fileno())
    except BaseException:
        listener.close()
        raise
    return listener


def _remove(path: Path, inode: int) -> None:
    """Remove our socket, and not the one that a later daemon may have put in its place."""
    with suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


class _Ignoring(trio.TaskStatus[Any]):
    """Passes `started` on without the listeners, which are nobody's business."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


async def _serve_client(
    stream: trio.SocketStream,
    operations: Mapping[str, Operation],
    operations_on: Mapping[str, OperationOn],
) -> None:
    async def send(message: Message) -> None:
        await stream.send_all(json.dumps(message).encode() + b"\n")

    try:
        line = b""
        with trio.move_on_after(_REQUEST_TIMEOUT_S):
            line = await _read_line(stream)
        if line:
            await send(await _answer(line, operations, operations_on, send))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        _log.debug("a client of the control socket has gone")


async def _read_line(stream: trio.SocketStream) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < REQUEST_BYTES_MAX:
        chunk = await stream.receive_some(REQUEST_BYTES_MAX)
        if not chunk:
            return b""
        line += chunk
    return bytes(line)


async def _answer(
    line: bytes,
    operations: Mapping[str, Operation],
    operations_on: Mapping[str, OperationOn],
    send: Send,
) -> Message:
    try:
        request = json.loads(line)
        on = operations_on.get(request["op"])
        operation = partial(on, request) if on is not None else operations[request["op"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"ok": False, "error": "control: unknown request"}
    try:
        return {"ok": True, **await operation(send)}
    except OrionError as error:
        return {"ok": False, "error": error.line}
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise
    except Exception as error:
        # A bug in a control command must not end the mount.
        _log.exception("control command %s", request["op"])
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


# -- the command's side --------------------------------------------------------------------------


class DaemonSilent(MountError):
    """There is a daemon, but it does not answer."""


class ControlClient:
    """A daemon's control socket, from a command that has nothing else to do meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_alive(self) -> bool:
        """Whether a daemon listens; also one that hangs."""
        try:
            with self._connected():
                return True
        except (TimeoutError, BlockingIOError):  # its queue is full: it has not served it for long
            return True
        except OSError:
            return False

    def pid(self) -> int:
        """The process that answers, the worker. Raises OSError without one."""
        with self._connected() as connection:
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            pid: int = _PEER.unpack(peer)[0]
            return pid

    def supervisor_pid(self) -> int | None:
        """The process that ends last; None if there is none besides `pid`."""
        try:
            with self.path.with_suffix(".lock").open("rb") as file:
                if _is_locked(file.fileno()):
                    return int(file.read(32))
        except (OSError, ValueError):
            pass
        return None

    def request(
        self, op: str, *, timeout_s: float = SILENCE_MAX_S, on: Message | None = None
    ) -> Iterator[Message]:
        """Progress lines, then the last line. Raises `MountError` if the daemon refuses or dies.

        `timeout_s` bounds the wait for each line; `on` is what the request says besides `op`.
        """
        try:
            with self._connected() as connection:
                connection.settimeout(timeout_s)
                connection.sendall(json.dumps({**(on or {}), "op": op}).encode() + b"\n")
                with connection.makefile("rb") as lines:
                    while line := lines.readline(ANSWER_BYTES_MAX):
                        message: Message = json.loads(line)
                        if message.get("ok") is False:
                            raise MountError(str(message.get("error")))
                        yield message
                        if "ok" in message:
                            return
        except (TimeoutError, BlockingIOError):
            raise DaemonSilent("the daemon does not answer in time") from None
        except (OSError, ValueError) as error:
            raise MountError(f"{op}: no connection to the daemon: {error}") from None
        raise MountError(f"{op}: the daemon died meanwhile", advice="see its log")

    def ask(self, op: str, *, timeout_s: float = SILENCE_MAX_S) -> Message:
        """Only the last line."""
        *_, last = self.request(op, timeout_s=timeout_s)
        return last

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(CONNECT_TIMEOUT_S)
            with _short_name(self.path) as name:
                connection.connect(name)
            yield connection


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def clients(folder: Path) -> list[ControlClient]:
    """One for each living daemon; sockets that dead ones left behind are removed."""
    return [ControlClient(path) for path in sorted(folder.glob("*.sock")) if not _is_stale(path)]


def _is_stale(path: Path) -> bool:
    """Whether nobody listens any more; the socket is removed then, and only then."""
    try:
        inode = path.lstat().st_ino
        with ControlClient(path)._connected():
            return False
    except OSError as error:
        if error.errno != errno.ECONNREFUSED:
            return error.errno == errno.ENOENT
        _remove(path, inode)
        return True


@contextmanager
def _short_name(path: Path) -> Iterator[str]:
    """`path` through /proc: a socket's name has at most 107 bytes, a folder's has not."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
