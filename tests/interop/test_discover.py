"""`discover`, and the mount of a whole portal, against real targets and through translation."""

import json
from pathlib import Path
from typing import Any

import pytest

from orion_iscsifs.testing.istgt import Istgt, IstgtSettings
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.programs import free_port
from orion_iscsifs.testing.tgt import Tgt
from tests.interop.conftest import MEBIBYTE, TGT_IQN, MakeEmbedded, TgtDisk
from tests.interop.product import Product, get, sized_file

needs_tgt = pytest.mark.interop("tgtd", "tgtadm")


def discovered(product: Product, portal: str, *options: str) -> list[dict[str, Any]]:
    document = json.loads(product("discover", portal, "--json", *options).stdout)
    assert document["version"] == 1
    targets: list[dict[str, Any]] = document["targets"]
    return targets


@needs_tgt
def test_the_luns_of_tgt_and_its_controller(product: Product, tgt_disk: TgtDisk) -> None:
    (target,) = discovered(product, tgt_disk.portal_url, "--luns")
    assert target["name"] == TGT_IQN
    assert target["error"] is None
    assert target["logged_in_at"] == f"127.0.0.1:{tgt_disk.port}"
    controller, disk = target["luns"]
    assert (controller["lun"], controller["type"], controller["size_bytes"]) == (
        0,
        "controller",
        None,
    )
    assert (disk["lun"], disk["type"], disk["block_size"]) == (1, "disk", 512)
    assert disk["size_bytes"] == tgt_disk.size_bytes
    shown = product("discover", f"127.0.0.1:{tgt_disk.port}", "--luns").stdout
    assert "controller" in shown
    assert "64M" in shown
    assert "\x1b" not in shown


@pytest.mark.interop("istgt")
def test_the_luns_of_istgt(product: Product, tmp_path: Path) -> None:
    backing = sized_file(tmp_path / "disk", 8 * MEBIBYTE)
    with Istgt(tmp_path, IstgtSettings(luns={0: backing})) as istgt:
        (target,) = discovered(product, istgt.portal_url, "--luns")
    assert target["name"] == istgt.iqn
    assert target["portals"] == [{"host": "127.0.0.1", "port": istgt.port, "group_tag": 1}]
    assert [lun["size_bytes"] for lun in target["luns"]] == [8 * MEBIBYTE]


@needs_tgt
def test_a_target_that_refuses_does_not_stop_the_rest(
    product: Product, tgt: Tgt, tmp_path: Path
) -> None:
    open_iqn, closed_iqn = f"{TGT_IQN}-open", f"{TGT_IQN}-closed"
    closed = tgt.add_target(closed_iqn)
    tgt.configure(["--op", "new", "--mode", "account", "--user", "u", "--password", "x" * 12])
    account = ["--op", "bind", "--mode", "account", "--tid", str(closed.tid), "--user", "u"]
    tgt.configure(account)
    tgt.add_target(open_iqn).add_lun(1, sized_file(tmp_path / "disk", MEBIBYTE))
    targets = {target["name"]: target for target in discovered(product, tgt.portal, "--luns")}
    assert "authentication" in targets[closed_iqn]["error"].lower()
    assert targets[closed_iqn]["luns"] == []
    assert targets[closed_iqn]["logged_in_at"] is None
    assert [lun["lun"] for lun in targets[open_iqn]["luns"]] == [0, 1]
    outcome = product("discover", tgt.portal, "--luns")
    assert outcome.stderr == ""


def test_many_embedded_luns(product: Product, make_embedded: MakeEmbedded) -> None:
    target = make_embedded(dict.fromkeys(range(1, 30), "ram:1M"))
    (found,) = discovered(product, target.portal_url, "--luns")
    assert [lun["lun"] for lun in found["luns"] if lun["type"] == "disk"] == list(range(1, 30))


@pytest.mark.fuse
@needs_tgt
def test_a_mount_through_address_translation(
    product: Product, proxied_disk: tuple[TgtDisk, TcpProxy, str]
) -> None:
    """tgt lists its inner port; everything goes through the portal that was dialled."""
    disk, proxy, _ = proxied_disk
    (target,) = discovered(product, proxy.portal, "--luns")
    assert target["portals"][0]["port"] == disk.port
    assert target["logged_in_at"] == proxy.portal
    before = proxy.connections_accepted
    with product.mounted(f"iscsi://{proxy.portal}/") as mountpoint:
        assert len(get(mountpoint / TGT_IQN / "lun1", 4096)) == 4096
        (session,) = product.status(mountpoint)["sessions"]
        connections: Any = session["connections"]
        assert connections[0]["portal"] == proxy.portal
    assert proxy.connections_accepted == before + 2, "discovery and the session itself"


def test_nobody_listens(product: Product) -> None:
    outcome = product("discover", f"127.0.0.1:{free_port()}", "--luns", "--json", code=1)
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("orion-iscsifs: ")
    assert "refused" in line
