"""`iscsis://` through stunnel in front of tgt: data, certificates, and what goes wrong in words."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from orion_iscsifs.testing.certificates import Authority
from orion_iscsifs.testing.programs import free_port, run
from orion_iscsifs.testing.stunnel import Stunnel
from tests.interop.conftest import MEBIBYTE, TgtDisk
from tests.interop.product import Product, get, is_mounted, mount_entry, pattern, put

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm", "stunnel4")]


@dataclass(frozen=True)
class Secured:
    disk: TgtDisk
    authority: Authority
    front: Stunnel
    start: Callable[..., Stunnel]

    @property
    def url(self) -> str:
        return self.front.url(self.disk.iqn)

    @property
    def trust(self) -> str:
        return f"tls_ca={self.authority.ca}"


@pytest.fixture
def secured(tgt_disk: TgtDisk, tmp_path: Path) -> Iterator[Secured]:
    """A disk of tgt behind stunnel; `start(...)` makes further stunnels in front of it."""
    authority = Authority(tmp_path)
    with ExitStack() as running:

        def start(*names: str, clients: Path | None = None, **how: object) -> Stunnel:
            pair = authority.issue(*names, **how)  # type: ignore[arg-type]
            return running.enter_context(Stunnel(tmp_path, tgt_disk.port, pair, clients=clients))

        yield Secured(tgt_disk, authority, start("127.0.0.1", "localhost"), start)


def refused(product: Product, url: str, *options: str, code: int = 32) -> str:
    mountpoint = product.new_mountpoint()
    outcome = product.mount(url, mountpoint, *options, code=code)
    assert not is_mounted(mountpoint)
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("orion-iscsifs: ")
    return line


def test_data_through_tls(product: Product, secured: Secured) -> None:
    data = pattern(5 * MEBIBYTE + 4096, seed=40)
    with product.mounted(secured.url, secured.trust) as mountpoint:
        entry = mount_entry(mountpoint)
        assert entry is not None
        assert entry[0] == secured.url
        put(mountpoint / "lun1", data, sync=True)
        put(mountpoint / "lun1", data[:512], 32 * MEBIBYTE)
        assert get(mountpoint / "lun1", len(data)) == data
        settings = (mountpoint / ".orion" / "config.toml").read_text(encoding="utf-8")
        assert f'tls_ca = "{secured.authority.ca}"' in settings
    content = secured.disk.backing.read_bytes()
    assert content[: len(data)] == data
    assert content[32 * MEBIBYTE : 32 * MEBIBYTE + 512] == data[:512]


@pytest.mark.interop("fio")
def test_fio_verifies_through_tls(product: Product, secured: Secured) -> None:
    """Random writes of mixed sizes at depth 16, without the cache, read back and compared."""
    job = [
        "--name=tls",
        "--verify_state_save=0",
        "--rw=randwrite",
        "--bsrange=4k-256k",
        "--size=16M",
        "--ioengine=libaio",
    ]
    job += ["--iodepth=16", "--direct=1", "--verify=crc32c", "--do_verify=1", "--minimal"]
    with product.mounted(secured.url, secured.trust, "cache=none") as mountpoint:
        run(["fio", *job, f"--filename={mountpoint / 'lun1'}"], timeout_s=60)


def test_discovery_through_tls(product: Product, secured: Secured) -> None:
    portal = f"iscsis://{secured.front.portal}"
    listed = product("discover", portal, "-o", secured.trust).stdout
    assert secured.disk.iqn in listed
    asked = product("discover", portal, "-o", secured.trust, "--luns", "--json").stdout
    (target,) = json.loads(asked)["targets"]
    assert target["logged_in_at"] == secured.front.portal, "tgt's own portal has no TLS"
    assert target["error"] is None
    (disk,) = [lun for lun in target["luns"] if lun["type"] == "disk"]
    assert disk["size_bytes"] == secured.disk.size_bytes


def test_a_client_certificate(product: Product, secured: Secured) -> None:
    front = secured.start("127.0.0.1", clients=secured.authority.ca)
    url = front.url(secured.disk.iqn)
    client = secured.authority.issue(client=True)
    keys = f"tls_cert={client.cert},tls_key={client.key}"
    with product.mounted(url, secured.trust, keys) as mountpoint:
        put(mountpoint / "lun1", b"x" * 4096, sync=True)
    assert "set tls_cert=" in refused(product, url, secured.trust)
    stranger = Authority(secured.authority.ca.parent, "strangers").issue(client=True)
    keys = f"tls_cert={stranger.cert},tls_key={stranger.key}"
    assert "authority of our certificate" in refused(product, url, secured.trust, keys)


@pytest.mark.parametrize(
    ("names", "how", "words"),
    [
        (["127.0.0.1"], {"days": (-2, -1)}, "the target's TLS certificate has expired"),
        (["192.0.2.1"], {}, "is not for this address"),
        (["127.0.0.1"], {"self_signed": True}, "is self-signed and not trusted"),
    ],
)
def test_a_bad_certificate(
    product: Product, secured: Secured, names: list[str], how: dict[str, object], words: str
) -> None:
    front = secured.start(*names, **how)
    line = refused(product, front.url(secured.disk.iqn), secured.trust)
    assert words in line
    assert front.portal in line


def test_a_wrong_name_and_an_unknown_authority(product: Product, secured: Secured) -> None:
    front = secured.start("other.example")
    by_name = front.url(secured.disk.iqn, host="localhost")
    assert "is for another host name" in refused(product, by_name, secured.trust)
    assert "unknown authority" in refused(product, secured.url)


def test_tls_on_one_side_only(product: Product, secured: Secured) -> None:
    plain = f"iscsis://127.0.0.1:{secured.disk.port}/{secured.disk.iqn}/1"
    line = refused(product, plain, secured.trust, "login_timeout=2")
    assert "TLS" in line
    line = refused(product, secured.front.url(secured.disk.iqn, scheme="iscsi"))
    assert "iscsis://" in line
    line = refused(product, secured.disk.url, secured.trust, code=2)
    assert "write iscsis:// for TLS" in line


def test_nobody_behind_the_tls_server(product: Product, secured: Secured, tmp_path: Path) -> None:
    pair = secured.authority.issue("127.0.0.1")
    with Stunnel(tmp_path, free_port(), pair) as front:
        line = refused(product, front.url(secured.disk.iqn), secured.trust)
    assert "check what the TLS server forwards to" in line


def test_the_tls_server_is_restarted_with_a_new_certificate(
    product: Product, secured: Secured
) -> None:
    data = pattern(MEBIBYTE, seed=41)
    with product.mounted(secured.url, secured.trust) as mountpoint:
        put(mountpoint / "lun1", data[:4096], sync=True)
        secured.front.stop()
        secured.front.resume(secured.authority.issue("127.0.0.1"))
        put(mountpoint / "lun1", data, sync=True)
        assert get(mountpoint / "lun1", len(data)) == data
    assert secured.disk.backing.read_bytes()[: len(data)] == data
