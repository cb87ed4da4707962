"""Short of memory: no deadlock; and how much memory the daemon itself takes."""

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import Program, ProgramFailed, run
from tests.interop import dirtier
from tests.interop.conftest import MEBIBYTE, MakeEmbedded
from tests.interop.memory_group import MemoryGroup, NoMemoryGroup, memory_group
from tests.interop.product import COMMAND, Product, abandon, alive, loop_device, sized_file
from tests.interop.test_filesystems import file_system

pytestmark = pytest.mark.fuse

CACHE_BYTES = 64 * MEBIBYTE
OVERHEAD_BYTES_MAX = 150 * MEBIBYTE
"""What the daemon may take besides its cache."""

LIMIT_BYTES = 256 * MEBIBYTE
REQUESTS_BYTES_MAX = 128 * MEBIBYTE
"""The kernel hands over up to 128 writes of 1 MiB, and they are in memory while they wait."""
FILES, BLOCKS = 4, 256
STUCK_S = 60.0
"""After this long it is a deadlock: some 10 s are usual."""


# -- no deadlock -----------------------------------------------------------------------------------


MakeGroup = Callable[..., MemoryGroup]


@pytest.fixture
def make_group(tmp_path: Path) -> Iterator[MakeGroup]:
    if os.geteuid() != 0:
        pytest.skip("memory cgroups need root")
    with contextlib.ExitStack() as made:

        def make(limit_bytes: int = LIMIT_BYTES) -> MemoryGroup:
            try:
                return made.enter_context(memory_group(limit_bytes, tmp_path / "cgroup"))
            except NoMemoryGroup as error:
                pytest.skip(f"no memory cgroup: {error}")

        yield make


@contextlib.contextmanager
def fuse_connections(folder: Path) -> Iterator[Path]:
    """fusectl in a private place: a connection that hangs is aborted there."""
    folder.mkdir()
    run(["mount", "-t", "fusectl", "none", folder])
    try:
        yield folder
    finally:
        run(["umount", "-l", folder])


