"""The parts that only decide: index, journal, records, frames, staging, policy, levels."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.block.pages import FRAME_BYTES, FRAME_SHIFT, PAGE_BYTES
from orion_iscsifs.errors import OrionError
from orion_iscsifs.localstore.seal import Seal
from orion_iscsifs.tier import frames, index, journal, record
from orion_iscsifs.tier.index import Index
from orion_iscsifs.tier.journal import DamagedJournal, Entry, Kind, Scribe
from orion_iscsifs.tier.level import LEVELS, USUAL_LEVEL, AdaptiveLevel, Compressibility
from orion_iscsifs.tier.policy import NEWCOMER_SHARE, STREAM_SLACK_BYTES, Admission, Ghosts, Streams
from orion_iscsifs.tier.record import Header
from orion_iscsifs.tier.staging import Staging
from tests.tier.tiers import KEY, KIB, MIB

STORE = bytes(range(16))
SEALS = [None, Seal(KEY)]


# -- index ---------------------------------------------------------------------------------------


@given(st.integers(), st.integers(1, 6))
def test_index_is_a_dictionary(seed: int, segments: int) -> None:
    """Against a dictionary of frames, over segments that come and go."""
    rng = random.Random(seed)
    rows, model = Index(100), dict[int, tuple[int, int, int, int]]()
    oldest, newest = 7, 6
    for _ in range(200):
        frame = rng.randrange(30) << rng.choice((0, 20, 35))
        choice = rng.random()
        if choice < 0.1 or newest < oldest:
            newest += 1
            rows.begin(newest)
        elif choice < 0.13 and newest - oldest >= segments:
            rows.forget(oldest)
            model = {frame: known for frame, known in model.items() if known[0] != oldest}
            oldest += 1
        elif choice < 0.6 and rows.count(newest) < 100:
            place, size, valid = (
                rng.randrange(1 << 17) * 512,
                rng.randrange(130) * 512,
                rng.randrange(1 << 16),
            )
            rows.put(newest, frame, place, size, valid)
            model[frame] = newest, place, size, valid
        elif choice < 0.9:
            start = frame << FRAME_SHIFT
            span = start + rng.randrange(FRAME_BYTES), start + rng.randrange(1, 40 * FRAME_BYTES)
            if span[0] < span[1]:
                removed = (
                    rows.remove_range(span)
                    if rng.random() < 0.5
                    else bool(sum([rows.remove_range_in(number, span) for number in rows.numbers]))
                )
                hit = False
                for known in list(model):
                    number, place, size, valid = model[known]
                    pages = index.pages_in(known, span)
                    hit |= bool(valid & pages)
                    model[known] = number, place, size, valid & ~pages
                assert removed == hit
        model = {frame: known for frame, known in model.items() if known[3]}
        found = rows.find(frame)
        shown = found and (found.number, found.place, found.size_bytes, found.valid)
        assert shown == model.get(frame)
        assert rows.frames == len(model)
    assert {frame for number in rows.numbers for frame, _ in rows.rows(number)} == set(model)


def test_index_remembers_visits() -> None:
    rows = Index(10)
    rows.begin(0)
    rows.put(0, 5, 0, 512, 0xFF)
    row = rows.find(5)
    assert row is not None
    assert not row.flags & index.VISITED
    rows.visit(row)
    found = rows.find(5)
    assert found is not None
    assert found.flags & index.VISITED
    assert rows.is_current(5, row)
    rows.put(0, 5, 512, 512, 0xFF)
    assert not rows.is_current(5, row)


# -- journal -------------------------------------------------------------------------------------


def some_entries(count: int) -> list[Entry]:
    rng = random.Random(count)
    return [
        Entry(rng.choice(list(Kind)), rng.randrange(1 << 16), rng.randrange(1 << 16),
              rng.getrandbits(40), rng.getrandbits(40), rng.getrandbits(60), rng.getrandbits(32),
              rng.randbytes(16))
        for _ in range(count)
    ]  # fmt: skip


def area(number: int, entries: list[Entry], size: int = 128) -> bytes:
    scribe = Scribe(STORE, number)
    lines = [scribe.encode(ordinal, entry) for ordinal, entry in enumerate(entries)]
    return b"".join(lines).ljust(size * journal.ENTRY_BYTES, b"\0")


def entries_in(number: int, content: bytes) -> list[Entry]:
    count = sum(1 for _ in Scribe(STORE, number).entries(content))
    return [journal.entry_at(content, ordinal) for ordinal in range(count)]


@pytest.mark.parametrize("count", [0, 1, 5, 128])
def test_entries_come_back(count: int) -> None:
    entries = some_entries(count)
    assert entries_in(3, area(3, entries)) == entries


def test_ordinals_may_pass_the_end_of_32_bits() -> None:
    """Some numbers of segments begin their checksums just below it."""
    entries = some_entries(5)
    scribe = Scribe(STORE, 3)
    scribe._seed = 0xFFFF_FFFE
    content = b"".join(scribe.encode(*one) for one in enumerate(entries))
    assert [found[:5] for found in scribe.entries(content)] == [entry[:5] for entry in entries]


def test_every_flipped_bit_of_a_journal_is_seen() -> None:
    """But for one: there is nothing to flip in an end that nobody has written."""
    entries = some_entries(3)
    content = area(3, entries, size=5)
    for bit in range(8 * 3 * journal.ENTRY_BYTES):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedJournal):
            entries_in(3, bytes(damaged))


def test_entries_elsewhere_are_damage() -> None:
    first, second = some_entries(2)
    content = area(3, [first, second])
    half = journal.ENTRY_BYTES
    with pytest.raises(DamagedJournal):
        entries_in(4, content)  # of another segment
    with pytest.raises(DamagedJournal):
        entries_in(3, content[half : 2 * half] + content[:half] + content[2 * half :])
    with pytest.raises(DamagedJournal):
        entries_in(3, bytes(half) + content[half:])  # the first is missing
    with pytest.raises(DamagedJournal):
        list(Scribe(bytes(16), 3).entries(content))  # of another store


def test_every_flipped_bit_of_a_header_is_seen() -> None:
    header = journal.SegmentHeader(5, 2, 64, bytes(range(16)))
    page = journal.encode_header(STORE, header)
    assert journal.decode_header(STORE, page) == header
    for bit in range(8 * 68):
        damaged = bytearray(page)
        damaged[bit // 8] ^= 1 << bit % 8
        assert journal.decode_header(STORE, bytes(damaged)) is None


@pytest.mark.parametrize("tier_bytes", [4 * MIB + 8 * KIB, 64 * MIB, 10 << 30, 100 << 30, 1 << 40])
def test_a_layout_fits(tier_bytes: int) -> None:
    size, count = journal.layout(tier_bytes)
    assert size * count + 2 * journal.PAGE_BYTES <= tier_bytes
    assert count >= journal.SEGMENTS_MIN
    assert journal.records_max(size) <= index.ROWS_MAX
    assert journal.records_max(size) <= journal.entries_max(size)


# -- records -------------------------------------------------------------------------------------


def header_for(content: bytes, seal: Seal | None, **changes: Any) -> Header:
    fields: dict[str, Any] = {
        "store_id": record.store_id(STORE), "number": 3, "place": 8192, "frame": 77,
        "valid": (1 << len(content) // PAGE_BYTES) - 1, "codec": record.RAW, "raw": len(content),
        "stored": len(content) + (16 if seal else 0), "life": 4, "seq": 9,
    }  # fmt: skip
    return Header(**fields | changes)


@pytest.mark.parametrize("seal", SEALS, ids=["plain", "sealed"])
def test_a_record_comes_back(seal: Seal | None) -> None:
    content = random.Random(1).randbytes(2 * PAGE_BYTES)
    header = header_for(content, seal)
    head, payload = record.encode(header, content, seal)
    found, shown = record.decode(head + bytes(payload) + bytes(512), seal)
    assert found == header
    assert shown == content
    assert header.size_bytes % record.ALIGN_BYTES == 0


@pytest.mark.parametrize("seal", SEALS, ids=["plain", "sealed"])
def test_every_flipped_bit_of_a_record_is_seen(seal: Seal | None) -> None:
    content = random.Random(1).randbytes(PAGE_BYTES)
    head, payload = record.encode(header_for(content, seal), content, seal)
    whole = head + bytes(payload)
    bits = [*range(8 * record.HEADER_BYTES), *range(8 * record.HEADER_BYTES, 8 * len(whole), 97)]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(OrionError):
            record.decode(bytes(damaged), seal)


def test_a_sealed_record_with_a_forged_header_does_not_open() -> None:
    """Whoever changes it can make the checksums fit, but not the tag."""
    seal = Seal(KEY)
    content = random.Random(1).randbytes(PAGE_BYTES)
    header = header_for(content, seal)
    _, payload = record.encode(header, content, seal)
    for name in ("frame", "number", "place", "valid", "life", "seq", "store_id"):
        forged = header_for(
            content, seal, **{name: getattr(header, name) ^ (512 if name == "place" else 2)}
        )
        if name == "valid":
            forged = header_for(content, seal, valid=2)

        class Replay(Seal):
            def encrypt(self, *_: Any) -> bytes:
                return bytes(payload)

        head, _ = record.encode(forged, content, Replay(KEY))
        with pytest.raises(OrionError, match="not what was sealed"):
            record.decode(head + bytes(payload), seal)


# -- frames --------------------------------------------------------------------------------------


@given(st.integers(1, 0xFFFF), st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=50))
def test_pages_are_gathered_and_spread(mask: int, wanted: int, pattern: bytes) -> None:
    frame = random.Random(pattern).randbytes(FRAME_BYTES)
    content = frames.gather(frame, mask)
    assert len(content) == mask.bit_count() * PAGE_BYTES
    target = bytearray(FRAME_BYTES)
    frames.spread(content, mask, wanted & mask, memoryview(target))
    for page in range(16):
        part = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
        is_wanted = (wanted & mask) >> page & 1
        assert target[part] == (frame[part] if is_wanted else bytes(PAGE_BYTES))


# -- staging -------------------------------------------------------------------------------------

CONTENT = memoryview(bytes(2 * FRAME_BYTES))
WHOLE = (0, FRAME_BYTES)


def test_what_changes_during_a_request_is_not_taken_in() -> None:
    staging = Staging(MIB)
    staging.watch(WHOLE)
    staging.begin_change((0, 8192))
    staging.end_change((0, 8192))
    assert staging.unwatch(WHOLE) == {0: 3}
    staging.watch(WHOLE)
    assert staging.unwatch(WHOLE) == {}


def test_a_change_that_began_before_a_request_counts_at_its_end() -> None:
    staging = Staging(MIB)
    staging.begin_change((0, 4096))
    staging.watch(WHOLE)
    assert staging.stage(0, 0xFFFF, CONTENT, 0) == 0xFFFE
    staging.end_change((0, 4096))
    assert staging.unwatch(WHOLE) == {0: 1}


def test_a_change_takes_back_what_is_staged() -> None:
    staging = Staging(MIB)
    staging.stage(0, 0xFFFF, CONTENT, 0)
    staging.stage(1, 1, CONTENT, FRAME_BYTES)
    staging.begin_change((4096, FRAME_BYTES + 1))
    assert [(staged.frame, staged.mask) for staged in staging.queue.values()] == [(0, 1)]
    (staged,) = staging.begin_batch(8)
    staging.begin_change((0, 1 << 40))
    assert (staged.mask, staged.changed) == (0, 0xFFFF)
    staging.end_batch()
    assert not staging.staged_bytes


def test_staging_is_bounded() -> None:
    staging = Staging(2 * FRAME_BYTES)
    assert staging.stage(0, 1, CONTENT, 0)
    assert staging.stage(1, 1, CONTENT, 0)
    assert staging.is_full
    assert not staging.stage(2, 1, CONTENT, 0)
    assert staging.stage(1, 2, CONTENT, 0)
    staging.begin_batch(1)
    assert not staging.stage(2, 1, CONTENT, 0)
    staging.end_batch()
    assert staging.stage(2, 1, CONTENT, 0)


# -- policy --------------------------------------------------------------------------------------


def test_while_there_is_room_everything_is_admitted() -> None:
    admission = Admission(64 * MIB, 1000)
    assert all(admission.admits(frame, FRAME_BYTES, is_known=False) for frame in range(1000))
    assert not any(admission.passes_by((at, at + MIB)) for at in range(0, 64 * MIB, MIB))


def test_a_full_tier_takes_some_newcomers_and_all_who_come_again() -> None:
    admission = Admission(64 * MIB, 1000)
    admission.is_full = True
    taken = [frame for frame in range(1000) if admission.admits(frame, FRAME_BYTES, is_known=False)]
    assert len(taken) == 1000 // NEWCOMER_SHARE
    refused = [frame for frame in range(900, 1000) if frame not in taken]
    assert all(admission.admits(frame, FRAME_BYTES, is_known=False) for frame in refused)
    assert admission.admits(5000, FRAME_BYTES, is_known=True)
    assert admission.is_proven(refused[0])
    assert not admission.is_proven(refused[0])


def test_ghosts_are_few() -> None:
    ghosts = Ghosts(1 << 30)
    assert ghosts.memory_bytes < 5 * MIB
    for frame in range(1000):
        ghosts.add(frame)
    assert sum(frame in ghosts for frame in range(1000)) > 990
    assert not any(frame in ghosts for frame in range(1000, 5000))


def test_a_long_stream_is_a_flood() -> None:
    streams = Streams(8 * MIB)
    rng = random.Random(1)
    order = list(range(0, 64 * MIB, 256 * KIB))
    for at in range(0, len(order), 8):  # readahead asks for several at once
        part = order[at : at + 8]
        rng.shuffle(part)
        order[at : at + 8] = part
    floods = []
    for at in order:
        streams.is_flood((1 << 40, (1 << 40) + 4096))  # somebody else works in between
        floods.append(streams.is_flood((at, at + 256 * KIB)))
    assert not any(floods[:24])
    assert all(floods[40:])


def test_random_reads_are_no_flood() -> None:
    streams = Streams(8 * MIB)
    rng = random.Random(1)
    for _ in range(5000):
        at = rng.randrange(1 << 30) & -4096
        assert not streams.is_flood((at, at + 4096))


def test_one_hot_place_is_no_flood() -> None:
    streams = Streams(8 * MIB)
    rng = random.Random(1)
    for _ in range(5000):
        at = rng.randrange(STREAM_SLACK_BYTES) & -4096
        assert not streams.is_flood((at, at + 64 * KIB))


# -- levels --------------------------------------------------------------------------------------


def test_a_slow_processor_gets_an_easier_level() -> None:
    level = AdaptiveLevel()
    assert level.level == USUAL_LEVEL
    for _ in range(100):
        level.note(compress_s=0.1, write_s=0.01, raw_bytes=MIB, is_behind=True)
    assert level.level == LEVELS[0]
    for _ in range(200):
        level.note(compress_s=0.01, write_s=0.1, raw_bytes=MIB, is_behind=True)
    assert level.level == LEVELS[-1]


def test_without_a_backlog_the_level_stays() -> None:
    level = AdaptiveLevel()
    for _ in range(100):
        level.note(compress_s=0.1, write_s=0.01, raw_bytes=MIB, is_behind=False)
    assert level.level == USUAL_LEVEL


def test_what_does_not_compress_is_tried_less_and_less() -> None:
    memory = Compressibility()
    tries = 0
    for _ in range(1000):
        if memory.is_worth_trying(0):
            tries += 1
            memory.note(0, saved=False)
        assert memory.is_worth_trying(1 << 40)  # elsewhere nothing is known
    assert 5 < tries < 20
    while not memory.is_worth_trying(0):
        pass
    memory.note(0, saved=True)
    assert all(memory.is_worth_trying(0) for _ in range(10))
