"""32-bit serial number arithmetic (RFC 1982, as RFC 7143 §4.2.2.1 demands for every SN)."""

from typing import Final

MODULUS: Final = 1 << 32
_HALF: Final = 1 << 31


def add(number: int, count: int) -> int:
    return (number + count) & 0xFFFF_FFFF


def distance(older: int, newer: int) -> int:
    """How far `newer` is ahead of `older`; negative when it is behind. In [-2^31, 2^31)."""
    ahead = (newer - older) & 0xFFFF_FFFF
    return ahead if ahead < _HALF else ahead - MODULUS


def less(first: int, second: int) -> bool:
    return (second - first - 1) & 0xFFFF_FFFF < _HALF - 1


def less_equal(first: int, second: int) -> bool:
    return first == second or less(first, second)
