"""Several paths to real targets, lost one by one under load that is verified."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orion_iscsifs.testing.istgt import Istgt, IstgtSettings
from orion_iscsifs.testing.netsim import Direction, TcpProxy
from orion_iscsifs.testing.programs import run
from tests.interop.conftest import MEBIBYTE, MakeEmbedded, TgtDisk
from tests.interop.product import Product, sized_file

pytestmark = pytest.mark.fuse

IMPATIENT = ("noop_interval=0.5", "noop_timeout=0.5", "login_timeout=2", "replacement_timeout=60")
FIO = ["fio", "--name=paths", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
FIO += ["--ioengine=libaio", "--direct=1", "--iodepth=16", "--output-format=terse"]
JOB = ["--rw=randwrite", "--bsrange=4k-64k", "--size=32M"]
SECONDS = 8.0


def paths(product: Product, mountpoint: Path) -> list[dict[str, Any]]:
    status: Any = product.status(mountpoint)
    found: list[dict[str, Any]] = status["paths"]
    return found


def wait_for_states(product: Product, mountpoint: Path, *wanted: str) -> None:
    deadline = time.monotonic() + 20
    while [path["state"] for path in paths(product, mountpoint)] != list(wanted):
        assert time.monotonic() < deadline, paths(product, mountpoint)
        time.sleep(0.1)


@contextmanager
def trouble(proxies: list[TcpProxy], seed: str, *, damage: bool) -> Iterator[list[str]]:
    """One path after the other is cut, stalled, refused, slowed or damaged, for a while."""
    kinds = ["cut", "stall", "refuse", "shape", "half_close"] + ["corrupt"] * damage
    chance, done, acted = random.Random(seed), threading.Event(), list[str]()

    def act() -> None:
        while not done.wait(chance.uniform(0.1, 0.5)):
            proxy = chance.choice(proxies)
            name = chance.choice(kinds)
            acted.append(name)
            if name == "shape":
                proxy.shape(delay_s=0.02, jitter_s=0.01, bytes_per_s=20 << 20)
            elif name == "corrupt":
                proxy.corrupt_next(Direction.TO_INITIATOR, after_bytes=chance.randrange(1 << 16))
            elif name == "half_close":
                proxy.half_close(chance.choice(list(Direction)))
            else:
                getattr(proxy, name)()
            done.wait(chance.uniform(0.2, 1.5))
            proxy.flow()
            proxy.accept()
            proxy.shape()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield acted
    finally:
        done.set()
        thread.join()


def verified_under_trouble(
    product: Product, url: str, backing: Path, proxies: list[TcpProxy], *options: str
) -> None:
    further = "+".join(proxy.portal for proxy in proxies[1:])
    words = (f"portals={further}", "cache=none", *IMPATIENT, *options)
    # Without digests damage would be data.
    damage = "data_digest=crc32c" in options
    with product.mounted(url, *words) as mountpoint:
        lun = mountpoint / "lun1"
        with trouble(proxies, url, damage=damage) as acted:
            until = time.monotonic() + SECONDS
            while time.monotonic() < until or len(acted) < 5:
                run([*FIO, *JOB, "--do_verify=1", f"--filename={lun}"], timeout_s=120)
        assert {path["state"] for path in paths(product, mountpoint)} <= {
            *("active", "failed", "marginal")
        }
        run([*FIO, *JOB, "--verify_only=1", f"--filename={lun}"], timeout_s=60)
    run([*FIO, *JOB, "--verify_only=1", "--direct=0", f"--filename={backing}"], timeout_s=60)


@contextmanager
def proxied(*ports: int) -> Iterator[list[TcpProxy]]:
    proxies = [TcpProxy("127.0.0.1", port) for port in ports]
    try:
        yield proxies
    finally:
        for proxy in proxies:
            proxy.close()


@pytest.mark.interop("fio", "tgtd", "tgtadm")
def test_verify_on_tgt_while_paths_fail(product: Product, tgt_disk: TgtDisk) -> None:
    """Two ways to one portal group: a login in place of the lost session ends it."""
    with proxied(tgt_disk.port, tgt_disk.port) as proxies:
        url = f"iscsi://{proxies[0].portal}/{tgt_disk.iqn}/1"
        verified_under_trouble(product, url, tgt_disk.backing, proxies)


@pytest.mark.interop("fio")
@pytest.mark.parametrize("policy", ["service-time", "failover"])
def test_verify_on_the_embedded_target_while_paths_fail(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path, policy: str
) -> None:
    backing = sized_file(memory_path / "disk.img", 64 * MEBIBYTE)
    target = make_embedded({1: str(backing)})
    with proxied(target.port, target.port) as proxies:
        url = f"iscsi://{proxies[0].portal}/{target.iqn}/1"
        options = ("data_digest=crc32c", f"path_policy={policy}")
        verified_under_trouble(product, url, backing, proxies, *options)


@pytest.mark.interop("istgt")
def test_both_paths_to_istgt(product: Product, tmp_path: Path) -> None:
    backing = sized_file(tmp_path / "disk", 8 * MEBIBYTE)
    with (
        Istgt(tmp_path, IstgtSettings(luns={0: backing})) as istgt,
        proxied(istgt.port, istgt.port) as proxies,
    ):
        url = f"iscsi://{proxies[0].portal}/{istgt.iqn}/0"
        options = (f"portals={proxies[1].portal}", "path_policy=round-robin", *IMPATIENT)
        with product.mounted(url, *options) as mountpoint:
            wait_for_states(product, mountpoint, "active", "active")
            (mountpoint / "lun0").write_bytes(b"1" * MEBIBYTE)
            proxies[0].refuse()
            with (mountpoint / "lun0").open("r+b", buffering=0) as file:
                assert file.read(MEBIBYTE) == b"1" * MEBIBYTE


@pytest.mark.interop("tgtd", "tgtadm")
def test_status_shows_the_paths(product: Product, tgt_disk: TgtDisk) -> None:
    with proxied(tgt_disk.port, tgt_disk.port) as proxies:
        url = f"iscsi://{proxies[0].portal}/{tgt_disk.iqn}/1"
        options = (f"portals={proxies[1].portal}", *IMPATIENT)
        with product.mounted(url, *options) as mountpoint:
            proxies[1].refuse()
            wait_for_states(product, mountpoint, "active", "failed")
            shown = product("status", mountpoint).stdout
            assert "degraded" in shown
            assert proxies[1].portal in shown
            (mountpoint / "lun1").write_bytes(b"1" * 4096)
