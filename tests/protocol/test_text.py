"""Key=value text (RFC 7143 §6.1). Checklist 27."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.text import (
    TEXT_BYTES_MAX,
    Pair,
    TextReader,
    encode_text,
    parse_number,
    shown,
    split_text,
)


def read(*segments: bytes) -> list[Pair]:
    reader = TextReader("Login Response")
    for segment in segments:
        reader.feed(segment)
    return reader.finish()


def test_encode() -> None:
    text = encode_text([("TargetName", "iqn.a"), ("TargetAlias", "Büro=1"), ("X-a.b", "")])
    assert text == b"TargetName=iqn.a\0TargetAlias=B\xc3\xbcro=1\0X-a.b=\0"
    assert encode_text([]) == b""


@pytest.mark.checklist(27, "6.1")
def test_pairs_span_pdus() -> None:
    """Checklist 27: a pair may be cut anywhere, even within a character."""
    text = encode_text([("TargetAlias", "Büro"), ("InitialR2T", "No")])
    for cut in range(len(text) + 1):
        assert read(text[:cut], text[cut:]) == [("TargetAlias", "Büro"), ("InitialR2T", "No")]


def test_the_first_equals_sign_ends_the_key() -> None:
    assert read(b"X-a=b=c\0") == [("X-a", "b=c")]


def test_a_reader_starts_again_after_finish() -> None:
    reader = TextReader("Text Response")
    reader.feed(b"A=1\0")
    assert reader.finish() == [("A", "1")]
    reader.feed(b"B=2\0")
    assert reader.finish() == [("B", "2")]
    assert reader.finish() == []


@pytest.mark.checklist(27, "6.1")
def test_keys_are_case_sensitive() -> None:
    """Checklist 27: a key in other letters is another key."""
    assert read(b"Initialr2t=No\0") == [("Initialr2t", "No")]


def test_pads_within_the_data_segment_are_skipped() -> None:
    assert read(b"A=1\0\0\0\0B=2\0\0") == [("A", "1"), ("B", "2")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"A=1", "no null delimiter"),
        (b"A=1\0B=2", "no null delimiter"),
        (b"Yes\0", "without '='"),
        (b"=1\0", "is not a key name"),
        (b"initialR2T=1\0", "is not a key name"),
        (b"A b=1\0", "is not a key name"),
        (b"A\n=1\0", "is not a key name"),
        (b"A" * 64 + b"=1\0", "is not a key name"),
        ("Ä=1\0".encode(), "is not a key name"),
        (b"A=\xff\0", "not UTF-8"),
        (b"TargetAlias=" + b"a" * 256 + b"\0", "longer than 255"),
        (b"TargetAlias=" + "ä".encode() * 128 + b"\0", "longer than 255"),
        (b"HeaderDigest=None," + b"a" * 256 + b"\0", "longer than 255"),
        (b"CHAP_R=0x" + b"0" * 2049 + b"\0", "longer than 2050"),
    ],
)
@pytest.mark.checklist(27, "6.1")
def test_malformed_text(text: bytes, problem: str) -> None:
    with pytest.raises(ProtocolViolation, match=rf"Login Response: .*{problem}.*§6\.1"):
        read(text)


@pytest.mark.parametrize(
    "pair",
    [
        ("A" * 63, "1"),
        ("TargetAlias", "a" * 255),
        ("HeaderDigest", ",".join(["a" * 255] * 4)),
        ("CHAP_C", "0x" + "0" * 2048),
        ("X-com.example.long", "a" * 4000),
        ("X#NodeArchitecture", "a/1"),
        ("iSCSIProtocolLevel", "1"),
    ],
)
@pytest.mark.checklist(27, "6.1")
@pytest.mark.checklist(41, "12.1.3")
def test_longest_values(pair: Pair) -> None:
    """Checklist 27 and 41: 63 bytes of key, 255 of a simple value, 1024 bytes of CHAP."""
    assert read(encode_text([pair])) == [pair]


@pytest.mark.checklist(27, "6.1")
def test_text_is_bounded() -> None:
    reader = TextReader("Login Response")
    reader.feed(bytes(TEXT_BYTES_MAX))
    with pytest.raises(ProtocolViolation, match="more than 65536 bytes"):
        reader.feed(b"\0")
    small = TextReader("Text Response", bytes_max=3)
    with pytest.raises(ProtocolViolation, match="Text Response: more than 3 bytes"):
        small.feed(b"A=1\0")


@pytest.mark.parametrize(
    ("size", "lengths"),
    [(0, [0]), (1, [1]), (8192, [8192]), (8193, [8192, 1]), (16384, [8192] * 2)],
)
def test_split(size: int, lengths: list[int]) -> None:
    parts = split_text(bytes(size), 8192)
    assert [len(part) for part in parts] == lengths


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("8192", 8192),
        ("0x1F", 31),
        ("0Xff", 255),
        ("0x0000000000000001", 1),
        ("18446744073709551615", (1 << 64) - 1),
        ("18446744073709551616", None),
        ("0x10000000000000000", None),
        ("01", None),
        ("", None),
        ("-1", None),
        ("+1", None),
        ("1 ", None),
        ("1_0", None),
        ("\u0661", None),
        ("0x", None),
        ("0b1", None),
        ("1~2", None),
        ("99999999999999999999999999", None),
    ],
)
def test_numbers(text: str, number: int | None) -> None:
    assert parse_number(text) == number


def test_what_a_message_shows_of_the_peers_text() -> None:
    assert shown("a") == "'a'"
    assert shown("\x1b[2Jä\n") == r"'\x1b[2J\xe4\n'"
    assert len(shown("a" * 1000)) == 65


@given(data=st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_are_text_or_a_violation(data: list[bytes]) -> None:
    try:
        for key, value in read(*data):
            assert 0 < len(key) <= 63
            assert "\0" not in value
    except ProtocolViolation:
        pass
