"""What both versions of LUKS have in common: key slots, the key's digest, the payload. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.crypt import antiforensic
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.kdf import Kdf, KeyDigest
from orion_iscsifs.crypt.xts import IV_UNIT_BYTES, KEY_BYTES, SectorCipher

MAGIC: Final = b"LUKS\xba\xbe"
ENCRYPTION: Final = "aes-xts-plain64"
SECTOR_BYTES: Final = (512, 1024, 2048, 4096)
OFFSET_BYTES_MAX: Final = 1 << 62
WORK_MAX: Final = 4.0
"""Of all key slots that are tried with one passphrase, in units of the most costly one allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One passphrase's copy of the volume key."""

    number: int
    kdf: Kdf
    offset_bytes: int
    """Of the material, from the start of the device."""
    room_bytes: int
    """What may be used there; wiped as a whole."""
    key_bytes: int
    """Of the volume key."""
    area_key_bytes: int
    """Of the key that the material is encrypted with."""
    stripes: int
    af_hash: str
    priority: int = 1
    """2 is tried first, 0 never unless it is asked for."""

    def __post_init__(self) -> None:
        for length in (self.key_bytes, self.area_key_bytes):
            if length not in KEY_BYTES:
                raise LuksError(
                    f"LUKS key slot {self.number}: a key of {length} bytes for {ENCRYPTION}:"
                    " 32 or 64"
                )
        if not 1 <= self.stripes <= antiforensic.STRIPES_MAX:
            raise LuksError(f"LUKS key slot {self.number}: {self.stripes} stripes")
        if self.material_bytes > self.room_bytes or self.offset_bytes > OFFSET_BYTES_MAX:
            raise LuksError(
                f"LUKS key slot {self.number}: {self.material_bytes} bytes don't fit into"
                f" {self.room_bytes} at {self.offset_bytes}"
            )

    @property
    def material_bytes(self) -> int:
        """Whole sectors."""
        return -(-self.key_bytes * self.stripes // IV_UNIT_BYTES) * IV_UNIT_BYTES

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.room_bytes

    def seal(self, passphrase: bytes, key: Buffer, random: Buffer) -> bytes:
        """The material that holds `key`. Takes as long as the KDF wants."""
        split = antiforensic.split(key, self.stripes, self.af_hash, random)
        padded = split + bytes(self.material_bytes - len(split))
        return self._cipher(passphrase).encrypt(0, padded)

    def unseal(self, passphrase: bytes, material: Buffer) -> bytes:
        """Some key; whether it is the right one the digest tells."""
        split = self._cipher(passphrase).decrypt(0, material)[: self.key_bytes * self.stripes]
        return antiforensic.merge(split, self.stripes, self.af_hash)

    def _cipher(self, passphrase: bytes) -> SectorCipher:
        """Key material is in sectors of 512 bytes, whatever the payload has; counted from 0."""
        return SectorCipher(self.kdf.derive(passphrase, self.area_key_bytes), IV_UNIT_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """Where the encrypted data is, and how it is encrypted."""

    offset_bytes: int
    size_bytes: int | None
    """None: up to the end of the device, wherever that is."""
    sector_bytes: int
    iv_first: int = 0
    """The number of the first sector, in units of 512 bytes."""

    def __post_init__(self) -> None:
        if self.sector_bytes not in SECTOR_BYTES:
            raise LuksError(f"LUKS: sectors of {self.sector_bytes} bytes: 512 to 4096")
        size = self.size_bytes or 0
        if self.offset_bytes > OFFSET_BYTES_MAX or size > OFFSET_BYTES_MAX:
            raise LuksError("LUKS: the payload is farther away than any device is large")
        if self.offset_bytes % IV_UNIT_BYTES or size % self.sector_bytes:
            raise LuksError("LUKS: the payload is not whole sectors")
        if self.iv_first > OFFSET_BYTES_MAX:
            raise LuksError(f"LUKS: the first sector has the number {self.iv_first}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """What opening needs to know, whichever version the header is."""

    version: int
    uuid: str
    slots: tuple[Slot, ...]
    digest: KeyDigest
    payload: Payload

    def __post_init__(self) -> None:
        check_apart(self.slots)

    def in_order(self) -> list[Slot]:
        """The slots as they are to be tried with a passphrase. Raises LuksError: too costly."""
        tried = [slot for slot in self.slots if slot.priority > 0]
        tried.sort(key=lambda slot: (-slot.priority, slot.number))
        # Whether a slot has opened is asked of the digest each time.
        judging = len(tried) * self.digest.kdf.work(len(self.digest.digest))
        if judging + sum(slot.kdf.work(slot.area_key_bytes) for slot in tried) > WORK_MAX:
            raise LuksError(
                "LUKS: the key slots ask for more work than a passphrase is worth",
                advice="the header is damaged, or made to keep this host busy",
            )
        return tried


def check_apart(slots: Iterable[Slot]) -> None:
    """Raises LuksError when two slots share bytes."""
    ordered = sorted(slots, key=lambda slot: slot.offset_bytes)
    for one, other in pairwise(ordered):
        if one.end_bytes > other.offset_bytes:
            raise LuksError(f"LUKS key slots {one.number} and {other.number}: in the same place")
