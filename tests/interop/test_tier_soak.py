"""fio writes, reads back and checks checksums, while the tier under it is taken apart.

Nothing that happens to the tier is an error of the mount, and nothing that comes out of it is
wrong: neither while fio runs, nor after an end in order, nor after the death of the daemon.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from orion_iscsifs.testing.programs import Program, wait_until
from tests.interop.conftest import MEBIBYTE, MakeTgtDisk, TgtDisk
from tests.interop.product import Product, abandon, alive
from tests.interop.test_fio_verify import VERIFY
from tests.interop.tier_disk import TierDisk, tier_disk
from tests.interop.tiered import TIER_BYTES, options, read
from tests.interop.workers import supervisor_of, watchdog

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.interop("fio", "tgtd", "tgtadm", "mkfs.ext4"),
]

CACHE_BYTES = 4 * MEBIBYTE
JOB = ["--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--direct=1", "--do_verify=1"]
# What was written a while ago, and has left the RAM cache, is checked all the time.
JOB += ["--verify_backlog=192"]
JOB_BYTES = 12 * MEBIBYTE
DISK_BYTES = TIER_BYTES + 16 * MEBIBYTE
HITS_MIN = 20
"""So many reads of fio's are answered by the tier before anything happens to it."""
FIO_S = 90.0

MISFORTUNES = {
    "deleted": TierDisk.delete,
    "disk full": TierDisk.fill,
    "disk gone": TierDisk.shut_down,
    "overwritten": TierDisk.overwrite,
    "read-only": TierDisk.turn_read_only,
    "segments deleted": TierDisk.delete_segments,
    "moved away": TierDisk.move_away,
    "truncated": TierDisk.truncate,
}
ENDS_IT = {"disk gone", "read-only"}
"""The tier can't go on after these, and says so."""
CACHES = ["writeback", "writethrough", "none"]
USUAL = {
    False: ["deleted", "disk full", "disk gone"],
    True: ["overwritten", "disk full", "deleted"],
}
"""By whether the tier is sealed; `--full` has everything for both."""


@pytest.fixture
def soak(
    request: pytest.FixtureRequest,
    product: Product,
    make_tgt_disk: MakeTgtDisk,
    memory_path: Path,
    tmp_path: Path,
) -> Iterator["Soak"]:
    """The parameter: how much fio writes; the LUN is half as large again."""
    job_bytes: int = request.param
    lun = make_tgt_disk(size_bytes=job_bytes * 3 // 2)
    with tier_disk(memory_path / "tier.img", tmp_path / "tier", DISK_BYTES) as disk:
        yield Soak(product, lun, disk, job_bytes)


class Soak:
    """Mounts of one LUN, one after the other, and something happens to the tier of each."""

    def __init__(self, product: Product, lun: TgtDisk, disk: TierDisk, job_bytes: int) -> None:
        self.disk: Final = disk
        self._product = product
        self._lun = lun
        self._job_bytes = job_bytes
        self._lives = 0
        self.states: set[str] = set()

    def live_through(self, name: str, *words: str, killed: bool) -> None:
        """One mount: right at its beginning, while it happens, after it; and its end."""
        self._lives += 1
        mountpoint = self._product.new_mountpoint()
        try:
            self._product.mount(self._lun.url, mountpoint, *words)
            self._check_all(mountpoint, f"before: {name}")
            hits = self._tier(mountpoint)["hits"]
            with self._fio(mountpoint) as fio:
                fio.wait_until(
                    lambda: self._tier(mountpoint)["hits"] >= hits + HITS_MIN, timeout_s=FIO_S
                )
                MISFORTUNES[name](self.disk)
                assert fio.wait(FIO_S) == 0, f"{name}: {fio.log_tail()}"
            self._check_all(mountpoint, f"after: {name}")
            state = self._tier(mountpoint)["state"]
            assert state in ({"failed"} if name in ENDS_IT else {"ok", "failed"}), name
            self.states.add(state)
            if killed:
                self._kill(mountpoint)
            else:
                self._product.umount(mountpoint)
        finally:
            abandon(mountpoint)
        self.disk.mend()

    def check(self, *words: str) -> None:
        """A last mount, to which nothing happens."""
        with self._product.mounted(self._lun.url, *words) as mountpoint:
            self._check_all(mountpoint, "in the end")
            assert self._tier(mountpoint)["state"] == "ok"

    def _fio(self, mountpoint: Path) -> Program:
        words = ["fio", *VERIFY, *JOB, f"--filename={mountpoint / self._lun.name}"]
        # Each life writes something else, slowly enough for something to happen meanwhile.
        words += [f"--size={self._job_bytes}", f"--randseed={self._lives}", "--rate=,16m"]
        return Program(words, log=self._product.home / f"fio{self._lives}.log")

    def _tier(self, mountpoint: Path) -> dict[str, Any]:
        text = (mountpoint / ".orion" / "status.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)["mounts"][0]["luns"][0]["tier"]
        return found

    def _check_all(self, mountpoint: Path, when: str) -> None:
        """What is read is what the target has."""
        self._product("flush", mountpoint)
        content = read(mountpoint / self._lun.name, self._lun.size_bytes)
        is_same = content == self._lun.backing.read_bytes()
        assert is_same, f"{when}: not what the target has"

    def _kill(self, mountpoint: Path) -> None:
        worker = self._product.pid(mountpoint)
        os.kill(supervisor_of(self._product, mountpoint), signal.SIGKILL)
        wait_until(lambda: not alive(worker), what="end of the daemon")


def words_of(soak: Soak, product: Product, *, is_sealed: bool) -> list[str]:
    words = options(soak.disk.folder, f"cache_size={CACHE_BYTES}")
    return [*words, f"cache_key_file={product.secret_file('the key')}"] if is_sealed else words


@pytest.mark.timeout(300)
@pytest.mark.parametrize("soak", [JOB_BYTES], indirect=True, ids=["12M"])
@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])
def test_verify_while_the_tier_is_taken_apart(
    product: Product, soak: Soak, *, is_sealed: bool
) -> None:
    words = words_of(soak, product, is_sealed=is_sealed)
    for number, name in enumerate(USUAL[is_sealed]):
        with watchdog(product):
            # The full disk is met by both kinds of an end.
            soak.live_through(name, *words, killed=number % 2 == int(not is_sealed))
    soak.check(*words)
    assert "failed" in soak.states


@pytest.mark.slow
@pytest.mark.timeout(1800)
# More than the tier holds: segments come and go.
@pytest.mark.parametrize("soak", [8 * JOB_BYTES], indirect=True, ids=["96M"])
@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])
def test_verify_for_long(product: Product, soak: Soak, *, is_sealed: bool) -> None:
    words = words_of(soak, product, is_sealed=is_sealed)
    for number in range(3):
        for killed in (False, True):
            for name in MISFORTUNES:
                with watchdog(product):
                    soak.live_through(name, *words, f"cache={CACHES[number]}", killed=killed)
    soak.check(*words)
    assert soak.states == {"ok", "failed"}
