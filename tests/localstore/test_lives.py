"""Lives of a store: what one has left behind is not the next one's, and no nonce comes twice."""

import random
from pathlib import Path

import pytest
import trio

from orion_iscsifs.localstore import codec, record, segment, superblock
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.record import Kind
from orion_iscsifs.localstore.seal import LIFE_MAX, Seal
from orion_iscsifs.localstore.store import LogStore
from tests.cache.logs import KIB, MIB, Size
from tests.cache.logs import superblock as new_block
from tests.localstore.sealed import KEY, SMALL, fill, opened, with_superblock_checksum

pytestmark = pytest.mark.usefixtures("cheap_keys")


class NonceWatch:
    """Notes what every nonce was used for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: dict[tuple[bytes, int, int], tuple[bytes, bytes]] = {}
        self.count = 0
        healthy = Seal.encrypt

        def encrypt(one: Seal, life: int, seq: int, header: bytes, payload: bytes) -> bytes:
            nonce, content = (one._key, life, seq), (header, bytes(payload))
            assert self.used.setdefault(nonce, content) == content, f"{life}, {seq} came twice"
            self.count += 1
            return healthy(one, life, seq, header, payload)

        monkeypatch.setattr(Seal, "encrypt", encrypt)
        # The salts alone would do. Here all uses of all segments have the same key.
        monkeypatch.setattr(codec, "_salt", lambda: bytes(segment.SALT_BYTES))


TINY = Size(segment_bytes=40 * KIB, segments=5)


class Host:
    """One log, life after life, each ended by a crash; what has to be in it."""

    def __init__(self, folder: Path, key: bytes | None, rng: random.Random) -> None:
        self.known: dict[int, bytes] = {}
        self._folder = folder
        self._key = key
        self._rng = rng
        self._number = 0
        self._destaged = self._durable = 0

    async def live(self) -> None:
        """Look what is there, write for a while, die."""
        rng = self._rng
        if self._number:
            store = LogStore.open(self._folder)
            store.unlock(self._key)
        else:
            store = LogStore.create(self._folder, new_block(MIB, TINY), self._key)
        scan = store.scan()
        found = list(scan.records)
        assert not scan.damage
        for header, place in found:
            if header.kind is Kind.DATA:
                content = await store.read(place, header.payload_checksum, header.length)
                assert content == self.known[header.seq], f"record {header.seq} is another one's"
        self.known = {seq: one for seq, one in self.known.items() if seq < scan.next_seq}
        if rng.random() < 0.9:  # or it dies before it has begun
            store.resume(scan)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.keep_prepared)
                for _ in range(rng.randrange(25)):
                    await self._step(store)
                nursery.cancel_scope.cancel()
        store.close()
        self._durable = max(self._durable, store.durable)
        self._lose_tail()

    async def _step(self, store: LogStore) -> None:
        rng, choice = self._rng, self._rng.random()
        self._number += 1
        if choice < 0.15:
            await store.commit()
        elif choice < 0.3:
            self._destaged = max(self._destaged, self._number - rng.randrange(8))
            if store.destaged < self._destaged:
                store.note_destaged(self._destaged, None)
        else:
            # Records of whole pages: what an earlier life has left keeps its place.
            size = rng.choice((512, 3584, 7680)) - 16 * (self._key is not None)
            content = self._number.to_bytes(8, "little") * (size // 8)
            seq = store.next_seq
            if store.append(Kind.DATA, self._number, 0, size, content, reserve=True) is None:
                store.note_destaged(self._number, None)
                self._destaged = self._number
                with trio.move_on_after(5):
                    await store.room.park()
            else:
                self.known[seq] = content

    def _lose_tail(self) -> None:
        """Of what was not synced any record may be gone, and others that come later be there."""
        rng = self._rng
        store = LogStore.open(self._folder, shared=True)
        scan = store.scan()
        found = list(scan.records)
        store.close()
        for header, place in found:
            if header.seq >= max(self._durable, scan.durable) and rng.random() < 0.3:
                path = self._folder / segment.file_name(place.slot)
                with path.open("r+b") as file:
                    file.seek(place.position - record.HEADER_BYTES)
                    file.write(bytes(512))


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "open"])
async def test_no_nonce_comes_twice_and_no_record_comes_back(
    memory_path: Path, key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over crashes, torn ends, segments that are used again, and lives that end at once."""
    watch = NonceWatch(monkeypatch)
    for seed in range(30):
        host = Host(memory_path / str(seed), key, random.Random(seed))
        for _ in range(25):
            await host.live()
    assert watch.count > 2000 or key is None


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "open"])
async def test_what_was_cut_off_does_not_come_back(tmp_path: Path, key: bytes | None) -> None:
    """It lies just where the next record would be, and has that record's number."""
    overhead = 16 * (key is not None)

    async def write(store: LogStore, sizes: list[int]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.keep_prepared)
            for size in sizes:
                payload = bytes([store.next_seq + 1]) * (size - overhead)
                while store.append(Kind.DATA, 1, 0, len(payload), payload, reserve=True) is None:
                    await store.room.park()
            nursery.cancel_scope.cancel()
        store.close()

    # Nine records of a page fill the first segment, three of two pages are in the next one.
    await write(LogStore.create(tmp_path, new_block(MIB, TINY), key), [3584] * 9 + [7680] * 3)
    with opened(tmp_path, key) as (_, scan):
        found = list(scan.records)
    assert [place.slot for _, place in found] == [0] * 9 + [1] * 3
    with (tmp_path / segment.file_name(0)).open("r+b") as file:
        file.seek(found[8].place.position - record.HEADER_BYTES)
        file.write(bytes(4096))
    store = LogStore.open(tmp_path)
    store.unlock(key)
    scan = store.scan()
    assert len(list(scan.records)) == 8
    store.resume(scan)
    # 8 and 9 take a page each. At the third page there is what an earlier life knew as 10.
    await write(store, [3584] * 2)
    with opened(tmp_path, key) as (_, scan):
        again = list(scan.records)
    assert [place for _, place in again[8:]] == [found[9].place, (1, 8192 + record.HEADER_BYTES)]
    assert found[10].place.position == 12288 + record.HEADER_BYTES
    assert not scan.damage


