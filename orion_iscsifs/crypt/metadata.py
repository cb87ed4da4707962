"""What the JSON text of a LUKS2 header says (LUKS2 On-Disk Format Specification 1.1, §3). Pure.

It is read twice: as it is, to be written back with a change and nothing lost; and as the types
below, each of whose values is bounded before it is used. Sizes are decimal numbers as strings.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Final, TypeVar

import msgspec

from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.kdf import Argon2, Kdf, KeyDigest, Pbkdf2, check_hash
from orion_iscsifs.crypt.volume import ENCRYPTION, OFFSET_BYTES_MAX, Payload, Slot, Volume

T = TypeVar("T")
SLOTS_MAX: Final = 32
AREAS_BYTES_MAX: Final = 128 << 20
"""For the material of all key slots: cryptsetup's limit, too."""
_AREA_ALIGN_BYTES: Final = 4096

_Number = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,19}$")]
# One way to write each number: "01" would be the slot 1, and not the one that is removed as "1".
_Id = Annotated[str, msgspec.Meta(pattern=r"\A(0|[1-9][0-9]{0,3})\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class _Area(msgspec.Struct, frozen=True):
    type: str
    offset: _Number
    size: _Number
    encryption: str = ""
    key_size: _Count = 0


class _Kdf(msgspec.Struct, frozen=True):
    type: str
    salt: bytes
    hash: str = ""
    iterations: _Count = 0
    time: _Count = 0
    memory: _Count = 0
    cpus: _Count = 0


class _Splitter(msgspec.Struct, frozen=True):
    type: str
    stripes: _Count = 0
    hash: str = ""


class _AnySlot(msgspec.Struct, frozen=True):
    """Of any kind: what it takes is not free."""

    type: str
    area: _Area


class _Slot(msgspec.Struct, frozen=True):
    type: str
    key_size: _Count
    area: _Area
    kdf: _Kdf
    af: _Splitter
    priority: _Count = 1


class _Segment(msgspec.Struct, frozen=True):
    type: str
    offset: _Number
    size: str
    encryption: str = ""
    sector_size: _Count = 512
    iv_tweak: _Number = "0"
    integrity: msgspec.Raw | None = None
    flags: list[str] = []


class _Digest(msgspec.Struct, frozen=True):
    type: str
    keyslots: list[_Id]
    segments: list[_Id]
    salt: bytes
    digest: bytes
    hash: str = ""
    iterations: _Count = 0


class _Token(msgspec.Struct, frozen=True):
    """Somebody else's; all that we do with it is to take a removed key slot out."""

    type: str
    keyslots: list[_Id] = []


class _Requirements(msgspec.Struct, frozen=True):
    mandatory: list[str] = []


class _Config(msgspec.Struct, frozen=True):
    json_size: _Number
    keyslots_size: _Number
    flags: list[str] = []
    requirements: _Requirements = _Requirements()


class _Metadata(msgspec.Struct, frozen=True):
    keyslots: dict[_Id, msgspec.Raw]
    segments: dict[_Id, _Segment]
    digests: dict[_Id, _Digest]
    config: _Config
    tokens: dict[_Id, _Token] = {}


def decode(text: bytes) -> dict[str, Any]:
    """The text as it is. Raises LuksError."""
    return _decoded(text, dict[str, Any])


def encode(raw: dict[str, Any]) -> bytes:
    return msgspec.json.encode(raw)


def volume(text: bytes, uuid: str, header_bytes: int) -> Volume:
    """What opening needs to know. Raises LuksError, in words, for what is not known here."""
    known = _decoded(text, _Metadata)
    if known.config.requirements.mandatory:
        names = ", ".join(_shown(name) for name in known.config.requirements.mandatory[:4])
        raise LuksError(
            f"LUKS2: the volume requires {names}, which is not known here",
            advice="an encryption under way has to be finished with `cryptsetup reencrypt` first",
        )
    number, payload = _payload(known)
    areas = _whole(known.config.keyslots_size)
    areas_end = 2 * header_bytes + areas
    if payload.offset_bytes < areas_end:
        raise LuksError(
            f"LUKS2: the payload at {payload.offset_bytes} lies in the key slots (up to"
            f" {areas_end}), or its header was detached"
        )
    if areas > AREAS_BYTES_MAX:
        raise LuksError(f"LUKS2: {areas} bytes of key slots: at most {AREAS_BYTES_MAX}")
    digest = next((one for one in known.digests.values() if number in one.segments), None)
    if digest is None:
        raise LuksError("LUKS2: no digest belongs to the payload")
    slots, refused = _slots(known, digest, 2 * header_bytes, areas_end)
    if not slots and refused:
        raise refused[0]
    return Volume(
        version=2, uuid=uuid, slots=tuple(slots), digest=_key_digest(digest), payload=payload
    )


def free_number(text: bytes) -> int:
    """Of the first key slot that does not exist. Raises LuksError if there is none."""
    taken = {int(number) for number in _decoded(text, _Metadata).keyslots}
    for number in range(SLOTS_MAX):
        if number not in taken:
            return number
    raise LuksError(f"LUKS2: all {SLOTS_MAX} key slots are in use", advice="remove a key first")


def free_room(text: bytes, header_bytes: int, length: int) -> int:
    """Where `length` bytes of key material fit. Raises LuksError if nowhere."""
    known = _decoded(text, _Metadata)
    at = 2 * header_bytes
    end = at + _whole(known.config.keyslots_size)
    for start, stop in sorted(_areas(known)):
        if at + length <= start:
            break
        at = max(at, -(-stop // _AREA_ALIGN_BYTES) * _AREA_ALIGN_BYTES)
    if at + length > end:
        raise LuksError("LUKS2: no room for one more key slot", advice="remove a key first")
    return at


def with_slot(raw: dict[str, Any], slot: Slot) -> dict[str, Any]:
    """`raw` with one more key slot, of the payload's key."""
    name = str(slot.number)
    raw["keyslots"][name] = _slot_json(slot)
    segments = set(raw["segments"])
    for digest in raw["digests"].values():
        if segments & set(digest["segments"]):
            digest["keyslots"] = sorted({*digest["keyslots"], name}, key=int)
    return raw


def without_slot(raw: dict[str, Any], number: int) -> dict[str, Any]:
    name = str(number)
    raw["keyslots"].pop(name, None)
    for owner in (*raw["digests"].values(), *raw.get("tokens", {}).values()):
        if name in owner.get("keyslots", []):
            owner["keyslots"] = [one for one in owner["keyslots"] if one != name]
    return raw


def new(
    digest: KeyDigest, *, sector_bytes: int, size_bytes: int, payload_bytes: int
) -> dict[str, Any]:
    """Of a volume without any key slot yet."""
    return {
        "keyslots": {},
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(payload_bytes),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": ENCRYPTION,
                "sector_size": sector_bytes,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": [],
                "segments": ["0"],
                "hash": digest.kdf.hash,
                "iterations": digest.kdf.iterations,
                "salt": digest.kdf.salt,
                "digest": digest.digest,
            }
        },
        "config": {
            "json_size": str(size_bytes - 4096),
            "keyslots_size": str(payload_bytes - 2 * size_bytes),
        },
    }


# -- reading ---------------------------------------------------------------------------------------


def _decoded(text: bytes | msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LuksError(f"LUKS2: the JSON text of the header makes no sense: {error}") from None


def _payload(known: _Metadata) -> tuple[str, Payload]:
    """The only segment, and its number."""
    if len(known.segments) != 1:
        raise LuksError(
            f"LUKS2: {len(known.segments)} segments, not one: a volume under conversion"
        )
    number, segment = next(iter(known.segments.items()))
    if segment.type != "crypt":
        raise LuksError(f"LUKS2: a segment of the type {_shown(segment.type)} is not known here")
    if segment.integrity is not None:
        raise LuksError(
            "LUKS2: the volume has integrity tags (dm-integrity), which is not known here"
        )
    if segment.flags:
        raise LuksError(f"LUKS2: a segment with the flag {_shown(segment.flags[0])}")
    if segment.encryption != ENCRYPTION:
        raise LuksError(
            f"LUKS2: the cipher {_shown(segment.encryption)} is not known here: {ENCRYPTION} is"
        )
    size = None if segment.size == "dynamic" else _whole(segment.size)
    if size == 0:
        raise LuksError("LUKS2: the payload has no size")
    return number, Payload(
        offset_bytes=_whole(segment.offset),
        size_bytes=size,
        sector_bytes=segment.sector_size,
        iv_first=_whole(segment.iv_tweak),
    )


def _slots(
    known: _Metadata, digest: _Digest, start: int, end: int
) -> tuple[list[Slot], list[LuksError]]:
    """The slots that hold the payload's key, and what keeps us from using some of them.

    A slot that can't be used (Argon2d, a foreign hash) is no reason not to use another one.
    """
    if len(known.keyslots) > SLOTS_MAX:
        raise LuksError(f"LUKS2: {len(known.keyslots)} key slots: at most {SLOTS_MAX}")
    for area in _areas(known):
        if area[0] < start or area[1] > end:
            raise LuksError(f"LUKS2: key material at {area[0]}, outside of the key slots")
    slots: list[Slot] = []
    refused: list[LuksError] = []
    for name in sorted(set(digest.keyslots), key=int):
        if name not in known.keyslots:
            raise LuksError(f"LUKS2: the digest names key slot {name}, which does not exist")
        try:
            slots.append(_slot(int(name), _decoded(known.keyslots[name], _Slot)))
        except LuksError as error:
            refused.append(error)
    return slots, refused


def _areas(known: _Metadata) -> Iterator[tuple[int, int]]:
    """Where key material of any kind is: start and end. Raises LuksError where two overlap."""
    found = []
    for raw in known.keyslots.values():
        area = _decoded(raw, _AnySlot).area
        found.append((_whole(area.offset), _whole(area.offset) + _whole(area.size)))
    found.sort()
    for one, other in pairwise(found):
        if one[1] > other[0]:
            raise LuksError("LUKS2: two key slots are in the same place")
    yield from found


def _slot(number: int, slot: _Slot) -> Slot:
    if slot.type != "luks2" or slot.area.type != "raw" or slot.af.type != "luks1":
        kind = next(t for t in (slot.type, slot.area.type, slot.af.type) if t not in _KNOWN_TYPES)
        raise LuksError(f"LUKS2 key slot {number}: the type {_shown(kind)} is not known here")
    if slot.area.encryption != ENCRYPTION:
        raise LuksError(
            f"LUKS2 key slot {number}: the cipher {_shown(slot.area.encryption)} is not known here:"
            f" {ENCRYPTION} is"
        )
    return Slot(
        number=number,
        kdf=_kdf(number, slot.kdf),
        offset_bytes=_whole(slot.area.offset),
        room_bytes=_whole(slot.area.size),
        key_bytes=slot.key_size,
        area_key_bytes=slot.area.key_size,
        stripes=slot.af.stripes,
        af_hash=check_hash(slot.af.hash),
        priority=slot.priority,
    )


_KNOWN_TYPES: Final = {"luks2", "raw", "luks1"}


def _kdf(number: int, kdf: _Kdf) -> Kdf:
    if kdf.type == "pbkdf2":
        return Pbkdf2(kdf.hash, kdf.iterations, kdf.salt)
    if kdf.type == "argon2i":
        return Argon2("argon2i", kdf.time, kdf.memory, kdf.cpus, kdf.salt)
    if kdf.type == "argon2id":
        return Argon2("argon2id", kdf.time, kdf.memory, kdf.cpus, kdf.salt)
    raise LuksError(
        f"LUKS2 key slot {number}: the key derivation {_shown(kdf.type)} is not known here"
    )


def _key_digest(digest: _Digest) -> KeyDigest:
    if digest.type != "pbkdf2":
        raise LuksError(f"LUKS2: a digest of the type {_shown(digest.type)} is not known here")
    if not 16 <= len(digest.digest) <= 64:
        raise LuksError(f"LUKS2: a digest of {len(digest.digest)} bytes")
    return KeyDigest(Pbkdf2(digest.hash, digest.iterations, digest.salt), digest.digest)


def _whole(number: str) -> int:
    if not number.isdecimal() or len(number) > 19 or int(number) > OFFSET_BYTES_MAX:
        raise LuksError(f"LUKS2: {_shown(number)} is no size")
    return int(number)


def _shown(name: str) -> str:
    return repr(name[:40])


# -- writing ---------------------------------------------------------------------------------------


def _slot_json(slot: Slot) -> dict[str, Any]:
    return {
        "type": "luks2",
        "key_size": slot.key_bytes,
        "area": {
            "type": "raw",
            "offset": str(slot.offset_bytes),
            "size": str(slot.room_bytes),
            "encryption": ENCRYPTION,
            "key_size": slot.area_key_bytes,
        },
        "kdf": _kdf_json(slot.kdf),
        "af": {"type": "luks1", "stripes": slot.stripes, "hash": slot.af_hash},
    }


def _kdf_json(kdf: Kdf) -> dict[str, Any]:
    if isinstance(kdf, Pbkdf2):
        return {
            "type": "pbkdf2",
            "hash": kdf.hash,
            "iterations": kdf.iterations,
            "salt": kdf.salt,
        }
    return {
        "type": kdf.kind,
        "time": kdf.time,
        "memory": kdf.memory_kib,
        "cpus": kdf.lanes,
        "salt": kdf.salt,
    }
