"""Targets to mount: tgt, istgt and the embedded one, each with ports and files of its own."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orion_iscsifs.testing.istgt import Istgt, IstgtSettings
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.tgt import Tgt, TgtTarget
from tests.interop.product import EmbeddedTarget, Product, sized_file

MEBIBYTE = 1 << 20
LUN_BYTES = 64 * MEBIBYTE
TGT_IQN = "iqn.2024-01.org.example:tgt"


@dataclass(frozen=True)
class Disk:
    """One LUN that somebody serves, and the file behind it."""

    url: str
    portal_url: str
    iqn: str
    lun: int
    backing: Path
    port: int

    @property
    def name(self) -> str:
        return f"lun{self.lun}"

    @property
    def size_bytes(self) -> int:
        return self.backing.stat().st_size


@dataclass(frozen=True)
class TgtDisk(Disk):
    """A LUN of tgt, with the daemon and the target to turn screws on."""

    daemon: Tgt
    target: TgtTarget


@pytest.fixture
def product(tmp_path: Path) -> Product:
    home = tmp_path / "home"
    home.mkdir()
    return Product(home)


@pytest.fixture
def tgt(tmp_path: Path) -> Iterator[Tgt]:
    with Tgt(tmp_path) as daemon:
        yield daemon


MakeTgtDisk = Callable[..., TgtDisk]


@pytest.fixture
def make_tgt_disk(tgt: Tgt, memory_path: Path) -> MakeTgtDisk:
    """Makes one target with one disk, LUN 1: `make_tgt_disk(size_bytes=, block_bytes=)`."""

    def make(*, size_bytes: int = LUN_BYTES, block_bytes: int = 512) -> TgtDisk:
        backing = sized_file(memory_path / "tgt-lun1.img", size_bytes)
        target = tgt.add_target(TGT_IQN)
        target.add_lun(1, backing, block_bytes=block_bytes)
        return TgtDisk(
            url=target.lun_url(1),
            portal_url=tgt.portal_url,
            iqn=TGT_IQN,
            lun=1,
            backing=backing,
            port=tgt.port,
            daemon=tgt,
            target=target,
        )

    return make


@pytest.fixture
def tgt_disk(make_tgt_disk: MakeTgtDisk) -> TgtDisk:
    return make_tgt_disk()


MakeEmbedded = Callable[..., EmbeddedTarget]


@pytest.fixture
def make_embedded(product: Product) -> Iterator[MakeEmbedded]:
    """Starts `orion-iscsifs target serve`: `make_embedded({1: "ram:64M"}, "--digests")`."""
    with contextlib.ExitStack() as running:

        def make(luns: dict[int, str], *options: str | Path, **more: str) -> EmbeddedTarget:
            target = EmbeddedTarget(product, luns, *options, **more)
            running.callback(target.stop)
            return target

        yield make


@pytest.fixture(
    params=[
        pytest.param("tgt", marks=pytest.mark.interop("tgtd", "tgtadm")),
        pytest.param("istgt", marks=pytest.mark.interop("istgt")),
        "embedded",
    ]
)
def disk(request: pytest.FixtureRequest, tmp_path: Path, memory_path: Path) -> Iterator[Disk]:
    """The same empty 64 MiB disk, served by each of the three targets."""
    if request.param == "tgt":
        yield request.getfixturevalue("tgt_disk")
        return
    backing = sized_file(memory_path / f"{request.param}.img", LUN_BYTES)
    with contextlib.ExitStack() as running:
        server: Istgt | EmbeddedTarget
        if request.param == "istgt":
            lun = 0
            server = running.enter_context(Istgt(tmp_path, IstgtSettings(luns={lun: backing})))
        else:
            lun = 1
            server = request.getfixturevalue("make_embedded")({lun: str(backing)})
        yield Disk(
            url=server.lun_url(lun),
            portal_url=server.portal_url,
            iqn=server.iqn,
            lun=lun,
            backing=backing,
            port=server.port,
        )


@pytest.fixture
def proxied_disk(tgt_disk: TgtDisk) -> Iterator[tuple[TgtDisk, TcpProxy, str]]:
    """A disk of tgt behind a network that can be made to fail, and its URL through that network."""
    with TcpProxy("127.0.0.1", tgt_disk.port) as proxy:
        yield tgt_disk, proxy, proxy.url(tgt_disk.iqn, tgt_disk.lun)


@pytest.fixture
def keys(tmp_path: Path) -> list[Path]:
    """Three key files: a passphrase, one with a newline, one with every byte."""
    contents = (b"correct horse", b"battery\nstaple\n", random.Random(1).randbytes(3000))
    paths = [tmp_path / f"key{number}" for number in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return paths
