"""What fuzzing has found, one test each."""

import tracemalloc

import pytest

from orion_iscsifs.errors import ProtocolViolation, UsageError
from orion_iscsifs.initiator.discovery import parse_address
from orion_iscsifs.protocol.framing import Framer
from orion_iscsifs.protocol.login import Offer, TargetAccess, TargetLogin
from orion_iscsifs.protocol.pdu import DataIn, LoginRequest, NopIn, Pdu
from orion_iscsifs.protocol.text import encode_text
from orion_iscsifs.scsi import mode, sense
from orion_iscsifs.scsi.mode import ModeParameters
from orion_iscsifs.url import parse
from tests.hostile import wire
from tests.hostile.logins import INITIATOR, TARGET
from tests.hostile.properties import PROPERTIES
from tests.hostile.wire import encoded


@pytest.mark.checklist(24, "11.4.7")
def test_sense_ends_where_it_says() -> None:
    """ADDITIONAL SENSE LENGTH 0: byte 12 is no ASC."""
    data = bytearray(sense.encode_sense(sense.POWER_ON))
    assert sense.decode_sense(data) == sense.POWER_ON
    data[7] = 0
    assert sense.decode_sense(data) == sense.SenseData(key=sense.SenseKey.UNIT_ATTENTION)
    data[7] = 5
    assert sense.decode_sense(data) == sense.SenseData(key=sense.SenseKey.UNIT_ATTENTION, asc=0x29)


def test_a_mode_page_ends_where_it_says() -> None:
    """Neither the next page nor what lies behind the mode data is read as part of a page."""
    empty_caching_page = bytes((mode.CACHING_PAGE, 0))
    behind = bytes((0xFB, 0xFF, 0xFF, 0xFF))
    found = mode.decode_mode_sense_6(bytes((9, 0, 0, 0)) + empty_caching_page + behind)
    assert found == ModeParameters()
    short_control_page = bytes((mode.CONTROL_PAGE, 1, 0))
    found = mode.decode_mode_sense_6(bytes((6, 0, 0, 0)) + short_control_page + b"\xff" * 8)
    assert found == ModeParameters()


@pytest.mark.parametrize("port", ["0333333333", "065535000", "00003260", "1" * 5000])
def test_a_port_with_many_digits_is_no_port(port: str) -> None:
    with pytest.raises(UsageError, match="is no port"):
        parse(f"iscsi://host:{port}")


@pytest.mark.parametrize("number", ["000001999999", "0" * 5000, "16384"])
def test_a_lun_with_many_digits_is_no_lun(number: str) -> None:
    with pytest.raises(UsageError, match="is no LUN"):
        parse(f"iscsi://host/iqn.2026-11.org.example:disk/{number}")


def test_a_shown_url_can_be_read_again() -> None:
    source = parse("iscsi://host/iqn.x:a%2541")
    assert source.target == "iqn.x:a%41"
    assert parse(source.redacted()) == source


def test_a_shown_zone_can_be_read_again() -> None:
    source = parse("iscsi://[fe80::1%25251]:860/")
    assert source.host == "fe80::1%251"
    assert parse(source.redacted()) == source


def test_a_target_name_moves_no_cursor() -> None:
    with pytest.raises(UsageError, match="is no target name"):
        parse("iscsi://host/iqn.x%1b[2J")


@pytest.mark.parametrize("address", ["\x1b[2J:3260", "a b:3260", "h\u00f6st\u2028:3260"])
def test_a_discovered_address_moves_no_cursor(address: str) -> None:
    with pytest.raises(ProtocolViolation, match="is no address") as caught:
        parse_address(address)
    assert caught.value.section == "13.8"


def test_an_initiator_alias_moves_no_cursor() -> None:
    login: TargetLogin = _target()
    keys = [("InitiatorName", INITIATOR), ("TargetName", TARGET), ("InitiatorAlias", "a\x1b[2Jb")]
    login.receive(LoginRequest(bytes(6), 1, True, csg=1, nsg=3, data=encode_text(keys)))
    assert login.done
    assert login.parameters.initiator_alias == "a[2Jb"


def _target() -> TargetLogin:
    return TargetLogin(
        offer=Offer(), lookup=lambda _: TargetAccess(), portal_group_tag=1, random_bytes=bytes
    )


# -- framing ---------------------------------------------------------------------------------------


def _receive(framer: Framer, stream: bytes) -> list[Pdu]:
    return [pdu for pdus in wire.feed(framer, stream, []) for pdu in pdus]


def test_a_data_segment_for_a_command_that_has_ended_leaves_its_buffer_alone() -> None:
    """`test_hostile_targets` has the same from end to end."""
    place = bytearray(100)
    framer = Framer(data_segment_length_max=1000, sink=lambda _pdu, _length: memoryview(place))
    stream = encoded(DataIn(7, data=b"x" * 100))
    assert _receive(framer, stream[:60]) == []
    framer.release({7: None})
    assert _receive(framer, stream[60:90]) == []
    assert place == b"x" * 42 + bytes(58), "the command is still alive"
    framer.release({8: None})
    place[:] = bytes(100)
    (pdu,) = _receive(framer, stream[90:])
    assert bytes(pdu.data) == b"x" * 100
    assert place == bytes(100)
    framer.release({})


@pytest.mark.parametrize("digests", [False, True])
def test_memory_is_bounded_by_the_segment_that_we_allow(digests: bool) -> None:
    """Long AHSs, large and small segments, none of them ever complete."""
    limit = 1 << 16
    streams = [
        NopIn().pack(255, limit) + bytes(255 * 4),
        encoded(NopIn(data=bytes(limit)), header_digest=digests, data_digest=digests)[:-1],
        b"".join(encoded(NopIn(), header_digest=digests) for _ in range(2000)),
        NopIn().pack(255, 0xFF_FFFF) * 30,
    ]
    for stream in streams:
        framer = Framer(data_segment_length_max=limit)
        framer.header_digest = framer.data_digest = digests
        tracemalloc.start()
        try:
            for batch in wire.feed(framer, stream, [1000]):
                batch.clear()
        except ProtocolViolation as error:
            wire.check_violation(error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2 * limit + (1 << 16)


def test_properties_do_fail() -> None:
    """What the properties check is checked: each of these breaks one."""
    with pytest.raises(AssertionError):
        wire.check_violation(ProtocolViolation("", "problem", section="1"))
    with pytest.raises(AssertionError):
        wire.check_violation(ProtocolViolation("PDU", "\x1b", section="1"))
    assert len(PROPERTIES) == 13
