"""Framing, headers and text as properties of arbitrary bytes."""

from collections.abc import Iterator
from typing import Final

from orion_iscsifs.errors import DigestError, ProtocolViolation
from orion_iscsifs.protocol.chap import decode_binary
from orion_iscsifs.protocol.digest import digest
from orion_iscsifs.protocol.framing import Damaged, Framer, encode
from orion_iscsifs.protocol.pdu import (
    BHS_BYTES,
    PDU_TYPES,
    DataIn,
    DataOut,
    LoginRequest,
    Pdu,
    data_segment_length,
    unpack,
)
from orion_iscsifs.protocol.text import (
    SHOWN_CHARS_MAX,
    TextReader,
    encode_text,
    parse_number,
    shown,
    split_text,
)
from tests.hostile.draw import Draw

_OPCODES: Final = tuple(PDU_TYPES)
_STAGING_BYTES: Final = 4096


def check_violation(error: ProtocolViolation) -> None:
    """Names the PDU and the section; nothing of it moves a terminal's cursor."""
    assert error.pdu
    assert error.section[0].isdigit() or error.section == "C", error.section
    assert error.pdu in str(error)
    assert f"§{error.section}" in str(error)
    assert str(error).isprintable(), repr(str(error))
    assert len(str(error)) < 1000


# -- framing ---------------------------------------------------------------------------------------


def framing(data: bytes) -> None:
    """The same PDUs however the stream is cut, bounded memory, typed errors only."""
    draw = Draw(data)
    settings = _Settings(draw)
    cuts = [1 + draw.below(400) for _ in range(draw.below(6))]
    stream = draw.rest() if draw.flag() else _stream(draw, settings)
    whole, failed = _run(settings, stream, [])
    pieces, failed_in_pieces = _run(settings, stream, cuts)
    assert failed_in_pieces == failed
    # What one call completes before it raises is lost with the connection.
    assert pieces[: len(whole)] == whole
    if not failed:
        assert len(pieces) == len(whole)


class _Settings:
    def __init__(self, draw: Draw) -> None:
        self.header_digest = draw.flag()
        self.data_digest = draw.flag()
        self.keep_damaged = draw.flag()
        self.sink = draw.flag()
        self.limit_bytes = draw.choice((512, 8192, 1 << 18))


def _stream(draw: Draw, settings: _Settings) -> bytes:
    """PDUs with valid digests around hostile headers; now and then a damaged byte."""
    stream = bytearray()
    while draw and len(stream) < 1 << 16:
        header = bytearray(draw.raw(BHS_BYTES).ljust(BHS_BYTES, b"\0"))
        if not draw.chance(8):
            header[0] = header[0] & 0xC0 | draw.choice(_OPCODES)
        ahs = draw.raw(4 * draw.below(4)) if draw.chance(4) else b""
        ahs = ahs.ljust(-(-len(ahs) // 4) * 4, b"\0")
        segment = draw.block() if draw.flag() else bytes(draw.below(10000))
        if not draw.chance(8):
            header[4:8] = (len(ahs) >> 2, *len(segment).to_bytes(3, "big"))
        stream += header + ahs
        if settings.header_digest:
            stream += digest(header + ahs)
        if segment:
            padding = bytes(-len(segment) % 4)
            stream += segment + padding
            if settings.data_digest:
                stream += digest(segment, padding)
        if draw.chance(8):
            stream[draw.below(len(stream))] ^= 1 + draw.below(255)
    return bytes(stream)


class _Memory:
    """Plays the sink, and counts what is asked for."""

    def __init__(self, settings: _Settings) -> None:
        self._limit = settings.limit_bytes
        self.bytes = 0

    def place(self, pdu: Pdu, length: int) -> memoryview | None:
        assert 0 < length <= self._limit, "a length that was not checked"
        self.bytes += length
        return memoryview(bytearray(length)) if isinstance(pdu, DataIn | DataOut) else None


def _run(settings: _Settings, stream: bytes, cuts: list[int]) -> tuple[list[str], bool]:
    memory = _Memory(settings)
    framer = Framer(
        data_segment_length_max=settings.limit_bytes,
        sink=memory.place if settings.sink else None,
        staging_bytes=_STAGING_BYTES,
    )
    framer.header_digest = settings.header_digest
    framer.data_digest = settings.data_digest
    framer.keep_damaged = settings.keep_damaged
    found: list[str] = []
    try:
        for pdus in feed(framer, stream, cuts):
            found += [_fingerprint(pdu, settings) for pdu in pdus]
    except ProtocolViolation as error:
        check_violation(error)
        assert not (
            isinstance(error, DigestError) and settings.keep_damaged and "data digest" in str(error)
        )
        return found, True
    assert memory.bytes <= len(stream) + settings.limit_bytes
    return found, False


def feed(framer: Framer, stream: bytes, cuts: list[int]) -> Iterator[list[Pdu]]:
    """Give the stream in pieces of these sizes, in turn; the PDUs of each."""
    position, turn = 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)] if cuts else len(stream)
        turn += 1
        given = 0
        buffers = framer.buffers()
        assert len(buffers[-1]) >= BHS_BYTES, "there is always room for a header"
        for buffer in buffers:
            part = stream[position + given : position + min(size, given + len(buffer))]
            buffer[: len(part)] = part
            given += len(part)
        position += given
        yield framer.received(given)


