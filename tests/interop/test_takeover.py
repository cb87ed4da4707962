"""A worker that dies is a pause: another one goes on with the same mount, if that is safe."""

import contextlib
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.fuse.mountpoint import unmount
from orion_iscsifs.testing.netsim import TcpProxy
from orion_iscsifs.testing.programs import run, wait_until
from tests.interop.conftest import MEBIBYTE, Disk, TgtDisk
from tests.interop.product import (
    Product,
    abandon,
    alive,
    get,
    is_mounted,
    loop_device,
    pattern,
    put,
)
from tests.interop.test_outages import Traffic, timed
from tests.interop.workers import (
    can_take_over,
    in_front,
    kill_worker,
    log_of,
    supervisor_of,
    takeovers,
    watchdog,
    worker_of,
)

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm"), can_take_over]
SECTOR_BYTES = 512
STAMP = struct.Struct("<QQ")


@pytest.fixture(autouse=True)
def nothing_hangs(product: Product) -> Iterator[None]:
    with watchdog(product):
        yield


def safe(cache: str, folder: Path) -> list[str]:
    """Options of a mode in which nothing that was acknowledged is lost with the worker."""
    log = [f"log_dir={folder}", "log_size=32M"] if cache == "log" else []
    return [f"cache={cache}", *log]


@pytest.mark.parametrize("cache", ["none", "writethrough", "log"])
def test_traffic_goes_on(product: Product, tgt_disk: TgtDisk, cache: str, tmp_path: Path) -> None:
    """Direct I/O while the worker is killed at random moments: no error, and the right data."""
    chosen = random.Random(51)
    options = [*safe(cache, tmp_path / "log"), "cache_size=4M"]
    with product.mounted(tgt_disk.url, *options) as mountpoint:
        (before,) = product.status(mountpoint)["sessions"]
        supervisor = supervisor_of(product, mountpoint)
        with Traffic(mountpoint / tgt_disk.name) as traffic:
            for _ in range(5):
                traffic.wait_for_requests(30)
                time.sleep(chosen.random() / 5)
                kill_worker(supervisor)
            traffic.wait_for_requests(50)
        (after,) = product.status(mountpoint)["sessions"]
        assert after["isid"] == before["isid"]
        assert takeovers(product, mountpoint) == 5
        product.umount(mountpoint)
        assert not alive(supervisor)
    content = tgt_disk.backing.read_bytes()
    assert content[: len(traffic.model)] == traffic.model


def stamped(offset: int, turn: int, length: int) -> bytes:
    """Every sector says where it is and when it was written."""
    sectors = range(offset, offset + length, SECTOR_BYTES)
    return b"".join(STAMP.pack(place, turn).ljust(SECTOR_BYTES, b"s") for place in sectors)


