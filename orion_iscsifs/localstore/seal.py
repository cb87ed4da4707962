"""Sealing: what a store holds is encrypted and bound to its place (docs/log-format.md).

A store has a random *data key*. It lies in the superblock, wrapped under a key that scrypt makes of
the passphrase: a new passphrase wraps the same data key again, and no data is rewritten. The tag of
the wrapping tells whether a passphrase is the right one.

`Seal` encrypts with AES-256-GCM. Its nonce is `life` and `seq`: sequence numbers alone come again,
since a crash may cut off an end that was not durable, but a store counts its lives, durably, before
it writes anything. The header of a record is associated data: a record that was changed, moved or
exchanged for another does not open.

What this does not hide: how many records there are, how long they are, and where on the device they
belong. Whoever can write to the disk can also put back an older state of all of it.
"""

import os
from struct import Struct
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from orion_iscsifs.block.device import Buffer
from orion_iscsifs.errors import OrionError

OVERHEAD_BYTES: Final = 16
"""What sealing adds: the tag."""
LIFE_MAX: Final = 0xFFFF_FFFF
KEY_BYTES: Final = 32
KDF: Final = "scrypt"
MEMORY_MAX_BYTES: Final = 256 << 20
"""Of scrypt. A superblock that asks for more is not believed."""
WORK_MAX: Final = 1 << 24
"""N·r·p, which is proportional to the time: here some 5 seconds."""
_NONCE: Final = Struct(">IQ")
_NONCE_BYTES: Final = 12
_SALT_BYTES: Final = 16
_COST: Final = Struct("<QII")
_WRAPPING: Final = b"orion-iscsifs data key"
_DERIVING: Final = b"orion-iscsifs derived key\0"


class Cost(msgspec.Struct, frozen=True):
    """What scrypt shall cost (RFC 7914 §2). The default: 32 MiB and a fifth of a second."""

    n: int = 1 << 15
    r: int = 8
    p: int = 3


COST: Final = Cost()


class WrongKey(OrionError):
    """The passphrase does not open the store. The message is for the user."""


class BadSeal(OrionError):
    """Damaged, or not what its header says, or sealed with another key."""


class Sealing(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a superblock that a passphrase opens."""

    kdf: str
    salt: bytes
    cost: Cost
    nonce: bytes
    wrapped: bytes
    """The data key, encrypted and authenticated."""


def new_sealing(passphrase: bytes, store: bytes) -> tuple[Sealing, bytes]:
    """For a new store with this id, and its data key. Blocks for a moment: run it in a thread."""
    key = os.urandom(KEY_BYTES)
    return _wrap(key, passphrase, store), key


def unwrap(sealing: Sealing, passphrase: bytes, store: bytes) -> bytes:
    """The data key. Blocks as `new_sealing` does. Raises WrongKey."""
    _check(sealing)
    try:
        under = AESGCM(_derive(sealing.salt, sealing.cost, passphrase))
        return under.decrypt(sealing.nonce, sealing.wrapped, _bound(sealing, store))
    except InvalidTag:
        raise WrongKey("the key does not open it") from None
    except MemoryError:
        raise WrongKey("there is not enough memory to try the key") from None


def rewrap(sealing: Sealing, old: bytes, new: bytes, store: bytes) -> Sealing:
    """The same data key under another passphrase. Blocks; raises WrongKey."""
    return _wrap(unwrap(sealing, old, store), new, store)


def _wrap(key: bytes, passphrase: bytes, store: bytes) -> Sealing:
    assert passphrase
    plain = Sealing(
        kdf=KDF,
        salt=os.urandom(_SALT_BYTES),
        cost=COST,
        nonce=os.urandom(_NONCE_BYTES),
        wrapped=b"",
    )
    under = AESGCM(_derive(plain.salt, plain.cost, passphrase))
    wrapped = under.encrypt(plain.nonce, key, _bound(plain, store))
    return msgspec.structs.replace(plain, wrapped=wrapped)


def _check(sealing: Sealing) -> None:
    """Bounds, before anything is spent on it."""
    cost = sealing.cost
    if sealing.kdf != KDF:
        raise WrongKey(f"its key is derived by {sealing.kdf[:20]!r}, which this version lacks")
    sound = (
        1 < cost.n <= MEMORY_MAX_BYTES
        and cost.n & (cost.n - 1) == 0
        and 0 < cost.r <= 64
        and 0 < cost.p <= 64
        and 128 * cost.n * cost.r <= MEMORY_MAX_BYTES
        and cost.n * cost.r * cost.p <= WORK_MAX
    )
    lengths = len(sealing.nonce), len(sealing.wrapped)
    if not sound or lengths != (_NONCE_BYTES, KEY_BYTES + OVERHEAD_BYTES):
        raise WrongKey("the part of its superblock that holds the key is damaged")


def _derive(salt: bytes, cost: Cost, passphrase: bytes) -> bytes:
    scrypt = Scrypt(salt=salt, length=KEY_BYTES, n=cost.n, r=cost.r, p=cost.p)
    return scrypt.derive(passphrase)


def _bound(sealing: Sealing, store: bytes) -> bytes:
    """What the wrapped key belongs to."""
    cost = _COST.pack(sealing.cost.n, sealing.cost.r, sealing.cost.p)
    return b"\0".join((_WRAPPING, sealing.kdf.encode(), store + cost + sealing.salt))


class Seal:
    """Encrypts and decrypts the records of one open store."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cipher = AESGCM(key)

    def derived(self, salt: bytes, context: bytes = b"") -> "Seal":
        """One with a key of its own, for one use of a file, and for what `context` says.

        With a random salt not even a store that was put back to an older state, and goes on from
        there a second time, seals two things alike.
        """
        hkdf = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_DERIVING + context)
        return Seal(hkdf.derive(self._key))

    def encrypt(self, life: int, seq: int, header: bytes, payload: Buffer) -> bytes:
        """`OVERHEAD_BYTES` longer than the payload. `life`, `seq`: never the same pair again."""
        return self._cipher.encrypt(_NONCE.pack(life, seq), payload, header)

    def decrypt(self, life: int, seq: int, header: bytes, stored: Buffer) -> bytes:
        """The payload. Raises BadSeal."""
        try:
            return self._cipher.decrypt(_NONCE.pack(life, seq), stored, header)
        except InvalidTag:
            raise BadSeal(f"record {seq} is not what was sealed") from None
