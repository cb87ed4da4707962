"""CHAP arithmetic (RFC 1994, RFC 7143 §12.1.3): responses, comparison, binary values in text.

Which key follows which is in `login_chap`. No secret, challenge or response reaches a message.
"""

import base64
import binascii
import enum
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Final

from orion_iscsifs.errors import AuthenticationFailed, ProtocolViolation
from orion_iscsifs.protocol.keys import CHAP_BINARY_BYTES_MAX

_HEX: Final = re.compile(r"0[xX][0-9a-fA-F]+")
_SECTION: Final = "12.1.3"
SECRET_BYTES_MIN: Final = 12


class ChapAlgorithm(enum.IntEnum):
    """Values of CHAP_A: IANA's PPP authentication algorithms."""

    MD5 = 5
    SHA1 = 6
    SHA256 = 7
    SHA3_256 = 8

    @property
    def hash_name(self) -> str:
        """As hashlib calls it."""
        return _HASHES[self][0]

    @property
    def response_bytes(self) -> int:
        return _HASHES[self][1]


_HASHES: Final = {
    ChapAlgorithm.MD5: ("md5", 16),
    ChapAlgorithm.SHA1: ("sha1", 20),
    ChapAlgorithm.SHA256: ("sha256", 32),
    ChapAlgorithm.SHA3_256: ("sha3_256", 32),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Name and secret of one direction."""

    user: str
    secret: bytes = field(repr=False)

    @property
    def is_weak(self) -> bool:
        """Shorter than the 96 bits that RFC 7143 §9.2.1 asks for without IPsec: warn about it."""
        return len(self.secret) < SECRET_BYTES_MIN


CHALLENGES_MAX: Final = 4096


class ChallengeRegister:
    """The challenges that this side has sent lately, on all of its connections (RFC 7143 §9.2.1).

    A rogue peer that gets one of them back as its own challenge on another connection would have
    us compute the response it lacks. So a challenge that comes in must not be in here. Bounded:
    the oldest is forgotten, long after its login has ended.
    """

    def __init__(self, challenges_max: int = CHALLENGES_MAX) -> None:
        self._challenges_max = challenges_max
        self._sent: dict[bytes, None] = {}

    def add(self, challenge: bytes) -> None:
        """A challenge of ours that is about to be sent."""
        self._sent[challenge] = None
        if len(self._sent) > self._challenges_max:
            del self._sent[next(iter(self._sent))]

    def __contains__(self, challenge: bytes) -> bool:
        # Challenges are no secrets: they cross the wire, so a plain comparison tells nobody more.
        return challenge in self._sent


def chap_response(
    algorithm: ChapAlgorithm, identifier: int, secret: bytes, challenge: bytes
) -> bytes:
    """The hash over identifier, secret and challenge; raises AuthenticationFailed."""
    text = bytes([identifier]) + secret + challenge
    try:
        return hashlib.new(algorithm.hash_name, text).digest()
    except ValueError:  # A host in FIPS mode has no MD5 for this purpose.
        raise AuthenticationFailed(
            f"CHAP with {algorithm.name}: this host's OpenSSL forbids {algorithm.hash_name}",
            advice="choose another algorithm with chap_algs=",
        ) from None


def same(left: bytes, right: bytes) -> bool:
    """Compared in a time that depends on the lengths only."""
    return hmac.compare_digest(left, right)


def encode_binary(value: bytes) -> str:
    """As a hex-constant (RFC 7143 §6.1): the one form that every target reads."""
    return "0x" + value.hex()


def decode_binary(
    text: str, *, key: str, pdu: str, bytes_max: int = CHAP_BINARY_BYTES_MAX
) -> bytes:
    """A hex- or base64-constant (RFC 7143 §6.1); raises ProtocolViolation."""
    value = _decoded(text)
    if value is None:
        raise ProtocolViolation(pdu, f"{key} is not a binary value", section=_SECTION)
    if not 0 < len(value) <= bytes_max:
        problem = f"{key} holds {len(value)} bytes, 1 to {bytes_max} are allowed"
        raise ProtocolViolation(pdu, problem, section=_SECTION)
    return value


def _decoded(text: str) -> bytes | None:
    if _HEX.fullmatch(text):
        # An odd number of digits stands for (n + 1) / 2 bytes: the missing nibble leads.
        digits = text[2:]
        return bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
    if text[:2] in ("0b", "0B"):
        try:
            return base64.b64decode(text[2:], validate=True)
        except (binascii.Error, ValueError):
            return None
    return None
