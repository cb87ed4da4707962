"""Key derivation: known answers, and the bounds of what a header may ask for."""

import pytest

from orion_iscsifs.crypt import keys
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.kdf import (
    ARGON2_MEMORY_KIB_MAX,
    ARGON2_WORK_KIB_MAX,
    ITERATIONS_MAX,
    Argon2,
    KeyDigest,
    Pbkdf2,
)
from orion_iscsifs.crypt.keys import Costs


@pytest.mark.parametrize(
    ("name", "iterations", "expected"),
    [
        # RFC 6070
        ("sha1", 4096, "4b007901b765489abead49d926f721d065a429c1"),
        # RFC 7914 §11 has the same for SHA-256 with other inputs; this one is the usual companion
        ("sha256", 4096, "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a"),
    ],
)
def test_pbkdf2(name: str, iterations: int, expected: str) -> None:
    derived = Pbkdf2(name, iterations, b"salt").derive(b"password", len(expected) // 2)
    assert derived.hex() == expected


@pytest.mark.parametrize("name", ["sha224", "sha384", "sha512"])
def test_pbkdf2_with_the_other_hashes(name: str) -> None:
    import hashlib

    expected = hashlib.pbkdf2_hmac(name, b"password", b"salt" * 8, 1000, 64)
    assert Pbkdf2(name, 1000, b"salt" * 8).derive(b"password", 64) == expected


def test_digest() -> None:
    kdf = Pbkdf2("sha256", 1000, b"salt")
    digest = KeyDigest(kdf, kdf.derive(b"key", 20))
    assert digest.matches(b"key")
    assert not digest.matches(b"kez")


@pytest.mark.parametrize("iterations", [0, -1, ITERATIONS_MAX + 1])
def test_pbkdf2_out_of_bounds(iterations: int) -> None:
    with pytest.raises(LuksError, match="iterations"):
        Pbkdf2("sha256", iterations, b"salt")


@pytest.mark.parametrize(
    ("time", "memory", "lanes", "salt"),
    [
        (0, 64, 1, 16),
        (1, ARGON2_MEMORY_KIB_MAX + 1, 1, 16),
        (ARGON2_WORK_KIB_MAX // 1024 + 1, 1024, 1, 16),
        (1, 7, 1, 16),
        (1, 64, 0, 16),
        (1, 1024, 17, 16),
        (1, 64, 1, 7),
        (1, 64, 1, 5000),
    ],
)
def test_argon2_out_of_bounds(time: int, memory: int, lanes: int, salt: int) -> None:
    with pytest.raises(LuksError, match=r"^LUKS: "):
        Argon2("argon2id", time, memory, lanes, bytes(salt))


async def test_costs_as_they_are_wanted() -> None:
    pbkdf2 = await keys.choose(Costs(pbkdf="pbkdf2", hash="sha512", iterations=1234), 64)
    assert isinstance(pbkdf2, Pbkdf2)
    assert (pbkdf2.hash, pbkdf2.iterations, len(pbkdf2.salt)) == ("sha512", 1234, 32)
    argon2 = await keys.choose(Costs(pbkdf="argon2i", iterations=5, memory_kib=64, lanes=3), 64)
    assert argon2 == Argon2("argon2i", 5, 64, 3, argon2.salt)


async def test_measured_costs_stay_in_bounds() -> None:
    """Longer wanted is never cheaper than the least; memory is what was allowed."""
    short = await keys.choose(Costs(pbkdf="pbkdf2", iter_time_s=0.001), 64)
    assert isinstance(short, Pbkdf2)
    assert short.iterations >= 1000
    argon2 = await keys.choose(Costs(iter_time_s=0.02, memory_kib=1024), 64)
    assert isinstance(argon2, Argon2)
    assert argon2.memory_kib == 1024
    assert argon2.time >= 4
    small = await keys.choose(Costs(iter_time_s=0.001), 64)
    assert isinstance(small, Argon2)
    assert small.memory_kib <= 1 << 20
    assert small.time * small.memory_kib <= ARGON2_WORK_KIB_MAX


async def test_two_salts_are_never_the_same() -> None:
    costs = Costs(pbkdf="pbkdf2", iterations=1000)
    assert (await keys.choose(costs, 64)).salt != (await keys.choose(costs, 64)).salt
