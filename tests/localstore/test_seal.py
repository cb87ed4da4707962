"""Sealing by itself: the format as made by hand, what opens and what does not, what keys cost."""

import struct
from dataclasses import dataclass, field

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.localstore import seal
from orion_iscsifs.localstore.seal import (
    LIFE_MAX,
    OVERHEAD_BYTES,
    BadSeal,
    Cost,
    Seal,
    Sealing,
    WrongKey,
    new_sealing,
    rewrap,
    unwrap,
)

STORE, KEY = bytes(range(16)), bytes(range(32))


pytestmark = pytest.mark.usefixtures("cheap_keys")


# -- the passphrase ------------------------------------------------------------------------------


def test_the_wrapped_key_as_the_format_says() -> None:
    """Made here with the primitives alone."""
    salt, nonce = b"s" * 16, b"n" * 12
    under = Scrypt(salt=salt, length=32, n=1 << 10, r=8, p=2).derive(b"passphrase")
    bound = b"orion-iscsifs data key\0scrypt\0" + STORE + struct.pack("<QII", 1 << 10, 8, 2) + salt
    wrapped = AESGCM(under).encrypt(nonce, KEY, bound)
    made = Sealing(kdf="scrypt", salt=salt, cost=Cost(1 << 10, 8, 2), nonce=nonce, wrapped=wrapped)
    assert unwrap(made, b"passphrase", STORE) == KEY
    assert msgspec.json.decode(msgspec.json.encode(made), type=Sealing) == made


def test_a_new_key_opens_and_nothing_else_does() -> None:
    sealing, key = new_sealing(b"right", STORE)
    assert len(key) == 32
    assert unwrap(sealing, b"right", STORE) == key
    for passphrase, store in ((b"wrong", STORE), (b"right", bytes(16)), (b"right\n", STORE)):
        with pytest.raises(WrongKey, match="does not open"):
            unwrap(sealing, passphrase, store)


def test_two_stores_of_one_passphrase_share_nothing() -> None:
    (one, key), (other, other_key) = new_sealing(b"p", STORE), new_sealing(b"p", STORE)
    assert key != other_key
    assert (one.salt, one.nonce) != (other.salt, other.nonce)
    assert key not in msgspec.json.encode(one)


def test_a_changed_passphrase_keeps_the_data_key() -> None:
    sealing, key = new_sealing(b"old", STORE)
    changed = rewrap(sealing, b"old", b"new", STORE)
    assert unwrap(changed, b"new", STORE) == key
    assert (changed.salt, changed.nonce) != (sealing.salt, sealing.nonce)
    with pytest.raises(WrongKey):
        unwrap(changed, b"old", STORE)
    with pytest.raises(WrongKey):
        rewrap(sealing, b"wrong", b"new", STORE)


@pytest.mark.parametrize("name", ["salt", "nonce", "wrapped"])
def test_any_bit_of_it_counts(name: str) -> None:
    sealing, _ = new_sealing(b"p", STORE)
    value: bytes = getattr(sealing, name)
    for bit in range(8 * len(value)):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WrongKey):
            unwrap(msgspec.structs.replace(sealing, **{name: bytes(flipped)}), b"p", STORE)


