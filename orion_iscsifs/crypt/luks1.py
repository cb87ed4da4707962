"""The LUKS1 header (LUKS On-Disk Format Specification 1.2.3, §2): 592 bytes, big-endian. Pure.

There is one copy and no checksum: damage shows in a field that makes no sense, or as a passphrase
that opens nothing.
"""

from dataclasses import dataclass, replace
from struct import Struct
from typing import Final

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.crypt.antiforensic import STRIPES
from orion_iscsifs.crypt.errors import LuksError, NoLuksHeader
from orion_iscsifs.crypt.kdf import KeyDigest, Pbkdf2, check_hash
from orion_iscsifs.crypt.volume import MAGIC, Payload, Slot, Volume, check_apart
from orion_iscsifs.crypt.xts import KEY_BYTES

SECTOR_BYTES: Final = 512
"""Everything counts in these, and the payload is encrypted in these."""
HEADER_BYTES: Final = 592
SLOTS: Final = 8
DIGEST_BYTES: Final = 20
SALT_BYTES: Final = 32
ENABLED: Final = 0x00AC71F3
DISABLED: Final = 0x0000DEAD
ALIGN_BYTES: Final = 4096
PAYLOAD_BYTES: Final = 2 << 20
"""Where the payload begins in a volume that is made here (and by cryptsetup)."""

_HEAD: Final = Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = Struct(">II32sII")


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """A key slot as it is stored, in use or not."""

    active: bool
    iterations: int
    salt: bytes
    material_sector: int
    stripes: int

    def encode(self) -> bytes:
        state = ENABLED if self.active else DISABLED
        return _SLOT.pack(state, self.iterations, self.salt, self.material_sector, self.stripes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Luks1:
    """A header that makes sense."""

    hash: str
    payload_sector: int
    key_bytes: int
    digest: KeyDigest
    uuid: str
    blocks: tuple[KeyBlock, ...]

    version = 1
    damage = ""
    """What was wrong and could be mended by a second copy: there is none."""

    @property
    def volume(self) -> Volume:
        """Raises LuksError when a slot in use makes no sense."""
        slots = [self.slot(number) for number, block in enumerate(self.blocks) if block.active]
        return Volume(
            version=1,
            uuid=self.uuid,
            slots=tuple(slots),
            digest=self.digest,
            payload=Payload(
                offset_bytes=self.payload_sector * SECTOR_BYTES,
                size_bytes=None,
                sector_bytes=SECTOR_BYTES,
            ),
        )

    def slot(self, number: int) -> Slot:
        """In use or not. Raises LuksError when it makes no sense."""
        block = self.blocks[number]
        slot = Slot(
            number=number,
            kdf=Pbkdf2(self.hash, block.iterations if block.active else 1, block.salt),
            offset_bytes=block.material_sector * SECTOR_BYTES,
            room_bytes=_whole(self.key_bytes * block.stripes, SECTOR_BYTES),
            key_bytes=self.key_bytes,
            area_key_bytes=self.key_bytes,
            stripes=block.stripes,
            af_hash=self.hash,
        )
        payload = self.payload_sector * SECTOR_BYTES
        if slot.offset_bytes < HEADER_BYTES or slot.end_bytes > payload:
            raise LuksError(
                f"LUKS key slot {number}: its material is at {slot.offset_bytes}, outside of the"
                " header"
            )
        return slot

    def free_slot(self) -> Slot:
        """The first that is not in use. Raises LuksError if there is none."""
        for number, block in enumerate(self.blocks):
            if not block.active:
                slot = self.slot(number)
                check_apart([*self.volume.slots, slot])
                return slot
        raise LuksError(f"LUKS: all {SLOTS} key slots are in use", advice="remove a key first")

    def with_slot(self, number: int, kdf: Pbkdf2) -> "Luks1":
        block = replace(self.blocks[number], active=True, iterations=kdf.iterations, salt=kdf.salt)
        return self._with_block(number, block)

    def without_slot(self, number: int) -> "Luks1":
        block = replace(self.blocks[number], active=False, iterations=0, salt=bytes(SALT_BYTES))
        return self._with_block(number, block)

    def _with_block(self, number: int, block: KeyBlock) -> "Luks1":
        return replace(self, blocks=(*self.blocks[:number], block, *self.blocks[number + 1 :]))

    def encode(self) -> bytes:
        head = _HEAD.pack(
            MAGIC,
            1,
            b"aes",
            b"xts-plain64",
            self.hash.encode(),
            self.payload_sector,
            self.key_bytes,
            self.digest.digest,
            self.digest.kdf.salt,
            self.digest.kdf.iterations,
            self.uuid.encode(),
        )
        return head + b"".join(block.encode() for block in self.blocks)


def new(*, uuid: str, hash_name: str, key_bytes: int, digest: KeyDigest) -> Luks1:
    """An empty header: every slot has its place, none is in use."""
    room = _whole(key_bytes * STRIPES, ALIGN_BYTES)
    blocks = tuple(
        KeyBlock(
            False, 0, bytes(SALT_BYTES), (ALIGN_BYTES + number * room) // SECTOR_BYTES, STRIPES
        )
        for number in range(SLOTS)
    )
    assert ALIGN_BYTES + SLOTS * room <= PAYLOAD_BYTES
    return Luks1(
        hash=check_hash(hash_name),
        payload_sector=PAYLOAD_BYTES // SECTOR_BYTES,
        key_bytes=key_bytes,
        digest=digest,
        uuid=uuid,
        blocks=blocks,
    )


def parse(head: Buffer) -> Luks1:
    """The first HEADER_BYTES of the device. Raises LuksError, in words for the user."""
    if len(head) < HEADER_BYTES or bytes(head[:6]) != MAGIC:
        raise NoLuksHeader("LUKS: there is no header")
    (
        _,
        version,
        cipher,
        mode,
        hash_field,
        payload_sector,
        key_bytes,
        digest,
        salt,
        iterations,
        uuid,
    ) = _HEAD.unpack_from(head)
    if version != 1:
        raise LuksError(f"LUKS: version {version} is not known here (1 and 2 are)")
    encryption = f"{_text(cipher)}-{_text(mode)}"
    if encryption != "aes-xts-plain64":
        raise LuksError(f"LUKS: the cipher {encryption!r} is not known here: aes-xts-plain64 is")
    if key_bytes not in KEY_BYTES:
        raise LuksError(f"LUKS: a key of {key_bytes} bytes for {encryption}: 32 or 64")
    if not payload_sector:
        raise LuksError("LUKS: the header was detached from the data (its payload is at 0)")
    blocks = tuple(_block(head, number) for number in range(SLOTS))
    hash_name = check_hash(_text(hash_field))
    return Luks1(
        hash=hash_name,
        payload_sector=payload_sector,
        key_bytes=key_bytes,
        digest=KeyDigest(Pbkdf2(hash_name, iterations, salt), digest),
        uuid=_text(uuid),
        blocks=blocks,
    )


def _block(head: Buffer, number: int) -> KeyBlock:
    state, iterations, salt, sector, stripes = _SLOT.unpack_from(
        head, _HEAD.size + number * _SLOT.size
    )
    if state not in {ENABLED, DISABLED}:
        raise LuksError(f"LUKS key slot {number}: neither in use nor free ({state:#010x})")
    return KeyBlock(state == ENABLED, iterations, salt, sector, stripes)


def _text(field: bytes) -> str:
    """Up to the first zero byte; what is no ASCII can't be a name that is known."""
    return field.split(b"\0", 1)[0].decode("ascii", "backslashreplace")


def _whole(length: int, unit: int) -> int:
    return -(-length // unit) * unit
