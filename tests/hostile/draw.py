"""Decisions out of a string of bytes: what a fuzzer mutates stays meaningful."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Takes decisions from the front of `data`; when that is used up, everything is zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        """Whether there is anything left to decide with."""
        return self._position < len(self._data)

    def raw(self, count: int) -> bytes:
        """At most `count` bytes: what is left of them."""
        start = self._position
        self._position += count
        return self._data[start : self._position]

    def rest(self) -> bytes:
        return self.raw(len(self._data))

    def number(self, count: int = 1) -> int:
        """Of `count` bytes."""
        return int.from_bytes(self.raw(count).ljust(count, b"\0"), "big")

    def below(self, limit: int) -> int:
        return self.number(1 if limit <= 256 else 4) % limit

    def flag(self) -> bool:
        return bool(self.number() & 1)

    def chance(self, of: int) -> bool:
        """Once in `of` times, and never when nothing is left."""
        return self.number() % of == 1

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def block(self) -> bytes:
        """Bytes with a length of their own, mostly short."""
        return self.raw(self.below(64))
