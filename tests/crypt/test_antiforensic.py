"""The splitter: what is split comes together again, and only if all of it is there."""

import random

from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.crypt.antiforensic import merge, split

HASHES = st.sampled_from(["sha1", "sha224", "sha256", "sha512"])


@given(
    key=st.binary(min_size=1, max_size=130),
    stripes=st.integers(1, 20),
    name=HASHES,
    seed=st.integers(),
)
def test_round_trip(key: bytes, stripes: int, name: str, seed: int) -> None:
    filler = random.Random(seed).randbytes((stripes - 1) * len(key))
    material = split(key, stripes, name, filler)
    assert len(material) == stripes * len(key)
    assert material[: len(filler)] == filler
    assert merge(memoryview(material), stripes, name) == key


@given(
    key=st.binary(min_size=16, max_size=64),
    stripes=st.integers(2, 12),
    name=HASHES,
    seed=st.integers(),
    data=st.data(),
)
def test_any_bit_that_is_lost_loses_the_key(
    key: bytes, stripes: int, name: str, seed: int, data: st.DataObject
) -> None:
    material = bytearray(
        split(key, stripes, name, random.Random(seed).randbytes((stripes - 1) * len(key)))
    )
    bit = data.draw(st.integers(0, len(material) * 8 - 1))
    material[bit // 8] ^= 1 << bit % 8
    assert merge(material, stripes, name) != key
