"""The device file under everything that one does to a disk's file, on 512 and 4096 byte sectors."""

import contextlib
import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import run
from tests.interop.conftest import LUN_BYTES, MEBIBYTE, MakeTgtDisk, TgtDisk
from tests.interop.product import Product, get, pattern, put

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]


@pytest.fixture(params=[512, 4096])
def block_bytes(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def served(make_tgt_disk: MakeTgtDisk, block_bytes: int) -> TgtDisk:
    return make_tgt_disk(block_bytes=block_bytes)


@pytest.fixture
def file(product: Product, served: TgtDisk) -> Iterator[Path]:
    with product.mounted(served.url) as mountpoint:
        yield mountpoint / "lun1"


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(pattern(6 * MEBIBYTE + 12_345))
    return path


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def aligned(data: bytes) -> mmap.mmap:
    """A page-aligned copy, which O_DIRECT asks for."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return buffer


@pytest.mark.parametrize("size", ["512", "1k", "4k", "7777", "64k", "1M", "3M"])
def test_dd_of_any_block_size(file: Path, data_file: Path, size: str, tmp_path: Path) -> None:
    # Without conv=notrunc: dd truncates its output first, which a disk takes without a change.
    run(["dd", f"if={data_file}", f"of={file}", f"bs={size}"])
    assert file.stat().st_size == LUN_BYTES
    run(["cmp", f"--bytes={data_file.stat().st_size}", data_file, file])
    copy = tmp_path / "copy"
    run(["dd", f"if={file}", f"of={copy}", f"bs={size}", "skip=1", "count=3"])
    step = copy.stat().st_size // 3
    padded = data_file.read_bytes().ljust(4 * step, b"\0")
    assert copy.read_bytes() == padded[step : 4 * step]


@pytest.mark.parametrize("blocks", [1, 3, 8, 256, 1024])
def test_direct_io_in_multiples_of_the_logical_block(
    file: Path, served: TgtDisk, block_bytes: int, blocks: int
) -> None:
    data = pattern(blocks * block_bytes, seed=blocks)
    offset = 5 * block_bytes
    with opened(file, os.O_RDWR | os.O_DIRECT) as descriptor:
        assert os.pwritev(descriptor, [aligned(data)], offset) == len(data)
        back = mmap.mmap(-1, len(data))
        assert os.preadv(descriptor, [back], offset) == len(data)
        assert back[:] == data
        os.fsync(descriptor)
    assert served.backing.read_bytes()[offset : offset + len(data)] == data


def test_dd_with_direct_output(file: Path, served: TgtDisk, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(pattern(8 * MEBIBYTE))
    run(["dd", f"if={source}", f"of={file}", "bs=256k", "oflag=direct", "conv=fsync"])
    assert served.backing.read_bytes()[: 8 * MEBIBYTE] == source.read_bytes()


def test_cp_and_cmp(file: Path, data_file: Path, tmp_path: Path) -> None:
    run(["cp", data_file, file])
    run(["cmp", f"--bytes={data_file.stat().st_size}", data_file, file])
    run(["cp", file, tmp_path / "image"])
    assert (tmp_path / "image").stat().st_size == LUN_BYTES
    run(["cmp", file, tmp_path / "image"])


def test_shared_mapping(file: Path, served: TgtDisk) -> None:
    data = pattern(300_000, seed=11)
    with opened(file, os.O_RDWR) as descriptor:
        with mmap.mmap(descriptor, 2 * MEBIBYTE) as mapping:
            mapping[77_777 : 77_777 + len(data)] = data
            mapping.flush()
            assert mapping[77_777 : 77_777 + len(data)] == data
        os.fsync(descriptor)
    assert served.backing.read_bytes()[77_777 : 77_777 + len(data)] == data


def test_unaligned_buffered_io_against_a_model(file: Path, served: TgtDisk) -> None:
    chosen = random.Random(20)
    span = 2 * MEBIBYTE
    model = bytearray(span)
    with opened(file, os.O_RDWR) as descriptor:
        for _ in range(300):
            length = chosen.randrange(1, 40_000)
            offset = chosen.randrange(span - length)
            if chosen.random() < 0.6:
                data = chosen.randbytes(length)
                assert os.pwrite(descriptor, data, offset) == length
                model[offset : offset + length] = data
            else:
                assert os.pread(descriptor, length, offset) == model[offset : offset + length]
        os.fsync(descriptor)
    assert served.backing.read_bytes()[:span] == model


@pytest.mark.parametrize("size", [0, 1, LUN_BYTES, 2 * LUN_BYTES])
def test_truncation_changes_nothing(file: Path, size: int) -> None:
    data = pattern(4096, seed=12)
    put(file, data)
    os.truncate(file, size)
    with file.open("wb"):  # O_TRUNC
        pass
    assert file.stat().st_size == LUN_BYTES
    assert get(file, len(data)) == data


def test_the_end_of_the_disk(file: Path) -> None:
    data = pattern(8192, seed=13)
    with opened(file, os.O_RDWR) as descriptor:
        assert os.pwrite(descriptor, data, LUN_BYTES - 8192) == 8192
        assert os.pread(descriptor, 65536, LUN_BYTES - 4096) == data[4096:]
        assert os.pread(descriptor, 4096, LUN_BYTES) == b""
        with pytest.raises(OSError, match="No space left") as refused:
            os.pwrite(descriptor, data, LUN_BYTES)
        assert refused.value.errno == errno.ENOSPC


def test_synchronous_writes_are_on_the_target(file: Path, served: TgtDisk) -> None:
    data = pattern(4096, seed=14)
    with opened(file, os.O_RDWR | os.O_SYNC) as descriptor:
        assert os.pwrite(descriptor, data, 4096) == len(data)
        assert served.backing.read_bytes()[4096:8192] == data


def test_nothing_can_be_made_renamed_or_removed(file: Path) -> None:
    folder = file.parent
    attempts = (
        lambda: (folder / "new").write_bytes(b""),
        lambda: (folder / "folder").mkdir(),
        lambda: file.unlink(),
        lambda: file.rename(folder / "other"),
        lambda: (folder / "link").symlink_to(file),
        lambda: os.link(file, folder / "hard"),
    )
    for attempt in attempts:
        with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is checked below
            attempt()
        assert refused.value.errno in (errno.EPERM, errno.EROFS, errno.EACCES)
    assert [name for name in os.listdir(folder) if name != ".orion"] == ["lun1"]


def test_control_files(product: Product, file: Path) -> None:
    control = file.parent / ".orion"
    assert '"version"' in (control / "status.json").read_text(encoding="utf-8")
    assert "cache" in (control / "config.toml").read_text(encoding="utf-8")
    assert (control / "metrics").read_text(encoding="utf-8").startswith("#")
    assert product("status", "--json").stdout.count(str(file.parent)) == 1
