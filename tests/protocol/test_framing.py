"""Framing: PDUs out of a byte stream that is cut anywhere, data segments in their own place."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import DigestError, OrionError, ProtocolViolation
from orion_iscsifs.protocol.digest import digest
from orion_iscsifs.protocol.framing import Damaged, Framer, encode
from orion_iscsifs.protocol.pdu import DataIn, NopIn, NopOut, Pdu, ScsiCommand, ScsiResponse

Buffer = bytes | bytearray | memoryview


def feed(framer: Framer, stream: Buffer, cuts: list[int]) -> list[Pdu]:
    """Give the stream in pieces of the sizes in `cuts`, as a socket would."""
    pdus: list[Pdu] = []
    position, turn = 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)] if cuts else len(stream)
        turn += 1
        chunk = memoryview(stream)[position : position + size]
        given_bytes = 0
        for buffer in framer.buffers():
            part = chunk[given_bytes : given_bytes + len(buffer)]
            buffer[: len(part)] = part
            given_bytes += len(part)
        position += given_bytes
        pdus += framer.received(given_bytes)
    return pdus


def wire(pdus: list[Pdu], header_digest: bool, data_digest: bool) -> bytes:
    return b"".join(
        bytes(piece)
        for pdu in pdus
        for piece in encode(pdu, header_digest=header_digest, data_digest=data_digest)
    )


def samples(sizes: list[int]) -> list[Pdu]:
    pdus: list[Pdu] = []
    for number, size in enumerate(sizes):
        data = bytes((number + position) & 0xFF for position in range(size))
        pdus.append(DataIn(number, data_sn=number, data=data))
        pdus.append(ScsiResponse(number, stat_sn=number))
        pdus.append(ScsiCommand(1, number, b"\x7f" * 16, ahs=b"\0\1\2\0abcd", data=data[:5]))
    return pdus


def test_crc32c_is_the_one_of_rfc_3720_appendix_b4() -> None:
    """Known answers: 32 bytes of zeroes, of ones, and counting up."""
    assert digest(bytes(32)) == bytes.fromhex("aa36918a")
    assert digest(b"\xff" * 32) == bytes.fromhex("43aba862")
    assert digest(bytes(range(32))) == bytes.fromhex("4e79dd46")


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 5000), max_size=6),
    header_digest=st.booleans(),
    data_digest=st.booleans(),
    placed=st.booleans(),
)
def test_any_cut_gives_the_same_pdus(
    sizes: list[int], cuts: list[int], header_digest: bool, data_digest: bool, placed: bool
) -> None:
    sent = samples(sizes)
    home = {number: bytearray(size) for number, size in enumerate(sizes)}

    def sink(pdu: Pdu, length: int) -> memoryview | None:
        if placed and isinstance(pdu, DataIn):
            return memoryview(home[pdu.initiator_task_tag])[:length]
        return None

    framer = Framer(data_segment_length_max=3000, sink=sink, staging_bytes=4096)
    framer.header_digest, framer.data_digest = header_digest, data_digest
    got = feed(framer, wire(sent, header_digest, data_digest), cuts)
    for pdu in got:
        pdu.data = bytes(pdu.data)
    assert got == sent
    if placed:
        assert [bytes(home[n]) for n in range(len(sizes))] == [bytes(p.data) for p in sent[::3]]


def test_a_large_segment_goes_to_its_place_without_passing_through_staging() -> None:
    place = bytearray(1 << 20)
    framer = Framer(data_segment_length_max=1 << 20, sink=lambda _p, _n: memoryview(place))
    stream = wire([DataIn(1, data=bytes(range(256)) * 4096)], False, False)
    feed(framer, stream[:100], [])
    first, staging = framer.buffers()
    assert len(first) == (1 << 20) - 52
    assert len(staging) > 1000
    assert len(feed(framer, stream[100:], [70000])) == 1
    assert place == bytes(range(256)) * 4096


def test_divert_gives_the_buffer_back_in_the_middle_of_a_segment() -> None:
    place = bytearray(100)
    framer = Framer(data_segment_length_max=1000, sink=lambda _p, _n: memoryview(place))
    framer.data_digest = True
    stream = wire([DataIn(7, data=b"x" * 100), NopIn(stat_sn=3)], False, True)
    feed(framer, stream[:98], [])
    framer.divert(8)
    framer.divert(7)
    place[:] = bytes(100)
    data_in, nop = feed(framer, stream[98:], [])
    assert place == bytes(100), "the owner's buffer is not touched any more"
    assert bytes(data_in.data) == b"x" * 100, "and the digest still covers all of the segment"
    assert nop == NopIn(stat_sn=3)


@pytest.mark.parametrize("position", [3, 40, 49])
@pytest.mark.checklist(45, "7.8")
def test_a_damaged_header_is_a_digest_error(position: int) -> None:
    """Checklist 45, RFC 7143 §7.8."""
    stream = bytearray(wire([NopOut(1)], True, False))
    stream[position] ^= 0x10
    framer = Framer(data_segment_length_max=100)
    framer.header_digest = True
    with pytest.raises(DigestError, match="header digest"):
        feed(framer, stream, [])


@pytest.mark.parametrize("position", [48, 52, 53, 55, 56, 59])
@pytest.mark.checklist(44, "13.1")
def test_damaged_data_padding_or_digest_is_a_digest_error(position: int) -> None:
    """Checklist 44 and 45: the padding is covered too (§11.2.3)."""
    stream = bytearray(wire([NopOut(1, data=b"hello")], False, True))
    assert len(stream) == 48 + 5 + 3 + 4
    stream[position] ^= 1
    framer = Framer(data_segment_length_max=100)
    framer.data_digest = True
    with pytest.raises(DigestError, match="data digest"):
        feed(framer, stream, [])


@pytest.mark.checklist(44, "11.2.3")
def test_no_data_segment_has_no_data_digest() -> None:
    """Checklist 44."""
    assert len(wire([NopOut(1)], False, True)) == 48


def test_a_segment_over_our_limit_is_refused_before_memory_is_taken() -> None:
    header = bytearray(NopIn().pack(0, 0xFF_FFFF))
    framer = Framer(data_segment_length_max=8192)
    with pytest.raises(ProtocolViolation, match=r"16777215 exceeds.*§13\.12"):
        feed(framer, header, [])


def test_an_unknown_opcode_is_a_violation_at_once() -> None:
    framer = Framer(data_segment_length_max=8192)
    with pytest.raises(ProtocolViolation, match="unknown opcode"):
        feed(framer, b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\n\r\n", [])


@given(stream=st.binary(max_size=4000), digests=st.booleans())
def test_hostile_bytes_end_in_a_typed_error_or_wait_for_more(stream: bytes, digests: bool) -> None:
    framer = Framer(data_segment_length_max=8192)
    framer.header_digest = framer.data_digest = digests
    with suppress(OrionError):
        feed(framer, stream, [])
    assert len(framer.buffers()[-1]) > 1000, "there is room for more"


@pytest.mark.checklist(45, "7.8")
def test_with_recovery_a_damaged_data_segment_costs_one_pdu() -> None:
    """§7.8: discard the PDU and go on behind it."""
    framer = Framer(data_segment_length_max=8192)
    framer.data_digest = framer.keep_damaged = True
    first, second = DataIn(1, 0, 0, data=b"first"), DataIn(1, 1, 5, data=b"second")
    stream = bytearray(wire([first, second], header_digest=False, data_digest=True))
    stream[48] ^= 1
    damaged, whole = feed(framer, stream, [7])
    assert isinstance(damaged, Damaged)
    assert (damaged.initiator_task_tag, damaged.pdu.name) == (1, DataIn.name)
    assert damaged.pack(0, 5) == first.pack(0, 5)
    assert isinstance(whole, DataIn)
    assert bytes(whole.data) == b"second"


def test_one_at_a_time_leaves_what_follows_uncut() -> None:
    """Digests begin behind the last Login Response (§13.1), perhaps in the same read."""
    framer = Framer(data_segment_length_max=8192)
    framer.one_at_a_time = True
    stream = wire([NopIn(stat_sn=1)], False, False) + wire([NopIn(stat_sn=2)], True, True)
    (first,) = feed(framer, stream, [])
    assert isinstance(first, NopIn)
    framer.header_digest = framer.data_digest = True
    framer.one_at_a_time = False
    (second,) = framer.received(0)
    assert isinstance(second, NopIn)
    assert (first.stat_sn, second.stat_sn) == (1, 2)
