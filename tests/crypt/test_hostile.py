"""Headers that somebody has made up: an OrionError or a volume, and never much time or memory."""

import copy
import time
from typing import Literal

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.crypt import headers, luks2
from orion_iscsifs.crypt.errors import LuksError
from orion_iscsifs.crypt.kdf import Argon2, Pbkdf2
from orion_iscsifs.crypt.opening import open_luks
from orion_iscsifs.errors import OrionError
from orion_iscsifs.testing.memory import MemoryDevice
from tests.crypt.helpers import PASSPHRASE, volume

HEAD_BYTES = 64 << 10


class Heads(dict[int, bytes]):
    """By version."""

    def __repr__(self) -> str:
        return "heads"  # Hypothesis shows what a test was given


@pytest.fixture(scope="module")
def heads() -> Heads:
    """The first bytes of a volume of each version."""

    async def make(version: Literal[1, 2]) -> bytes:
        return (await volume(version)).peek(0, HEAD_BYTES)

    return Heads({1: trio.run(make, 1), 2: trio.run(make, 2)})


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a derivation costs is bounded by its own rules (test_kdf); here it costs nothing."""

    def derive(self: Pbkdf2 | Argon2, passphrase: bytes, length: int) -> bytes:
        return bytes(range(length))

    monkeypatch.setattr(Pbkdf2, "derive", derive)
    monkeypatch.setattr(Argon2, "derive", derive)


def attempt(head: bytes) -> None:
    """Load, look, open and change it; only errors of ours, and soon."""

    async def run() -> OrionError | None:
        device = MemoryDevice(20 << 20)
        device.poke(0, head)
        aligned = AlignedDevice(device)
        try:
            header = await headers.load(aligned)
            found = header.volume
            assert found.payload.sector_bytes <= 4096
            if isinstance(header, luks2.Luks2):
                header.free_slot(Pbkdf2("sha256", 1000, bytes(32)), 64, "sha256")
            else:
                header.free_slot()
            for slot in found.slots:
                header.without_slot(slot.number)
            await open_luks(device, PASSPHRASE, "lun1")
        except OrionError as error:
            return error
        return None

    started = time.monotonic()
    error = trio.run(run)
    assert error is None or ("\n" not in error.line and len(error.line) < 700)
    assert time.monotonic() - started < 30


Flips = st.lists(st.tuples(st.integers(0, 591), st.integers(0, 255)), min_size=1, max_size=12)


@given(flips=Flips, version=st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None)
def test_bytes_changed_at_random(heads: Heads, flips: list[tuple[int, int]], version: int) -> None:
    head = bytearray(heads[version])
    for at, value in flips:
        head[at] = value
    attempt(bytes(head))


@given(
    content=st.binary(max_size=8192),
    magic=st.sampled_from([b"", b"LUKS\xba\xbe\0\1", b"LUKS\xba\xbe\0\2"]),
)
@settings(max_examples=80, deadline=None)
def test_noise(content: bytes, magic: bytes) -> None:
    attempt(magic + content)


Json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.sampled_from(["0", "1", "dynamic", "crypt", "16777216", "-5", "99999999999999999999"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(raw: object, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [at] if at else []
    if isinstance(raw, dict):
        for name, inner in raw.items():
            found += paths(inner, (*at, name))
    return found


Edits = st.lists(
    st.tuples(st.integers(0, 999), st.none() | st.tuples(Json)), min_size=1, max_size=3
)


@given(edits=Edits)
@settings(max_examples=120, deadline=None)
def test_values_replaced_at_random_under_a_good_checksum(
    heads: Heads, edits: list[tuple[int, tuple[object] | None]]
) -> None:
    """None: the value is left out."""
    header = luks2.parse(heads[2][: luks2.SIZE_BYTES], 0)
    raw = header.raw
    for index, value in edits:
        known = paths(raw)
        *inner, last = known[index % len(known)] if known else ("keyslots",)
        place = raw
        for step in inner:
            place = place[step]
        if value is not None:
            place[last] = copy.deepcopy(value[0])
        elif last in place:
            del place[last]
    text = msgspec.json.encode(raw)
    changed = msgspec_replace(header, text)
    head = changed.encode(second=False, salt=bytes(64))
    attempt(head + changed.encode(second=True, salt=bytes(64)))


def msgspec_replace(header: luks2.Luks2, text: bytes) -> luks2.Luks2:
    return luks2.Luks2(
        size_bytes=header.size_bytes,
        sequence=header.sequence,
        label=header.label,
        subsystem=header.subsystem,
        checksum=header.checksum,
        uuid=header.uuid,
        text=text,
    )


def test_a_header_of_4_mib_is_read_and_no_more(heads: Heads) -> None:
    """The largest that the format knows, full of brackets."""
    header = luks2.parse(heads[2][: luks2.SIZE_BYTES], 0)
    for text in (b"[" * (4 << 20), b'{"a":' * 800_000, b'"' + b"x" * (4 << 20)):
        large = luks2.Luks2(
            size_bytes=luks2.SIZES[-1],
            sequence=1,
            label=b"",
            subsystem=b"",
            checksum="sha256",
            uuid=header.uuid,
            text=text[: luks2.SIZES[-1] - luks2.BINARY_BYTES - 1],
        )
        attempt(large.encode(second=False, salt=bytes(64)))


def test_an_error_shows_little_of_what_the_header_says(heads: Heads) -> None:
    header = luks2.parse(heads[2][: luks2.SIZE_BYTES], 0)
    raw = header.raw
    raw["segments"]["0"]["encryption"] = "x" * 5000 + "\n\x1b[31m"
    with pytest.raises(LuksError) as caught:
        _ = msgspec_replace(header, msgspec.json.encode(raw)).volume
    assert len(caught.value.line) < 300
    assert "\x1b" not in caught.value.line