def _fingerprint(pdu: Pdu, settings: _Settings) -> str:
    inner = pdu.pdu if isinstance(pdu, Damaged) else pdu
    assert len(inner.data) <= settings.limit_bytes
    assert len(inner.ahs) <= 255 * 4
    # A Reject has to show the header, of a damaged PDU too.
    assert len(pdu.pack(len(inner.ahs) >> 2, len(inner.data))) == BHS_BYTES
    inner.data = bytes(inner.data)
    return f"{type(pdu).__name__} {inner!r}"


# -- headers ---------------------------------------------------------------------------------------


def headers(data: bytes) -> None:
    """48 bytes are a PDU or a violation; packing gives every field back and nothing else."""
    for opcode in _OPCODES if len(data) > BHS_BYTES else (None,):
        header = bytearray(data[:BHS_BYTES].ljust(BHS_BYTES, b"\0"))
        if opcode is not None:
            header[0] = header[0] & 0xC0 | opcode
        _header(bytes(header))


def _header(header: bytes) -> None:
    try:
        pdu = unpack(header)
    except ProtocolViolation as error:
        check_violation(error)
        assert header[0] & 0x3F not in PDU_TYPES
        return
    words, length = header[4], data_segment_length(header)
    packed = pdu.pack(words, length)
    assert len(packed) == BHS_BYTES
    assert (packed[0] & 0x3F, packed[4], data_segment_length(packed)) == (
        header[0] & 0x3F,
        words,
        length,
    )
    again = unpack(packed)
    # Async Message and Reject always go out with the reserved tag, whatever came in.
    if pdu.initiator_task_tag == again.initiator_task_tag:
        assert again == pdu
    assert again.pack(words, length) == packed
    for wanted in (bytearray(header), memoryview(header)):
        assert unpack(wanted) == pdu


# -- text ------------------------------------------------------------------------------------------


def text(data: bytes) -> None:
    """Pairs or a violation, however the bytes are spread over PDUs; and back again."""
    draw = Draw(data)
    step = 1 + draw.below(300)
    limit = draw.choice((100, 8192, 65536))
    raw = draw.rest()
    reader = TextReader(LoginRequest.name, limit)
    try:
        for segment in split_text(raw, step):
            assert len(segment) <= step
            reader.feed(memoryview(segment))
        pairs = reader.finish()
    except ProtocolViolation as error:
        check_violation(error)
    else:
        assert len(raw) <= limit
        again = TextReader(LoginRequest.name, len(raw) + 1)
        again.feed(encode_text(pairs))
        assert again.finish() == pairs
        assert reader.finish() == [], "empty, and ready for the next segment"
    values(raw)


def values(data: bytes) -> None:
    """Numbers and binary values out of text that may be anything."""
    word = data.decode("utf-8", "replace")
    number = parse_number(word)
    assert number is None or 0 <= number < 1 << 64
    assert number is None or word.isascii()
    quoted = shown(word)
    assert quoted.isascii()
    assert quoted.isprintable()
    assert len(quoted) <= 10 * SHOWN_CHARS_MAX + 5
    for candidate in (word, "0x" + data.hex(), "0b" + word):
        try:
            value = decode_binary(candidate, key="CHAP_C", pdu=LoginRequest.name)
        except ProtocolViolation as error:
            check_violation(error)
        else:
            assert 0 < len(value) <= 1024


def encoded(pdu: Pdu, *, header_digest: bool = False, data_digest: bool = False) -> bytes:
    """A PDU as it goes over the wire."""
    pieces = encode(pdu, header_digest=header_digest, data_digest=data_digest)
    return b"".join(bytes(piece) for piece in pieces)
