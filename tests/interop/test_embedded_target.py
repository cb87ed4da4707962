"""`orion-iscsifs target serve` under libiscsi's tools and qemu-img, which know nothing of us."""

import json
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import ProgramFailed, run
from tests.interop.conftest import MEBIBYTE, MakeEmbedded
from tests.interop.product import EmbeddedTarget, Product, pattern, sized_file

needs_libiscsi = pytest.mark.interop("iscsi-ls", "iscsi-inq", "iscsi-readcapacity16", "iscsi-perf")
needs_qemu = pytest.mark.interop("qemu-img")
SIZE_BYTES = 32 * MEBIBYTE
SECRET, MUTUAL_SECRET = "secret-of-mine", "secret-of-disk"


@pytest.fixture
def backing(memory_path: Path) -> Path:
    return sized_file(memory_path / "backing.img", SIZE_BYTES)


@pytest.fixture
def target(make_embedded: MakeEmbedded, backing: Path) -> EmbeddedTarget:
    protected = sized_file(backing.with_name("protected.img"), SIZE_BYTES)
    served: EmbeddedTarget = make_embedded({1: str(backing), 2: "ram:16M", 3: f"{protected},ro"})
    return served


def with_user(url: str) -> str:
    return url.replace("iscsi://", f"iscsi://somebody%{SECRET}@")


@needs_libiscsi
def test_iscsi_ls(target: EmbeddedTarget) -> None:
    listed = run(["iscsi-ls", "-s", target.portal_url], timeout_s=10)
    assert f"Target:{target.iqn} Portal:127.0.0.1:{target.port}" in listed
    assert listed.count("DIRECT_ACCESS") == 3


@needs_libiscsi
def test_iscsi_inq(target: EmbeddedTarget) -> None:
    standard = run(["iscsi-inq", target.lun_url(1)], timeout_s=10)
    assert "Peripheral Device Type:DIRECT_ACCESS" in standard
    supported = run(["iscsi-inq", "-e", "1", "-c", "0", target.lun_url(1)], timeout_s=10)
    assert "BLOCK_LIMITS" in supported.upper()
    serials = {
        run(["iscsi-inq", "-e", "1", "-c", "131", target.lun_url(lun)], timeout_s=10)
        for lun in (1, 2)
    }
    assert len(serials) == 2, "two LUNs have one designator"


@needs_libiscsi
def test_iscsi_readcapacity16(target: EmbeddedTarget) -> None:
    for lun, size_bytes in ((1, SIZE_BYTES), (2, 16 * MEBIBYTE)):
        shown = run(["iscsi-readcapacity16", target.lun_url(lun)], timeout_s=10)
        assert f"Total size:{size_bytes}" in shown


@needs_libiscsi
@pytest.mark.parametrize("options", [[], ["-r"]], ids=["sequential", "random"])
def test_iscsi_perf(target: EmbeddedTarget, options: list[str]) -> None:
    words = ["iscsi-perf", "-t", "1", "-b", "8", "-m", "32", *options, target.lun_url(2)]
    assert "iops average" in run(words, timeout_s=15)


@needs_libiscsi
def test_unknown_names_are_refused(target: EmbeddedTarget) -> None:
    with pytest.raises(ProgramFailed):
        run(["iscsi-inq", f"{target.portal_url}/iqn.2024-01.org.example:nobody/1"], timeout_s=10)
    with pytest.raises(ProgramFailed):
        run(["iscsi-readcapacity16", target.lun_url(7)], timeout_s=10)


@needs_libiscsi
@pytest.mark.parametrize("digest", ["crc32c", "none"])
def test_header_digest(target: EmbeddedTarget, digest: str) -> None:
    url = f"{target.lun_url(2)}?header_digest={digest}"
    assert f"Total size:{16 * MEBIBYTE}" in run(["iscsi-readcapacity16", url], timeout_s=10)


@needs_libiscsi
def test_a_target_that_insists_on_digests(product: Product, make_embedded: MakeEmbedded) -> None:
    target: EmbeddedTarget = make_embedded({1: "ram:16M"}, "--digests")
    run(["iscsi-readcapacity16", target.lun_url(1)], timeout_s=10)
    mountpoint = product.new_mountpoint()
    refused = product.mount(target.lun_url(1), mountpoint, "header_digest=none", code=32)
    assert "refused the login" in refused.said
    with product.mounted(target.lun_url(1)) as mountpoint:
        shown = (mountpoint / ".orion" / "status.json").read_text()
        (session,) = json.loads(shown)["mounts"][0]["sessions"]
        assert session["connections"][0]["header_digest"] == "CRC32C"


@needs_libiscsi
def test_blocks_of_4096_bytes(make_embedded: MakeEmbedded) -> None:
    target: EmbeddedTarget = make_embedded({1: "ram:16M,block=4096"})
    shown = run(["iscsi-readcapacity16", target.lun_url(1)], timeout_s=10)
    assert "LOGICAL BLOCK LENGTH IN BYTES:4096" in shown
    assert f"Total size:{16 * MEBIBYTE}" in shown


@needs_libiscsi
@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha3-256"])
def test_chap(product: Product, make_embedded: MakeEmbedded, algorithm: str) -> None:
    target: EmbeddedTarget = make_embedded(
        {1: "ram:16M"},
        *("--chap-user", "somebody", "--chap-secret-file", product.secret_file(SECRET)),
        *("--mutual-user", "disk", "--mutual-secret-file", product.secret_file(MUTUAL_SECRET)),
    )
    mutual = f"{with_user(target.lun_url(1))}?target_user=disk&target_password={MUTUAL_SECRET}"
    url = f"{mutual}&auth={algorithm}"
    assert "Total size" in run(["iscsi-readcapacity16", url], timeout_s=10)
    with pytest.raises(ProgramFailed):
        run(["iscsi-readcapacity16", target.lun_url(1)], timeout_s=10)
    with pytest.raises(ProgramFailed):
        run(["iscsi-readcapacity16", url.replace(SECRET, "another-secret")], timeout_s=10)


@needs_qemu
def test_qemu_img_convert_and_compare(
    target: EmbeddedTarget, backing: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(pattern(9 * MEBIBYTE) + bytes(SIZE_BYTES - 9 * MEBIBYTE))
    url = target.lun_url(1)
    run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, url], timeout_s=60)
    assert backing.read_bytes() == source.read_bytes()
    assert "identical" in run(["qemu-img", "compare", "-f", "raw", "-F", "raw", source, url])
    copy = tmp_path / "copy.qcow2"
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", url, copy], timeout_s=60)
    assert "identical" in run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, copy])


@needs_qemu
def test_a_read_only_lun_is_read_only(target: EmbeddedTarget, tmp_path: Path) -> None:
    source = sized_file(tmp_path / "source.img", SIZE_BYTES)
    with pytest.raises(ProgramFailed):
        run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, target.lun_url(3)])


def test_one_file_is_one_lun(make_embedded: MakeEmbedded, backing: Path) -> None:
    """Two LUNs on one file would be two disks that change under each other's feet."""
    with pytest.raises(ProgramFailed, match="in use"):
        make_embedded({1: str(backing), 2: str(backing)})


def test_it_ends_cleanly(make_embedded: MakeEmbedded) -> None:
    target: EmbeddedTarget = make_embedded({1: "ram:16M"})
    assert target.stop() == 0
    assert "Traceback" not in target.program.log_tail()


def test_a_size_makes_the_file(make_embedded: MakeEmbedded, tmp_path: Path) -> None:
    file = tmp_path / "new.img"
    make_embedded({1: f"{file},size=12M"})
    assert file.stat().st_size == 12 * MEBIBYTE
