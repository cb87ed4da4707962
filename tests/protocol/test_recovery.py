"""PDUs that are lost, doubled and out of order: what an initiator makes of them (§7.9, §11.16)."""

from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import R2T, DataIn, ScsiResponse
from orion_iscsifs.protocol.recovery import (
    MISSING_MAX,
    STATUSES_HELD_MAX,
    RecoveringRead,
    RecoveringWrite,
    StatusQueue,
    first_run,
)

PIECE = 8


def piece(data: bytes, data_sn: int) -> DataIn:
    offset = PIECE * data_sn
    return DataIn(1, data_sn, offset, data=data[offset : offset + PIECE])


def take(read: RecoveringRead, buffer: bytearray, pdu: DataIn) -> bool:
    """What `RecoveringInbound` does with a Data-In; False: it was a duplicate."""
    offset = read.place(pdu, len(pdu.data))
    if offset is not None:
        buffer[offset : offset + len(pdu.data)] = pdu.data
    read.arrived(pdu)
    return offset is not None


# -- reads ----------------------------------------------------------------------------------------


@pytest.mark.checklist(15, "11.7.5")
@pytest.mark.checklist(54, "7.9")
@given(data=st.data(), pieces=st.integers(1, 12))
def test_any_order_loss_and_duplication_ends_with_the_data(
    data: st.DataObject, pieces: int
) -> None:
    """What is missing is named exactly, and when nothing is, the buffer holds the data."""
    content = bytes(range(pieces * PIECE))
    read, buffer = RecoveringRead(len(content)), bytearray(len(content))
    seen: set[int] = set()
    arrivals = data.draw(st.lists(st.integers(0, pieces - 1), max_size=40))
    for data_sn in arrivals:
        assert take(read, buffer, piece(content, data_sn)) == (data_sn not in seen)
        seen.add(data_sn)
        assert read.missing == set(range(max(seen) + 1)) - seen
        assert read.received_bytes == PIECE * len(seen)
    read.expect_below(pieces)
    while read.missing:
        start, length = first_run(read.missing)
        assert read.missing.isdisjoint({start - 1, start + length})
        for data_sn in range(start, start + length):
            take(read, buffer, piece(content, data_sn))
    read.check("SCSI Response")
    assert bytes(buffer) == content
    assert read.data_sn == pieces


@example(data_sn=3, offset=24, length=1)
@given(
    data_sn=st.integers(0, 6),
    offset=st.integers(0, 40),
    length=st.integers(0, 24),
)
def test_a_piece_that_does_not_belong_is_a_violation(
    data_sn: int, offset: int, length: int
) -> None:
    """Whatever takes one piece's place: right, or the check says so. Nothing lands outside.

    A last piece that is shorter is no violation by itself: the bytes counted tell (residual).
    """
    content = bytes(range(32))
    read, buffer = RecoveringRead(32), bytearray(32)
    right = (offset, length) == (PIECE * data_sn, PIECE) or data_sn >= 4
    try:
        if data_sn < 4:
            take(read, buffer, DataIn(1, data_sn, offset, data=bytes(length)))
        for number in range(4):
            take(read, buffer, piece(content, number))
        read.check("SCSI Response")
    except ProtocolViolation:
        assert not right
    else:
        short_end = (data_sn, offset) == (3, 24) and length < PIECE
        assert right or short_end or (length == 0 and offset <= 32)
        assert right or read.received_bytes == 24 + length
        if right and data_sn >= 4:
            assert bytes(buffer) == content


def test_a_data_in_without_data_may_have_any_offset() -> None:
    """It often only carries the status; level 0 takes it, so levels 1 and 2 do."""
    read, buffer = RecoveringRead(PIECE), bytearray(PIECE)
    take(read, buffer, DataIn(1, 0, 0, data=b"12345678"))
    take(read, buffer, DataIn(1, 1, 0, has_status=True, final=True))
    read.check("SCSI Data-In")
    assert read.data_sn == 2


@pytest.mark.parametrize("number", [MISSING_MAX + 1, 0xFFFF_FFFF])
def test_a_jump_that_no_loss_explains_is_a_violation(number: int) -> None:
    """It bounds the memory that a target can make us take."""
    read = RecoveringRead(1 << 30)
    with pytest.raises(ProtocolViolation, match="DataSN"):
        read.place(DataIn(1, number), 0)
    with pytest.raises(ProtocolViolation, match="DataSN"):
        read.expect_below(number)
    write = RecoveringWrite(memoryview(bytes(100)), Parameters())
    with pytest.raises(ProtocolViolation, match="R2TSN"):
        write.solicited(R2T(0, 1, 2, number, 0, 10))
    assert not read.missing
    assert not write.missing


@pytest.mark.checklist(53, "11.5.6")
@given(seen=st.sets(st.integers(0, 7)))
def test_a_reassigned_read_goes_on_at_its_first_hole(seen: set[int]) -> None:
    """ExpDataSN is the first that is missing; what came behind it comes again and is taken."""
    content = bytes(range(8 * PIECE))
    read, buffer = RecoveringRead(len(content)), bytearray(len(content))
    for data_sn in seen:
        take(read, buffer, piece(content, data_sn))
    due = read.resume()
    assert due == min(set(range(9)) - seen)
    assert read.received_bytes == PIECE * due
    buffer[PIECE * due :] = bytes(len(content) - PIECE * due)
    for data_sn in range(due, 8):
        assert take(read, buffer, piece(content, data_sn))
    read.check("SCSI Response")
    assert bytes(buffer) == content


