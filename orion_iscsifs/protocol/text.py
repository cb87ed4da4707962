"""Key=value text of Login and Text PDUs (RFC 7143 §6.1): bytes to pairs and back.

A logical text data segment may span PDUs (C bit), and so may a single pair. `TextReader` gathers
one such segment, bounded before memory is taken.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.keys import KEYS, VALUE_BYTES_MAX, Kind
from orion_iscsifs.protocol.pdu import LoginRequest
from orion_iscsifs.protocol.pdu.base import Buffer

Pair = tuple[str, str]

TEXT_BYTES_MAX: Final = 65536
"""Of one logical text data segment: what §6.1 asks for with long authentication items."""

SHOWN_CHARS_MAX: Final = 60

# §6.1's standard-label, and the '#' of X#NodeArchitecture. iSCSIProtocolLevel, alone of all keys,
# begins with a small letter.
_KEY_NAME: Final = re.compile(r"(?:[A-Z]|iSCSI)[A-Za-z0-9.\-+@_#]{0,62}\Z")
_KEY_BYTES_MAX: Final = 63

_BINARY_BYTES_MAX: Final = 8
"""Of a regular-binary-value: 64 bits."""

_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,19}")


def encode_text(pairs: Sequence[Pair]) -> bytes:
    """The pairs as they go on the wire, a null byte after each."""
    return b"".join(f"{key}={value}\0".encode() for key, value in pairs)


def split_text(text: bytes, segment_bytes_max: int) -> list[bytes]:
    """The data segments that carry `text`, at least one; all but the last need the C bit."""
    starts = range(0, max(len(text), 1), segment_bytes_max)
    return [text[start : start + segment_bytes_max] for start in starts]


def shown(text: str) -> str:
    """Text of the peer as part of a message: quoted, without control characters, short."""
    return ascii(text if len(text) <= SHOWN_CHARS_MAX else text[:SHOWN_CHARS_MAX] + "...")


def printable(text: str) -> str:
    """Text for people to read, so that it can't move a terminal's cursor."""
    return "".join(char for char in text if char.isprintable())


def parse_number(text: str) -> int | None:
    """A numerical-value of §6.1 (decimal or hex, below 2**64), or None."""
    if _NUMBER.fullmatch(text) is None:
        return None
    number = int(text, 0)
    return number if number < 1 << 64 else None


def parse_binary_number(text: str) -> int | None:
    """A regular-binary-value of §6.1 as a number (decimal, hex or base64), or None."""
    if text[:2] not in ("0b", "0B"):
        return parse_number(text)
    try:
        value = base64.b64decode(text[2:], validate=True)
    except (binascii.Error, ValueError):
        return None
    return int.from_bytes(value) if 0 < len(value) <= _BINARY_BYTES_MAX else None


class TextReader:
    """Gathers one logical text data segment: `feed` each data segment, then `finish`.

    `pdu` names the PDU in errors. Raises ProtocolViolation for whatever §6.1 forbids. After
    `finish` the reader is empty and can take the next segment.
    """

    def __init__(self, pdu: str = LoginRequest.name, bytes_max: int = TEXT_BYTES_MAX) -> None:
        self._pdu = pdu
        self._bytes_max = bytes_max
        self._text = bytearray()

    @property
    def is_whole(self) -> bool:
        """What was fed does not end in the middle of a pair."""
        return not self._text or self._text[-1] == 0

    def feed(self, data: Buffer) -> None:
        """The data segment of one PDU, with or without the C bit."""
        if len(self._text) + len(data) > self._bytes_max:
            raise self._violation(f"more than {self._bytes_max} bytes of text")
        self._text += data

    def finish(self) -> list[Pair]:
        """The pairs, in order; the last data segment (C bit 0) has been fed."""
        text, self._text = self._text, bytearray()
        if text and text[-1] != 0:
            raise self._violation("the last key=value pair has no null delimiter")
        # Empty items are pads that some targets count into DataSegmentLength.
        return [self._pair(bytes(item)) for item in text.split(b"\0") if item]

    def _pair(self, item: bytes) -> Pair:
        try:
            key, equals, value = item.decode().partition("=")
        except UnicodeDecodeError:
            raise self._violation("text that is not UTF-8") from None
        if not equals:
            raise self._violation("text without '='")
        if len(key) > _KEY_BYTES_MAX or _KEY_NAME.match(key) is None:
            raise self._violation(f"{key[:_KEY_BYTES_MAX]!r} is not a key name")
        self._check_length(key, value)
        return key, value

    def _check_length(self, key: str, value: str) -> None:
        row = KEYS.get(key)
        if row is None:
            return  # A key of a later specification has the limit that it says; bytes_max holds.
        # The limit is that of a simple value: a list is bounded item by item.
        items = value.split(",") if row.kind is Kind.LIST else [value]
        limit = max(row.value_bytes_max, VALUE_BYTES_MAX)
        if any(len(item.encode()) > limit for item in items):
            raise self._violation(f"a value of {key} is longer than {limit} bytes")

    def _violation(self, problem: str) -> ProtocolViolation:
        return ProtocolViolation(self._pdu, problem, section="6.1")
