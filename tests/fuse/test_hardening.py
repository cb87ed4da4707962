"""Hardening of a process: real system calls, each in a process that ends with the test."""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orion_iscsifs.fuse import hardening
from orion_iscsifs.fuse.hardening import OOM_SCORE_ADJ, Hardening

REPOSITORY = Path(__file__).parents[2]
CAP_IPC_LOCK = 14
CAP_SYS_RESOURCE = 24

PREPARE = """
import ctypes, json, logging, mmap, os, pathlib, resource, threading
from orion_iscsifs.fuse.hardening import harden

libc = ctypes.CDLL(None, use_errno=True)
logged = []

class Kept(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())

logging.getLogger().addHandler(Kept())
logging.getLogger().setLevel(logging.INFO)

def kib(name):
    for row in pathlib.Path("/proc/self/status").read_text().splitlines():
        if row.startswith(name + ":"):
            return int(row.split()[1])

def is_flusher():
    return libc.prctl(58, *map(ctypes.c_ulong, (0, 0, 0, 0)))

"""
REPORT = """
print(json.dumps({**result, "status": hardened.as_dict(), "logged": logged}))
"""


@dataclass(frozen=True)
class Report:
    """What a process said of itself after `harden()`."""

    said: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.said[key]

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.said["status"]
        return status


def in_a_process(script: str) -> Report:
    """Run `script`, which leaves what `harden()` said in `hardened`, and a `result`."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + script + REPORT],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Report(json.loads(done.stdout))


def may(capability: int) -> bool:
    """Whether we have it where it counts: in the first user namespace."""
    first = Path("/proc/self/uid_map").read_text(encoding="ascii").split() == [
        "0",
        "0",
        "4294967295",
    ]
    for row in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if row.startswith("CapEff:"):
            return first and bool(int(row.split()[1], 16) >> capability & 1)
    return False


def test_what_is_reported_is_what_is_in_force() -> None:
    report = in_a_process("""
hardened = harden()
flags = []
thread = threading.Thread(target=lambda: flags.append(is_flusher()))
thread.start()
thread.join()
result = {
    "flushers": [is_flusher(), *flags],
    "locked_kib": kib("VmLck"),
    "score": int(pathlib.Path("/proc/self/oom_score_adj").read_text()),
}
""")
    status = report.status
    assert status["io_flusher"] is may(CAP_SYS_RESOURCE)
    # Who may not set it may not ask for it either. A thread that was begun later has it too.
    assert report["flushers"] == ([1, 1] if status["io_flusher"] else [-1, -1])
    assert status["memory_locked"] is (report["locked_kib"] > 0)
    assert status["memory_locked"] or not may(CAP_IPC_LOCK)
    assert status["oom_score_adj"] == report["score"]
    if may(CAP_SYS_RESOURCE):
        assert report["score"] == OOM_SCORE_ADJ


def test_each_refusal_has_a_reason() -> None:
    """Without any capability: nothing is set, nothing breaks, and the log says why."""
    report = in_a_process("""
hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
enough = 1 << 40 if hard == resource.RLIM_INFINITY else hard
resource.setrlimit(resource.RLIMIT_MEMLOCK, (enough, enough))
header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3; this process
assert libc.capset(header, (ctypes.c_uint32 * 6)()) == 0
hardened = harden()
result = {
    "locked_kib": kib("VmLck"),
    "limit": resource.getrlimit(resource.RLIMIT_MEMLOCK),
    "score": int(pathlib.Path("/proc/self/oom_score_adj").read_text()),
    "enough": enough,
}
""")
    status = report.status
    assert not status["io_flusher"]
    # However high the limit is: a later allocation might meet it.
    assert not status["memory_locked"]
    assert report["locked_kib"] == 0
    assert report["limit"] == [report["enough"]] * 2
    assert status["oom_score_adj"] == report["score"]
    assert set(status["refused"]) == {"io_flusher", "memory_locked", "oom_score_adj"}
    for name, why in status["refused"].items():
        assert "(needs " in why
        assert report["logged"].count(f"{name} is not set: {why}") == 1


class Libc:
    """Grants everything, and notes the limit of locked memory at that moment."""

    def __init__(self) -> None:
        self.limit = (1 << 20, resource.RLIM_INFINITY)
        self.calls: list[tuple[str, list[int], int]] = []

    def prctl(self, option: int, *words: Any) -> int:
        self.calls.append(("prctl", [option, *(word.value for word in words)], self.limit[0]))
        return 0

    def mlockall(self, flags: int) -> int:
        self.calls.append(("mlockall", [flags], self.limit[0]))
        return 0


@pytest.mark.parametrize(
    ("hard", "meanwhile", "afterwards"),
    [
        pytest.param(1 << 30, 0, 1 << 20, id="finite: the capability decides"),
        # Without the capability a limit may still be lifted by whoever it is not forced on.
        pytest.param(
            resource.RLIM_INFINITY,
            resource.RLIM_INFINITY,
            resource.RLIM_INFINITY,
            id="infinite: lifted for good",
        ),
    ],
)
def test_where_everything_is_granted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hard: int, meanwhile: int, afterwards: int
) -> None:
    libc, score = Libc(), tmp_path / "oom_score_adj"
    libc.limit = (1 << 20, hard)
    score.write_text("200\n", encoding="ascii")
    monkeypatch.setattr(hardening, "_libc", libc)
    monkeypatch.setattr(hardening, "_OOM_SCORE_ADJ", score)
    monkeypatch.setattr(resource, "getrlimit", lambda _: libc.limit)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: setattr(libc, "limit", limit))
    assert hardening.harden() == Hardening(
        io_flusher=True, memory_locked=True, oom_score_adj=OOM_SCORE_ADJ, refused={}
    )
    assert libc.calls == [("prctl", [57, 1, 0, 0, 0], 1 << 20), ("mlockall", [7], meanwhile)]
    assert libc.limit == (afterwards, hard)
    assert score.read_text(encoding="ascii") == "-1000"


def test_reserved_memory_costs_nothing_before_it_is_touched() -> None:
    """The cache reserves `cache_size` in one piece: more than there is limit or memory."""
    if not may(CAP_IPC_LOCK):
        pytest.skip("locks no memory: needs CAP_IPC_LOCK")
    report = in_a_process("""
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, resource.getrlimit(8)[1]))
hardened = harden()
before = kib("VmRSS"), kib("VmLck")
area = mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
reserved = kib("VmRSS"), kib("VmLck")
for offset in range(0, 32 << 20, mmap.PAGESIZE):
    area[offset] = 1
result = {"before": before, "reserved": reserved, "touched": (kib("VmRSS"), kib("VmLck"))}
""")
    before, reserved, touched = report["before"], report["reserved"], report["touched"]
    assert reserved[1] - before[1] >= 8 << 20  # it is under the lock …
    assert reserved[0] - before[0] < 4 << 10  # … and not in memory
    assert 32 << 10 <= touched[0] - reserved[0] < 40 << 10


def test_a_child_is_an_ordinary_process(tmp_path: Path) -> None:
    """What a daemon starts may be killed when memory runs out, as anything else."""
    spared = tmp_path / "oom_score_adj"
    spared.write_text(f"{OOM_SCORE_ADJ}\n", encoding="ascii")
    # Nobody needs a right to raise the score, so 300 takes the place of what a child inherits.
    report = in_a_process(f"""
from orion_iscsifs.fuse import apart
score = pathlib.Path("/proc/self/oom_score_adj")
score.write_text("300")
wait = "until [ $(cat /proc/$$/oom_score_adj) -eq 0 ]; do :; done; echo ordinary"
apart._OWN_SCORE = {str(spared)!r}
changed = apart.run(["/bin/sh", "-c", wait], timeout_s=20)[1].decode()
apart._OWN_SCORE = str(score)  # a process that is not spared: its children are as it is
kept = apart.run(["/bin/cat", "/proc/self/oom_score_adj"], timeout_s=20)[1].decode()
hardened, result = harden(), {{"changed": changed, "kept": kept}}
""")
    assert report["changed"] == "ordinary\n"
    assert report["kept"] == "300\n"
