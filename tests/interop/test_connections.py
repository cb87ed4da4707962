"""Sessions of several connections and recovery at level 2, as a user mounts them.

What the target holds in the end is what counts: every test compares the file behind the LUN.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from orion_iscsifs.testing.istgt import Istgt, IstgtSettings
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.programs import run, wait_until
from tests.interop.conftest import LUN_BYTES, MEBIBYTE, Disk, MakeEmbedded, TgtDisk
from tests.interop.product import Product, get, pattern, put, sized_file

pytestmark = pytest.mark.fuse

FOUR = "connections=4"
DIRECT = "cache=none"
"""Every request is a command of its own, with the data compared at each fsync or none."""


def session(product: Product, mountpoint: Path) -> dict[str, Any]:
    (found,) = product.status(mountpoint)["sessions"]
    return cast("dict[str, Any]", found)


def wait_for_connections(product: Product, mountpoint: Path, number: int) -> dict[str, Any]:
    """The session as soon as it has that many connections: all but the first join later."""

    def connected() -> bool:
        connections = session(product, mountpoint)["connections"]
        return [one["state"] for one in connections] == ["logged-in"] * number

    wait_until(connected, what=f"{number} connections", timeout_s=20)
    return session(product, mountpoint)


def counters(found: Mapping[str, Any]) -> dict[str, int]:
    return cast("dict[str, int]", found["counters"])


@contextmanager
def fio(file: Path, size: str = "24M") -> Iterator[None]:
    """Direct random writes at depth 16 while the block runs; then all is read and compared."""
    job = ["--name=verify", "--rw=randwrite", "--bs=16k", f"--size={size}", "--ioengine=libaio"]
    job += ["--iodepth=16", "--direct=1", "--time_based", "--runtime=2", "--minimal"]
    job += [
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--verify_state_save=0",
        f"--filename={file}",
    ]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            run(["fio", *job], timeout_s=60)
        except BaseException as failure:  # for the test's thread
            failures.append(failure)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(70)
    assert not thread.is_alive()
    assert not failures, failures


def write_everywhere(file: Path, count: int = 64) -> dict[int, bytes]:
    """Blocks of 64 KiB all over the disk, each with an fsync at the end; by offset."""
    step = LUN_BYTES // count
    written = {number * step: pattern(65536, seed=number) for number in range(count)}
    for offset, data in written.items():
        put(file, data, offset)
    put(file, written[0], 0, sync=True)
    return written


def compare(backing: Path, written: Mapping[int, bytes]) -> None:
    for offset, data in written.items():
        assert get(backing, len(data), offset) == data, f"wrong data at {offset}"


@pytest.mark.interop("tgtd", "tgtadm", "fio")
@pytest.mark.checklist(2, "4.2.2.1")
def test_four_connections_to_tgt(product: Product, tgt_disk: TgtDisk) -> None:
    tgt_disk.target.set_parameter("MaxConnections", "4")
    with product.mounted(tgt_disk.url, FOUR, DIRECT) as mountpoint:
        found = wait_for_connections(product, mountpoint, 4)
        assert sorted(one["cid"] for one in found["connections"]) == [0, 1, 2, 3]
        assert len({one["local"] for one in found["connections"]}) == 4
        with fio(mountpoint / "lun1"):
            pass
        written = write_everywhere(mountpoint / "lun1")
        assert counters(session(product, mountpoint))["connections_lost"] == 0
    compare(tgt_disk.backing, written)


@pytest.mark.interop("tgtd", "tgtadm", "fio")
def test_one_of_tgts_connections_is_lost(product: Product, tgt_disk: TgtDisk) -> None:
    """tgt takes every logout for one of the connection that carries it: a new session begins."""
    tgt_disk.target.set_parameter("MaxConnections", "4")
    with TcpProxy("127.0.0.1", tgt_disk.port) as proxy:
        url = proxy.url(tgt_disk.iqn, tgt_disk.lun)
        with product.mounted(url, FOUR, DIRECT) as mountpoint:
            wait_for_connections(product, mountpoint, 4)
            with fio(mountpoint / "lun1"):
                assert proxy.cut_one(2)
            written = write_everywhere(mountpoint / "lun1")
            found = wait_for_connections(product, mountpoint, 4)
            assert counters(found)["connections_lost"] >= 1
    compare(tgt_disk.backing, written)


@pytest.mark.interop("istgt", "fio")
def test_one_of_istgts_connections_is_lost(
    product: Product, tmp_path: Path, memory_path: Path
) -> None:
    """istgt takes a logout for one of the connection that carries it, too."""
    backing = sized_file(memory_path / "istgt.img", LUN_BYTES)
    with (
        Istgt(tmp_path, IstgtSettings(luns={0: backing})) as target,
        TcpProxy("127.0.0.1", target.port) as proxy,
        product.mounted(proxy.url(target.iqn, 0), FOUR, DIRECT) as mountpoint,
    ):
        wait_for_connections(product, mountpoint, 4)
        with fio(mountpoint / "lun0"):
            assert proxy.cut_one(2)
        written = write_everywhere(mountpoint / "lun0")
        wait_for_connections(product, mountpoint, 4)
    compare(backing, written)


@pytest.mark.interop("fio")
def test_one_of_four_connections_is_lost_at_level_2(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path
) -> None:
    """The session goes on over the others, and the lost connection is replaced."""
    backing = sized_file(memory_path / "lun1.img", LUN_BYTES)
    target = make_embedded({1: str(backing)}, "--max-connections", "4", "--erl", "2")
    with TcpProxy("127.0.0.1", target.port) as proxy:
        url = proxy.url(target.iqn, 1)
        with product.mounted(url, FOUR, "erl=2", DIRECT) as mountpoint:
            before = wait_for_connections(product, mountpoint, 4)
            assert before["error_recovery_level"] == 2
            row = product("status", mountpoint).stdout.splitlines()[-1].split()
            assert row == [target.iqn, proxy.portal, "logged-in", "4", "2"]
            with fio(mountpoint / "lun1"):
                for number in (3, 1):
                    assert proxy.cut_one(number)
                    wait_for_connections(product, mountpoint, 4)
            written = write_everywhere(mountpoint / "lun1")
            after = session(product, mountpoint)
    assert after["tsih"] == before["tsih"]
    assert counters(after)["logins"] == 1
    assert counters(after)["connections_lost"] == 2
    compare(backing, written)


@pytest.mark.interop("fio")
@pytest.mark.checklist(28, "6.2")
def test_all_connections_are_lost_at_level_2(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path
) -> None:
    """The same session is taken up again (§6.3.6): the same TSIH, no new login."""
    backing = sized_file(memory_path / "lun1.img", LUN_BYTES)
    target = make_embedded({1: str(backing)}, "--max-connections", "2", "--erl", "2")
    with TcpProxy("127.0.0.1", target.port) as proxy:
        url = proxy.url(target.iqn, 1)
        with product.mounted(url, "connections=2", "erl=2", DIRECT) as mountpoint:
            before = wait_for_connections(product, mountpoint, 2)
            with fio(mountpoint / "lun1"):
                assert proxy.cut() == 2
                after = wait_for_connections(product, mountpoint, 2)
            written = write_everywhere(mountpoint / "lun1")
    assert after["tsih"] == before["tsih"]
    assert counters(after)["logins"] == 1
    assert counters(after)["connections_lost"] == 2
    compare(backing, written)


def test_more_is_asked_for_than_any_target_gives(product: Product, disk: Disk) -> None:
    """Targets that know one connection or level 0 only: the mount has what they give."""
    with product.mounted(disk.url, FOUR, "erl=2") as mountpoint:
        written = write_everywhere(mountpoint / disk.name, 16)
        found = session(product, mountpoint)
        assert found["state"] == "logged-in"
        assert found["error_recovery_level"] == 0
        assert counters(found)["logins"] == 1
        assert get(mountpoint / disk.name, 65536, MEBIBYTE * 4) == written[4 * MEBIBYTE]
    compare(disk.backing, written)
