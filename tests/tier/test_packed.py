"""What a record holds, in parts that are compressed apart."""

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.block.pages import FRAME_BYTES, PAGE_BYTES
from orion_iscsifs.tier import record
from orion_iscsifs.tier.packed import MANY_PARTS, PART_BYTES, Packed, pack_all, unpack, unpack_all
from orion_iscsifs.tier.record import BadRecord

NOISE = random.Random(1).randbytes(FRAME_BYTES)
TEXT = (b"a line of a text that compresses very well, number %d\n" * 2000)[:FRAME_BYTES]


def packed_of(content: bytes) -> Packed:
    ((codec, payload),) = pack_all([content], zstandard.ZstdCompressor())
    return Packed(codec, payload, len(content))


class Counting:
    """A decompressor, and how many parts it was given."""

    def __init__(self) -> None:
        self._real = zstandard.ZstdDecompressor()
        self.parts = 0

    def decompress(self, part: bytes) -> bytes:
        self.parts += 1
        return self._real.decompress(part)

    def multi_decompress_to_buffer(
        self, parts: list[bytes | bytearray | memoryview], threads: int
    ) -> object:
        self.parts += len(parts)
        return self._real.multi_decompress_to_buffer(parts, threads=threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_at_once(threads: int) -> None:
    records = [packed_of(TEXT) for _ in range(MANY_PARTS)]
    wanted = [(packed, at) for packed in records for at in packed.lacking(0, FRAME_BYTES)]
    assert len(wanted) > MANY_PARTS
    decompressor = zstandard.ZstdDecompressor()
    assert not unpack_all(wanted, decompressor, threads=threads)
    assert all(unpack(packed, decompressor) == TEXT for packed in records)


@given(st.integers(1, 16), st.randoms(use_true_random=False))
def test_any_range_comes_back(pages: int, rng: random.Random) -> None:
    """Out of pages some of which compress."""
    content = b"".join(
        rng.choice((NOISE, TEXT, bytes(FRAME_BYTES)))[:PAGE_BYTES] for _ in range(pages)
    )
    packed = packed_of(content)
    decompressor = zstandard.ZstdDecompressor()
    for _ in range(5):
        start = rng.randrange(len(content))
        end = rng.randrange(start + 1, len(content) + 1)
        assert not unpack_all([(packed, at) for at in packed.lacking(start, end)], decompressor)
        assert not packed.lacking(start, end)
        target = bytearray(end - start)
        packed.copy(start, end, memoryview(target))
        assert target == content[start:end]
    assert unpack(packed, decompressor) == content


def test_a_page_costs_one_part() -> None:
    packed, counting = packed_of(TEXT), Counting()
    lacking = packed.lacking(PART_BYTES, PART_BYTES + PAGE_BYTES)
    assert lacking == [1]
    assert not unpack_all([(packed, at) for at in lacking], counting)  # type: ignore[arg-type]
    assert counting.parts == 1
    assert packed.lacking(PART_BYTES + PAGE_BYTES, 2 * PART_BYTES) == []
    assert packed.lacking(0, FRAME_BYTES) == [0, 2, 3]


def test_what_does_not_compress_is_stored_as_it_is() -> None:
    half = NOISE[: FRAME_BYTES // 2] + TEXT[: FRAME_BYTES // 2]
    assert packed_of(NOISE).lacking(0, FRAME_BYTES) == []
    assert packed_of(half).lacking(0, FRAME_BYTES) == [2, 3]


@pytest.mark.parametrize("level", [-5, 1, 3, 19])
def test_compression_has_to_be_worth_it(level: int) -> None:
    compressor = zstandard.ZstdCompressor(level=level)
    nearly = NOISE[: FRAME_BYTES * 9 // 10].ljust(FRAME_BYTES, b"x")
    half = NOISE[: FRAME_BYTES // 2].ljust(FRAME_BYTES, b"x")
    contents = [NOISE, nearly, half]
    packed = pack_all(contents, compressor)
    assert [codec for codec, _ in packed] == [record.RAW, record.RAW, record.ZSTD]
    assert packed[0][1] is NOISE
    for (codec, payload), content in zip(packed, contents, strict=True):
        found = Packed(codec, payload, FRAME_BYTES)
        assert unpack(found, zstandard.ZstdDecompressor()) == content
    assert pack_all([], compressor) == []


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("level", [1, 19])
def test_all_in_one_call_is_each_by_itself(level: int, threads: int) -> None:
    contents = [TEXT, NOISE, TEXT[:PAGE_BYTES], TEXT[: 5 * PAGE_BYTES]]
    engine = zstandard.ZstdCompressor(level=level)
    packed = pack_all(contents, engine, threads=threads)
    together = [(codec, bytes(payload)) for codec, payload in packed]
    alone = [pack_all([content], engine)[0] for content in contents]
    assert together == [(codec, bytes(payload)) for codec, payload in alone]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [5, 20])
def test_damage_among_others_is_found_and_costs_only_itself(count: int, threads: int) -> None:
    records = [packed_of(TEXT) for _ in range(count)]
    ((_, payload),) = pack_all([TEXT], zstandard.ZstdCompressor())
    broken = bytearray(payload)
    broken[-6:] = bytes(6)
    records[1] = Packed(record.ZSTD, broken, FRAME_BYTES)
    wanted = [(packed, at) for packed in records for at in packed.lacking(0, FRAME_BYTES)]
    decompressor = zstandard.ZstdDecompressor()
    bad = unpack_all(wanted, decompressor, threads=threads)
    assert set(bad) == {records[1]}
    for packed in (records[0], *records[2:]):
        assert not packed.lacking(0, FRAME_BYTES)
        assert unpack(packed, decompressor) == TEXT
    with pytest.raises(BadRecord, match="can't be decompressed"):
        unpack(records[1], decompressor)


def lengths(*parts: int) -> bytes:
    return b"".join(part.to_bytes(2, "little") for part in parts)


@pytest.mark.parametrize(
    ("codec", "payload"),
    [
        (record.RAW, b"too short"),
        (record.ZSTD, b"no"),
        (record.ZSTD, lengths(10, 10, 10, 10)),
        (record.ZSTD, lengths(1, 0, 0, 0) + b"too long"),
    ],
)
def test_lengths_that_can_not_be(codec: int, payload: bytes) -> None:
    with pytest.raises(BadRecord):
        Packed(codec, payload, FRAME_BYTES)


def test_a_part_that_says_it_is_huge_takes_no_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    good = zstandard.ZstdCompressor().compress(bytes(PART_BYTES))
    for parts in ((bomb, good), (bomb, bomb), (b"nonsense", good)):
        payload = lengths(*map(len, parts)) + b"".join(parts)
        packed = Packed(record.ZSTD, payload, 2 * PART_BYTES)
        bad = unpack_all([(packed, 0), (packed, 1)], zstandard.ZstdDecompressor())
        assert set(bad) == {packed}
        assert 0 in packed.lacking(0, 2 * PART_BYTES)
    with pytest.raises(BadRecord, match="another length"):
        packed_with(bomb).stored(0)


def packed_with(part: bytes) -> Packed:
    return Packed(record.ZSTD, lengths(len(part)) + part, PART_BYTES)
