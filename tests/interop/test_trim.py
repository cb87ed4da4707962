"""`trim` on mounted LUNs: the target's backing file really becomes smaller."""

import json
from pathlib import Path

import pytest

from tests.interop.conftest import MakeEmbedded, MakeTgtDisk
from tests.interop.product import Product, sized_file

pytestmark = pytest.mark.fuse

MEBIBYTE = 1 << 20
LUN_BYTES = 16 * MEBIBYTE


def fill(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\x5a" * LUN_BYTES)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def trim_a_part(product: Product, mountpoint: Path, backing: Path) -> None:
    file = mountpoint / "lun1"
    fill(file)
    product("flush", mountpoint)
    before = allocated(backing)
    outcome = product("trim", file, "--offset", "4M", "--length", "8M", "--json")
    answer = json.loads(outcome.stdout)
    assert answer["version"] == 1
    assert answer["asked_bytes"] == answer["discarded_bytes"] == 8 * MEBIBYTE
    assert allocated(backing) <= before - 8 * MEBIBYTE
    content = file.read_bytes()
    assert content[4 * MEBIBYTE : 12 * MEBIBYTE] == bytes(8 * MEBIBYTE)
    assert content.count(0x5A) == 8 * MEBIBYTE


def test_embedded_target(product: Product, make_embedded: MakeEmbedded, memory_path: Path) -> None:
    backing = sized_file(memory_path / "thin.img", LUN_BYTES)
    with product.mounted(make_embedded({1: str(backing)}).lun_url(1)) as mountpoint:
        trim_a_part(product, mountpoint, backing)
        file = mountpoint / "lun1"
        said = product("trim", file, "--offset", "512", "--length", "8K").stdout
        assert "4096 bytes" in said
        outside = product("trim", file, "--length", "1G", code=1).stderr
        assert "not inside the" in outside
        wrong = product("trim", mountpoint / "lun7", code=1).stderr
        assert "lun7: no device file" in wrong
        product("trim", memory_path / "thin.img", code=2)


@pytest.mark.interop("tgtd", "tgtadm")
def test_thin_lun_of_tgt(product: Product, make_tgt_disk: MakeTgtDisk) -> None:
    disk = make_tgt_disk(size_bytes=LUN_BYTES)
    disk.target.set_thin(1)
    with product.mounted(disk.url) as mountpoint:
        trim_a_part(product, mountpoint, disk.backing)
        with (mountpoint / "lun1").open("r+b") as file:
            file.write(bytes(2 * MEBIBYTE))
        product("flush", mountpoint)
        assert disk.backing.read_bytes()[: 4 * MEBIBYTE] == bytes(2 * MEBIBYTE) + b"\x5a" * (
            2 * MEBIBYTE
        )


@pytest.mark.interop("tgtd", "tgtadm")
def test_thick_lun_is_refused_in_words(product: Product, make_tgt_disk: MakeTgtDisk) -> None:
    disk = make_tgt_disk(size_bytes=LUN_BYTES)
    with product.mounted(disk.url) as mountpoint:
        refused = product("trim", mountpoint / "lun1", code=1).stderr
        assert "takes no UNMAP" in refused
