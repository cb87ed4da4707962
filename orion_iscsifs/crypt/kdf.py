"""How a passphrase becomes a key: PBKDF2, Argon2i, Argon2id. Pure, but takes its time.

The costs are in the header, so whoever wrote it decides how long we compute and how much memory we
take. All of that is bounded here, before any of it is spent.
"""

import hmac
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.argon2 import Argon2i, Argon2id
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from orion_iscsifs.crypt.errors import LuksError

HASHES: Final[dict[str, type[hashes.HashAlgorithm]]] = {
    "sha1": hashes.SHA1,
    "sha224": hashes.SHA224,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}

ITERATIONS_MIN: Final = 1000
"""Of PBKDF2, in a volume that is made here: as in cryptsetup."""
ITERATIONS_MAX: Final = 1 << 28
"""Of PBKDF2 in a header: a minute or two."""
ARGON2_MEMORY_KIB_MAX: Final = 4 << 20
"""4 GiB, cryptsetup's limit too."""
ARGON2_LANES_MAX: Final = 16
ARGON2_WORK_KIB_MAX: Final = 64 << 20
"""Memory times passes: about a minute."""
SALT_BYTES_MAX: Final = 1024

Argon2Kind = Literal["argon2i", "argon2id"]


def check_hash(name: str) -> str:
    """Raises LuksError for a hash that is not known here."""
    if name not in HASHES:
        raise LuksError(f"LUKS: the hash {_shown(name)} is not known here")
    return name


def _shown(name: str) -> str:
    """What a header says, in a message."""
    return repr(name[:40])


@dataclass(frozen=True, slots=True)
class Pbkdf2:
    """PBKDF2-HMAC. Raises LuksError for costs out of bounds."""

    hash: str
    iterations: int
    salt: bytes

    def __post_init__(self) -> None:
        check_hash(self.hash)
        _check_salt(self.salt)
        if not 1 <= self.iterations <= ITERATIONS_MAX:
            raise LuksError(
                f"LUKS: {self.iterations} iterations of PBKDF2: at most {ITERATIONS_MAX} are done"
            )

    @property
    def memory_kib(self) -> int:
        return 0

    def work(self, length: int) -> float:
        """1 for the most that a key slot may cost."""
        blocks = -(-length // HASHES[self.hash]().digest_size)
        return self.iterations * blocks / (ITERATIONS_MAX * 4)

    def derive(self, passphrase: bytes, length: int) -> bytes:
        """Lets other threads run meanwhile."""
        kdf = PBKDF2HMAC(HASHES[self.hash](), length, self.salt, self.iterations)
        return kdf.derive(passphrase)


@dataclass(frozen=True, slots=True)
class Argon2:
    """RFC 9106. `time` is the number of passes. Raises LuksError for costs out of bounds."""

    kind: Argon2Kind
    time: int
    memory_kib: int
    lanes: int
    salt: bytes

    def __post_init__(self) -> None:
        _check_salt(self.salt)
        if not 1 <= self.lanes <= ARGON2_LANES_MAX:
            raise LuksError(f"LUKS: {self.kind} with {self.lanes} lanes: 1 to {ARGON2_LANES_MAX}")
        if not 8 * self.lanes <= self.memory_kib <= ARGON2_MEMORY_KIB_MAX:
            raise LuksError(
                f"LUKS: {self.kind} with {self.memory_kib} KiB of memory:"
                f" {8 * self.lanes} to {ARGON2_MEMORY_KIB_MAX} are taken"
            )
        if self.time < 1 or self.time * self.memory_kib > ARGON2_WORK_KIB_MAX:
            raise LuksError(
                f"LUKS: {self.kind} with {self.time} passes over {self.memory_kib} KiB:"
                f" at most {ARGON2_WORK_KIB_MAX} KiB in all are done"
            )
        if len(self.salt) < 8:
            raise LuksError(f"LUKS: a salt of {len(self.salt)} bytes for {self.kind}: 8 at least")

    def work(self, length: int) -> float:
        """1 for the most that a key slot may cost."""
        del length
        return self.time * self.memory_kib / ARGON2_WORK_KIB_MAX

    def derive(self, passphrase: bytes, length: int) -> bytes:
        """Lets other threads run meanwhile. Raises LuksError when it can't be done here."""
        make = Argon2id if self.kind == "argon2id" else Argon2i
        try:
            kdf = make(
                salt=self.salt,
                length=length,
                iterations=self.time,
                lanes=self.lanes,
                memory_cost=self.memory_kib,
            )
            return kdf.derive(passphrase)
        except UnsupportedAlgorithm:
            raise LuksError(
                f"LUKS: this host's OpenSSL has no {self.kind} (3.2 or later has)",
                advice="install cryptography from PyPI, which brings its own OpenSSL",
            ) from None
        except (MemoryError, ValueError) as error:
            raise LuksError(
                f"LUKS: {self.kind} with {self.memory_kib} KiB: {error or 'not enough memory'}"
            ) from None


Kdf = Pbkdf2 | Argon2


@dataclass(frozen=True, slots=True)
class KeyDigest:
    """Tells whether a volume key is the right one."""

    kdf: Pbkdf2
    digest: bytes

    def matches(self, key: bytes) -> bool:
        return hmac.compare_digest(self.kdf.derive(key, len(self.digest)), self.digest)


def _check_salt(salt: bytes) -> None:
    if not 1 <= len(salt) <= SALT_BYTES_MAX:
        raise LuksError(f"LUKS: a salt of {len(salt)} bytes")
