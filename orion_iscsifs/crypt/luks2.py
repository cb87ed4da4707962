"""The LUKS2 header (LUKS2 On-Disk Format Specification 1.1, §2-3). Pure.

A binary header of 4096 bytes and a JSON text behind it, twice, each with a checksum over both and a
sequence number: the copy that checks and has the higher number counts. `metadata` knows what the
text says. What it does not know (tokens, other kinds of key slots) is kept as it is.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, replace
from struct import Struct
from typing import Any, Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.crypt import metadata
from orion_iscsifs.crypt.antiforensic import STRIPES
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.kdf import Kdf, KeyDigest
from orion_iscsifs.crypt.volume import MAGIC, Slot, Volume

SECOND_MAGIC: Final = b"SKUL\xba\xbe"
BINARY_BYTES: Final = 4096
SIZES: Final = tuple(16384 << power for power in range(9))
"""What one copy may take: 16 KiB to 4 MiB. The second one begins behind the first."""
SIZE_BYTES: Final = SIZES[0]
"""In a volume that is made here."""
PAYLOAD_BYTES: Final = 16 << 20
"""Where the payload begins in a volume that is made here (and by cryptsetup)."""
SLOTS_MAX: Final = metadata.SLOTS_MAX
_ALIGN_BYTES: Final = 4096
_CHECKSUM_AT: Final = 448
_CHECKSUM_BYTES: Final = 64
_SEQUENCE_MAX: Final = (1 << 64) - 1
_HEAD: Final = Struct(">6sHQQ48s32s64s40s48sQ184x64s")
"""Magic, version, hdr_size, seqid, label, csum_alg, salt, uuid, subsystem, hdr_offset, csum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Luks2:
    """A header that makes sense."""

    size_bytes: int
    sequence: int
    label: bytes
    subsystem: bytes
    checksum: str
    uuid: str
    text: bytes
    """The JSON, without the zeroes behind it."""
    damage: str = ""
    """Why only one of the two copies can be used; empty: both can."""
    is_second: bool = False
    """It is the second copy, and the first is damaged or older: that one is to be written first."""

    version = 2

    @property
    def volume(self) -> Volume:
        """Raises LuksError, in words for the user, for what is not known here."""
        return metadata.volume(self.text, self.uuid, self.size_bytes)

    @property
    def raw(self) -> dict[str, Any]:
        """The whole text, as it is."""
        return metadata.decode(self.text)

    def free_slot(self, kdf: Kdf, key_bytes: int, af_hash: str) -> Slot:
        """A place for one more passphrase. Raises LuksError if there is none."""
        number = metadata.free_number(self.text)
        room = -(-key_bytes * STRIPES // _ALIGN_BYTES) * _ALIGN_BYTES
        return Slot(
            number=number,
            kdf=kdf,
            offset_bytes=metadata.free_room(self.text, self.size_bytes, room),
            room_bytes=room,
            key_bytes=key_bytes,
            area_key_bytes=key_bytes,
            stripes=STRIPES,
            af_hash=af_hash,
        )

    def with_slot(self, slot: Slot) -> "Luks2":
        return self._changed(metadata.with_slot(self.raw, slot))

    def without_slot(self, number: int) -> "Luks2":
        return self._changed(metadata.without_slot(self.raw, number))

    def _changed(self, raw: dict[str, Any]) -> "Luks2":
        """Raises LuksError when the text has become too long, or the counter is at its end."""
        text = metadata.encode(raw)
        if len(text) >= self.size_bytes - BINARY_BYTES:
            raise LuksError("LUKS2: the header has no room for one more key slot")
        if self.sequence >= _SEQUENCE_MAX:
            raise LuksError("LUKS2: the sequence number of the header is at its end")
        return replace(self, text=text, sequence=self.sequence + 1, damage="")

    def encode(self, *, second: bool, salt: bytes) -> bytes:
        """One of the copies; `salt` is 64 random bytes that make it unlike any other."""
        head = _HEAD.pack(
            SECOND_MAGIC if second else MAGIC,
            2,
            self.size_bytes,
            self.sequence,
            self.label,
            self.checksum.encode(),
            salt,
            self.uuid.encode(),
            self.subsystem,
            self.size_bytes if second else 0,
            b"",
        )
        blob = bytearray(self.size_bytes)
        blob[: len(head)] = head
        blob[BINARY_BYTES : BINARY_BYTES + len(self.text)] = self.text
        digest = hashlib.new(self.checksum, blob).digest()
        blob[_CHECKSUM_AT : _CHECKSUM_AT + len(digest)] = digest
        return bytes(blob)


def new(
    *,
    uuid: str,
    sector_bytes: int,
    digest: KeyDigest,
    label: str = "",
) -> Luks2:
    """An empty header, to be written for the first time after `with_slot`."""
    raw = metadata.new(
        digest,
        sector_bytes=sector_bytes,
        size_bytes=SIZE_BYTES,
        payload_bytes=PAYLOAD_BYTES,
    )
    return Luks2(
        size_bytes=SIZE_BYTES,
        sequence=0,
        label=label.encode(),
        subsystem=b"",
        checksum="sha256",
        uuid=uuid,
        text=metadata.encode(raw),
    )


@dataclass(frozen=True, slots=True)
class Copy:
    """What the binary header of one copy says."""

    size_bytes: int
    sequence: int


def examine(head: Buffer, offset: int) -> Copy | None:
    """The binary header at `offset`; None: there is none. Raises LuksError: one of another kind."""
    wanted = SECOND_MAGIC if offset else MAGIC
    if len(head) < BINARY_BYTES or bytes(head[:6]) != wanted:
        return None
    _, version, size, sequence, *_, at, _ = _HEAD.unpack_from(head)
    if version != 2:
        raise LuksError(f"LUKS: version {version} is not known here (1 and 2 are)")
    if size not in SIZES:
        raise LuksError(f"LUKS2: a header of {size} bytes")
    if at != offset or (offset and offset != size):
        raise LuksError(f"LUKS2: a header at {offset} that says it is at {at}")
    return Copy(size, sequence)


def parse(blob: Buffer, offset: int) -> Luks2:
    """One copy, all of it. Raises LuksError, in words for the user."""
    found = examine(blob, offset)
    if found is None or len(blob) != found.size_bytes:
        raise LuksError("LUKS2: there is no header")
    _, _, size, sequence, label, checksum, _, uuid, subsystem, _, digest = _HEAD.unpack_from(blob)
    name = _text(checksum)
    if name not in _CHECKSUMS:
        raise LuksError(f"LUKS2: the checksum {name!r} is not known here")
    cleared = bytearray(blob)
    cleared[_CHECKSUM_AT : _CHECKSUM_AT + _CHECKSUM_BYTES] = bytes(_CHECKSUM_BYTES)
    actual = _CHECKSUMS[name](cleared).digest()
    if not hmac.compare_digest(actual, digest[: len(actual)]):
        raise LuksError("LUKS2: the header is damaged: its checksum is wrong")
    return Luks2(
        size_bytes=size,
        sequence=sequence,
        label=label,
        subsystem=subsystem,
        checksum=name,
        uuid=_text(uuid),
        text=bytes(blob[BINARY_BYTES:]).split(b"\0", 1)[0],
    )


def choose(first: Luks2 | LuksError | None, second: Luks2 | LuksError | None) -> Luks2:
    """The copy that counts, and in its `damage` what is wrong with the other one.

    Raises LuksError when neither can be used.
    """
    good = [copy for copy in (first, second) if isinstance(copy, Luks2)]
    if not good:
        why = first if isinstance(first, LuksError) else second
        detail = f": {str(why).removeprefix('LUKS2: ')}" if why is not None else ""
        raise LuksError(
            f"LUKS2: neither copy of the header can be used{detail}",
            advice="restore a backup of the header (`cryptsetup luksHeaderRestore`)",
        )
    best = max(good, key=lambda copy: copy.sequence)
    if len(good) == 2 and good[0].sequence == good[1].sequence:
        return best
    which = "first" if best is second else "second"
    other = first if best is second else second
    why_not = (
        f"is older ({other.sequence}, not {best.sequence})"
        if isinstance(other, Luks2)
        else "is damaged"
    )
    damage = f"the {which} copy of the header {why_not}"
    return replace(best, damage=damage, is_second=best is second)


_CHECKSUMS: Final[dict[str, Callable[[Buffer], Any]]] = {
    "sha1": hashlib.sha1,
    "sha256": hashlib.sha256,
    "sha384": hashlib.sha384,
    "sha512": hashlib.sha512,
}


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "backslashreplace")
