"""The two directions of one connection through `netsim`'s proxy, and the lines that they share.

Everything here belongs to the thread of the proxy. A method that meets a broken socket raises
OSError: the pair is over.
"""

import contextlib
import enum
import math
import random
import selectors
import socket
from collections import deque
from dataclasses import dataclass, field

from orion_iscsifs.testing.link import CHUNK_BYTES, Link


class Direction(enum.Enum):
    TO_TARGET = "to target"
    TO_INITIATOR = "to initiator"


@dataclass(eq=False)
class Line:
    """One direction, of all connections."""

    chance: random.Random
    link: Link = field(default_factory=Link)
    taken_bytes: int = 0
    forwarded_bytes: int = 0
    corrupt_at: int | None = None
    """One bit of the byte that is taken as number so-and-so is to be flipped."""

    def corrupt_after(self, after_bytes: int) -> None:
        self.corrupt_at = self.taken_bytes + after_bytes

    def taken(self, arrived: bytes, now: float) -> memoryview:
        """What enters the line when these bytes arrive: damaged, if it is their turn."""
        self.link.took(len(arrived), now)
        index = -1 if self.corrupt_at is None else self.corrupt_at - self.taken_bytes
        self.taken_bytes += len(arrived)
        if not 0 <= index < len(arrived):
            return memoryview(arrived)
        self.corrupt_at = None
        damaged = bytearray(arrived)
        damaged[index] ^= 0x10
        return memoryview(damaged)


@dataclass(eq=False)
class Pipe:
    """Bytes on their way from `source` to `sink`."""

    source: socket.socket
    sink: socket.socket
    line: Line
    pending: deque[tuple[float, memoryview]] = field(default_factory=deque)
    """Pieces, and when they are due; an empty one is the end of the stream."""
    in_flight_bytes: int = 0
    last_due: float = 0.0
    ended: bool = False
    """The last piece is in `pending`, or was."""
    swallowing: bool = False
    """The end came before `source` had ended: what it still sends gets lost."""
    finished: bool = False
    """The end has been passed on to `sink`."""

    def end(self) -> None:
        """The stream ends here, after what is in flight."""
        if not self.ended:
            self.swallowing = self.ended = True
            self.pending.append((self.last_due, memoryview(b"")))

    def watch(self, wanted: dict[socket.socket, int], now: float) -> float:
        """Add the events that this pipe waits for; the time that it waits for, if any."""
        wake_at = math.inf
        if self.pending:
            due = self.pending[0][0]
            if due <= now:
                wanted[self.sink] = wanted.get(self.sink, 0) | selectors.EVENT_WRITE
            else:
                wake_at = due
        link = self.line.link
        if self.swallowing or self._has_room:
            if self.swallowing or link.take_max(now):
                wanted[self.source] = wanted.get(self.source, 0) | selectors.EVENT_READ
            else:
                wake_at = min(wake_at, link.busy_until)
        return wake_at

    @property
    def _has_room(self) -> bool:
        return not self.ended and self.in_flight_bytes < self.line.link.room_bytes

    def take(self, now: float) -> None:
        """One piece from the source, if the link takes one."""
        if self.swallowing:
            with contextlib.suppress(BlockingIOError):
                self.swallowing = bool(self.source.recv(CHUNK_BYTES))
        length = self.line.link.take_max(now) if self._has_room else 0
        if not length:
            return
        try:
            arrived = self.source.recv(length)
        except BlockingIOError:
            return
        self.ended = not arrived
        self.last_due = self.line.link.arrival(now, self.last_due, self.line.chance)
        self.pending.append((self.last_due, self.line.taken(arrived, now)))
        self.in_flight_bytes += len(arrived)

    def send(self, now: float) -> None:
        """What is due, as much as the sink takes; the end of the stream too."""
        while self.pending and self.pending[0][0] <= now:
            due, piece = self.pending.popleft()
            if not piece:
                self.finished = True
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
                return
            sent = 0
            with contextlib.suppress(BlockingIOError):
                sent = self.sink.send(piece)
            self.line.forwarded_bytes += sent
            self.in_flight_bytes -= sent
            if sent < len(piece):
                self.pending.appendleft((due, piece[sent:]))
                return


@dataclass(eq=False)
class Pair:
    initiator: socket.socket
    target: socket.socket
    pipes: tuple[Pipe, Pipe]
    reset_at: float = math.inf
