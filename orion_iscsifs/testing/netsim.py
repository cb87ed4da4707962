"""A TCP proxy between an initiator and a target that misbehaves on request.

Theory of operation
-------------------
One thread runs one selector loop over the listening socket and every pair of sockets. A pair is
two one-way pipes; each has at most `CHUNK_BYTES` in hand: while some are waiting to leave, nothing
more is read, so the proxy adds no buffer that would hide back pressure. Controls are called from
the test's thread: they queue a function and wake the loop through a socket pair, and return when
the loop has run it, so that after `cut()` returned the connections *are* cut. The sockets
belong to the loop's thread alone; there is no lock.

What the controls stage:
* `cut()`: every connection is reset (RST) at both ends; new ones are welcome. `cut_one(n)`: the
  nth of those that stand, in the order in which they came.
* `refuse()`/`accept()`: the port refuses connections, as a host without the service does.
* `stall()`/`flow()`: bytes stop, connections stay; new ones are accepted and get no answer, as a
  target that hangs or a network that swallows packets does.
* `corrupt_next(direction, after_bytes)`: flips one bit, as a faulty link behind TCP's checksum
  would.
"""

import contextlib
import enum
import queue
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

CHUNK_BYTES = 256 * 1024
CONTROL_TIMEOUT_S = 10.0


class Direction(enum.Enum):
    TO_TARGET = "to target"
    TO_INITIATOR = "to initiator"


@dataclass(eq=False)
class _Pipe:
    """Bytes on their way from `source` to `sink`."""

    source: socket.socket
    sink: socket.socket
    direction: Direction
    pending: bytearray = field(default_factory=bytearray)
    ended: bool = False
    """`source` has sent its last byte."""
    finished: bool = False
    """The end has been passed on to `sink` too."""


@dataclass(eq=False)
class _Pair:
    initiator: socket.socket
    target: socket.socket
    pipes: tuple[_Pipe, _Pipe]


