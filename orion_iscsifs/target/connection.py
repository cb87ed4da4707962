"""One TCP connection of the target: bytes in, PDUs out, as few system calls as possible.

Raw non-blocking sockets rather than `trio.SocketStream`: both directions try the system call first
and wait only when the kernel has nothing, and one wake-up handles every PDU that has arrived.
Answers gather in a queue that one `sendmsg` empties; a writer task exists only for the moments
when the peer reads too slowly.
"""

import socket
from typing import Final

import trio

from orion_iscsifs.errors import ConnectionLost
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.framing import Framer, Sink, encode
from orion_iscsifs.protocol.login_stages import LOGIN_SEGMENT_BYTES_MAX
from orion_iscsifs.protocol.pdu import Pdu
from orion_iscsifs.target.faults import Act

Buffer = bytes | bytearray | memoryview

_PIECES_MAX: Final = 512
"""Of one sendmsg; IOV_MAX is 1024."""
_READS_WITHOUT_REST: Final = 8
"""A peer that never pauses must not keep the other tasks from running."""


class Connection:
    """`stat_sn` is the StatSN of the next status that this connection carries."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.local: tuple[str, int] = sock.getsockname()[:2]
        self.peer: tuple[str, int] = sock.getpeername()[:2]
        self.stat_sn = 0
        self.cid = 0
        self.heard = True
        """Anything was received since somebody last set this to False."""
        self.queued_bytes = 0
        self._sink: Sink | None = None
        self._sock = sock
        self._framer = Framer(data_segment_length_max=LOGIN_SEGMENT_BYTES_MAX, sink=self._place)
        self._queue: list[Buffer] = []
        self._more_to_send = trio.lowlevel.ParkingLot()
        self._all_sent = trio.lowlevel.ParkingLot()
        self._reads = 0
        self.closed = False

    # -- receiving --------------------------------------------------------------------------------

    def enter_full_feature(
        self,
        *,
        header_digest: bool,
        data_digest: bool,
        segment_bytes_max: int,
        sink: Sink,
        keep_damaged: bool = False,
    ) -> None:
        """The login ended with these; `sink` is asked where data segments belong.

        `keep_damaged`: ErrorRecoveryLevel 1 and above (see framing.Framer).
        """
        framer = self._framer
        framer.keep_damaged = keep_damaged
        framer.header_digest, framer.data_digest = header_digest, data_digest
        framer.data_segment_length_max = segment_bytes_max
        self._sink = sink

    @property
    def segment_bytes_max(self) -> int:
        """What we declared as MaxRecvDataSegmentLength; a text exchange may declare another."""
        return self._framer.data_segment_length_max

    @segment_bytes_max.setter
    def segment_bytes_max(self, value: int) -> None:
        self._framer.data_segment_length_max = value

    def _place(self, pdu: Pdu, length: int) -> memoryview | None:
        return self._sink(pdu, length) if self._sink is not None else None

    async def receive(self) -> list[Pdu]:
        """At least one PDU; raises ConnectionLost, ProtocolViolation or DigestError."""
        framer = self._framer
        while True:
            if self.closed:
                raise ConnectionLost(f"{self.peer}: closed here")
            try:
                count = self._sock.recvmsg_into(framer.buffers())[0]
            except BlockingIOError:
                self._reads = 0
                await self._readable()
                continue
            except OSError as error:
                raise ConnectionLost(f"{self.peer}: {error.strerror}") from error
            if count == 0:
                raise ConnectionLost(f"{self.peer}: closed by the initiator")
            self.heard = True
            pdus = framer.received(count)
            self._reads += 1
            if self._reads == _READS_WITHOUT_REST:
                self._reads = 0
                await trio.lowlevel.checkpoint()
            if pdus:
                return pdus

    async def _readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._sock)
        except trio.ClosedResourceError:
            raise ConnectionLost(f"{self.peer}: closed here") from None

    # -- sending ----------------------------------------------------------------------------------

    def send(self, pdu: Pdu, spoil: Act | None = None) -> None:
        """Queue one PDU; `flush` sends. `spoil` damages a digest on purpose."""
        framer = self._framer
        pieces = encode(pdu, header_digest=framer.header_digest, data_digest=framer.data_digest)
        if spoil is not None:
            pieces = self._spoilt(pieces, spoil)
        for piece in pieces:
            self.queued_bytes += len(piece)
        self._queue += pieces

    def next_stat_sn(self) -> int:
        number = self.stat_sn
        self.stat_sn = serial.add(number, 1)
        return number

    def flush(self) -> None:
        """Send what the kernel takes now; the writer task does the rest."""
        self._send_now()
        if self._queue:
            self._more_to_send.unpark()

    def _send_now(self) -> None:
        queue = self._queue
        while queue and not self.closed:
            try:
                count = self._sock.sendmsg(queue[:_PIECES_MAX])
            except BlockingIOError:
                return
            except OSError:
                # The reader meets the same broken connection and ends the session.
                self.close()
                return
            self.queued_bytes -= count
            done = 0
            for piece in queue:
                if count < len(piece):
                    break
                count -= len(piece)
                done += 1
            del queue[:done]
            if count:
                queue[0] = memoryview(queue[0])[count:]
        if not queue:
            self._all_sent.unpark_all()

    async def write_loop(self) -> None:
        """Waits for room in the kernel's buffer whenever `flush` left something."""
        while True:
            if not self._queue or self.closed:
                await self._more_to_send.park()
                continue
            try:
                await trio.lowlevel.wait_writable(self._sock)
            except trio.ClosedResourceError:
                return
            self._send_now()

    async def drain(self) -> None:
        """Until everything queued is in the kernel; needs `write_loop` running."""
        self.flush()
        while self._queue and not self.closed:
            await self._all_sent.park()

    async def send_all(self) -> None:
        """As `drain`, without a writer task: for the login phase."""
        while True:
            self._send_now()
            if not self._queue or self.closed:
                return
            try:
                await trio.lowlevel.wait_writable(self._sock)
            except trio.ClosedResourceError:
                return

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """At once; what is queued is lost. Wakes whoever waits for the socket."""
        if self.closed:
            return
        self.closed = True
        self._queue.clear()
        self.queued_bytes = 0
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        self._all_sent.unpark_all()

    def _spoilt(self, pieces: list[Buffer], spoil: Act) -> list[Buffer]:
        """The same PDU with one bit of its header or data digest inverted."""
        framer = self._framer
        if spoil is Act.CORRUPT_HEADER_DIGEST and framer.header_digest:
            pieces[0] = _last_bit_flipped(pieces[0])
        elif spoil is Act.CORRUPT_DATA_DIGEST and framer.data_digest and len(pieces) > 1:
            pieces[-1] = _last_bit_flipped(pieces[-1])
        return pieces


def _last_bit_flipped(piece: Buffer) -> bytes:
    damaged = bytearray(piece)
    damaged[-1] ^= 1
    return bytes(damaged)