async def test_a_life_that_the_superblock_does_not_know_is_not_lived_again(
    tmp_path: Path,
) -> None:
    """Both its copies were put back to what they were before."""
    await fill(tmp_path, KEY, small=True)
    before = {name: (tmp_path / name).read_bytes() for name in superblock.NAMES}
    for life in (2, 3, 4):
        store = LogStore.open(tmp_path)
        store.unlock(KEY)
        scan = store.scan()
        assert list(scan.records)
        store.resume(scan)
        assert store.superblock.life == life
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.keep_prepared)
            while store.append(Kind.ZERO, 100 + life, 0, 4096, reserve=True) is None:
                await store.room.park()
            nursery.cancel_scope.cancel()
        store.close()
        for name, page in before.items():
            (tmp_path / name).write_bytes(page)


async def test_lives_run_out_in_words(tmp_path: Path) -> None:
    await fill(tmp_path, KEY, small=True)
    store = LogStore.open(tmp_path)
    store.unlock(KEY)
    store.update(life=LIFE_MAX - 1)
    store.resume(store.scan())
    assert store.superblock.life == LIFE_MAX
    with pytest.raises(LogError, match="opened too often") as refused:
        store.resume(store.scan())
    assert "cache drop" in refused.value.advice
    store.close()


def test_an_earlier_version_refuses_what_it_would_misunderstand(tmp_path: Path) -> None:
    for name, key, bits in (("sealed", KEY, 3), ("open", None, 2)):
        LogStore.create(tmp_path / name, new_block(MIB, SMALL), key).close()
        for copy in superblock.NAMES:
            page = (tmp_path / name / copy).read_bytes()
            assert int.from_bytes(page[20:24], "little") == bits


@pytest.mark.parametrize("bit", range(2, 32))
def test_features_of_a_later_version_are_refused(tmp_path: Path, bit: int) -> None:
    LogStore.create(tmp_path, new_block(MIB, SMALL), KEY).close()
    for name in superblock.NAMES:
        page = bytearray((tmp_path / name).read_bytes())
        page[20:24] = (int.from_bytes(page[20:24], "little") | 1 << bit).to_bytes(4, "little")
        (tmp_path / name).write_bytes(with_superblock_checksum(bytes(page)))
    with pytest.raises(LogError, match="not known to this version"):
        LogStore.open(tmp_path)
