"""Another passphrase for a log: only its superblocks change, and one of both keys always opens."""

import os
from pathlib import Path

import pytest

from orion_iscsifs.errors import BusyError
from orion_iscsifs.localstore import files, rekey, seal, superblock
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.rekey import change_keys
from orion_iscsifs.localstore.seal import WrongKey
from orion_iscsifs.localstore.store import LogStore
from tests.cache.logs import MIB
from tests.cache.logs import superblock as new_block
from tests.localstore.sealed import KEY, SMALL, Written, files_of, fill, opened, verify

pytestmark = pytest.mark.usefixtures("cheap_keys")

NEW = b"another passphrase"


def opens(folder: Path, key: bytes) -> bool:
    try:
        with opened(folder, key):
            return True
    except WrongKey:
        return False


async def made(folder: Path) -> Written:
    return await fill(folder, KEY, small=True)


async def test_the_data_stays_and_the_old_key_is_good_for_nothing(tmp_path: Path) -> None:
    written = await made(tmp_path)
    before = files_of(tmp_path)
    assert change_keys([tmp_path], KEY, NEW) == [tmp_path]
    after = files_of(tmp_path)
    assert {name for name in before if before[name] != after[name]} == set(superblock.NAMES)
    written.key = NEW
    assert await verify(written) == (len(written.contents), "")
    # Neither of the two copies opens with the old key, when it is the only one.
    for kept, lost in (superblock.NAMES, superblock.NAMES[::-1]):
        (tmp_path / lost).write_bytes(b"")
        assert (opens(tmp_path, KEY), opens(tmp_path, NEW)) == (False, True)
        (tmp_path / lost).write_bytes(after[lost])
        assert (tmp_path / kept).read_bytes() == after[kept]


@pytest.mark.parametrize("torn", [0, 512, 4095])
@pytest.mark.parametrize("written", [0, 1])
async def test_a_crash_in_the_middle_leaves_one_key_that_opens(
    tmp_path: Path, written: int, torn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many copies, and with a part of the next one."""
    log = await made(tmp_path)
    done: list[int] = []
    healthy = files.write_superblock_page

    def write(folder: Path, counter: int, page: bytes) -> None:
        if len(done) == written:
            path = folder / superblock.NAMES[counter % 2]
            path.write_bytes(page[:torn] + path.read_bytes()[torn:])
            raise OSError(5, os.strerror(5))
        done.append(counter)
        healthy(folder, counter, page)

    with monkeypatch.context() as broken:
        broken.setattr(files, "write_superblock_page", write)
        with pytest.raises(LogError, match="can't be written: Input/output error"):
            change_keys([tmp_path], KEY, NEW)
    right, wrong = (NEW, KEY) if written else (KEY, NEW)
    assert (opens(tmp_path, right), opens(tmp_path, wrong)) == (True, False)
    log.key = right
    assert await verify(log) == (len(log.contents), "")
    assert change_keys([tmp_path], right, b"third") == [tmp_path]
    assert opens(tmp_path, b"third")


async def test_all_or_none(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, key in zip(folders, (KEY, NEW, None), strict=True):
        LogStore.create(folder, new_block(MIB, SMALL), key).close()
    before = [files_of(folder) for folder in folders]
    with pytest.raises(WrongKey, match="b: the key does not open it") as refused:
        change_keys(folders, KEY, b"third")
    assert "nothing was changed" in refused.value.advice
    assert before == [files_of(folder) for folder in folders]
    # What is not sealed is left as it is, and not counted.
    assert change_keys([folders[0], folders[2]], KEY, NEW) == [folders[0]]
    assert before[2] == files_of(folders[2])


async def test_a_log_in_use_is_refused(tmp_path: Path) -> None:
    await made(tmp_path / "a")
    await made(tmp_path / "b")
    before = files_of(tmp_path / "a")
    store = LogStore.open(tmp_path / "b")
    with pytest.raises(BusyError):
        change_keys([tmp_path / "a", tmp_path / "b"], KEY, NEW)
    store.close()
    assert before == files_of(tmp_path / "a")
    assert change_keys([tmp_path / "a", tmp_path / "b"], KEY, NEW)


async def test_damaged_superblocks_are_said(tmp_path: Path) -> None:
    await made(tmp_path)
    for name in superblock.NAMES:
        (tmp_path / name).write_bytes(bytes(4096))
    with pytest.raises(LogError, match="neither of its superblocks"):
        change_keys([tmp_path], KEY, NEW)


async def test_stores_of_another_kind(tmp_path: Path) -> None:
    """With a superblock of their own; its feature bits stay."""

    class Other(superblock.Superblock, frozen=True, kw_only=True):
        more: str

    store = b"o" * 16
    sealing, key = seal.new_sealing(KEY, store)
    block = Other(
        store=store,
        lun="l",
        size_bytes=1,
        block_bytes=1,
        segment_bytes=1,
        segments=1,
        created="",
        more="m",
        sealing=sealing,
    )
    for counter, name in enumerate(superblock.NAMES, 6):
        page = superblock.encode(counter, block, incompat=superblock.SEALED, magic=b"OTHER__1")
        (tmp_path / name).write_bytes(page)
    with pytest.raises(LogError, match="neither"):
        change_keys([tmp_path], KEY, NEW)
    kinds = (rekey.LOG, (Other, b"OTHER__1"))
    assert change_keys([tmp_path], KEY, NEW, kinds=kinds) == [tmp_path]
    pages = files.superblock_pages(tmp_path)
    found = superblock.newest(pages, Other, b"OTHER__1")
    assert found is not None
    counter, changed = found
    assert (counter, changed.more) == (9, "m")
    assert changed.sealing is not None
    assert seal.unwrap(changed.sealing, NEW, store) == key
    assert [superblock.incompat(page) for page in pages] == [superblock.SEALED] * 2
