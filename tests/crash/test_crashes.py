"""Crashes of the real thing: a process that is killed, a real target, a real log on a disk.

In the manner of LSVD's crash test: blocks are stamped with their address and the number of the
write; the process is killed with SIGKILL at any time; then nothing more happens, or the part of the
log that was not synced is thrown away (the host lost power), or the whole log is lost. What a
remount shows afterwards is what INTERFACE §6 promises, and the next round goes on from there.
"""

import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from orion_iscsifs.config import CacheMode, Destage, SecretBytes
from orion_iscsifs.localstore import record
from orion_iscsifs.localstore.store import LogStore
from orion_iscsifs.testing.programs import wait_until
from tests.cache.crashes import BLOCKS, Crash, Promise, version
from tests.crash import life
from tests.interop.product import EmbeddedTarget, Product

ROUNDS = 25
CHAINS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 80))]
_LIFE_S = 30.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([life.__name__])


class Host:
    """One log and one LUN, round after round."""

    def __init__(self, home: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.destage = Destage.FAST if seed % 4 == 3 else Destage.ORDERED
        self.disk = home / "disk"
        self.disk.touch()
        self.promise = Promise()
        self._home = home
        self._number = 1
        self._rounds = 0
        with self.disk.open("r+b") as file:
            file.truncate(16 << 20)
        self.target = EmbeddedTarget(Product(home), {1: str(self.disk)})
        key = SecretBytes(b"a passphrase") if seed % 4 == 2 else None
        self._settings = life.config(str(home / "logs"), CacheMode.LOG, self.destage, key)

    def live_and_die(self) -> int:
        """A life that ends with SIGKILL at any time; how far its log was durable by then."""
        self._rounds += 1
        reports = self._home / f"reports-{self._rounds}"
        reports.touch()
        url, state, seed = self.target.lun_url(), self._state, self.rng.getrandbits(32)
        arguments = (url, self._settings, str(reports), state, seed, self._number)
        process = _CONTEXT.Process(target=life.live, args=arguments)
        process.start()
        try:
            wait_until(lambda: reports.stat().st_size > 0, what="the life's first report")
            time.sleep(self.rng.choice((0.0, 0.01, 0.03, 0.1, 0.2)))
        finally:
            process.kill()
            process.join(_LIFE_S)
        assert process.exitcode == -signal.SIGKILL
        durable = life.read_reports(reports, self.promise)
        self._number += 100_000
        return durable

    def lose_tail(self, durable: int) -> None:
        """What was not synced may be gone: from any record on that was not durable."""
        store = LogStore.open(self.log_folder, shared=True)
        try:
            scan = store.scan()
            found = list(scan.records)
        finally:
            store.close()
        cut = self.rng.randint(max(durable, scan.durable), max(scan.next_seq, durable))
        for header, place in found:
            if header.seq >= cut:
                path = self.log_folder / f"wlog-{place.slot:08x}"
                with path.open("r+b") as file:
                    file.seek(place.position - record.HEADER_BYTES)
                    file.write(bytes(header.size_bytes))

    def lose_log(self) -> None:
        shutil.rmtree(self.log_folder)

    def image_after_remount(self) -> bytes:
        shown = self._home / "shown"
        arguments = (self.target.lun_url(), self._settings, str(shown), self._state)
        process = _CONTEXT.Process(target=life.read, args=arguments)
        process.start()
        process.join(_LIFE_S)
        assert process.exitcode == 0
        return shown.read_bytes()

    def begin_anew(self, image: bytes) -> None:
        """What is there now is what the next round starts from."""
        self.promise = Promise()
        for block in range(BLOCKS):
            if number := version(image, block):
                self.promise.written[block] = {number: 0}
                self.promise.acknowledged[block] = self.promise.flushed[block] = number

    @property
    def on_the_target(self) -> bytes:
        with self.disk.open("rb") as file:
            return file.read(life.AREA)

    @property
    def log_folder(self) -> Path:
        (folder,) = (self._home / "logs").iterdir()
        return folder

    @property
    def _state(self) -> str:
        return str(self._home / "state")


def least(promise: Promise, crash: Crash) -> dict[int, int]:
    known: dict[Crash, dict[int, int]] = {
        Crash.KILL: promise.acknowledged,
        Crash.POWER: promise.flushed,
    }
    return known.get(crash, {})


@pytest.mark.parametrize("seed", CHAINS)
def test_rounds(seed: int, memory_path: Path) -> None:
    host = Host(memory_path, seed)
    ordered = host.destage is Destage.ORDERED
    try:
        for _ in range(ROUNDS):
            crash = host.rng.choice((Crash.KILL, Crash.POWER, Crash.NO_LOG))
            durable = host.live_and_die()
            if ordered:
                host.promise.check(host.on_the_target, least={}, ordered=True)
            if crash is Crash.POWER:
                host.lose_tail(durable)
            elif crash is Crash.NO_LOG:
                host.lose_log()
            image = host.image_after_remount()
            host.promise.check(
                image, least=least(host.promise, crash), ordered=ordered and crash is not Crash.KILL
            )
            assert host.on_the_target == image, "what is shown has been replayed"
            host.begin_anew(image)
    finally:
        host.target.stop()
