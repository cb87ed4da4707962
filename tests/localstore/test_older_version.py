"""A log as the version before lives and sealing has left it, made by hand."""

import json
import struct
from base64 import b64encode
from pathlib import Path

import crc32c
import trio

from orion_iscsifs.cache.writelog import recover
from orion_iscsifs.localstore.record import Kind
from orion_iscsifs.localstore.store import LogStore

STORE = bytes(range(16))
SEGMENT = 64 << 10


def checked(head: bytes) -> bytes:
    return head + struct.pack("<I", crc32c.crc32c(head))


def superblock_page(counter: int) -> bytes:
    fields = {
        "store": b64encode(STORE).decode(),
        "lun": "naa.old",
        "size_bytes": 1 << 20,
        "block_bytes": 512,
        "segment_bytes": SEGMENT,
        "segments": 4,
        "created": "2026-01-01T00:00:00+00:00",
        "target": "iqn.x LUN 1",
        "key": 7,
        "generation": 3,
        "clean": False,
        "ended": "",
    }
    text = json.dumps(fields).encode()
    head = struct.pack("<8sIIIIQI", b"OLSUPER1", 1, 0, 0, 0, counter, len(text))
    return checked((head + text).ljust(4092, b"\0"))


def record_bytes(seq: int, kind: int, offset: int, length: int, payload: bytes) -> bytes:
    (owner,) = struct.unpack("<Q", STORE[8:])
    head = struct.pack(
        "<4sBBHQQQQQIII",
        b"OLR1",
        kind,
        0,
        0,
        owner,
        seq,
        0,
        seq + 1,
        offset,
        length,
        len(payload),
        crc32c.crc32c(payload),
    )
    whole = checked(head) + payload
    return whole.ljust(-(-len(whole) // 512) * 512, b"\0")


def make(folder: Path) -> None:
    folder.mkdir()
    for counter, name in ((4, "super.0"), (3, "super.1")):
        (folder / name).write_bytes(superblock_page(counter))
    header = checked(struct.pack("<8sI4x16sQQQQ", b"OLSEG1\0\0", 1, STORE, 0, 0, 0, 0))
    records = (
        record_bytes(0, 1, 4096, 512, b"d" * 512),
        record_bytes(1, 2, 8192, 4096, b""),
        record_bytes(2, 1, 0, 512, b"e" * 512),
    )
    content = header.ljust(4096, b"\0") + b"".join(records)
    for slot in range(4):
        image = content if slot == 0 else b""
        (folder / f"wlog-{slot:08x}").write_bytes(image.ljust(SEGMENT, b"\0"))


async def test_it_is_replayed_and_gone_on_with(tmp_path: Path) -> None:
    make(tmp_path / "log")
    store = LogStore.open(tmp_path / "log")
    store.unlock(None)
    epochs, scan = recover(store, 0.0)
    assert (scan.next_seq, scan.damage, scan.torn_bytes) == (3, "", 0)
    spans = [(start, end, change.zero) for start, end, change in epochs.live]
    assert spans == [(0, 512, False), (4096, 4608, False), (8192, 12288, True)]
    ((_, _, change),) = epochs.live.find((4096, 4608))
    assert change.place is not None
    assert await store.read(change.place, change.checksum, 512) == b"d" * 512
    store.resume(scan)
    assert store.superblock.life == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.keep_prepared)
        while store.append(Kind.DATA, 9, 0, 512, b"n" * 512, reserve=True) is None:
            await store.room.park()
        nursery.cancel_scope.cancel()
    store.close()
    store = LogStore.open(tmp_path / "log", shared=True)
    numbers = [found.header.seq for found in store.scan().records]
    store.close()
    assert numbers == [0, 1, 2, 3]
    # From now on the version that made it refuses it.
    newest = max((tmp_path / "log" / f"super.{copy}").read_bytes()[20:32] for copy in (0, 1))
    assert newest[:4] == (2).to_bytes(4, "little")