@pytest.mark.parametrize("cache", ["writethrough", "log"])
def test_buffered_writers_and_an_open_file(
    product: Product, tgt_disk: TgtDisk, cache: str, tmp_path: Path
) -> None:
    """Through the page cache, with files that the first worker has opened; each sector checked."""
    chosen = random.Random(52)
    length, size = 64 * 1024, 16 * MEBIBYTE
    turns: dict[int, int] = {}
    with product.mounted(tgt_disk.url, *safe(cache, tmp_path / "log")) as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        file = os.open(mountpoint / tgt_disk.name, os.O_RDWR)
        durable = os.open(mountpoint / tgt_disk.name, os.O_RDWR | os.O_DSYNC)
        listing = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        inode = os.fstat(file).st_ino
        try:
            for turn in range(1, 201):
                offset = chosen.randrange(size // length) * length
                turns[offset] = turn
                descriptor = durable if turn % 7 == 0 else file
                data = stamped(offset, turn, length)
                assert os.pwrite(descriptor, data, offset) == length
                if turn % 11 == 0:
                    os.fsync(file)
                if turn % 50 == 0:
                    kill_worker(supervisor)
            assert os.fstat(file).st_ino == inode
            assert tgt_disk.name in os.listdir(listing)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset, turn in turns.items():
                assert os.pread(file, length, offset) == stamped(offset, turn, length)
        finally:
            for descriptor in (file, durable, listing):
                os.close(descriptor)
        (mountpoint / ".orion" / "status.json").read_text()
    content = tgt_disk.backing.read_bytes()
    for offset, turn in turns.items():
        assert content[offset : offset + length] == stamped(offset, turn, length)


def test_other_ways_to_die(product: Product, disk: Disk) -> None:
    """On each of the three targets."""
    with product.mounted(disk.url, "cache=none") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        for turn, number in enumerate((signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL), 1):
            victim = product.pid(mountpoint)
            os.kill(victim, number)
            data = pattern(4096, seed=turn)
            put(mountpoint / disk.name, data, sync=True)
            assert get(mountpoint / disk.name, 4096) == data
            assert product.pid(mountpoint) != victim
        # What pyfuse3 does not know is hooked in the new worker too.
        zeroed = ("--zero-range", "--keep-size", "--length", "4096")
        run(["fallocate", *zeroed, mountpoint / disk.name])
        assert not any(get(mountpoint / disk.name, 4096))
        assert supervisor_of(product, mountpoint) == supervisor
    assert f"was killed by {signal.SIGSEGV.name}" in log_of(product)


def test_what_only_the_log_has_is_there_after_a_takeover(
    product: Product, tgt_disk: TgtDisk, tmp_path: Path
) -> None:
    """Writes that were acknowledged and that the target has not seen."""
    options = [*safe("log", tmp_path / "log"), "dirty_age=60"]
    with product.mounted(tgt_disk.url, *options) as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        path = mountpoint / tgt_disk.name
        for turn in range(1, 4):
            for number in range(64):
                put(path, pattern(4096, seed=turn * 100 + number), number * 8192)
            kill_worker(supervisor)  # acknowledged, and never synced
            for number in range(64):
                assert get(path, 4096, number * 8192) == pattern(4096, seed=turn * 100 + number)
            put(path, b"s" * 512, MEBIBYTE, sync=True)
        assert takeovers(product, mountpoint) == 3
        product.umount(mountpoint)
    content = tgt_disk.backing.read_bytes()
    for number in range(64):
        assert content[number * 8192 :][:4096] == pattern(4096, seed=300 + number)
    assert content[MEBIBYTE:][:512] == b"s" * 512


def test_read_only_mounts_are_taken_over(product: Product, tgt_disk: TgtDisk) -> None:
    tgt_disk.backing.write_bytes(pattern(tgt_disk.size_bytes))
    with (
        product.mounted(tgt_disk.url, "ro", "readahead=off") as mountpoint,
        (mountpoint / tgt_disk.name).open("rb", buffering=0) as file,
    ):
        os.kill(product.pid(mountpoint), signal.SIGKILL)
        file.seek(MEBIBYTE)
        assert file.read(MEBIBYTE) == tgt_disk.backing.read_bytes()[MEBIBYTE : 2 * MEBIBYTE]


@pytest.mark.loop
@pytest.mark.parametrize("cache", ["writethrough", "log"])
def test_a_file_system_survives(
    product: Product, tgt_disk: TgtDisk, cache: str, tmp_path: Path
) -> None:
    """ext4 on a loop device: a journal write that fails would make it read-only."""
    inside = product.home / "ext4"
    inside.mkdir()
    with product.mounted(tgt_disk.url, *safe(cache, tmp_path / "log")) as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        with loop_device(mountpoint / tgt_disk.name) as device:
            run(["mkfs.ext4", "-q", device])
            run(["mount", device, inside])
            try:
                files = {f"f{index}": pattern(200_000, seed=index) for index in range(24)}
                for index, (name, data) in enumerate(files.items()):
                    with (inside / name).open("wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    if index % 6 == 3:
                        kill_worker(supervisor)
                Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
                for name, data in files.items():
                    assert (inside / name).read_bytes() == data
                (inside / "still writable").write_bytes(b"yes")
            finally:
                run(["umount", inside])
            run(["fsck.ext4", "-f", "-n", device])


def test_writeback_is_not_taken_over(product: Product, tgt_disk: TgtDisk) -> None:
    with product.mounted(tgt_disk.url, "cache=writeback") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        put(mountpoint / tgt_disk.name, pattern(4096))
        os.kill(product.pid(mountpoint), signal.SIGKILL)
        wait_until(lambda: not alive(supervisor), what="end of the supervisor")
        error, seconds = timed(lambda: get(mountpoint / tgt_disk.name, 512, MEBIBYTE))
        assert error is not None
        assert seconds < 5
        assert "killed by SIGKILL; the mount ends with it: cache=writeback" in log_of(product)
        said = product("umount", mountpoint).stderr
        assert "its daemon had died" in said


def test_a_worker_that_always_dies_is_given_up(product: Product, tgt_disk: TgtDisk) -> None:
    """Nothing hangs: requests end with an error, and the dead mount can be unmounted."""
    with product.mounted(tgt_disk.url, "cache=none") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        deadline = time.monotonic() + 60
        with in_front("dd", f"if={mountpoint / tgt_disk.name}", "bs=1M", "iflag=direct") as reader:
            while alive(supervisor):
                assert time.monotonic() < deadline, "not given up"
                with contextlib.suppress(OSError, FileNotFoundError):
                    if (worker := worker_of(supervisor)) is not None:
                        os.kill(worker, signal.SIGKILL)
                time.sleep(0.01)
            reader.wait(10)
        error, _ = timed(lambda: get(mountpoint / tgt_disk.name, 512, MEBIBYTE))
        assert error is not None
        assert "6 times within 60 s: the mount is given up" in log_of(product)
        product("umount", mountpoint)
        assert not is_mounted(mountpoint)


Proxied = tuple[TgtDisk, TcpProxy, str]


def test_the_target_is_away_at_that_time(product: Product, proxied_disk: Proxied) -> None:
    """The pause lasts until it is back. Commands work meanwhile, or wait."""
    disk, proxy, url = proxied_disk
    with product.mounted(url, "cache=none", "login_timeout=3") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        proxy.refuse()
        kill_worker(supervisor)
        file = mountpoint / disk.name
        words = ("if=/dev/zero", f"of={file}", "bs=4k", "count=1", "conv=notrunc,fsync")
        with in_front("dd", *words, "status=none") as writer:
            wait_until(lambda: "trying again" in log_of(product), what="a first try")
            status = product.status(mountpoint)
            assert status["state"] == "recovering"
            assert [lun["name"] for lun in status["luns"]] == [disk.name]
            refused = product("umount", mountpoint, "--timeout", "1", code=1).stderr
            assert "still mounted" in refused
            assert writer.poll() is None
            proxy.accept()
            product("flush", mountpoint)
            assert writer.wait(30) == 0
        assert takeovers(product, mountpoint) == 1
        assert "requests are held, trying again" in log_of(product)


def test_it_is_given_up_after_replacement_timeout(product: Product, proxied_disk: Proxied) -> None:
    disk, proxy, url = proxied_disk
    with product.mounted(url, "cache=none", "replacement_timeout=1") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        proxy.refuse()
        kill_worker(supervisor)
        wait_until(lambda: not alive(supervisor), what="end of the supervisor", timeout_s=40)
        error, _ = timed(lambda: get(mountpoint / disk.name, 512, MEBIBYTE))
        assert error is not None
        proxy.accept()


def test_force_while_the_target_is_away(product: Product, proxied_disk: Proxied) -> None:
    disk, proxy, url = proxied_disk
    with product.mounted(url, "cache=none") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        proxy.refuse()
        kill_worker(supervisor)
        with in_front("dd", f"if={mountpoint / disk.name}", "bs=1M", "iflag=direct") as reader:
            product("umount", mountpoint, "--force", "--timeout", "1")
            assert not is_mounted(mountpoint)
            assert not alive(supervisor)
            assert reader.wait(10) != 0


def test_umount_right_after_a_kill(product: Product, tgt_disk: TgtDisk) -> None:
    data = pattern(4096, seed=55)
    with product.mounted(tgt_disk.url, "cache=writethrough") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        put(mountpoint / tgt_disk.name, data)
        os.kill(product.pid(mountpoint), signal.SIGKILL)
        product("umount", mountpoint)
        assert not is_mounted(mountpoint)
        assert not alive(supervisor)
    assert tgt_disk.backing.read_bytes()[:4096] == data
    with product.mounted(tgt_disk.url) as mountpoint:  # nothing is left locked or reserved
        assert get(mountpoint / tgt_disk.name, 4096) == data


def test_umount2_while_there_is_no_worker(product: Product, proxied_disk: Proxied) -> None:
    """Who unmounts past us leaves nothing to take over: nobody tries any longer."""
    _, proxy, url = proxied_disk
    with product.mounted(url, "cache=none") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        proxy.refuse()
        kill_worker(supervisor)
        unmount(str(mountpoint), lazy=True)
        wait_until(lambda: not alive(supervisor), what="end of the daemon", timeout_s=30)
        assert not is_mounted(mountpoint)


@pytest.mark.parametrize("whom", ["worker", "supervisor", "both"])
def test_sigterm_after_a_takeover(product: Product, tgt_disk: TgtDisk, whom: str) -> None:
    with product.mounted(tgt_disk.url, "cache=none") as mountpoint:
        supervisor = supervisor_of(product, mountpoint)
        kill_worker(supervisor)
        worker = product.pid(mountpoint)
        chosen = {"worker": [worker], "supervisor": [supervisor], "both": [supervisor, worker]}
        for pid in chosen[whom]:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not (alive(supervisor) or alive(worker)), what="end", timeout_s=20)
        assert not is_mounted(mountpoint)
    assert "given up" not in log_of(product)


def test_the_death_of_the_supervisor_ends_both(product: Product, tgt_disk: TgtDisk) -> None:
    with product.mounted(tgt_disk.url, "cache=none") as mountpoint:
        worker, supervisor = product.pid(mountpoint), supervisor_of(product, mountpoint)
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not alive(worker), what="end of the worker", timeout_s=10)
        abandon(mountpoint)


def test_in_the_foreground(product: Product, tgt_disk: TgtDisk) -> None:
    mountpoint = product.new_mountpoint()
    words = ("mount", tgt_disk.url, mountpoint, "-f", "-o", "cache=none")
    with product.start(*words) as program:
        try:
            program.wait_until(lambda: (mountpoint / "lun1").exists())
            supervisor = supervisor_of(product, mountpoint)
            assert supervisor == program.pid
            kill_worker(supervisor)
            put(mountpoint / "lun1", pattern(4096), sync=True)
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 0, program.log_tail()
            assert "taken over by process" in program.log_tail()
        finally:
            abandon(mountpoint)
    assert tgt_disk.backing.read_bytes()[:4096] == pattern(4096)
