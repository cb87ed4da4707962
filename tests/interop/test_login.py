"""Authentication, digests, negotiated parameters and discovery, against targets that insist."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from orion_iscsifs.testing.istgt import Istgt, IstgtChap, IstgtSettings
from orion_iscsifs.testing.tgt import Tgt
from tests.interop.conftest import LUN_BYTES, MEBIBYTE, Disk, MakeEmbedded, TgtDisk
from tests.interop.product import Product, get, pattern, put, sized_file

pytestmark = pytest.mark.fuse
needs_tgt = pytest.mark.interop("tgtd", "tgtadm")
needs_istgt = pytest.mark.interop("istgt")

# 12 to 16 characters: the lengths that every target takes.
SECRET, MUTUAL_SECRET, WRONG_SECRET = "secret-of-mine", "secret-of-disk", "another-secret"


@dataclass(frozen=True)
class Credentials:
    """Options for a mount, and the files in them."""

    product: Product

    def one_way(self, secret: str = SECRET) -> list[str]:
        return ["chap_user=somebody", f"chap_secret_file={self.product.secret_file(secret)}"]

    def mutual(self, mutual_secret: str = MUTUAL_SECRET) -> list[str]:
        file = self.product.secret_file(mutual_secret)
        return [*self.one_way(), "mutual_user=disk", f"mutual_secret_file={file}"]


@pytest.fixture
def credentials(product: Product) -> Credentials:
    return Credentials(product)


def expect_refusal(product: Product, url: str, options: list[str], *words: str) -> None:
    """The mount fails with mount(8)'s code and one line that has one of `words` in it."""
    outcome = product.mount(url, product.new_mountpoint(), *options, code=32)
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("orion-iscsifs: ")
    assert any(word in line.lower() for word in words), line
    for secret in (SECRET, MUTUAL_SECRET, WRONG_SECRET):
        assert secret not in outcome.said


def use(product: Product, disk: Disk, *options: str) -> None:
    """Mount, write in several sizes, and compare with the backing file."""
    data = pattern(2 * MEBIBYTE + 4096, seed=30)
    with product.mounted(disk.url, *options) as mountpoint:
        put(mountpoint / disk.name, data, sync=True)
        put(mountpoint / disk.name, data[:4096], 8 * MEBIBYTE)
        assert get(mountpoint / disk.name, len(data)) == data
    content = disk.backing.read_bytes()
    assert content[: len(data)] == data
    assert content[8 * MEBIBYTE : 8 * MEBIBYTE + 4096] == data[:4096]


# -- CHAP -----------------------------------------------------------------------------------------


@needs_tgt
def test_chap_with_tgt(product: Product, tgt_disk: TgtDisk, credentials: Credentials) -> None:
    tgt_disk.target.require_chap("somebody", SECRET)
    use(product, tgt_disk, *credentials.one_way())
    expect_refusal(product, tgt_disk.url, credentials.one_way(WRONG_SECRET), "authentic", "chap")
    expect_refusal(product, tgt_disk.url, [], "authentic", "chap")


@needs_tgt
def test_mutual_chap_with_tgt(
    product: Product, tgt_disk: TgtDisk, credentials: Credentials
) -> None:
    tgt_disk.target.require_chap("somebody", SECRET)
    tgt_disk.target.prove_identity("disk", MUTUAL_SECRET)
    use(product, tgt_disk, *credentials.mutual())
    expect_refusal(product, tgt_disk.url, credentials.mutual(WRONG_SECRET), "authentic", "chap")


@needs_tgt
def test_a_target_that_skips_authentication_is_refused(
    product: Product, tgt_disk: TgtDisk, credentials: Credentials
) -> None:
    expect_refusal(product, tgt_disk.url, credentials.one_way(), "authentic", "chap")


@needs_tgt
def test_tgt_takes_sha256s_number_for_sha1(
    product: Product, tgt_disk: TgtDisk, credentials: Credentials
) -> None:
    """CHAP_A=7 is SHA-256; to tgt it is SHA-1. That can't work, and must fail in words (tgt itself
    gives no reason)."""
    tgt_disk.target.require_chap("somebody", SECRET)
    options = [*credentials.one_way(), "chap_algs=sha256"]
    expect_refusal(product, tgt_disk.url, options, "refused the login", "authentic", "chap")


