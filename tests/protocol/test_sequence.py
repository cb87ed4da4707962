"""Serial arithmetic, the command window and StatSN (RFC 7143 §4.2.2)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.sequence import CommandWindow, StatusCounter

NUMBERS = st.integers(0, 0xFFFF_FFFF)


@given(number=NUMBERS, ahead=st.integers(1, (1 << 31) - 1))
@pytest.mark.checklist(1, "4.2.2.1")
def test_order_of_serial_numbers_at_the_wrap(number: int, ahead: int) -> None:
    """Checklist 1."""
    later = serial.add(number, ahead)
    assert serial.less(number, later)
    assert not serial.less(later, number)
    assert serial.less_equal(number, number)
    assert serial.distance(number, later) == ahead
    assert serial.distance(later, number) == -ahead


@pytest.mark.checklist(1, "4.2.2.1")
def test_the_window_wraps() -> None:
    """Checklist 1 and 2."""
    window = CommandWindow(0xFFFF_FFFE, 0xFFFF_FFFE, 1)
    assert window.free == 4
    assert [window.take() for _ in range(4)] == [0xFFFF_FFFE, 0xFFFF_FFFF, 0, 1]
    assert window.free == 0
    assert window.update(2, 5)
    assert (window.free, window.take()) == (4, 2)


@pytest.mark.checklist(2, "4.2.2.1")
def test_a_closed_window_has_no_slot() -> None:
    """Checklist 2: MaxCmdSN = ExpCmdSN - 1 closes the window (§4.2.2.1)."""
    window = CommandWindow(10, 10, 9)
    assert window.free == 0
    assert window.update(10, 10)
    assert window.free == 1


@pytest.mark.parametrize(("exp", "maximum"), [(10, 8), (12, 10), (5, 0xFFFF_FFF0)])
@pytest.mark.checklist(3, "4.2.2.1")
def test_a_max_below_exp_minus_one_is_ignored_as_a_whole(exp: int, maximum: int) -> None:
    """Checklist 3."""
    window = CommandWindow(10, 10, 20)
    assert not window.update(exp, maximum)
    assert (window.exp_cmd_sn, window.max_cmd_sn) == (10, 20)


@pytest.mark.checklist(3, "4.2.2.1")
def test_updates_only_move_forward() -> None:
    """Checklist 3: an old PDU that comes late takes nothing back."""
    window = CommandWindow(10, 10, 20)
    assert not window.update(8, 15)
    assert (window.exp_cmd_sn, window.max_cmd_sn) == (10, 20)
    assert not window.update(12, 20)
    assert window.exp_cmd_sn == 12
    assert window.update(11, 21)
    assert (window.exp_cmd_sn, window.max_cmd_sn) == (12, 21)


@pytest.mark.checklist(2, "4.2.2.1")
@pytest.mark.parametrize("start", [0, 10, 0xFFFF_FFFF])
def test_a_window_of_one_closes_and_opens_with_each_command(start: int) -> None:
    """tgt's: MaxCmdSN is ExpCmdSN."""
    window = CommandWindow(start, start, start)
    for number in range(3):
        assert window.free == 1
        assert window.take() == serial.add(start, number)
        assert window.free == 0
        due = serial.add(start, number + 1)
        # The target has the command but no room for another: ExpCmdSN moves, the window does not.
        assert not window.update(due, serial.add(due, -1))
        assert (window.exp_cmd_sn, window.free) == (due, 0)
        assert window.update(due, due)


@pytest.mark.checklist(2, "4.2.2.1")
def test_commands_beyond_the_window_are_our_bug() -> None:
    window = CommandWindow(5, 5, 4)
    with pytest.raises(AssertionError):
        window.take()


@pytest.mark.checklist(4, "4.2.2.1")
def test_reading_the_number_of_an_immediate_command_takes_none() -> None:
    """It carries `cmd_sn` as it is, with the window open or closed."""
    window = CommandWindow(7, 7, 7)
    assert [window.cmd_sn, window.take(), window.cmd_sn, window.cmd_sn] == [7, 7, 8, 8]
    assert window.free == 0


@given(
    start=NUMBERS,
    steps=st.lists(
        st.one_of(
            st.just("take"),
            # How far the target is with commands, its window, and how many PDUs ago that was.
            st.tuples(st.integers(0, 5), st.integers(-1, 6), st.integers(0, 3)),
        ),
        max_size=60,
    ),
)
@pytest.mark.checklist(1, "4.2.2.1")
@pytest.mark.checklist(2, "4.2.2.1")
@pytest.mark.checklist(3, "4.2.2.1")
def test_the_window_is_what_unbounded_numbers_say(
    start: int, steps: list[str | tuple[int, int, int]]
) -> None:
    """Any start, so also the wrap; late PDUs, closed windows. The model counts without end."""
    window = CommandWindow(start, start, start)
    sent = received = maximum = start
    said: list[tuple[int, int]] = [(start, start)]
    for step in steps:
        if isinstance(step, str):
            if sent <= maximum:
                assert window.take() == sent & 0xFFFF_FFFF
                sent += 1
        else:
            progress, size, ago = step
            exp = min(said[-1][0] + progress, sent)
            # A target's MaxCmdSN never shrinks, and is never below ExpCmdSN - 1.
            said.append((exp, max(said[-1][1], exp + size, exp - 1)))
            exp, upper = said[max(0, len(said) - 1 - ago)]
            moved = window.update(exp & 0xFFFF_FFFF, upper & 0xFFFF_FFFF)
            assert moved is (upper > maximum)
            received, maximum = max(received, exp), max(maximum, upper)
        assert window.free == max(0, maximum - sent + 1)
        assert window.cmd_sn == sent & 0xFFFF_FFFF
        assert window.exp_cmd_sn == received & 0xFFFF_FFFF


@pytest.mark.checklist(6, "4.2.2.2")
def test_stat_sn_advances_drops_duplicates_and_refuses_gaps() -> None:
    """Checklist 5 and 6."""
    counter = StatusCounter(0xFFFF_FFFF)
    assert counter.advance(0xFFFF_FFFF, "SCSI Response")
    assert counter.advance(0, "SCSI Response")
    assert not counter.advance(0xFFFF_FFFF, "SCSI Response")
    assert counter.exp_stat_sn == 1
    with pytest.raises(ProtocolViolation, match=r"SCSI Response: StatSN 0x3 .*§4\.2\.2\.2"):
        counter.advance(3, "SCSI Response")