# -- writes ---------------------------------------------------------------------------------------


def r2t(number: int, offset: int, length: int) -> R2T:
    return R2T(0x5, 1, 100 + number, number, offset, length)


@pytest.mark.checklist(18, "11.8")
@given(numbers=st.lists(st.integers(0, 9), max_size=30))
def test_each_r2t_is_answered_once_in_whatever_order(numbers: list[int]) -> None:
    data = memoryview(bytes(range(100)))
    write = RecoveringWrite(data, Parameters())
    seen: set[int] = set()
    for number in numbers:
        burst = write.solicited(r2t(number, 10 * number, 10))
        assert (burst is None) == (number in seen)
        seen.add(number)
        assert write.missing == set(range(max(seen) + 1)) - seen
        if burst is not None:
            (data_out,) = burst
            assert (data_out.target_transfer_tag, data_out.lun) == (100 + number, 0x5)
            assert (data_out.buffer_offset, data_out.data_sn) == (10 * number, 0)
            assert data_out.final
            assert bytes(data_out.data) == bytes(data[10 * number : 10 * number + 10])


@pytest.mark.checklist(53, "7.2.2")
def test_a_reassigned_write_answers_its_r2ts_again() -> None:
    """Their Data-Out PDUs may have died with the connection, and replicas keep their R2TSN."""
    write = RecoveringWrite(memoryview(bytes(100)), Parameters())
    for number in range(3):
        assert write.solicited(r2t(number, 10 * number, 10)) is not None
    assert write.solicited(r2t(1, 10, 10)) is None
    write.resume()
    assert write.solicited(r2t(1, 10, 10)) is not None
    assert write.solicited(r2t(1, 10, 10)) is None, "on one connection it is a duplicate"
    assert write.solicited(r2t(0, 0, 10)) is None, "replicas come in order"
    assert write.solicited(r2t(2, 20, 10)) is not None
    assert write.solicited(r2t(3, 30, 10)) is not None
    assert not write.missing


def test_a_target_can_not_have_a_write_sent_for_ever() -> None:
    write = RecoveringWrite(memoryview(bytes(100)), Parameters())
    for number in range(16):
        assert write.solicited(r2t(number, 0, 100)) is not None
    with pytest.raises(ProtocolViolation, match="asks for 1700 bytes of a write of 100"):
        write.solicited(r2t(16, 0, 100))


# -- statuses -------------------------------------------------------------------------------------


@dataclass
class Statuses:
    """A queue, and what it has handed out."""

    queue: StatusQueue
    start: int

    def settle(self) -> list[int]:
        taken = []
        while (pdu := self.queue.head) is not None:
            self.queue.take()
            taken.append(serial.distance(self.start, pdu.stat_sn))  # type: ignore[attr-defined]
        return taken


@pytest.mark.checklist(1, "4.2.2.1")
@pytest.mark.checklist(6, "4.2.2.2")
@given(
    start=st.one_of(st.integers(0, 0xFFFF_FFFF), st.integers(0xFFFF_FFF0, 0xFFFF_FFFF)),
    arrivals=st.lists(st.integers(-5, 20), max_size=60),
)
def test_statuses_are_handed_out_once_and_in_order(start: int, arrivals: list[int]) -> None:
    """Also where StatSN wraps; what is missing is the first run of holes."""
    statuses = Statuses(StatusQueue(start), start)
    queue = statuses.queue
    seen: set[int] = set()
    taken: list[int] = []
    for number in arrivals:
        fresh = queue.put(serial.add(start, number), ScsiResponse(1, stat_sn=start + number))
        assert fresh == (number >= 0 and number not in seen)
        seen |= {number} & set(range(21))
        taken += statuses.settle()
        assert taken == list(range(len(taken)))
        assert queue.exp_stat_sn == serial.add(start, len(taken))
        holes = set(range(max(seen, default=-1) + 1)) - seen
        if holes:
            begin, length = first_run(holes)
            assert queue.missing == (serial.add(start, begin), length)
        else:
            assert queue.missing is None
            assert taken == sorted(seen)


@pytest.mark.checklist(6, "4.2.2.2")
@pytest.mark.parametrize("ahead", [STATUSES_HELD_MAX + 1, 0x7FFF_FFFF])
def test_a_large_difference_is_a_violation(ahead: int) -> None:
    queue = StatusQueue(0xFFFF_FFF0)
    with pytest.raises(ProtocolViolation, match="StatSN"):
        queue.put(serial.add(0xFFFF_FFF0, ahead), ScsiResponse(1))
    assert (queue.head, queue.missing) == (None, None)


@pytest.mark.checklist(1, "4.2.2.1")
def test_a_number_half_way_round_is_no_status() -> None:
    """RFC 1982 leaves its order open: it is dropped like an old one, and not kept."""
    queue = StatusQueue(5)
    assert not queue.put(serial.add(5, 1 << 31), ScsiResponse(1))
    assert (queue.end, queue.missing) == (5, None)
