"""PDUs over one TCP connection: a non-blocking socket and a `Framer`.

trio's own sockets pay a checkpoint for every call. Here a call that can be served at once is
served at once; only an empty or a full socket waits.
"""

import contextlib
import socket
from typing import ClassVar, Final

import trio

from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.protocol.framing import Framer
from orion_iscsifs.protocol.pdu import Pdu

Buffer = bytes | bytearray | memoryview

_PIECES_MAX: Final = 512
"""Pieces for one sendmsg, below the kernel's limit of 1024 (UIO_MAXIOV)."""


class Wire:
    """The connection's socket. Errors of the socket are raised as ConnectionLost."""

    advice_if_strange: ClassVar[str] = (
        "check that the port is an iSCSI target's; if it is one with TLS, write iscsis://"
    )
    """For a peer that ends the connection, or talks nonsense, before its first PDU."""

    def __init__(self, sock: socket.socket, framer: Framer, peer: str) -> None:
        self._sock = sock
        self.framer = framer
        self.peer = peer
        """`host:port`, for messages."""

    @property
    def local(self) -> str:
        host, port = self._sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def shutdown(self) -> None:
        """Nothing more is sent or received; `close` still has to follow."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def receive_nowait(self) -> list[Pdu] | None:
        """The PDUs that the bytes at hand complete (perhaps none); None when no byte is there."""
        framer = self.framer
        buffers = framer.buffers()
        try:
            if len(buffers) == 1:
                count = self._sock.recv_into(buffers[0])
            else:
                count = self._sock.recvmsg_into(buffers)[0]
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise self._lost(error) from None
        if count == 0:
            raise ConnectionLost(f"{self.peer}: the target closed the connection")
        return framer.received(count)

    async def receive(self) -> list[Pdu]:
        """Wait for bytes; the PDUs they complete (perhaps none)."""
        while True:
            pdus = self.receive_nowait()
            if pdus is not None:
                return pdus
            await self.wait_readable()

    async def first_bytes(self, count: int) -> bytes:
        """Wait for bytes; up to `count` of them, still to be received."""
        await self.wait_readable()
        try:
            return self._sock.recv(count, socket.MSG_PEEK)
        except OSError:
            return b""

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self._sock)

    def send_nowait(self, pieces: list[Buffer]) -> list[Buffer]:
        """Send what the socket takes in one call; the pieces (or parts) that are left."""
        batch = pieces if len(pieces) <= _PIECES_MAX else pieces[:_PIECES_MAX]
        try:
            sent = self._sock.sendmsg(batch)
        except (BlockingIOError, InterruptedError):
            return pieces
        except OSError as error:
            raise self._lost(error) from None
        for index, piece in enumerate(batch):
            if sent < len(piece):
                rest: list[Buffer] = [memoryview(piece)[sent:]] if sent else [piece]
                return rest + pieces[index + 1 :]
            sent -= len(piece)
        return pieces[len(batch) :]

    async def send(self, pieces: list[Buffer]) -> None:
        """Send all; waits while the socket is full."""
        while pieces := self.send_nowait(pieces):
            await trio.lowlevel.wait_writable(self._sock)

    def _lost(self, error: OSError) -> ConnectionLost:
        return ConnectionLost(f"{self.peer}: connection lost: {error.strerror or error}")
