"""Compression where it pays, and how little is lost where it does not."""

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.localstore.packing import PACKED_MIN_BYTES, Packer, Unpackable, unpack

GIB = 1 << 30
TEXT = b"the quick brown fox jumps over the lazy dog. " * 2000
NOISE = random.Random(1).randbytes(1 << 20)


def attempts(packer: Packer, offset: int, payload: bytes, count: int) -> int:
    """How often, of so many, it tries to compress this."""
    tried = 0
    for _ in range(count):
        if packer.wants(offset, len(payload)):
            packer.pack(offset, payload)
            tried += 1
    return tried


def test_what_is_short_is_left_alone() -> None:
    assert not Packer().wants(0, PACKED_MIN_BYTES - 1)
    assert Packer().wants(0, PACKED_MIN_BYTES)


@given(st.binary(max_size=2000), st.integers(1, 200))
def test_there_and_back(piece: bytes, times: int) -> None:
    payload = piece * times
    packed = Packer().pack(0, memoryview(payload))
    if packed is not None:
        assert unpack(packed, len(payload)) == payload


@pytest.mark.parametrize(("noise", "pays"), [(13, True), (15, False)])
def test_an_eighth_has_to_be_saved(noise: int, pays: bool) -> None:
    payload = NOISE[: noise * 4096] + bytes((16 - noise) * 4096)
    assert (Packer().pack(0, payload) is not None) == pays


def test_noise_is_tried_ever_more_seldom() -> None:
    packer, noise = Packer(), NOISE[:PACKED_MIN_BYTES]
    assert attempts(packer, 0, noise, 256) <= 9
    assert 3 <= attempts(packer, 0, noise, 2560) <= 12
    # Nothing is known of another region, and what is tried and pays is tried from then on.
    assert attempts(packer, GIB, TEXT, 100) == 100
    assert attempts(packer, 0, TEXT, 600) > 300


def test_what_is_remembered_is_bounded() -> None:
    packer = Packer()
    for region in range(10_000):
        packer.pack(region * GIB, NOISE[:PACKED_MIN_BYTES])
    assert len(packer._hopeless) <= 4096


def test_what_is_not_what_it_says_is_refused_and_takes_no_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    for packed in (bomb, unsized, b"", b"no frame at all", bomb[:20]):
        with pytest.raises(Unpackable):
            unpack(packed, 4096)
    whole = zstandard.ZstdCompressor().compress(NOISE[:4096])
    assert unpack(whole, 4096) == NOISE[:4096]
    with pytest.raises(Unpackable):
        unpack(whole[:-100], 4096)
    with pytest.raises(Unpackable):
        unpack(whole, 4095)
