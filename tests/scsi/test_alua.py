"""Target port groups on the wire: SPC-4 §6.37, §6.45, and what hostile bytes get."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.scsi import alua, inquiry
from orion_iscsifs.scsi.alua import AccessState, PortGroup, PortGroups, Wish
from orion_iscsifs.scsi.cdb import CDB_BYTES
from orion_iscsifs.scsi.inquiry import Designator, DesignatorType, StandardInquiry
from orion_iscsifs.scsi.malformed import MalformedData

NUMBERS = st.integers(0, 0xFFFF)
GROUPS = st.builds(
    PortGroup,
    tag=NUMBERS,
    state=st.integers(0, 15),
    preferred=st.booleans(),
    supported=st.frozensets(st.sampled_from(AccessState)),
    status_code=st.integers(0, 255),
    ports=st.lists(NUMBERS, max_size=4).map(tuple),
)


def test_report_as_bytes() -> None:
    """By hand from SPC-4 tables 316 to 319: two groups, the second in transition."""
    data = bytes.fromhex(
        "0000001c"
        "808f000100000002" + "0000000100000002"
        "0fff0002" + "00020001" + "00000003"
    )  # fmt: skip
    found = alua.decode_port_groups(data)
    first, second = found.groups
    assert (first.tag, first.access, first.preferred) == (1, AccessState.ACTIVE_OPTIMIZED, True)
    assert first.ports == (1, 2)
    assert first.supported == frozenset(AccessState) - {
        AccessState.OFFLINE,
        AccessState.LBA_DEPENDENT,
    }
    assert (second.tag, second.access, second.ports) == (2, AccessState.TRANSITIONING, (3,))
    assert second.status_code == alua.ChangedBy.DEVICE
    assert found.implicit_transition_time_s == 0
    assert found.with_tag(2) is second
    assert found.with_port(2) is first
    assert found.with_tag(3) is None
    assert found.with_port(9) is None


def test_the_extended_header_has_the_transition_time() -> None:
    data = bytes.fromhex("0000000c103c0000" + "0201000700000000")
    found = alua.decode_port_groups(data)
    assert found.implicit_transition_time_s == 60
    assert [(group.tag, group.access) for group in found.groups] == [(7, AccessState.STANDBY)]
    assert alua.encode_port_groups(found, extended=True) == data


@given(st.lists(GROUPS, max_size=5), st.booleans(), st.integers(0, 255))
def test_report_there_and_back(groups: list[PortGroup], extended: bool, time_s: int) -> None:
    reported = PortGroups(tuple(groups), time_s if extended else 0)
    data = alua.encode_port_groups(reported, extended=extended)
    assert alua.port_groups_length(data) == len(data)
    assert alua.decode_port_groups(data) == reported
    assert alua.decode_port_groups(data + b"surplus") == reported


@given(st.binary(max_size=200))
def test_a_hostile_report_is_bounded(data: bytes) -> None:
    if len(data) < 4:
        with pytest.raises(MalformedData):
            alua.decode_port_groups(data)
        return
    found = alua.decode_port_groups(data)
    assert 8 * len(found.groups) <= len(data)
    assert sum(4 * len(group.ports) for group in found.groups) <= len(data)


def test_no_more_groups_than_any_device_has() -> None:
    body = bytes(8) * (alua.PORT_GROUPS_MAX + 5)
    data = len(body).to_bytes(4, "big") + body
    assert len(alua.decode_port_groups(data).groups) == alua.PORT_GROUPS_MAX


def test_a_reserved_state_is_not_used() -> None:
    assert PortGroup(tag=1, state=9).access is AccessState.UNAVAILABLE
    usable = {state for state in AccessState if state.usable}
    assert usable == {
        AccessState.ACTIVE_OPTIMIZED,
        AccessState.ACTIVE_NON_OPTIMIZED,
        AccessState.LBA_DEPENDENT,
    }
    assert len({state.words for state in AccessState}) == len(AccessState)


def test_cdbs() -> None:
    report = alua.report_target_port_groups(0x1234, extended=True)
    assert report == bytes.fromhex("a32a0000000000001234000000000000")
    assert alua.parse_report_target_port_groups(report) == alua.ReportTargetPortGroups(1, 0x1234)
    assert alua.report_target_port_groups()[:2] == bytes.fromhex("a30a")
    change = alua.set_target_port_groups(12)
    assert change == bytes.fromhex("a40a000000000000000c000000000000")
    assert alua.parse_set_target_port_groups(change) == 12
    assert len(report) == len(change) == CDB_BYTES


@given(st.lists(st.builds(Wish, NUMBERS, st.integers(0, 15)), max_size=5))
def test_wishes_there_and_back(wishes: list[Wish]) -> None:
    assert alua.decode_wishes(alua.encode_wishes(wishes)) == wishes


def test_wishes_as_bytes() -> None:
    assert alua.encode_wishes([Wish(2, AccessState.STANDBY)]) == bytes.fromhex("0000000002000002")
    assert alua.decode_wishes(b"") == []
    for length in (1, 3, 5, 7, 9):
        with pytest.raises(MalformedData):
            alua.decode_wishes(bytes(length))


def test_designators_tell_where_the_path_goes() -> None:
    page = inquiry.encode_designators(
        (Designator(DesignatorType.NAA, b"12345678"), *alua.port_designators(3, 7))
    )
    assert page[16:32] == bytes.fromhex("51940004" + "00000003" + "51950004" + "00000007")
    found = inquiry.decode_designators(page)
    assert alua.relative_target_port(found) == 3
    assert alua.target_port_group(found) == 7


@pytest.mark.parametrize(
    "designator",
    [
        Designator(DesignatorType.TARGET_PORT_GROUP, b"\0\0\0", association=1),
        Designator(DesignatorType.TARGET_PORT_GROUP, b"\0\0\0\1", association=0),
        Designator(DesignatorType.NAA, b"\0\0\0\1", association=1),
    ],
    ids=["short", "of the logical unit", "other"],
)
def test_designators_that_say_nothing(designator: Designator) -> None:
    assert alua.target_port_group([designator]) is None
    assert alua.relative_target_port([designator]) is None


@pytest.mark.parametrize("tpgs", range(4))
def test_tpgs_in_inquiry_data(tpgs: int) -> None:
    data = inquiry.encode_inquiry(StandardInquiry(tpgs=tpgs))
    assert data[5] == tpgs << 4
    assert inquiry.decode_inquiry(data).tpgs == tpgs
    assert inquiry.decode_inquiry(data[:5]).tpgs == 0
