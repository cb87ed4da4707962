"""Sense data in both formats, and what an initiator makes of it."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import (
    LunNotFound,
    MediumError,
    NotSupported,
    OutOfRange,
    PathInaccessible,
    ReservationConflict,
    ScsiError,
    SpaceExhausted,
    WriteProtected,
)
from orion_iscsifs.scsi import sense
from orion_iscsifs.scsi.additional_sense import words
from orion_iscsifs.scsi.sense import SenseData, SenseKey, Status
from orion_iscsifs.scsi.verdict import Action, error, judge

FIXED = bytes.fromhex("f000 05 00001234 0a 00000000 2100 00000000")
DESCRIPTOR = bytes.fromhex("72 05 21 00 000000 0c 00 0a 80 00 0000000100001234")


def test_fixed_format_golden() -> None:
    data = SenseData(SenseKey.ILLEGAL_REQUEST, 0x21, 0, information=0x1234)
    assert sense.encode_sense(data) == FIXED
    assert sense.decode_sense(FIXED) == data


def test_descriptor_format_golden() -> None:
    data = SenseData(SenseKey.ILLEGAL_REQUEST, 0x21, 0, information=0x1_0000_1234)
    assert sense.encode_sense(data, descriptor_format=True) == DESCRIPTOR
    assert sense.decode_sense(DESCRIPTOR) == data


def test_fixed_format_leaves_out_an_lba_that_does_not_fit() -> None:
    data = sense.encode_sense(SenseData(5, 0x21, 0, information=1 << 32))
    assert data[0] == 0x70
    assert sense.decode_sense(data).information is None


def test_the_byte_of_the_cdb_that_is_wrong() -> None:
    data = SenseData(5, 0x24, 0, cdb_field=2)
    assert sense.encode_sense(data)[15:] == bytes((0xC0, 0, 2))
    described = sense.encode_sense(data, descriptor_format=True)
    assert described[7:] == bytes((8, 2, 6, 0, 0, 0xC0, 0, 2, 0))
    assert sense.decode_sense(described) == SenseData(5, 0x24, 0)


senses = st.builds(
    SenseData,
    key=st.integers(0, 15),
    asc=st.integers(0, 255),
    ascq=st.integers(0, 255),
    information=st.none() | st.integers(0, (1 << 32) - 1),
    deferred=st.booleans(),
)


@given(data=senses, descriptor_format=st.booleans())
def test_round_trip(data: SenseData, descriptor_format: bool) -> None:
    assert sense.decode_sense(sense.encode_sense(data, descriptor_format=descriptor_format)) == data
    assert sense.sense_of_response(sense.response_segment(data)) == data


@given(st.binary(max_size=300))
@pytest.mark.checklist(24, "11.4.7")
def test_hostile_sense_never_raises(raw: bytes) -> None:
    for decoded in (sense.decode_sense(raw), sense.sense_of_response(raw)):
        assert decoded.describe()
        assert judge(Status.CHECK_CONDITION, decoded) in Action


@pytest.mark.checklist(24, "11.4.7")
def test_sense_length_beyond_the_segment_is_cut() -> None:
    decoded = sense.sense_of_response(b"\xff\xff" + FIXED)
    assert (decoded.key, decoded.asc) == (5, 0x21)
    assert sense.sense_of_response(b"") == SenseData()


def test_words() -> None:
    assert sense.LBA_OUT_OF_RANGE.describe() == (
        "illegal request, logical block address out of range (5/21/00)"
    )
    assert (
        SenseData(9, 0x80, 1).describe()
        == "vendor specific, a condition of the vendor's own (9/80/01)"
    )
    assert (
        SenseData(0xC, 0, 0).describe() == "sense key C, no additional sense information (C/00/00)"
    )
    assert sense.status_name(0x28) == "TASK SET FULL"
    assert sense.status_name(0x77) == "status 77h"


@pytest.mark.parametrize(
    ("status", "data", "action"),
    [
        (Status.GOOD, None, Action.DONE),
        (Status.CONDITION_MET, None, Action.DONE),
        (Status.BUSY, None, Action.RETRY_AFTER_DELAY),
        (Status.TASK_SET_FULL, None, Action.RETRY_AFTER_DELAY),
        (Status.TASK_ABORTED, None, Action.RETRY),
        (Status.RESERVATION_CONFLICT, None, Action.FAIL),
        (0x77, None, Action.FAIL),
        (Status.CHECK_CONDITION, None, Action.RETRY),
        (Status.CHECK_CONDITION, SenseData(6, 0x29, 0), Action.RETRY),
        (Status.CHECK_CONDITION, SenseData(6, 0x2A, 9), Action.REREAD_CAPACITY),
        (Status.CHECK_CONDITION, SenseData(6, 0x3F, 0x0E), Action.RESCAN_LUNS),
        (Status.CHECK_CONDITION, SenseData(6, 0x47, 0x7F), Action.RETRY),
        (Status.CHECK_CONDITION, SenseData(2, 0x04, 0x01), Action.RETRY_AFTER_DELAY),
        (Status.CHECK_CONDITION, SenseData(2, 0x3A, 0x00), Action.FAIL),
        *(
            (Status.CHECK_CONDITION, SenseData(2, 0x04, ascq), Action.RETRY_AFTER_DELAY)
            for ascq in (0x00, 0x04, 0x05, 0x06, 0x07, 0x09, 0x11, 0x14, 0x1A, 0x1B, 0x1C, 0x1D)
        ),
        (Status.CHECK_CONDITION, SenseData(2, 0x04, 0x02), Action.START),
        (Status.CHECK_CONDITION, SenseData(2, 0x04, 0x03), Action.FAIL),
        *(
            (Status.CHECK_CONDITION, SenseData(2, 0x04, ascq), Action.OTHER_PATH)
            for ascq in (0x0A, 0x0B, 0x0C)
        ),
        *(
            (Status.CHECK_CONDITION, SenseData(6, 0x2A, ascq), Action.CHECK_ACCESS)
            for ascq in (0x06, 0x07)
        ),
        *(
            (Status.CHECK_CONDITION, SenseData(6, *code), Action.REREAD_CAPACITY)
            for code in ((0x2A, 0x01), (0x28, 0x00), (0x3F, 0x03))
        ),
        (Status.CHECK_CONDITION, SenseData(5, 0x25, 0x00), Action.ABSENT),
        (Status.CHECK_CONDITION, SenseData(5, 0x24, 0x00), Action.FAIL),
        (Status.CHECK_CONDITION, SenseData(7, 0x27, 0x07), Action.FAIL),
        (Status.CHECK_CONDITION, SenseData(4, 0x44, 0x00), Action.FAIL),
        (Status.ACA_ACTIVE, None, Action.RETRY_AFTER_DELAY),
        (Status.CHECK_CONDITION, SenseData(0xB, 0x0C, 0x0C), Action.TRANSPORT_RETRY),
        (Status.CHECK_CONDITION, SenseData(0xB, 0x0C, 0x0D), Action.TRANSPORT_RETRY),
        (Status.CHECK_CONDITION, SenseData(0xB, 0x47, 0x05), Action.TRANSPORT_RETRY),
        (Status.CHECK_CONDITION, SenseData(0xB, 0x11, 0x13), Action.TRANSPORT_RETRY),
        (Status.CHECK_CONDITION, SenseData(0xB, 0x4B, 0x00), Action.RETRY),
        (Status.CHECK_CONDITION, SenseData(1, 0x17, 0x01), Action.DONE),
        (Status.CHECK_CONDITION, SenseData(3, 0x11, 0x00), Action.FAIL),
        (Status.CHECK_CONDITION, SenseData(1, 0x0C, 0x00, deferred=True), Action.FAIL),
    ],
)
@pytest.mark.checklist(25, "11.4.7.2")
def test_what_an_initiator_does(status: int, data: SenseData | None, action: Action) -> None:
    assert judge(status, data) is action


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (sense.WRITE_PROTECTED, WriteProtected),
        (sense.SPACE_ALLOCATION_FAILED, SpaceExhausted),
        (sense.LBA_OUT_OF_RANGE, OutOfRange),
        (sense.LUN_NOT_SUPPORTED, LunNotFound),
        (sense.INVALID_OPCODE, NotSupported),
        (sense.UNRECOVERED_READ_ERROR, MediumError),
        (SenseData(2, 4, 0x0B), PathInaccessible),
        (sense.INTERNAL_TARGET_FAILURE, ScsiError),
    ],
)
def test_errors(data: SenseData, kind: type[Exception]) -> None:
    raised = error("WRITE of lun1", Status.CHECK_CONDITION, data)
    assert type(raised) is kind
    assert str(raised) == f"WRITE of lun1: {data.describe()}"


def test_errors_keep_the_numbers() -> None:
    raised = error("READ", Status.CHECK_CONDITION, SenseData(3, 0x11, 4))
    assert isinstance(raised, ScsiError)
    assert (raised.sense_key, raised.asc, raised.ascq) == (3, 0x11, 4)


def test_a_reservation_conflict_says_what_to_do() -> None:
    conflict = error("READ", Status.RESERVATION_CONFLICT)
    assert isinstance(conflict, ReservationConflict)
    assert "another initiator has reserved the LUN" in conflict.line
    assert "-o preempt" in conflict.advice


@pytest.mark.parametrize("ascq", [0x03, 0x04, 0x05])
def test_reservations_that_changed_are_looked_at(ascq: int) -> None:
    changed = SenseData(SenseKey.UNIT_ATTENTION, 0x2A, ascq)
    assert judge(Status.CHECK_CONDITION, changed) is Action.CHECK_RESERVATION


# -- additional sense in words ---------------------------------------------------------------------


@given(st.integers(0, 255), st.integers(0, 255))
def test_every_pair_has_words(asc: int, ascq: int) -> None:
    said = words(asc, ascq)
    assert said
    assert said == said.strip()
    assert "|" not in said
    assert ";" not in said


@pytest.mark.parametrize(
    ("asc", "ascq", "said"),
    [
        (0x04, 0x01, "logical unit not ready, becoming ready"),
        (0x04, 0x0B, "logical unit not ready, target port in standby state"),
        (0x11, 0x00, "unrecovered read error"),
        (0x11, 0x04, "unrecovered read error, automatic reallocation failed"),
        (0x29, 0x07, "I_T nexus loss occurred"),
        (0x2A, 0x09, "capacity data has changed"),
        (0x2F, 0x00, "commands cleared, by another initiator"),
        (0x27, 0x07, "space allocation failed"),
        (0x40, 0x85, "diagnostic failure on component 85h"),
        (0x04, 0x7F, "logical unit not ready, unassigned qualifier"),
        (0x04, 0x80, "logical unit not ready, the vendor's own qualifier"),
        (0x7E, 0x00, "unassigned additional sense code"),
        (0x80, 0x00, "a condition of the vendor's own"),
    ],
)
def test_additional_sense_in_words(asc: int, ascq: int, said: str) -> None:
    assert words(asc, ascq) == said


def test_a_medium_error_names_its_lba() -> None:
    raised = error("READ", Status.CHECK_CONDITION, SenseData(3, 0x11, 0, information=4711))
    assert isinstance(raised, MediumError)
    assert raised.lba == 4711
    assert str(raised).endswith("(3/11/00) at LBA 4711")
    unknown = error("READ", Status.CHECK_CONDITION, SenseData(3, 0x11, 0))
    assert isinstance(unknown, MediumError)
    assert unknown.lba is None


def test_a_full_thin_pool_is_no_write_protection() -> None:
    raised = error("WRITE", Status.CHECK_CONDITION, sense.SPACE_ALLOCATION_FAILED)
    assert raised.errno == errno.ENOSPC
    assert "thin pool" in raised.advice
