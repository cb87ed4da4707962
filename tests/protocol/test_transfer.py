"""What goes out with a write and after it, and what may come in for a read."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import NO_TAG, R2T, DataIn, DataOut
from orion_iscsifs.protocol.transfer import Burst, ReadTransfer, WriteTransfer, prompt_bytes_max

LIMITS = Parameters(
    initial_r2t=False,
    immediate_data=True,
    max_send_data_segment_length=1000,
    first_burst_length=2500,
    max_burst_length=4000,
)


def answer_to(write: WriteTransfer, r2t: R2T) -> list[DataOut]:
    burst = write.solicited(r2t)
    assert burst is not None
    return list(burst)


def transfer(size: int, limits: Parameters = LIMITS) -> WriteTransfer:
    return WriteTransfer(memoryview(bytes(position % 251 for position in range(size))), limits)


@pytest.mark.parametrize(
    ("initial_r2t", "immediate_data", "immediate", "first_burst"),
    [
        (False, True, 1000, 2500),
        (True, True, 1000, 1000),
        (False, False, 0, 2500),
        (True, False, 0, 0),
    ],
)
@pytest.mark.checklist(11, "11.3.4")
@pytest.mark.checklist(12, "13.11")
def test_the_four_combinations(
    initial_r2t: bool, immediate_data: bool, immediate: int, first_burst: int
) -> None:
    """Checklist 11 and 12, RFC 7143 §13.10 and §13.11."""
    limits = replace(LIMITS, initial_r2t=initial_r2t, immediate_data=immediate_data)
    write = transfer(9000, limits)
    assert write.immediate_bytes == immediate
    assert write.first_burst_bytes == first_burst
    unsolicited = list(write.unsolicited(5, 9))
    assert sum(len(pdu.data) for pdu in unsolicited) == first_burst - immediate
    assert [pdu.data_sn for pdu in unsolicited] == list(range(len(unsolicited)))
    assert all(pdu.target_transfer_tag == NO_TAG for pdu in unsolicited)
    assert [pdu.final for pdu in unsolicited] == [False] * (len(unsolicited) - 1) + [True] * bool(
        unsolicited
    )


def test_a_short_write_is_all_immediate() -> None:
    write = transfer(600)
    assert write.immediate_bytes == write.first_burst_bytes == 600
    assert list(write.unsolicited(0, 1)) == []


@given(
    size=st.integers(1, 20000),
    segment=st.integers(512, 3000),
    burst=st.integers(512, 8000),
    first=st.integers(512, 8000),
    initial_r2t=st.booleans(),
    immediate_data=st.booleans(),
)
@pytest.mark.checklist(11, "13.14")
@pytest.mark.checklist(14, "13.12")
@pytest.mark.checklist(17, "11.8")
def test_every_byte_is_sent_once_and_no_limit_is_passed(
    size: int, segment: int, burst: int, first: int, initial_r2t: bool, immediate_data: bool
) -> None:
    """Checklist 11, 14 and 17."""
    limits = Parameters(
        initial_r2t=initial_r2t,
        immediate_data=immediate_data,
        max_send_data_segment_length=segment,
        first_burst_length=min(first, burst),
        max_burst_length=burst,
    )
    write = transfer(size, limits)
    got = bytearray(write.data[: write.immediate_bytes])
    for pdu in write.unsolicited(0, 1):
        assert pdu.buffer_offset == len(got)
        assert len(pdu.data) <= segment
        got += pdu.data
    assert len(got) <= limits.first_burst_length or write.first_burst_bytes <= segment
    r2t_sn = 0
    while len(got) < size:
        length = min(burst, size - len(got))
        answer = answer_to(write, R2T(3, 1, 77, r2t_sn, len(got), length))
        r2t_sn += 1
        assert [pdu.data_sn for pdu in answer] == list(range(len(answer)))
        assert {(pdu.target_transfer_tag, pdu.lun) for pdu in answer} == {(77, 3)}
        assert [pdu.final for pdu in answer] == [False] * (len(answer) - 1) + [True]
        for pdu in answer:
            assert pdu.buffer_offset == len(got)
            assert len(pdu.data) <= segment
            got += pdu.data
    assert got == write.data


@pytest.mark.parametrize(
    ("r2t", "problem"),
    [
        (R2T(0, 1, 5, 0, 0, 0), "Length 0"),
        (R2T(0, 1, 5, 0, 0, 4001), "MaxBurstLength 4000"),
        (R2T(0, 1, 5, 0, 8000, 1001), "asks for 8000"),
        (R2T(0, 1, NO_TAG, 0, 0, 100), "ffffffff"),
        (R2T(0, 1, 5, 1, 0, 100), "R2TSN 1"),
    ],
)
@pytest.mark.checklist(17, "11.8")
@pytest.mark.checklist(18, "11.8")
def test_an_r2t_that_asks_for_nonsense_is_a_violation(r2t: R2T, problem: str) -> None:
    """Checklist 17 and 18."""
    with pytest.raises(ProtocolViolation, match=problem):
        transfer(9000).solicited(r2t)


def test_an_r2t_never_asks_for_the_same_bytes_again() -> None:
    """Error recovery level 0 has no recovery R2T; the bound on what is queued depends on it."""
    write = transfer(9000)
    assert answer_to(write, R2T(0, 1, 5, 0, 4000, 1000))
    with pytest.raises(ProtocolViolation, match="before 5000 was asked for"):
        write.solicited(R2T(0, 1, 5, 1, 4999, 1000))
    assert answer_to(write, R2T(0, 1, 5, 1, 5000, 1000))


@pytest.mark.checklist(15, "11.7.5")
@pytest.mark.checklist(16, "11.7.7")
def test_reads_take_data_in_order_and_inside_their_length() -> None:
    """Checklist 15 and 16; a Data-In without data is fine."""
    read = ReadTransfer(100)
    assert read.place(DataIn(1, data_sn=0, buffer_offset=0), 60) == 0
    assert read.place(DataIn(1, data_sn=1, buffer_offset=0), 0) == 60
    assert read.place(DataIn(1, data_sn=2, buffer_offset=60), 40) == 60
    assert (read.received_bytes, read.data_sn) == (100, 3)


@pytest.mark.parametrize(
    ("pdu", "length", "section"),
    [
        (DataIn(1, data_sn=1), 10, "11.7.5"),
        (DataIn(1, buffer_offset=10), 10, "11.7.6"),
        (DataIn(1), 101, "11.7.6"),
    ],
)
@pytest.mark.checklist(15, "11.7.5")
@pytest.mark.checklist(16, "11.7.6")
def test_data_in_out_of_place_is_a_violation(pdu: DataIn, length: int, section: str) -> None:
    """Checklist 15 and 16."""
    with pytest.raises(ProtocolViolation) as caught:
        ReadTransfer(100).place(pdu, length)
    assert caught.value.section == section


@given(start=st.integers(0, 3000), length=st.integers(0, 9000), segment=st.integers(1, 3000))
def test_a_burst_encodes_to_the_bytes_of_its_pdus(start: int, length: int, segment: int) -> None:
    """The fast way to the wire and the PDU objects say the same, padding included."""
    data = memoryview(bytes(position % 251 for position in range(start + length)))
    burst = Burst(5, 9, 77, data, start, start + length, segment)
    slow = bytearray()
    for pdu in burst:
        pdu.exp_stat_sn = 1234
        for piece in encode(pdu, header_digest=False, data_digest=False):
            slow += piece
    assert b"".join(burst.encode(1234)) == slow


@pytest.mark.parametrize("initial_r2t", [True, False])
@pytest.mark.parametrize("immediate_data", [True, False])
@pytest.mark.parametrize(("segment", "first_burst"), [(512, 8192), (8192, 4096), (8192, 8192)])
def test_the_most_that_needs_no_r2t(
    initial_r2t: bool, immediate_data: bool, segment: int, first_burst: int
) -> None:
    limits = replace(
        LIMITS,
        initial_r2t=initial_r2t,
        immediate_data=immediate_data,
        max_send_data_segment_length=segment,
        first_burst_length=first_burst,
        max_burst_length=65536,
    )
    most = prompt_bytes_max(limits)
    for length in (0, 1, most, most + 1, 65536):
        transfer = WriteTransfer(memoryview(bytes(length)), limits)
        assert (transfer.first_burst_bytes == length) == (length <= most)
