"""A tgt that moves its initiators on to another one (RFC 7143 §11.13.5)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import free_port
from orion_iscsifs.testing.tgt import Tgt, TgtTarget
from tests.interop.conftest import MEBIBYTE, TGT_IQN, TgtDisk
from tests.interop.product import Product, get, pattern, put

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.interop("tgtd", "tgtadm"),
    pytest.mark.checklist(38, "11.13.5"),
]

ELSEWHERE = "127.0.0.2"
"""tgt does not redirect whoever came to the address that it would redirect to."""


@pytest.fixture
def signpost(tmp_path: Path) -> Iterator[TgtTarget]:
    """A target of the same name at another portal, without the disk."""
    folder = tmp_path / "signpost"
    folder.mkdir()
    with Tgt(folder) as daemon:
        yield daemon.add_target(TGT_IQN)


def point(signpost: TgtTarget, port: int, reason: str) -> None:
    for name, value in (("Address", ELSEWHERE), ("Port", str(port)), ("Reason", reason)):
        signpost.set_parameter(f"Redirect{name}", value)


@pytest.mark.parametrize("reason", ["Temporary", "Permanent"])
def test_the_disk_is_somewhere_else(
    product: Product, tgt_disk: TgtDisk, signpost: TgtTarget, reason: str
) -> None:
    elsewhere = f"portal={ELSEWHERE}:{tgt_disk.port}"
    tgt_disk.daemon.admin(["--op", "new", "--mode", "portal", "--param", elsewhere])
    point(signpost, tgt_disk.port, reason)
    data = pattern(MEBIBYTE, seed=50)
    with product.mounted(signpost.lun_url(1)) as mountpoint:
        put(mountpoint / "lun1", data, sync=True)
        assert get(mountpoint / "lun1", len(data)) == data
        # The next login finds its way again.
        assert tgt_disk.target.drop_connections() == 1
        put(mountpoint / "lun1", data[:4096], MEBIBYTE, sync=True)
    assert tgt_disk.backing.read_bytes()[:MEBIBYTE] == data


def test_the_signpost_points_nowhere(product: Product, signpost: TgtTarget) -> None:
    port = free_port()
    point(signpost, port, "Temporary")
    outcome = product.mount(signpost.lun_url(1), product.new_mountpoint(), code=32)
    (line,) = outcome.stderr.strip().splitlines()
    assert f"-> {ELSEWHERE}:{port}" in line
    assert "connection refused" in line
