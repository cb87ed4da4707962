"""Persistent reservations: who may write to a logical unit (SPC-4 §5.13), codec for both roles.

Every I_T nexus registers a key of its own choice; one of them holds the reservation. PERSISTENT
RESERVE IN (§6.15) tells keys, holder and abilities, PERSISTENT RESERVE OUT (§6.16) changes them.
"""

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.scsi.malformed import Buffer, MalformedData, field

KEY_BYTES: Final = 8
OUT_BYTES: Final = 24
"""Length of the parameter list of PERSISTENT RESERVE OUT without TransportIDs."""
KEYS_MAX: Final = 8191
"""As many as READ KEYS can tell: its allocation length has 16 bits."""
SCOPE_LOGICAL_UNIT: Final = 0


class InAction(enum.IntEnum):
    """Service actions of PERSISTENT RESERVE IN (SPC-4 table 216)."""

    READ_KEYS = 0x00
    READ_RESERVATION = 0x01
    REPORT_CAPABILITIES = 0x02
    READ_FULL_STATUS = 0x03


class OutAction(enum.IntEnum):
    """Service actions of PERSISTENT RESERVE OUT (SPC-4 table 229)."""

    REGISTER = 0x00
    RESERVE = 0x01
    RELEASE = 0x02
    CLEAR = 0x03
    PREEMPT = 0x04
    PREEMPT_AND_ABORT = 0x05
    REGISTER_AND_IGNORE_EXISTING_KEY = 0x06
    REGISTER_AND_MOVE = 0x07


class ReservationType(enum.IntEnum):
    """TYPE (SPC-4 table 222): who may do what while the reservation lasts."""

    WRITE_EXCLUSIVE = 0x1
    EXCLUSIVE_ACCESS = 0x3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 0x5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 0x6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 0x7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 0x8

    @property
    def words(self) -> str:
        """`Write Exclusive - Registrants Only`."""
        return _WORDS[self]

    @property
    def all_registrants(self) -> bool:
        """Every registered nexus holds the reservation."""
        return self in _ALL_REGISTRANTS


_WORDS: Final = {
    ReservationType.WRITE_EXCLUSIVE: "Write Exclusive",
    ReservationType.EXCLUSIVE_ACCESS: "Exclusive Access",
    ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY: "Write Exclusive - Registrants Only",
    ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY: "Exclusive Access - Registrants Only",
    ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS: "Write Exclusive - All Registrants",
    ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS: "Exclusive Access - All Registrants",
}
_ALL_REGISTRANTS: Final = frozenset(
    {
        ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS,
        ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
    }
)


def type_words(kind: int) -> str:
    """A TYPE in words, a reserved one too."""
    try:
        return ReservationType(kind).words
    except ValueError:
        return f"reservation type {kind:X}h"


# -- commands --------------------------------------------------------------------------------------

_IN: Final = Struct(">BB5xHx")
_OUT: Final = Struct(">BBBxxIx")
_PARAMETERS: Final = Struct(">QQ4xB3x")
_SPEC_I_PT: Final = 0x08
_ALL_TG_PT: Final = 0x04
_APTPL: Final = 0x01


def reserve_in(action: InAction, allocation_length: int) -> bytes:
    """PERSISTENT RESERVE IN."""
    return _IN.pack(OpCode.PERSISTENT_RESERVE_IN, action, allocation_length)


def reserve_out(action: OutAction, kind: int = 0, parameter_bytes: int = OUT_BYTES) -> bytes:
    """PERSISTENT RESERVE OUT for the whole logical unit; `kind` is a `ReservationType`."""
    scope_and_type = SCOPE_LOGICAL_UNIT << 4 | kind
    return _OUT.pack(OpCode.PERSISTENT_RESERVE_OUT, action, scope_and_type, parameter_bytes)


@dataclass(frozen=True, slots=True)
class ReserveIn:
    action: int
    allocation_length: int


@dataclass(frozen=True, slots=True)
class ReserveOut:
    action: int
    scope: int
    kind: int
    parameter_bytes: int


def parse_reserve_in(cdb: Buffer) -> ReserveIn:
    return ReserveIn(cdb[1] & 0x1F, field(cdb, 7, 2))