class TcpProxy:
    """Listens on a port of its own and forwards to `(host, port)`; a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._listener: socket.socket | None = _listen(0)
        self.port: int = self._listener.getsockname()[1]
        self.connections_accepted = 0
        self.bytes_forwarded = dict.fromkeys(Direction, 0)
        self._pairs: list[_Pair] = []
        self._stalled = False
        self._corrupt_at: dict[Direction, int] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._thread.start()

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, iqn: str, lun: int) -> str:
        return f"iscsi://{self.portal}/{iqn}/{lun}"

    # -- controls: called from any thread, done when they return -----------------------------------

    def cut(self) -> int:
        """Reset every connection; how many there were."""
        counted: list[int] = []

        def reset_all() -> None:
            counted.append(len(self._pairs))
            for pair in list(self._pairs):
                self._drop(pair, reset=True)

        self._control(reset_all)
        return counted[0]

    def cut_one(self, number: int) -> bool:
        """Reset one connection, numbered from 0; False: there are not so many."""
        found: list[bool] = []

        def reset_one() -> None:
            found.append(number < len(self._pairs))
            if found[0]:
                self._drop(self._pairs[number], reset=True)

        self._control(reset_one)
        return found[0]

    def refuse(self) -> None:
        """Refuse connections from now on, and cut those that exist."""
        self._control(self._close_listener)
        self.cut()

    def accept(self) -> None:
        """Take connections again, on the same port."""
        self._control(self._open_listener)

    def stall(self) -> None:
        """Forward nothing, keep everything open."""
        self._control(lambda: setattr(self, "_stalled", True))

    def flow(self) -> None:
        """End a stall: what waited goes on its way."""
        self._control(lambda: setattr(self, "_stalled", False))

    def corrupt_next(self, direction: Direction, *, after_bytes: int = 0) -> None:
        """Flip one bit of the byte that comes `after_bytes` from now in `direction`."""

        def arm() -> None:
            self._corrupt_at[direction] = self.bytes_forwarded[direction] + after_bytes

        self._control(arm)

    def close(self) -> None:
        if self._running:
            self._control(self._shut_down)
            self._thread.join(CONTROL_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _control(self, action: Callable[[], None]) -> None:
        done = threading.Event()

        def perform() -> None:
            try:
                action()
            finally:
                done.set()

        self._commands.put(perform)
        self._wake_writer.send(b"!")
        if not done.wait(CONTROL_TIMEOUT_S):
            raise RuntimeError("tcp-proxy: its loop does not answer")

    # -- the loop: everything below runs in the proxy's thread -------------------------------------

    def _run(self) -> None:
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        while self._running:
            self._watch()
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_reader:
                    self._obey()
                elif key.fileobj is self._listener:
                    self._welcome()
            if not self._stalled:
                self._forward()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _watch(self) -> None:
        """Tell the selector what to wait for; few sockets, so it is simply said anew."""
        wanted: dict[socket.socket, int] = {self._wake_reader: selectors.EVENT_READ}
        if self._listener is not None:
            wanted[self._listener] = selectors.EVENT_READ
        for pair in () if self._stalled else self._pairs:
            for pipe in pair.pipes:
                if pipe.pending:
                    wanted[pipe.sink] = wanted.get(pipe.sink, 0) | selectors.EVENT_WRITE
                elif not pipe.ended:
                    wanted[pipe.source] = wanted.get(pipe.source, 0) | selectors.EVENT_READ
        for key in list(self._selector.get_map().values()):
            if key.fileobj not in wanted:
                self._selector.unregister(key.fileobj)
        for sock, events in wanted.items():
            if sock not in self._selector.get_map():
                self._selector.register(sock, events)
            else:
                self._selector.modify(sock, events)

    def _obey(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _welcome(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(BlockingIOError):
            initiator, _ = self._listener.accept()
            self.connections_accepted += 1
            try:
                target = socket.create_connection(self._upstream, timeout=CONTROL_TIMEOUT_S)
            except OSError:
                _reset(initiator)
                return
            for sock in (initiator, target):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pipes = (
                _Pipe(initiator, target, Direction.TO_TARGET),
                _Pipe(target, initiator, Direction.TO_INITIATOR),
            )
            self._pairs.append(_Pair(initiator, target, pipes))

    def _forward(self) -> None:
        for pair in list(self._pairs):
            try:
                for pipe in pair.pipes:
                    self._move(pipe)
            except OSError:
                self._drop(pair, reset=True)
                continue
            if all(pipe.finished for pipe in pair.pipes):
                self._drop(pair, reset=False)

    def _move(self, pipe: _Pipe) -> None:
        if not pipe.pending and not pipe.ended:
            try:
                arrived = pipe.source.recv(CHUNK_BYTES)
            except BlockingIOError:
                return
            pipe.ended = not arrived
            pipe.pending += arrived
            self._damage(pipe)
        if pipe.pending:
            with contextlib.suppress(BlockingIOError):
                sent = pipe.sink.send(pipe.pending)
                self.bytes_forwarded[pipe.direction] += sent
                del pipe.pending[:sent]
        if pipe.ended and not pipe.pending and not pipe.finished:
            pipe.finished = True
            with contextlib.suppress(OSError):
                pipe.sink.shutdown(socket.SHUT_WR)

    def _damage(self, pipe: _Pipe) -> None:
        position = self._corrupt_at.get(pipe.direction)
        if position is None:
            return
        # `pending` was empty before: its first byte is number `bytes_forwarded`.
        index = position - self.bytes_forwarded[pipe.direction]
        if 0 <= index < len(pipe.pending):
            pipe.pending[index] ^= 0x10
            del self._corrupt_at[pipe.direction]

    def _drop(self, pair: _Pair, *, reset: bool) -> None:
        self._pairs.remove(pair)
        for sock in (pair.initiator, pair.target):
            with contextlib.suppress(KeyError):
                self._selector.unregister(sock)
            if reset:
                _reset(sock)
            else:
                sock.close()

    def _close_listener(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _open_listener(self) -> None:
        if self._listener is None:
            self._listener = _listen(self.port)

    def _shut_down(self) -> None:
        self._running = False
        self._close_listener()
        for pair in list(self._pairs):
            self._drop(pair, reset=False)


def _listen(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    listener.setblocking(False)
    return listener


def _reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN: linger on, zero seconds."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
