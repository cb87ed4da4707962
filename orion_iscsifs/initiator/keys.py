"""Reservation keys: which registrations are ours, after a crash too.

A key has 8 bytes. The first 6 are random, made once for each LUN that this host mounts, and kept;
the last 2 are the qualifier of the ISID of the path (RFC 7143 §11.12.5). So every path registers a
key of its own, and any key that this host has ever registered is known as its own.
"""

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from orion_iscsifs.initiator.identity import keep

_BASE_BYTES: Final = 6
_QUALIFIER_BITS: Final = 16


def lun_stem(lun_name: str) -> str:
    """The name of a LUN's files in the state directory."""
    return hashlib.sha256(lun_name.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class LunKeys:
    """This host's keys for one LUN."""

    base: int
    """The first 48 bits of each; never zero."""

    @classmethod
    def load(cls, state_dir: Path, lun_name: str) -> Self:
        """`lun_name`: what tells the LUN from all others. Raises MountError."""
        path = state_dir / "keys" / lun_stem(lun_name)
        try:
            base = int(path.read_text(), 16)
        except (OSError, ValueError):
            base = 0
        if not 0 < base < 1 << 8 * _BASE_BYTES:
            base = int.from_bytes(secrets.token_bytes(_BASE_BYTES), "big") or 1
            keep(path, f"{base:012x}\n")
        return cls(base)

    def of(self, isid: bytes) -> int:
        """The key of the path with this ISID."""
        return self.base << _QUALIFIER_BITS | int.from_bytes(isid[-2:], "big")

    def is_ours(self, key: int) -> bool:
        return key >> _QUALIFIER_BITS == self.base