@pytest.mark.parametrize(
    "cost",
    [
        Cost(1 << 40, 8, 1),
        Cost(1 << 22, 8, 1),
        Cost(2, 1 << 30, 1),
        Cost(2, 1, 1 << 30),
        Cost(1 << 18, 8, 64),
        Cost(3, 8, 1),
        Cost(0, 8, 1),
        Cost(1, 8, 1),
        Cost(-4, 8, 1),
        Cost(16, 0, 1),
        Cost(16, 8, 0),
    ],
)
def test_a_cost_that_nobody_would_choose_is_not_paid(
    cost: Cost, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealing, _ = new_sealing(b"p", STORE)
    monkeypatch.setattr(seal, "_derive", lambda *_: pytest.fail("it was tried"))
    with pytest.raises(WrongKey, match="damaged"):
        unwrap(msgspec.structs.replace(sealing, cost=cost), b"p", STORE)


def test_other_costs_are_other_keys() -> None:
    sealing, _ = new_sealing(b"p", STORE)
    with pytest.raises(WrongKey, match="does not open"):
        unwrap(msgspec.structs.replace(sealing, cost=Cost(32, 1, 1)), b"p", STORE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kdf": "argon2id"}, "'argon2id', which this version lacks"),
        ({"nonce": b"n" * 11}, "damaged"),
        ({"wrapped": b"w" * 47}, "damaged"),
    ],
)
def test_what_is_not_known_is_said(changes: dict[str, object], told: str) -> None:
    sealing, _ = new_sealing(b"p", STORE)
    with pytest.raises(WrongKey, match=told):
        unwrap(msgspec.structs.replace(sealing, **changes), b"p", STORE)


def test_what_it_costs_by_default_is_within_what_is_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    sealing, key = new_sealing(b"p", STORE)
    assert sealing.cost.n * sealing.cost.r * sealing.cost.p >= 1 << 19
    assert unwrap(sealing, b"p", STORE) == key


# -- records -------------------------------------------------------------------------------------


def test_a_record_as_the_format_says() -> None:
    nonce = struct.pack(">IQ", 7, 99)
    assert Seal(KEY).encrypt(7, 99, b"head", b"body") == AESGCM(KEY).encrypt(
        nonce, b"body", b"head"
    )
    info = b"orion-iscsifs derived key\0naa.1"
    derived = HKDF(hashes.SHA256(), 32, salt=STORE, info=info).derive(KEY)
    found = Seal(KEY).derived(STORE, b"naa.1").encrypt(7, 99, b"head", b"body")
    assert found == AESGCM(derived).encrypt(nonce, b"body", b"head")


LIVES = st.integers(0, LIFE_MAX)
SEQS = st.integers(0, (1 << 64) - 1)


@given(life=LIVES, seq=SEQS, header=st.binary(max_size=64), payload=st.binary(max_size=300))
def test_there_and_back(life: int, seq: int, header: bytes, payload: bytes) -> None:
    one = Seal(KEY)
    stored = one.encrypt(life, seq, header, memoryview(payload))
    assert len(stored) == len(payload) + OVERHEAD_BYTES
    assert one.decrypt(life, seq, header, memoryview(stored)) == payload


@dataclass
class Record:
    """All that a record is made of; one thing of it changes."""

    life: int = 3
    seq: int = 1000
    header: bytes = b"h" * 56
    stored: bytes = field(default_factory=lambda: Seal(KEY).encrypt(3, 1000, b"h" * 56, b"p" * 40))


@given(
    life=LIVES,
    seq=SEQS,
    header=st.binary(max_size=60),
    stored=st.binary(max_size=80),
    data=st.data(),
)
def test_whatever_is_changed_does_not_open(
    life: int, seq: int, header: bytes, stored: bytes, data: st.DataObject
) -> None:
    kept, other = Record(), Record(life, seq, header, stored)
    for name in data.draw(
        st.sets(st.sampled_from(["life", "seq", "header", "stored"]), min_size=1)
    ):
        setattr(kept, name, getattr(other, name))
    if kept == Record():
        return
    with pytest.raises(BadSeal, match=f"record {kept.seq}"):
        Seal(KEY).decrypt(kept.life, kept.seq, kept.header, kept.stored)


def test_every_bit_of_a_record_counts() -> None:
    whole = Record()
    for bit in range(8 * len(whole.stored)):
        flipped = bytearray(whole.stored)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadSeal):
            Seal(KEY).decrypt(whole.life, whole.seq, whole.header, flipped)


def test_another_key_or_another_use_opens_nothing() -> None:
    whole = Record()
    for one in (Seal(bytes(32)), Seal(KEY).derived(b"use"), Seal(KEY).derived(b"", b"use")):
        with pytest.raises(BadSeal):
            one.decrypt(whole.life, whole.seq, whole.header, whole.stored)
