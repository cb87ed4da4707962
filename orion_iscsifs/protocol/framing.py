"""Between the byte stream and PDUs (RFC 7143 §11.2): pure, both roles, no copy of large data.

Theory of operation
-------------------
A TCP stream is a run of PDUs: 48 bytes of BHS, perhaps AHS, perhaps a header digest, the data
segment, its padding to four bytes, perhaps a data digest. Two things cost on the receiving side:
system calls and copies. Small PDUs are best read many at a time, a large data segment is best read
straight to where it belongs. `Framer` does both with one scatter read:

    buffers()     [rest of the open data segment, staging area]   for one recvmsg_into
    received(n)   every PDU that these n bytes complete

Headers, small segments and the first part of a large one land in the staging area. When a header
is complete, `sink(pdu, length)` may name the memory where its data segment belongs (a reader's own
buffer, for a Data-In); what is already staged is copied there and the rest comes in place. Behind
an open segment the staging area is empty by construction, so the bytes that follow (padding,
digest, the next PDUs) begin at its start.

A length is checked against `data_segment_length_max` (our own MaxRecvDataSegmentLength) before
memory is taken. Digests are checked as each segment completes. A header digest that does not match
ends the connection at every level: the length it protects can't be trusted (RFC 7143 §7.8). A data
digest that does not match ends it too, unless `keep_damaged` says that the session can recover:
then a `Damaged` takes the PDU's place.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import ClassVar, Final

import crc32c

from orion_iscsifs.errors import DigestError, ProtocolViolation
from orion_iscsifs.protocol.digest import DIGEST_BYTES, Buffer, digest
from orion_iscsifs.protocol.pdu import BHS_BYTES, PDU_TYPES, Pdu, unpack

Sink = Callable[[Pdu, int], memoryview | None]
"""Given a PDU whose data segment of so many bytes follows: where it belongs, or None."""

STAGING_BYTES: Final = 128 << 10
_HEADER_BYTES_MAX: Final = BHS_BYTES + 255 * 4 + DIGEST_BYTES
PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")
"""What a data segment needs to end on four bytes, by its length modulo 4 (RFC 7143 §11.2.3)."""


@dataclass(slots=True)
class Damaged:
    """A PDU whose data digest does not match: its header is right, its data segment is not.

    Whoever gets it must act as if the PDU had not come, and ask for it again (RFC 7143 §7.8).
    """

    name: ClassVar[str] = "PDU with a wrong data digest"

    pdu: Pdu
    initiator_task_tag: int
    data: Buffer = b""
    ahs: Buffer = b""

    def pack(self, ahs_words: int, data_length: int) -> bytes:
        """The header as it came, which a Reject has to show (§11.17)."""
        return self.pdu.pack(ahs_words, data_length)


class Framer:
    """Cuts received bytes into PDUs. See the module's docstring."""

    def __init__(
        self,
        *,
        data_segment_length_max: int,
        sink: Sink | None = None,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        assert staging_bytes >= 2 * _HEADER_BYTES_MAX
        self.data_segment_length_max = data_segment_length_max
        self.header_digest = False
        self.data_digest = False
        self.keep_damaged = False
        """ErrorRecoveryLevel 1 and above: a wrong data digest gives a `Damaged`, not an error."""
        self.one_at_a_time = False
        """Stop after each PDU: the last Login Response changes how what follows it is cut up."""
        self.sink = sink
        self._staging = memoryview(bytearray(staging_bytes))
        self._start = 0
        self._end = 0
        self._open: Pdu | None = None
        """The PDU whose data segment or trailer has not arrived in full."""
        self._rest: memoryview | None = None
        """What is missing of the open data segment; the next bytes go there."""
        self._trailer = 0
        """Padding and data digest of the open PDU, in bytes, still to come."""

    def buffers(self) -> list[memoryview]:
        """Where the next bytes belong, in order; never empty."""
        staging = self._staging[self._end :]
        return [staging] if self._rest is None else [self._rest, staging]

    def received(self, count: int) -> list[Pdu]:
        """Take `count` bytes that were read into `buffers()`; the PDUs they complete.

        With `one_at_a_time` at most one; `received(0)` gives the next of those that are here.
        Raises ProtocolViolation or DigestError; the stream is unusable afterwards.
        """
        done: list[Pdu] = []
        if self._rest is not None:
            taken = min(count, len(self._rest))
            count -= taken
            self._rest = self._rest[taken:] if taken < len(self._rest) else None
        self._end += count
        while self._rest is None and (pdu := self._next()) is not None:
            done.append(pdu)
            if self.one_at_a_time:
                break
        self._make_room()
        return done

    def divert(self, initiator_task_tag: int) -> None:
        """Let go of the memory that the sink gave for this task's open data segment.

        The bytes still to come go to memory of our own: the owner wants its buffer back.
        """
        pdu = self._open
        if pdu is None or pdu.initiator_task_tag != initiator_task_tag:
            return
        private = memoryview(bytearray(pdu.data))
        if self._rest is not None:
            self._rest = private[len(private) - len(self._rest) :]
        pdu.data = private

    def release(self, tasks: Container[int]) -> None:
        """`divert` the open data segment if its task is not one of `tasks`, which are still alive.

        To be called when PDUs have been handled and before their readers can run: a peer may begin
        a data segment for a command whose end came in the same batch.
        """
        if self._open is not None and self._open.initiator_task_tag not in tasks:
            self.divert(self._open.initiator_task_tag)

    def _next(self) -> Pdu | None:
        """The next PDU that is complete, or None after opening one that is not."""
        pdu = self._open
        if pdu is None:
            pdu = self._header()
            if pdu is None or self._open is None:
                return pdu
        if self._rest is not None or self._end - self._start < self._trailer:
            return None
        return self._finish(pdu)

    def _header(self) -> Pdu | None:
        """Parse one header; a PDU with data becomes the open one."""
        start, available = self._start, self._end - self._start
        if available < BHS_BYTES:
            return None
        staging = self._staging
        word = int.from_bytes(staging[start + 4 : start + 8], "big")
        ahs_bytes, length = (word >> 24) * 4, word & 0xFF_FFFF
        header_bytes = BHS_BYTES + ahs_bytes
        if available < header_bytes + (DIGEST_BYTES if self.header_digest else 0):
            # An unknown opcode is told at once: a stranger's bytes may name any length.
            if staging[start] & 0x3F not in PDU_TYPES:
                unpack(staging[start : start + BHS_BYTES])
            return None
        self._start += header_bytes
        if self.header_digest:
            self._check_header_digest(start, header_bytes)
        pdu = unpack(staging[start : start + BHS_BYTES])
        if ahs_bytes:
            pdu.ahs = bytes(staging[start + BHS_BYTES : start + header_bytes])
        if length:
            self._open_segment(pdu, length)
        return pdu

    def _check_header_digest(self, start: int, header_bytes: int) -> None:
        header = self._staging[start : start + header_bytes]
        if digest(header) != self._staging[self._start : self._start + DIGEST_BYTES]:
            raise DigestError("PDU", "the header digest does not match", section="7.8")
        self._start += DIGEST_BYTES

    def _open_segment(self, pdu: Pdu, length: int) -> None:
        if length > self.data_segment_length_max:
            raise ProtocolViolation(
                pdu.name,
                f"DataSegmentLength {length} exceeds our MaxRecvDataSegmentLength"
                f" {self.data_segment_length_max}",
                section="13.12",
            )
        place = self.sink(pdu, length) if self.sink is not None else None
        if place is None:
            place = memoryview(bytearray(length))
        assert len(place) == length
        staged = min(length, self._end - self._start)
        place[:staged] = self._staging[self._start : self._start + staged]
        self._start += staged
        pdu.data = place
        self._open = pdu
        self._rest = place[staged:] if staged < length else None
        self._trailer = -length % 4 + (DIGEST_BYTES if self.data_digest else 0)

    def _finish(self, pdu: Pdu) -> Pdu:
        """Check and drop the trailer of the open PDU."""
        trailer = self._staging[self._start : self._start + self._trailer]
        self._start += self._trailer
        self._open = None
        if self.data_digest:
            padding = len(trailer) - DIGEST_BYTES
            if digest(pdu.data, trailer[:padding]) != trailer[padding:]:
                if self.keep_damaged:
                    return Damaged(pdu, pdu.initiator_task_tag)
                raise DigestError(pdu.name, "the data digest does not match", section="7.8")
        return pdu

    def _make_room(self) -> None:
        """Move what is left to the front when the staging area could become too short."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._staging) - self._end < _HEADER_BYTES_MAX:
            left = bytes(self._staging[self._start : self._end])
            self._staging[: len(left)] = left
            self._start, self._end = 0, len(left)


def encode(pdu: Pdu, *, header_digest: bool, data_digest: bool) -> list[Buffer]:
    """The pieces of one PDU for a gathering send, in order; the data segment is not copied."""
    data, ahs = pdu.data, pdu.ahs
    length = len(data)
    header = pdu.pack(len(ahs) >> 2, length)
    if ahs:
        header += bytes(ahs)
    if header_digest:
        header += digest(header)
    if not length:
        return [header]
    padding = PADDING[length & 3]
    if data_digest:
        crc = crc32c.crc32c(padding, crc32c.crc32c(data))
        return [header, data, padding + crc.to_bytes(DIGEST_BYTES, "little")]
    return [header, data, padding] if padding else [header, data]
