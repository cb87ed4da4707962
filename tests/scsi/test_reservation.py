"""PERSISTENT RESERVE IN and OUT: golden bytes, round trips, and bytes that nobody should send."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.scsi import reservation as pr
from orion_iscsifs.scsi.malformed import MalformedData
from orion_iscsifs.scsi.reservation import (
    Capabilities,
    Holder,
    InAction,
    Keys,
    OutAction,
    OutParameters,
    Registration,
    Reservation,
    ReservationType,
    TransportId,
)

KEY = 0x1122334455667788
PORT = TransportId("iqn.2024-01.org.example:a", bytes.fromhex("80abcdef0001"))


def test_commands() -> None:
    read_keys = pr.reserve_in(InAction.READ_KEYS, 0x1234)
    assert read_keys == bytes.fromhex("5e 00 0000000000 1234 00")
    assert pr.parse_reserve_in(read_keys) == pr.ReserveIn(0, 0x1234)
    kind = ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY
    reserve = pr.reserve_out(OutAction.RESERVE, kind)
    assert reserve == bytes.fromhex("5f 01 05 0000 00000018 00")
    assert pr.parse_reserve_out(reserve) == pr.ReserveOut(1, 0, 5, 24)


def test_parameters_of_out() -> None:
    data = pr.encode_out(OutParameters(key=KEY, service_action_key=2, aptpl=True))
    assert data == bytes.fromhex("1122334455667788 0000000000000002 00000000 01 000000")
    assert pr.decode_out(data) == OutParameters(key=KEY, service_action_key=2, aptpl=True)
    ports = OutParameters(all_target_ports=True, specify_initiator_ports=True)
    assert pr.encode_out(ports)[20] == 0x0C
    assert pr.decode_out(pr.encode_out(ports)) == ports
    with pytest.raises(MalformedData, match="23 bytes"):
        pr.decode_out(data[:23])


def test_keys() -> None:
    data = pr.encode_keys(Keys(7, (KEY, 1)))
    assert data == bytes.fromhex("00000007 00000010 1122334455667788 0000000000000001")
    assert pr.decode_keys(data) == Keys(7, (KEY, 1))
    assert pr.decode_keys(data[:20]) == Keys(7, (KEY,)), "half a key is none"
    assert pr.in_length(data[:8]) == 24
    assert pr.decode_keys(pr.encode_keys(Keys(7, ()))) == Keys(7, ())


def test_reservation() -> None:
    held = Reservation(9, Holder(KEY, 5))
    data = pr.encode_reservation(held)
    assert data == bytes.fromhex("00000009 00000010 1122334455667788 00000000 00 05 0000")
    assert pr.decode_reservation(data) == held
    assert pr.decode_reservation(bytes.fromhex("00000009 00000000")) == Reservation(9, None)


def test_capabilities() -> None:
    told = Capabilities(
        types=frozenset({ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY}),
        persist_capable=True,
        persist_active=True,
    )
    assert pr.encode_capabilities(told) == bytes.fromhex("0008 01 81 2000 0000")
    assert pr.decode_capabilities(pr.encode_capabilities(told)) == told
    every = Capabilities(types=frozenset(ReservationType))
    assert pr.encode_capabilities(every)[4:6] == bytes.fromhex("ea01")
    assert pr.decode_capabilities(bytes(8)).types is None
    assert pr.decode_capabilities(b"") == Capabilities()


@pytest.mark.parametrize(
    ("port", "golden"),
    [
        (PORT, bytes.fromhex("4500002c") + b"iqn.2024-01.org.example:a,i,0x80abcdef0001\0\0"),
        (TransportId("iqn.x:y"), bytes.fromhex("05000014") + b"iqn.x:y".ljust(20, b"\0")),
    ],
    ids=["port", "name"],
)
def test_transport_ids(port: TransportId, golden: bytes) -> None:
    assert pr.encode_transport_id(port) == golden
    assert pr.decode_transport_id(golden) == port


def test_strange_transport_ids() -> None:
    assert pr.decode_transport_id(bytes(24)) == TransportId(""), "Fibre Channel"
    assert pr.decode_transport_id(b"") == TransportId("")
    bell = bytes.fromhex("05000008") + b"iqn\x07\x1b\xffx\0"
    name = pr.decode_transport_id(bell).name
    assert name.isprintable(), "it is shown to users"
    assert name.startswith("iqn")
    short = bytes.fromhex("4500000c") + b"iqn,i,0x12\0\0"
    assert pr.decode_transport_id(short) == TransportId("iqn", None)


def test_full_status() -> None:
    first = Registration(key=KEY, is_holder=True, kind=5, relative_port=1, initiator=PORT)
    second = Registration(key=2, all_target_ports=True, initiator=TransportId("iqn.b"))
    data = pr.encode_full_status(3, [first, second])
    assert pr.decode_full_status(data) == pr.FullStatus(3, (first, second))
    assert pr.decode_full_status(data[:70]).registrations[0].key == KEY


@pytest.mark.parametrize(
    "decode",
    [pr.decode_keys, pr.decode_reservation, pr.decode_full_status],
    ids=lambda f: f.__name__,
)
def test_half_a_header_is_malformed(decode: object) -> None:
    assert callable(decode)
    with pytest.raises(MalformedData, match="at least 8"):
        decode(bytes(7))


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_malformed(data: bytes) -> None:
    for decode in (pr.decode_keys, pr.decode_reservation, pr.decode_full_status):
        if len(data) >= 8:
            assert decode(data).generation == int.from_bytes(data[:4], "big")
    if len(data) >= pr.OUT_BYTES:
        assert pr.decode_out(data).key == int.from_bytes(data[:8], "big")
    assert pr.decode_capabilities(data).persist_capable == bool(data[2:3] and data[2] & 1)
    assert pr.decode_transport_id(data).name.isprintable()


@given(
    st.integers(0, 2**32 - 1),
    st.lists(
        st.builds(
            Registration,
            key=st.integers(0, 2**64 - 1),
            relative_port=st.integers(0, 65535),
            all_target_ports=st.booleans(),
            initiator=st.builds(
                TransportId,
                st.from_regex(r"iqn\.[a-z0-9.:-]{1,200}", fullmatch=True),
                st.none() | st.binary(min_size=6, max_size=6),
            ),
        ),
        max_size=5,
    ),
)
def test_full_status_round_trips(generation: int, registrations: list[Registration]) -> None:
    data = pr.encode_full_status(generation, registrations)
    assert pr.decode_full_status(data) == pr.FullStatus(generation, tuple(registrations))
    assert pr.in_length(data) == len(data)


def test_types_in_words() -> None:
    words = pr.type_words(5)
    assert words == "Write Exclusive - Registrants Only"
    assert pr.type_words(0xB) == "reservation type Bh"
    assert ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS.all_registrants
    assert not ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY.all_registrants
