"""The third-party targets themselves, seen by libiscsi's tools: what the other tests stand on."""

import signal
import subprocess
from pathlib import Path

import pytest

from orion_iscsifs.testing.istgt import Istgt, IstgtChap, IstgtSettings
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.programs import Program, ProgramFailed, run
from orion_iscsifs.testing.tgt import Tgt
from tests.interop.conftest import LUN_BYTES, Disk, MakeTgtDisk, TgtDisk
from tests.interop.product import sized_file

pytestmark = pytest.mark.interop(
    "tgtd", "tgtadm", "istgt", "iscsi-ls", "iscsi-inq", "iscsi-readcapacity16", "iscsi-perf"
)


def capacity(url: str) -> dict[str, str]:
    text = run(["iscsi-readcapacity16", url], timeout_s=10)
    return dict(row.split(":", 1) for row in text.splitlines() if ":" in row)


def test_tgt_offers_its_luns(tgt: Tgt, tmp_path: Path) -> None:
    target = tgt.add_target("iqn.2024-01.org.example:two")
    target.add_lun(1, sized_file(tmp_path / "a", LUN_BYTES))
    target.add_lun(2, sized_file(tmp_path / "b", LUN_BYTES), block_bytes=4096)
    listed = run(["iscsi-ls", "-s", tgt.portal_url], timeout_s=10)
    assert f"Target:{target.iqn} Portal:{tgt.portal},1" in listed
    assert listed.count("DIRECT_ACCESS") == 2
    assert capacity(target.lun_url(1))["LOGICAL BLOCK LENGTH IN BYTES"] == "512"
    assert capacity(target.lun_url(2))["LOGICAL BLOCK LENGTH IN BYTES"] == "4096"


def test_tgt_comes_back_as_it_was(tgt_disk: TgtDisk) -> None:
    tgt_disk.target.require_chap("somebody", "a-secret-of-mine")
    authority = "iscsi://somebody%a-secret-of-mine@"
    url = tgt_disk.url.replace("iscsi://", authority)
    before = capacity(url)
    tgt_disk.daemon.stop()
    with pytest.raises(ProgramFailed):
        capacity(url)
    tgt_disk.daemon.resume()
    assert capacity(url) == before
    with pytest.raises(ProgramFailed, match="Authentication"):
        capacity(tgt_disk.url)


def test_tgt_proves_its_identity(tgt_disk: TgtDisk) -> None:
    tgt_disk.target.require_chap("somebody", "a-secret-of-mine")
    tgt_disk.target.prove_identity("target", "secret-of-target")
    url = tgt_disk.url.replace("iscsi://", "iscsi://somebody%a-secret-of-mine@")
    assert capacity(f"{url}?target_user=target&target_password=secret-of-target")
    with pytest.raises(ProgramFailed):
        capacity(f"{url}?target_user=target&target_password=another-secret-1")


def test_tgt_drops_connections_on_request(tgt_disk: TgtDisk, tmp_path: Path) -> None:
    perf = ["iscsi-perf", "-b", "8", "-m", "4", "-t", "3", tgt_disk.url]
    with Program(perf, log=tmp_path / "perf.log") as program:
        program.wait_until(lambda: "iops" in program.log_tail())
        assert tgt_disk.target.drop_connections() == 1
        program.stop(signal.SIGKILL)  # it never gives up by itself


def test_tgt_parameters_are_set(tgt_disk: TgtDisk) -> None:
    for name, value in (("InitialR2T", "No"), ("ImmediateData", "No"), ("DataDigest", "CRC32C")):
        tgt_disk.target.set_parameter(name, value)
    shown = tgt_disk.daemon.admin(["--op", "show", "--mode", "target", "--tid", "1"])
    assert {"InitialR2T=No", "ImmediateData=No", "DataDigest=CRC32C"} <= set(shown.splitlines())


def test_frozen_tgt_is_silent(tgt_disk: TgtDisk) -> None:
    with tgt_disk.daemon.frozen(), pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["iscsi-inq", tgt_disk.url], check=True, capture_output=True, timeout=0.7)
    assert capacity(tgt_disk.url)


@pytest.fixture
def istgt_backing(memory_path: Path) -> Path:
    return sized_file(memory_path / "istgt.img", LUN_BYTES)


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_istgt_offers_its_lun(istgt_backing: Path, tmp_path: Path, block_bytes: int) -> None:
    settings = IstgtSettings(luns={0: istgt_backing}, block_bytes=block_bytes)
    with Istgt(tmp_path, settings) as istgt:
        shown = capacity(istgt.lun_url(0))
    assert shown["Total size"] == str(LUN_BYTES)
    assert shown["LOGICAL BLOCK LENGTH IN BYTES"] == str(block_bytes)


def test_istgt_asks_for_chap(istgt_backing: Path, tmp_path: Path) -> None:
    chap = IstgtChap(
        user="somebody", secret="a-secret-of-m", mutual_user="disk", mutual_secret="secret-of-disk"
    )
    with Istgt(tmp_path, IstgtSettings(luns={0: istgt_backing}, chap=chap)) as istgt:
        url = istgt.lun_url(0).replace("iscsi://", "iscsi://somebody%a-secret-of-m@")
        assert capacity(f"{url}?target_user=disk&target_password=secret-of-disk")
        with pytest.raises(ProgramFailed):
            capacity(istgt.lun_url(0))


def test_istgt_comes_back(istgt_backing: Path, tmp_path: Path) -> None:
    with Istgt(tmp_path, IstgtSettings(luns={0: istgt_backing})) as istgt:
        before = capacity(istgt.lun_url(0))
        istgt.stop()
        istgt.resume()
        assert capacity(istgt.lun_url(0)) == before


def test_the_proxy_carries_iscsi(proxied_disk: tuple[TgtDisk, TcpProxy, str]) -> None:
    disk, proxy, url = proxied_disk
    assert capacity(url) == capacity(disk.url)
    assert proxy.connections_accepted == 1


def test_several_daemons_at_once(make_tgt_disk: MakeTgtDisk, tmp_path: Path) -> None:
    disk: Disk = make_tgt_disk()
    with Tgt(tmp_path) as second:
        target = second.add_target("iqn.2024-01.org.example:second")
        assert target.iqn not in run(["iscsi-ls", disk.portal_url], timeout_s=10)
        assert target.iqn in run(["iscsi-ls", second.portal_url], timeout_s=10)