@needs_istgt
@pytest.mark.parametrize("mutual", [False, True])
def test_chap_with_istgt(
    product: Product, credentials: Credentials, memory_path: Path, tmp_path: Path, mutual: bool
) -> None:
    backing = sized_file(memory_path / "istgt.img", LUN_BYTES)
    chap = IstgtChap(user="somebody", secret=SECRET)
    if mutual:
        chap = IstgtChap(
            user="somebody", secret=SECRET, mutual_user="disk", mutual_secret=MUTUAL_SECRET
        )
    with Istgt(tmp_path, IstgtSettings(luns={0: backing}, chap=chap)) as istgt:
        disk = Disk(istgt.lun_url(0), istgt.portal_url, istgt.iqn, 0, backing, istgt.port)
        use(product, disk, *(credentials.mutual() if mutual else credentials.one_way()))
        expect_refusal(product, disk.url, credentials.one_way(WRONG_SECRET), "authentic", "chap")


@pytest.fixture
def embedded_disk(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path, request: pytest.FixtureRequest
) -> Disk:
    """A disk of the embedded target, with CHAP (`one-way` or `mutual`) as the test's parameter."""
    options: list[str | Path] = ["--chap-user", "somebody"]
    options += ["--chap-secret-file", product.secret_file(SECRET)]
    if request.param == "mutual":
        options += ["--mutual-user", "disk"]
        options += ["--mutual-secret-file", product.secret_file(MUTUAL_SECRET)]
    backing = sized_file(memory_path / "embedded.img", LUN_BYTES)
    target = make_embedded({1: str(backing)}, *options)
    return Disk(target.lun_url(1), target.portal_url, target.iqn, 1, backing, target.port)


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha3-256"])
@pytest.mark.parametrize("embedded_disk", ["one-way", "mutual"], indirect=True)
def test_chap_algorithms(
    product: Product,
    embedded_disk: Disk,
    credentials: Credentials,
    algorithm: str,
    request: pytest.FixtureRequest,
) -> None:
    mutual = "mutual" in request.node.name
    options = credentials.mutual() if mutual else credentials.one_way()
    use(product, embedded_disk, *options, f"chap_algs={algorithm}")


@pytest.mark.parametrize("embedded_disk", ["mutual"], indirect=True)
def test_wrong_secrets_with_the_embedded_target(
    product: Product, embedded_disk: Disk, credentials: Credentials
) -> None:
    url = embedded_disk.url
    expect_refusal(product, url, credentials.one_way(WRONG_SECRET), "authentic", "chap")
    expect_refusal(product, url, credentials.mutual(WRONG_SECRET), "authentic", "chap")
    expect_refusal(product, url, [], "authentic", "chap")


# -- digests --------------------------------------------------------------------------------------


def digests(product: Product, url: str, *options: str) -> tuple[object, object]:
    """Header and data digest that the session has agreed on."""
    with product.mounted(url, *options) as mountpoint:
        (session,) = product.status(mountpoint)["sessions"]
        connections = session["connections"]
        assert isinstance(connections, list)
        return connections[0]["header_digest"], connections[0]["data_digest"]


@needs_tgt
@pytest.mark.parametrize("data", ["CRC32C", "None"])
@pytest.mark.parametrize("header", ["CRC32C", "None"])
def test_digests_with_tgt(product: Product, tgt_disk: TgtDisk, header: str, data: str) -> None:
    tgt_disk.target.set_parameter("HeaderDigest", header)
    tgt_disk.target.set_parameter("DataDigest", data)
    options = [f"header_digest={header.lower()}", f"data_digest={data.lower()}"]
    use(product, tgt_disk, *options)
    agreed = digests(product, tgt_disk.url, *options)
    assert [str(digest).lower() for digest in agreed] == [header.lower(), data.lower()]