@contextlib.contextmanager
def never_stuck(abort: Path, *groups: MemoryGroup) -> Iterator[None]:
    """After `STUCK_S` whoever waits inside gets an error: the connection is aborted first, since
    nothing that waits for the daemon can be killed."""
    fired = threading.Event()

    def end_it() -> None:
        fired.set()
        abort.write_text("1", encoding="ascii")
        for pid in [pid for group in groups for pid in group.pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(STUCK_S, end_it)
    timer.start()
    try:
        yield
    except (ProgramFailed, AssertionError) as error:
        if not fired.is_set():
            raise
        raise AssertionError(f"stuck: not done after {STUCK_S:.0f} s, then aborted") from error
    finally:
        timer.cancel()
        timer.join()
    assert not fired.is_set(), f"stuck: not done after {STUCK_S:.0f} s, then aborted"


@pytest.mark.loop
@pytest.mark.interop("mkfs.ext4", "fsck.ext4")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("together", [True, False], ids=["one group", "two groups"])
def test_no_deadlock_when_memory_is_short(
    product: Product,
    make_embedded: MakeEmbedded,
    make_group: MakeGroup,
    tmp_path: Path,
    together: bool,
) -> None:
    """Four times what memory holds is written; the daemon is under such a limit itself."""
    target = make_embedded({1: "ram:1536M"})
    mountpoint = product.new_mountpoint()
    writers = make_group()
    need_bytes = CACHE_BYTES + OVERHEAD_BYTES_MAX + REQUESTS_BYTES_MAX
    own = writers if together else make_group(need_bytes)
    with contextlib.ExitStack() as undo:
        connections = undo.enter_context(fuse_connections(tmp_path / "fusectl"))
        undo.enter_context(mounted_inside(product, own, target.lun_url(), mountpoint))
        pid = product.pid(mountpoint)
        assert pid in own.pids(), "the daemon is not under the limit"
        if together:
            skip_where_it_may_hang(product, mountpoint, own)
        abort = connections / str(os.minor(os.lstat(mountpoint).st_dev)) / "abort"
        undo.enter_context(never_stuck(abort, own, writers))
        device = undo.enter_context(loop_device(mountpoint / "lun1"))
        run(writers.command("mkfs.ext4", "-q", "-F", device), timeout_s=STUCK_S)
        top = tmp_path / "top"
        with file_system(device, top):
            work(product, writers, "write", top)
        assert writers.times_full > 0, "the limit was never met: nothing was tested"
        assert LIMIT_BYTES * 9 // 10 <= (writers.peak_bytes or LIMIT_BYTES) <= LIMIT_BYTES
        run(["fsck.ext4", "-f", "-n", device], timeout_s=STUCK_S)
        with file_system(device, top):  # mounted anew, so nothing is left in the page cache
            work(product, writers, "check", top)
        assert alive(pid)
        assert (own.killed, writers.killed) == (0, 0)


def skip_where_it_may_hang(product: Product, mountpoint: Path, group: MemoryGroup) -> None:
    """Version 1 lets whoever needs memory wait for the group's writeback, so for ourselves, unless
    it is an IO_FLUSHER. Nothing else helps there than a group of the daemon's own."""
    hardening = product.status(mountpoint)["hardening"]
    if group.version == 1 and not hardening["io_flusher"]:
        pytest.skip(f"cgroup v1, and no IO_FLUSHER: {hardening['refused']['io_flusher']}")


@contextlib.contextmanager
def mounted_inside(
    product: Product, group: MemoryGroup, source: str, mountpoint: Path
) -> Iterator[None]:
    words: list[str | Path] = ["mount", source, mountpoint, "-o", f"cache_size={CACHE_BYTES}"]
    try:
        product.run(*group.command(COMMAND, *words))
        yield
        product.umount(mountpoint)
    finally:
        abandon(mountpoint)


def work(product: Product, group: MemoryGroup, what: str, folder: Path) -> None:
    words = group.command(sys.executable, dirtier.__file__, what, folder, str(FILES), str(BLOCKS))
    with Program(words, log=product.home / f"{what}.log") as program:
        assert program.wait(STUCK_S * 2) == 0, program.log_tail()


# -- how much memory the daemon takes ----------------------------------------------------------


LUN_BYTES = 1 << 40
OPERATIONS = 600
WORKERS = 4
SIZES = (4096, 65536, 131072, MEBIBYTE)
SAMPLES_MIN = 50


def resident(pid: int) -> dict[str, int]:
    """`VmRSS` (now) and `VmHWM` (the most so far) in bytes."""
    rows = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    fields = dict(row.split(":", 1) for row in rows)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def load(file: int, seed: int) -> int:
    """Random reads and writes all over the LUN; the bytes moved."""
    choose = random.Random(seed)
    moved = 0
    for _ in range(OPERATIONS):
        size = choose.choice(SIZES)
        offset = choose.randrange((LUN_BYTES - size) // 4096) * 4096
        if choose.random() < 0.5:
            moved += os.pwrite(file, choose.randbytes(size), offset)
        else:
            moved += len(os.pread(file, size, offset))
    return moved


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cache_bytes", [64 * MEBIBYTE, 256 * MEBIBYTE])
def test_memory_stays_within_the_cache_and_a_fixed_part(
    product: Product, make_embedded: MakeEmbedded, tmp_path: Path, cache_bytes: int
) -> None:
    target = make_embedded({1: str(sized_file(tmp_path / "sparse.img", LUN_BYTES))})
    with product.mounted(target.lun_url(), f"cache_size={cache_bytes}") as mountpoint:
        pid = product.pid(mountpoint)
        before = resident(pid)["VmRSS"]
        file = os.open(mountpoint / "lun1", os.O_RDWR | os.O_DIRECT)
        samples = []
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                loads = [pool.submit(load, file, seed) for seed in range(WORKERS)]
                while not all(one.done() for one in loads):
                    samples.append(resident(pid)["VmRSS"])
                    wait(loads, timeout=0.02)
            os.fsync(file)
        finally:
            os.close(file)
        moved = sum(one.result() for one in loads)
        # The kernel brings VmHWM up to date now and then only.
        most = max(resident(pid)["VmHWM"], *samples)
    figures = f"before {before >> 20} MiB, most {most >> 20} MiB, {len(samples)} samples"
    # It was really loaded: the cache is full, several times over, and it was looked at often.
    assert moved > 2 * cache_bytes
    assert len(samples) >= SAMPLES_MIN
    assert most - before > cache_bytes * 3 // 4, figures
    assert most < cache_bytes + OVERHEAD_BYTES_MAX, figures
