"""`inspect`: what real LUNs say of themselves, who has reserved them, and that nobody notices."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orion_iscsifs.testing.istgt import Istgt, IstgtSettings
from tests.interop.conftest import MEBIBYTE, MakeEmbedded, MakeTgtDisk, TgtDisk
from tests.interop.product import Product, sized_file

FAILED, USAGE = 1, 2


def inspected(product: Product, url: str, *options: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(product("inspect", url, "--json", *options).stdout)
    assert document["version"] == 1
    return document


@pytest.mark.interop("tgtd", "tgtadm")
@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_a_lun_of_tgt(product: Product, make_tgt_disk: MakeTgtDisk, block_bytes: int) -> None:
    disk = make_tgt_disk(block_bytes=block_bytes)
    document = inspected(product, disk.url)
    (lun,) = document["luns"]
    assert (lun["lun"], lun["error"]) == (1, None)
    assert lun["size_bytes"] == disk.size_bytes
    assert lun["block_size"] == block_bytes
    assert lun["blocks"] * block_bytes == disk.size_bytes
    assert lun["vendor"] == "IET"
    assert lun["serial"]
    assert lun["name"] in [one["value"] for one in lun["designators"]]
    assert lun["reservations"]["holder"] is None
    assert lun["alua"] is None
    assert document["session"]["portal"] == f"127.0.0.1:{disk.port}"
    assert document["session"]["parameters"]["max_burst_length"] > 0
    shown = product("inspect", disk.url).stdout
    assert f"{block_bytes} bytes, physical" in shown
    assert ("4Kn" in shown) == (block_bytes == 4096)
    assert "\x1b" not in shown


@pytest.mark.interop("tgtd", "tgtadm")
def test_every_lun_and_the_controller(product: Product, tgt_disk: TgtDisk) -> None:
    url = tgt_disk.url.removesuffix("/1")
    controller, disk = inspected(product, url)["luns"]
    assert (controller["lun"], disk["lun"]) == (0, 1)
    assert "not a disk" in controller["error"]
    assert disk["error"] is None


@pytest.mark.interop("istgt")
def test_a_lun_of_istgt(product: Product, tmp_path: Path) -> None:
    backing = sized_file(tmp_path / "disk", 8 * MEBIBYTE)
    with Istgt(tmp_path, IstgtSettings(luns={0: backing})) as istgt:
        (lun,) = inspected(product, f"{istgt.portal_url}/{istgt.iqn}/0")["luns"]
    assert lun["size_bytes"] == 8 * MEBIBYTE
    assert lun["error"] is None


def test_limits_access_and_commands(product: Product, make_embedded: MakeEmbedded) -> None:
    target = make_embedded({1: "ram:64M"})
    (lun,) = inspected(product, target.lun_url(1))["luns"]
    assert lun["provisioning"] == {
        "type": "thin",
        "enabled": True,
        "unmap": True,
        "write_same_16_unmap": True,
        "write_same_10_unmap": True,
        "reads_zeroes": True,
    }
    assert lun["limits"]["optimal_unmap_granularity"] > 0
    assert lun["caching"]["dpofua"]
    (group,) = lun["alua"]["groups"]
    assert (group["tag"], group["state"]) == (lun["alua"]["own_group"], "active/optimized")
    opcodes = {command["opcode"] for command in lun["commands"]}
    assert {0x28, 0x2A, 0x42, 0x5E, 0x5F, 0x93} <= opcodes
    shown = product("inspect", target.lun_url(1)).stdout
    assert "UNMAP, WRITE SAME(16) with UNMAP" in shown
    assert "active/optimized, this path" in shown


@pytest.mark.fuse
def test_the_holder_is_named_and_not_disturbed(
    product: Product, make_embedded: MakeEmbedded
) -> None:
    target = make_embedded({1: "ram:64M"})
    with product.mounted(target.lun_url(1)) as mountpoint:
        mounted: Any = product.status(mountpoint)["luns"][0]
        (lun,) = inspected(product, target.lun_url(1))["luns"]
        holder = lun["reservations"]["holder"]
        assert holder["key"] == mounted["reservation"]["key"]
        assert holder["type"] == "Write Exclusive - Registrants Only"
        (registration,) = lun["reservations"]["registrations"]
        assert registration["holder"]
        assert registration["initiator"].startswith("iqn.")
        assert registration["initiator"] in product("inspect", target.lun_url(1)).stdout
        (mountpoint / "lun1").write_bytes(b"x" * 4096)
        session: Any = product.status(mountpoint)["sessions"][0]
        assert session["counters"]["logins"] == 1


@pytest.mark.parametrize(
    ("tail", "code", "message"),
    [
        ("/9", FAILED, "LUN 9: the target has no such LUN"),
        ("-another/1", FAILED, "no such target at this portal"),
    ],
)
def test_what_is_not_there(
    product: Product, make_embedded: MakeEmbedded, tail: str, code: int, message: str
) -> None:
    target = make_embedded({1: "ram:8M"})
    refused = product("inspect", target.url + tail, code=code)
    (line,) = refused.stderr.strip().splitlines()
    assert message in line
    assert refused.stdout == ""


def test_without_a_target(product: Product) -> None:
    refused = product("inspect", "iscsi://127.0.0.1:1/", code=USAGE)
    assert "no target is named" in refused.stderr
    assert "discover" in refused.stderr


@pytest.mark.fuse
@pytest.mark.interop("tgtd", "tgtadm")
def test_the_file_tells_the_same(product: Product, tgt_disk: TgtDisk) -> None:
    """`user.orion.*` of the device file."""
    (lun,) = inspected(product, tgt_disk.url)["luns"]
    with product.mounted(tgt_disk.url, "dirty_age=600") as mountpoint:
        path = mountpoint / "lun1"

        def attribute(name: str) -> str:
            return os.getxattr(path, f"user.orion.{name}").decode()

        assert attribute("name") == lun["name"]
        assert attribute("vendor") == lun["vendor"]
        assert attribute("target") == tgt_disk.iqn
        assert int(attribute("size_bytes")) == lun["size_bytes"]
        assert attribute("reservation") == "held"
        assert attribute("dirty_bytes") == "0"
        with path.open("r+b", buffering=0) as file:
            file.write(b"x" * 65536)
            assert attribute("dirty_bytes") == "65536"
        assert {f"user.orion.{name}" for name in ("lun", "cache")} <= set(os.listxattr(path))
