"""aes-xts-plain64 against IEEE 1619's vectors and against OpenSSL, sector by sector."""

import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.xts import SectorCipher

KEY = bytes(range(64))


def test_ieee_1619_vectors_2_and_3() -> None:
    plain = bytes([0x44] * 32)
    second = SectorCipher(bytes([0x11] * 16 + [0x22] * 16), 32)
    ciphertext = bytes.fromhex("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0")
    assert second.encrypt(0x3333333333, plain) == ciphertext
    assert second.decrypt(0x3333333333, ciphertext) == plain
    third = SectorCipher(bytes(range(0xFF, 0xEF, -1)) + bytes([0x22] * 16), 32)
    ciphertext = bytes.fromhex("af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89")
    assert third.encrypt(0x3333333333, plain) == ciphertext


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("key_bytes", [32, 64])
def test_every_sector_has_the_tweak_of_its_number_in_512_bytes(
    sector_bytes: int, key_bytes: int
) -> None:
    key, content = KEY[:key_bytes], random.Random(1).randbytes(5 * sector_bytes)
    first = (1 << 40) + 8
    expected = b""
    for index in range(5):
        tweak = (first + index * sector_bytes // 512).to_bytes(16, "little")
        one = Cipher(algorithms.AES(key), modes.XTS(tweak)).encryptor()
        expected += one.update(content[index * sector_bytes : (index + 1) * sector_bytes])
    cipher = SectorCipher(key, sector_bytes)
    assert cipher.encrypt(first, content) == expected
    assert cipher.decrypt(first, memoryview(bytearray(expected))) == content


def test_a_key_of_two_equal_halves_is_refused() -> None:
    with pytest.raises(LuksError, match="the same"):
        SectorCipher(bytes(64), 512)


def test_a_library_that_reads_the_tweak_only_once_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All sectors would have the same number, and nothing else would tell."""
    real = modes.XTS
    monkeypatch.setattr(modes, "XTS", lambda tweak: real(bytes(tweak)))
    with pytest.raises(LuksError, match="cryptography"):
        SectorCipher(KEY, 512)