def parse_reserve_out(cdb: Buffer) -> ReserveOut:
    return ReserveOut(cdb[1] & 0x1F, cdb[2] >> 4, cdb[2] & 0x0F, field(cdb, 5, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutParameters:
    """The parameter list of PERSISTENT RESERVE OUT (SPC-4 §6.16.3)."""

    key: int = 0
    """RESERVATION KEY: the one that this nexus has registered."""
    service_action_key: int = 0
    """The new key of a registration, or the key to preempt."""
    aptpl: bool = False
    """ACTIVATE PERSIST THROUGH POWER LOSS."""
    all_target_ports: bool = False
    specify_initiator_ports: bool = False


def encode_out(parameters: OutParameters) -> bytes:
    flags = (
        (_SPEC_I_PT if parameters.specify_initiator_ports else 0)
        | (_ALL_TG_PT if parameters.all_target_ports else 0)
        | (_APTPL if parameters.aptpl else 0)
    )
    return _PARAMETERS.pack(parameters.key, parameters.service_action_key, flags)


def decode_out(data: Buffer) -> OutParameters:
    """Raises MalformedData for fewer than 24 bytes."""
    if len(data) < OUT_BYTES:
        raise MalformedData(
            "PERSISTENT RESERVE OUT", f"{len(data)} bytes of parameters, not {OUT_BYTES}"
        )
    flags = data[20]
    return OutParameters(
        key=field(data, 0, 8),
        service_action_key=field(data, 8, 8),
        aptpl=bool(flags & _APTPL),
        all_target_ports=bool(flags & _ALL_TG_PT),
        specify_initiator_ports=bool(flags & _SPEC_I_PT),
    )


# -- READ KEYS, READ RESERVATION -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keys:
    """Every registered key, once for each registered nexus. `generation` is PRGENERATION."""

    generation: int
    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """The reservation that is in force. With an all-registrants type the key is zero."""

    key: int
    kind: int
    """A `ReservationType`, or a number that SPC-4 reserves."""
    scope: int = SCOPE_LOGICAL_UNIT


@dataclass(frozen=True, slots=True)
class Reservation:
    """What READ RESERVATION tells."""

    generation: int
    holder: Holder | None


def in_length(data: Buffer) -> int:
    """The allocation length that fetches all of READ KEYS or READ FULL STATUS."""
    return 8 + field(data, 4, 4)


def encode_keys(told: Keys) -> bytes:
    """Complete: the caller cuts it to the allocation length."""
    body = b"".join(key.to_bytes(KEY_BYTES, "big") for key in told.keys)
    return told.generation.to_bytes(4, "big") + len(body).to_bytes(4, "big") + body


def decode_keys(data: Buffer) -> Keys:
    """What is cut off is left out. Raises MalformedData without a whole header."""
    _check_header("READ KEYS", data)
    end = min(in_length(data), len(data)) - KEY_BYTES
    return Keys(field(data, 0, 4), tuple(field(data, at, 8) for at in range(8, end + 1, KEY_BYTES)))


def encode_reservation(told: Reservation) -> bytes:
    head = told.generation.to_bytes(4, "big")
    if told.holder is None:
        return head + bytes(4)
    holder = told.holder
    scope_and_type = bytes((holder.scope << 4 | holder.kind,))
    body = holder.key.to_bytes(KEY_BYTES, "big") + bytes(5) + scope_and_type + bytes(2)
    return head + len(body).to_bytes(4, "big") + body


def decode_reservation(data: Buffer) -> Reservation:
    """Raises MalformedData without a whole header."""
    _check_header("READ RESERVATION", data)
    if field(data, 4, 4) < 16:
        return Reservation(field(data, 0, 4), None)
    scope_and_type = field(data, 21, 1)
    holder = Holder(field(data, 8, 8), scope_and_type & 0x0F, scope_and_type >> 4)
    return Reservation(field(data, 0, 4), holder)


def _check_header(what: str, data: Buffer) -> None:
    if len(data) < 8:
        raise MalformedData(what, f"{len(data)} bytes where at least 8 are due")


# -- REPORT CAPABILITIES ---------------------------------------------------------------------------

_TYPE_BIT: Final = {
    ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS: 0x8000,
    ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY: 0x4000,
    ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY: 0x2000,
    ReservationType.EXCLUSIVE_ACCESS: 0x0800,
    ReservationType.WRITE_EXCLUSIVE: 0x0200,
    ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS: 0x0001,
}
_TYPE_MASK_VALID: Final = 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """SPC-4 §6.15.4."""

    types: frozenset[ReservationType] | None = None
    """None: the device does not say."""
    persist_capable: bool = False
    """PTPL_C: can keep reservations through a loss of power."""
    persist_active: bool = False
    """PTPL_A: does so now."""
    all_target_ports: bool = False
    specify_initiator_ports: bool = False


def encode_capabilities(told: Capabilities) -> bytes:
    flags = told.specify_initiator_ports << 3 | told.all_target_ports << 2 | told.persist_capable
    valid = 0 if told.types is None else _TYPE_MASK_VALID
    mask = sum(_TYPE_BIT[kind] for kind in told.types or ())
    head = (8).to_bytes(2, "big") + bytes((flags, valid | told.persist_active))
    return head + mask.to_bytes(2, "big") + bytes(2)


def decode_capabilities(data: Buffer) -> Capabilities:
    flags, more, mask = field(data, 2, 1), field(data, 3, 1), field(data, 4, 2)
    valid = bool(more & _TYPE_MASK_VALID)
    return Capabilities(
        types=frozenset(k for k, bit in _TYPE_BIT.items() if mask & bit) if valid else None,
        persist_capable=bool(flags & 0x01),
        persist_active=bool(more & 0x01),
        all_target_ports=bool(flags & 0x04),
        specify_initiator_ports=bool(flags & 0x08),
    )


# -- TransportID (SPC-4 §7.6.4.6) ------------------------------------------------------------------

_ISCSI: Final = 5
_WITH_ISID: Final = 0x40
_SEPARATOR: Final = ",i,0x"
_TRANSPORT_ID_BYTES_MIN: Final = 24
_NAME_BYTES_MAX: Final = 223


@dataclass(frozen=True, slots=True)
class TransportId:
    """An iSCSI initiator (`isid` None), or one of its ports. Another transport has no name."""

    name: str
    isid: bytes | None = None

    def __str__(self) -> str:
        return self.name if self.isid is None else f"{self.name}{_SEPARATOR}{self.isid.hex()}"


def encode_transport_id(port: TransportId) -> bytes:
    text = str(port).encode() + b"\0"
    size = max(-(-len(text) // 4) * 4, _TRANSPORT_ID_BYTES_MIN - 4)
    kind = _ISCSI | (0 if port.isid is None else _WITH_ISID)
    return bytes((kind, 0)) + size.to_bytes(2, "big") + text.ljust(size, b"\0")


def decode_transport_id(data: Buffer) -> TransportId:
    """A name that is none, or of another transport, becomes an empty or cleaned text."""
    if field(data, 0, 1) & 0x0F != _ISCSI:
        return TransportId("")
    raw = bytes(data[4 : 4 + field(data, 2, 2)]).split(b"\0")[0]
    text = "".join(c if c.isprintable() else "?" for c in raw.decode("utf-8", "replace"))
    name, found, isid = text.partition(_SEPARATOR)
    name = name[:_NAME_BYTES_MAX]
    if not found:
        return TransportId(name)
    try:
        number = bytes.fromhex(isid)
    except ValueError:
        number = b""
    return TransportId(name, number if len(number) == 6 else None)


# -- READ FULL STATUS ------------------------------------------------------------------------------

_DESCRIPTOR_BYTES: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """One registered nexus (SPC-4 §6.15.5)."""

    key: int
    is_holder: bool = False
    kind: int = 0
    """Of the reservation, where `is_holder`."""
    all_target_ports: bool = False
    relative_port: int = 0
    initiator: TransportId = TransportId("")


@dataclass(frozen=True, slots=True)
class FullStatus:
    generation: int
    registrations: tuple[Registration, ...]


def encode_full_status(generation: int, registrations: Iterable[Registration]) -> bytes:
    body = b"".join(_encode_registration(one) for one in registrations)
    return generation.to_bytes(4, "big") + len(body).to_bytes(4, "big") + body


def _encode_registration(one: Registration) -> bytes:
    port = encode_transport_id(one.initiator)
    flags = one.all_target_ports << 1 | one.is_holder
    head = one.key.to_bytes(KEY_BYTES, "big") + bytes(4)
    head += bytes((flags, one.kind if one.is_holder else 0)) + bytes(4)
    return head + one.relative_port.to_bytes(2, "big") + len(port).to_bytes(4, "big") + port


def decode_full_status(data: Buffer) -> FullStatus:
    """What is cut off is left out. Raises MalformedData without a whole header."""
    _check_header("READ FULL STATUS", data)
    return FullStatus(field(data, 0, 4), tuple(_registrations(data[8 : in_length(data)])))


def _registrations(body: Buffer) -> Iterator[Registration]:
    offset = 0
    while offset + _DESCRIPTOR_BYTES <= len(body):
        end = offset + _DESCRIPTOR_BYTES + field(body, offset + 20, 4)
        flags = body[offset + 12]
        yield Registration(
            key=field(body, offset, 8),
            is_holder=bool(flags & 0x01),
            kind=body[offset + 13] & 0x0F,
            all_target_ports=bool(flags & 0x02),
            relative_port=field(body, offset + 18, 2),
            initiator=decode_transport_id(body[offset + _DESCRIPTOR_BYTES : end]),
        )
        offset = end
