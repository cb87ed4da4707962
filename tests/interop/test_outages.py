"""Broken connections, silent and restarted targets: I/O is held, retried and correct."""

import contextlib
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from orion_iscsifs.testing.netsim import Direction, TcpProxy
from orion_iscsifs.testing.programs import wait_until
from tests.interop.conftest import MEBIBYTE, MakeEmbedded, TgtDisk
from tests.interop.product import EmbeddedTarget, Product, get, is_mounted, pattern, put, sized_file

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

Proxied = tuple[TgtDisk, TcpProxy, str]
CHUNK_BYTES = 16 * 1024
SPAN_BYTES = 8 * MEBIBYTE
IMPATIENT = ("noop_interval=1", "noop_timeout=1", "command_timeout=3", "login_timeout=3")


class Traffic:
    """Direct reads and writes at random places in a thread, checked against a model."""

    def __init__(self, file: Path) -> None:
        self.model = bytearray(SPAN_BYTES)
        self.requests_done = 0
        self.failure: BaseException | None = None
        self._file = file
        self._running = True
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        chosen = random.Random(40)
        buffer = mmap.mmap(-1, CHUNK_BYTES)
        descriptor = os.open(self._file, os.O_RDWR | os.O_DIRECT)
        try:
            while self._running:
                offset = chosen.randrange(SPAN_BYTES // CHUNK_BYTES) * CHUNK_BYTES
                here = slice(offset, offset + CHUNK_BYTES)
                if chosen.random() < 0.5:
                    buffer[:] = chosen.randbytes(CHUNK_BYTES)
                    assert os.pwritev(descriptor, [buffer], offset) == CHUNK_BYTES
                    self.model[here] = buffer[:]
                else:
                    assert os.preadv(descriptor, [buffer], offset) == CHUNK_BYTES
                    assert buffer[:] == self.model[here], f"wrong data at {offset}"
                self.requests_done += 1
            os.fsync(descriptor)
        except BaseException as failure:  # handed to the test's thread
            self.failure = failure
        finally:
            os.close(descriptor)
            buffer.close()

    def wait_for_requests(self, number: int, timeout_s: float = 30.0) -> None:
        """Wait until that many more requests are done: the mount works."""
        wanted = self.requests_done + number
        wait_until(
            lambda: self.requests_done >= wanted or self.failure is not None,
            what=f"{number} more requests",
            timeout_s=timeout_s,
        )
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join(60)
        assert not self._thread.is_alive(), "a request never ended"
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def busy_mount(product: Product, url: str, disk: TgtDisk, *options: str) -> Iterator[Traffic]:
    """Traffic on a mount inside the block; afterwards the backing file holds all of it."""
    with (
        product.mounted(url, *options) as mountpoint,
        Traffic(mountpoint / disk.name) as traffic,
    ):
        traffic.wait_for_requests(50)
        yield traffic
        traffic.wait_for_requests(50)
    assert disk.backing.read_bytes()[:SPAN_BYTES] == traffic.model


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_cut_connections(product: Product, proxied_disk: Proxied, cache: str) -> None:
    disk, proxy, url = proxied_disk
    with busy_mount(product, url, disk, f"cache={cache}", "cache_size=4M") as traffic:
        for _ in range(3):
            assert proxy.cut() == 1
            traffic.wait_for_requests(30)
    assert proxy.connections_accepted >= 4


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_restarted_target(product: Product, tgt_disk: TgtDisk, cache: str) -> None:
    options = (f"cache={cache}", "cache_size=4M", *IMPATIENT)
    with busy_mount(product, tgt_disk.url, tgt_disk, *options) as traffic:
        tgt_disk.daemon.stop()
        time.sleep(1.0)
        tgt_disk.daemon.resume()
        traffic.wait_for_requests(50)


def test_target_that_listens_before_it_is_configured(product: Product, tgt_disk: TgtDisk) -> None:
    """A restarted tgtd says "target not found" for a moment. That is no reason to give up."""
    with busy_mount(product, tgt_disk.url, tgt_disk, "cache=none", *IMPATIENT) as traffic:
        tgt_disk.daemon.stop()
        time.sleep(0.3)
        tgt_disk.daemon.resume(portal_first=True)
        traffic.wait_for_requests(50)


def test_connection_closed_by_the_target(product: Product, tgt_disk: TgtDisk) -> None:
    with busy_mount(product, tgt_disk.url, tgt_disk, "cache=none") as traffic:
        assert tgt_disk.target.drop_connections() == 1
        traffic.wait_for_requests(50)


def test_refused_for_a_while(product: Product, proxied_disk: Proxied) -> None:
    disk, proxy, url = proxied_disk
    with busy_mount(product, url, disk, "cache_size=4M", *IMPATIENT) as traffic:
        proxy.refuse()
        time.sleep(2.0)
        proxy.accept()
        traffic.wait_for_requests(50)


def test_silent_network(product: Product, proxied_disk: Proxied) -> None:
    disk, proxy, url = proxied_disk
    with busy_mount(product, url, disk, "cache=none", *IMPATIENT) as traffic:
        proxy.stall()
        time.sleep(4.0)  # longer than it takes to notice
        # What was on its way must not land any more: the old session ends before the retry.
        proxy.flow()
        traffic.wait_for_requests(50)


def test_frozen_target(product: Product, tgt_disk: TgtDisk) -> None:
    with busy_mount(product, tgt_disk.url, tgt_disk, "cache=none", *IMPATIENT) as traffic:
        with tgt_disk.daemon.frozen():
            time.sleep(3.5)
        traffic.wait_for_requests(50)


@pytest.mark.parametrize("direction", Direction)
def test_damaged_bytes_are_noticed_and_repaired(
    product: Product, proxied_disk: Proxied, direction: Direction
) -> None:
    disk, proxy, url = proxied_disk
    for name in ("HeaderDigest", "DataDigest"):
        disk.target.set_parameter(name, "CRC32C")
    options = ("cache=none", "header_digest=crc32c", "data_digest=crc32c", *IMPATIENT)
    with busy_mount(product, url, disk, *options) as traffic:
        for after_bytes in (0, 1000, 100_000):
            proxy.corrupt_next(direction, after_bytes=after_bytes)
            traffic.wait_for_requests(50)


def test_session_is_reinstated_under_the_same_isid(product: Product, proxied_disk: Proxied) -> None:
    disk, proxy, url = proxied_disk
    with product.mounted(url) as mountpoint:
        (before,) = product.status(mountpoint)["sessions"]
        proxy.cut()
        assert get(mountpoint / disk.name, 4096) == bytes(4096)
        (after,) = product.status(mountpoint)["sessions"]
        assert after["isid"] == before["isid"]
        assert after["state"] == "logged-in"


def timed(action: Callable[[], object]) -> tuple[OSError | None, float]:
    """The error that `action` ended with, and its duration in seconds."""
    started = time.monotonic()
    try:
        action()
    except OSError as error:
        return error, time.monotonic() - started
    return None, time.monotonic() - started


def test_reads_fail_after_replacement_timeout(product: Product, proxied_disk: Proxied) -> None:
    disk, proxy, url = proxied_disk
    with product.mounted(url, "replacement_timeout=2", "readahead=off", *IMPATIENT) as mountpoint:
        proxy.refuse()
        error, seconds = timed(lambda: get(mountpoint / disk.name, 4096, 32 * MEBIBYTE))
        assert error is not None
        assert error.errno == errno.EIO
        assert 1.0 < seconds < 12.0
        proxy.accept()
        wait_until(
            lambda: timed(lambda: get(mountpoint / disk.name, 4096, 40 * MEBIBYTE))[0] is None,
            what="working mount",
        )


def test_dirty_data_outlives_an_outage(product: Product, proxied_disk: Proxied) -> None:
    """While the target is away writes are absorbed, fsync fails in time, and nothing is lost."""
    disk, proxy, url = proxied_disk
    data = pattern(2 * MEBIBYTE, seed=41)
    with product.mounted(url, "replacement_timeout=2", *IMPATIENT) as mountpoint:
        file = mountpoint / disk.name
        proxy.refuse()
        assert timed(lambda: put(file, data))[0] is None
        error, seconds = timed(lambda: put(file, data[:4096], sync=True))
        assert error is not None
        assert error.errno == errno.EIO
        assert seconds < 15.0
        assert get(file, len(data)) == data
        proxy.accept()
        wait_until(
            lambda: timed(lambda: put(file, data[:4096], sync=True))[0] is None, what="fsync"
        )
        assert disk.backing.read_bytes()[: len(data)] == data


def test_umount_with_a_dead_target_says_so(product: Product, proxied_disk: Proxied) -> None:
    disk, proxy, url = proxied_disk
    data = pattern(MEBIBYTE, seed=42)
    with product.mounted(url, *IMPATIENT) as mountpoint:
        proxy.refuse()
        put(mountpoint / disk.name, data)
        refused = product("umount", mountpoint, "--timeout", "3", code=None, timeout_s=30)
        assert refused.code != 0
        assert refused.stderr.startswith("orion-iscsifs: ")
        proxy.accept()
        if is_mounted(mountpoint):
            product("umount", mountpoint)
        wait_until(
            lambda: disk.backing.read_bytes()[: len(data)] == data, what="the data on the target"
        )


def test_restarted_embedded_target(
    product: Product, make_embedded: MakeEmbedded, memory_path: Path
) -> None:
    backing = sized_file(memory_path / "embedded.img", 16 * MEBIBYTE)
    target: EmbeddedTarget = make_embedded({1: str(backing)})
    data = pattern(4 * MEBIBYTE, seed=43)
    with product.mounted(target.lun_url(1), *IMPATIENT) as mountpoint:
        put(mountpoint / "lun1", data[: 2 * MEBIBYTE], sync=True)
        target.stop()
        put(mountpoint / "lun1", data[2 * MEBIBYTE :], 2 * MEBIBYTE)
        target.resume()
        put(mountpoint / "lun1", data[:512], sync=True)
        assert backing.read_bytes()[: len(data)] == data
    target.stop()