@needs_istgt
def test_digests_with_istgt(product: Product, memory_path: Path, tmp_path: Path) -> None:
    backing = sized_file(memory_path / "istgt.img", LUN_BYTES)
    with Istgt(tmp_path, IstgtSettings(luns={0: backing})) as istgt:
        disk = Disk(istgt.lun_url(0), istgt.portal_url, istgt.iqn, 0, backing, istgt.port)
        use(product, disk, "header_digest=crc32c", "data_digest=crc32c")


def test_digests_with_the_embedded_target(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path
) -> None:
    backing = sized_file(memory_path / "embedded.img", LUN_BYTES)
    target = make_embedded({1: str(backing)}, "--digests")
    disk = Disk(target.lun_url(1), target.portal_url, target.iqn, 1, backing, target.port)
    options = ("header_digest=crc32c", "data_digest=crc32c")
    use(product, disk, *options)
    agreed = digests(product, disk.url, *options)
    assert [str(digest).lower() for digest in agreed] == ["crc32c", "crc32c"]


@needs_tgt
def test_a_digest_that_is_demanded_but_not_agreed(product: Product, tgt_disk: TgtDisk) -> None:
    tgt_disk.target.set_parameter("HeaderDigest", "None")
    expect_refusal(product, tgt_disk.url, ["header_digest=crc32c"], "digest")


# -- negotiated parameters ------------------------------------------------------------------------


@needs_tgt
@pytest.mark.parametrize(
    ("initial_r2t", "immediate_data"), list(itertools.product(["Yes", "No"], repeat=2))
)
def test_unsolicited_and_solicited_data(
    product: Product, tgt_disk: TgtDisk, initial_r2t: str, immediate_data: str
) -> None:
    tgt_disk.target.set_parameter("InitialR2T", initial_r2t)
    tgt_disk.target.set_parameter("ImmediateData", immediate_data)
    use(product, tgt_disk)


SMALL = {
    "tiny segments": {"MaxRecvDataSegmentLength": "512"},
    "tiny bursts": {"FirstBurstLength": "1024", "MaxBurstLength": "2048"},
    "odd sizes": {
        "MaxRecvDataSegmentLength": "3000",
        "FirstBurstLength": "5004",
        "MaxBurstLength": "70004",
    },
}


@needs_tgt
@pytest.mark.parametrize("initial_r2t", ["Yes", "No"])
@pytest.mark.parametrize("limits", SMALL.values(), ids=SMALL)
def test_small_limits_are_obeyed(
    product: Product, tgt_disk: TgtDisk, initial_r2t: str, limits: dict[str, str]
) -> None:
    for name, value in {"InitialR2T": initial_r2t, **limits}.items():
        tgt_disk.target.set_parameter(name, value)
    use(product, tgt_disk)


@needs_istgt
@pytest.mark.parametrize("immediate_data", [True, False])
def test_solicited_data_with_istgt(
    product: Product, memory_path: Path, tmp_path: Path, immediate_data: bool
) -> None:
    backing = sized_file(memory_path / "istgt.img", LUN_BYTES)
    settings = IstgtSettings(luns={0: backing}, immediate_data=immediate_data)
    with Istgt(tmp_path, settings) as istgt:
        use(product, Disk(istgt.lun_url(0), istgt.portal_url, istgt.iqn, 0, backing, istgt.port))


# -- discovery ------------------------------------------------------------------------------------


@needs_tgt
def test_discover(product: Product, tgt: Tgt, tmp_path: Path) -> None:
    names = [f"iqn.2024-01.org.example:disk{number}" for number in range(3)]
    for name in names:
        tgt.add_target(name).add_lun(1, sized_file(tmp_path / name[-5:], MEBIBYTE))
    listed = product("discover", tgt.portal).stdout
    assert all(name in listed for name in names)
    assert tgt.portal in listed
    document = json.dumps(json.loads(product("discover", tgt.portal, "--json").stdout))
    assert all(name in document for name in names)


def test_discover_each_target(product: Product, disk: Disk) -> None:
    assert disk.iqn in product("discover", f"127.0.0.1:{disk.port}").stdout
