"""Another file system object, in another process, stands by what the first one told the kernel."""

import errno
import os
from unittest.mock import Mock

import pytest
from pyfuse3 import ROOT_INODE, FUSEError

from orion_iscsifs.config import FuseConfig
from orion_iscsifs.custody import STATE, Custody
from orion_iscsifs.fuse.handover import Handover
from orion_iscsifs.fuse.operations import DeviceFiles
from tests.fuse.devices import ByteDevice

SIZE = 1 << 20
CTX = Mock()
NAMES = {"lun1": "naa.1", "lun2": "naa.2", "lun3": "naa.3"}


def made(*paths: str, known: Handover, names: dict[str, str] = NAMES) -> DeviceFiles:
    return DeviceFiles(
        {path: ByteDevice(SIZE) for path in paths},
        config=FuseConfig(),
        control={"status.json": lambda: b"{}"},
        describe=lambda path: {"name": names[path]},
        handover=known,
    )


async def inode_of(files: DeviceFiles, path: str) -> int:
    inode = ROOT_INODE
    for name in path.split("/"):
        entry = await files.lookup(inode, name.encode(), CTX)
        inode = entry.st_ino
    return inode


async def test_paths_keep_their_inodes() -> None:
    known = Handover()
    first = made("lun1", "lun2", known=known)
    first.add_file("lun3", ByteDevice(SIZE))
    first.remove_file("lun1")
    before = {path: await inode_of(first, path) for path in ("lun2", "lun3", ".orion/status.json")}
    later = made("lun3", "lun1", "lun2", known=known)
    assert {path: await inode_of(later, path) for path in before} == before
    assert await inode_of(later, "lun1") not in {ROOT_INODE, 2, *before.values()}


async def test_a_file_that_comes_back_later_is_the_same_unless_the_disk_is_another() -> None:
    known = Handover()
    before = await inode_of(made("lun1", "lun2", known=known), "lun2")
    later = made("lun1", known=known)
    with pytest.raises(FUSEError) as missing:
        await inode_of(later, "lun2")
    assert missing.value.errno == errno.ENOENT
    later.add_file("lun2", ByteDevice(SIZE))
    assert await inode_of(later, "lun2") == before
    other = made("lun1", known=known, names={**NAMES, "lun2": "naa.9"})
    other.add_file("lun2", ByteDevice(SIZE))
    assert await inode_of(other, "lun2") != before


async def test_open_files_go_on() -> None:
    known = Handover()
    first = made("lun1", "lun2", known=known)
    opened = await first.open(await inode_of(first, "lun2"), os.O_RDWR | os.O_DSYNC, CTX)
    text = await first.open(await inode_of(first, ".orion/status.json"), os.O_RDONLY, CTX)
    later = made("lun2", "lun1", known=known)
    assert await later.write(opened.fh, 0, b"abc") == 3
    assert await later.read(opened.fh, 0, 3) == b"abc"
    assert later._handles[opened.fh].fua
    await later.fsync(opened.fh, True)
    assert later.counters()["lun2"].writes == 1
    assert await later.read(text.fh, 0, 10) == b"{}"
    again = await later.open(await inode_of(later, "lun2"), os.O_RDWR, CTX)
    assert again.fh != opened.fh
    for fh in (opened.fh, again.fh, text.fh):
        await later.release(fh)
    without = made("lun1", known=Handover())
    with pytest.raises(FUSEError) as refused:
        await without.read(opened.fh, 0, 3)
    assert refused.value.errno == errno.EBADF


async def test_an_open_file_whose_lun_has_gone() -> None:
    known = Handover()
    first = made("lun1", "lun2", known=known)
    opened = await first.open(await inode_of(first, "lun2"), os.O_RDWR, CTX)
    later = made("lun1", known=known)
    for attempt in (later.read(opened.fh, 0, 1), later.write(opened.fh, 0, b"x")):
        with pytest.raises(FUSEError) as refused:
            await attempt
        assert refused.value.errno == errno.EBADF


async def test_the_times_stay() -> None:
    known = Handover()
    first = made("lun1", known=known)
    before = await first.getattr(await inode_of(first, "lun1"), CTX)
    later = made("lun1", known=known)
    assert (await later.getattr(before.st_ino, CTX)).st_mtime_ns == before.st_mtime_ns


def test_through_the_supervisor() -> None:
    kept: dict[str, int] = {}

    class Keeping(Custody):
        def keep(self, name: str, descriptor: int) -> None:
            kept[name] = os.dup(descriptor)

        def inherit(self, name: str) -> int | None:
            return kept.pop(name, None)

    known = Handover(inodes={"lun1": 2}, init_reply=b"\x07\0\xff", device="0:50")
    known.saver(Keeping())()
    assert list(kept) == [STATE]
    assert Handover.of(Keeping()) == known
    assert Handover.of(Keeping()) is None
