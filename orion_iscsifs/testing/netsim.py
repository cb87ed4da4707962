"""A TCP proxy between an initiator and a target that misbehaves on request.

Theory of operation
-------------------
One thread runs one selector loop over the listening socket and every pair of sockets. A pair is
two one-way pipes. On a link without a delay each has at most `CHUNK_BYTES` in hand: while some are
waiting to leave, nothing more is read, so the proxy adds no buffer that would hide back pressure.
On a link with a delay bytes are in flight, as they are on a wire: every piece that was read has a
time at which it is due, and nothing is sent before that; `IN_FLIGHT_BYTES_MAX` bounds them. A rate
is kept where bytes are read (`link.py`): a link that is busy takes nothing, and the sender notices
by TCP's own means. `pipes.py` does all that for one pair. The selector's timeout is the next time
at which anything may go on, so an unshaped proxy never wakes up for a timer.

Controls are called from the test's thread: they queue a function and wake the loop through a socket
pair, and return when the loop has run it, so that after `cut()` returned the connections *are* cut.
The sockets belong to the loop's thread alone; there is no lock.

What the controls stage:
* `cut()`: every connection is reset (RST) at both ends; new ones are welcome. `cut_one(n)`: the
  nth of those that stand, in the order in which they came.
* `refuse()`/`accept()`: the port refuses connections, as a host without the service does.
* `stall()`/`flow()`: bytes stop, connections stay; new ones are accepted and get no answer, as a
  target that hangs or a network that swallows packets does.
* `corrupt_next(direction, after_bytes)`: flips one bit, as a faulty link behind TCP's checksum
  would.
* `shape(delay_s, jitter_s, bytes_per_s, direction)`: a slow or long line, in one direction or both.
* `drop_randomly(mean_s)`: each connection is reset after a random time of its own.
* `half_close(direction)`: one side sees the end of the stream while the other direction goes on.
"""

import contextlib
import math
import queue
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from orion_iscsifs.testing.link import Link
from orion_iscsifs.testing.pipes import Direction, Line, Pair, Pipe

__all__ = ["Direction", "TcpProxy"]

CONTROL_TIMEOUT_S = 10.0


class TcpProxy:
    """Listens on a port of its own and forwards to `(host, port)`; a context manager.

    `seed` makes jitter and random drops the same every time.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self._upstream = (host, port)
        self._listener: socket.socket | None = _listen(0)
        self.port: int = self._listener.getsockname()[1]
        self.connections_accepted = 0
        self.connections_dropped = 0
        """By `drop_randomly`."""
        self._lifetime_s: float | None = None
        self._chance = random.Random(seed)
        self._lines = {direction: Line(self._chance) for direction in Direction}
        self._turn = 0
        self._pairs: list[Pair] = []
        self._stalled = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._thread.start()

    @property
    def bytes_forwarded(self) -> dict[Direction, int]:
        return {direction: line.forwarded_bytes for direction, line in self._lines.items()}

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

        line = self._lines[direction]
        self._control(lambda: line.corrupt_after(after_bytes))

    def shape(
        self,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        bytes_per_s: float | None = None,
        direction: Direction | None = None,
    ) -> None:
        """Make the line in `direction` (None: both) so, and only so: `shape()` undoes it all.

        Connections share `bytes_per_s`. Bytes that are in flight arrive when they were due.
        """

        def replace_links() -> None:
            for each in Direction if direction is None else (direction,):
                self._lines[each].link = Link(delay_s, jitter_s, bytes_per_s)

        self._control(replace_links)

    def drop_randomly(self, mean_s: float | None) -> None:
        """Reset each connection, those to come too, after `mean_s` on average; None: no more."""

        def draw() -> None:
            self._lifetime_s = mean_s
            for pair in self._pairs:
                pair.reset_at = self._draw_lifetime()

        self._control(draw)

    def half_close(self, direction: Direction) -> None:
        """End the stream of every connection in `direction`, after what is in flight.

        The other direction goes on; what the sender still sends gets lost.
        """

        def end() -> None:
            for pair in self._pairs:
                for pipe in pair.pipes:
                    if pipe.line is self._lines[direction]:
                        pipe.end()

        self._control(end)

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
            wake_at = self._watch(time.monotonic())
            timeout_s = None if wake_at == math.inf else max(0.0, wake_at - time.monotonic())
            for key, _ in self._selector.select(timeout_s):
                if key.fileobj is self._wake_reader:
                    self._obey()
                elif key.fileobj is self._listener:
                    self._welcome()
            if not self._stalled:
                self._forward()
            self._drop_the_due(time.monotonic())
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _watch(self, now: float) -> float:
        """Tell the selector what to wait for, said anew each time; until when at the most."""
        wanted: dict[socket.socket, int] = {self._wake_reader: selectors.EVENT_READ}
        if self._listener is not None:
            wanted[self._listener] = selectors.EVENT_READ
        wake_at = min((pair.reset_at for pair in self._pairs), default=math.inf)
        for pair in () if self._stalled else self._pairs:
            for pipe in pair.pipes:
                wake_at = min(wake_at, pipe.watch(wanted, now))
        watched = self._selector.get_map()
        for key in list(watched.values()):
            if key.fileobj not in wanted:
                self._selector.unregister(key.fileobj)
        for sock, events in wanted.items():
            if sock not in watched:
                self._selector.register(sock, events)
            elif watched[sock].events != events:
                self._selector.modify(sock, events)
        return wake_at

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
                Pipe(initiator, target, self._lines[Direction.TO_TARGET]),
                Pipe(target, initiator, self._lines[Direction.TO_INITIATOR]),
            )
            self._pairs.append(Pair(initiator, target, pipes, self._draw_lifetime()))

    def _draw_lifetime(self) -> float:
        """When a connection is to be reset."""
        if self._lifetime_s is None:
            return math.inf
        return time.monotonic() + self._chance.expovariate(1 / self._lifetime_s)

    def _drop_the_due(self, now: float) -> None:
        for pair in [pair for pair in self._pairs if pair.reset_at <= now]:
            self.connections_dropped += 1
            self._drop(pair, reset=True)

    def _forward(self) -> None:
        # Another pair is first each time: they share the rate of the link.
        self._turn = (self._turn + 1) % max(1, len(self._pairs))
        for pair in self._pairs[self._turn :] + self._pairs[: self._turn]:
            try:
                for pipe in pair.pipes:
                    pipe.take(time.monotonic())
                    pipe.send(time.monotonic())
            except OSError:
                self._drop(pair, reset=True)
                continue
            if all(pipe.finished for pipe in pair.pipes):
                self._drop(pair, reset=False)

    def _drop(self, pair: Pair, *, reset: bool) -> None:
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
