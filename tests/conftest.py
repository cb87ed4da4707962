"""What a test needs from the machine, and the switch for slow ones.

Markers say what a test cannot do without: `fuse`, `loop`, and `interop("program", ...)`, which
names the third-party programs it runs. A test whose needs are not met is skipped with the reason.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.localstore import seal
from tests.together import group_of

SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked `slow` too")


def pytest_configure() -> None:
    # Debian keeps mkfs, losetup and tgtd where an ordinary user's PATH does not look.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_FOLDERS}"
    # A shell's background jobs ignore it, and so would every program that a test interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """How `-n` distributes the tests, unless `--dist` says otherwise."""
    from xdist.scheduler import LoadScopeScheduling

    if config.getvalue("dist") != "load":
        return None
    scheduler = LoadScopeScheduling(config, log)
    # The groups that xdist_group makes mean nothing with pytest 9.2: a test's name stays as it is.
    scheduler._split_scope = group_of
    return scheduler


def _fuse_is_missing() -> str | None:
    device = Path("/dev/fuse")
    if not (device.exists() and os.access(device, os.R_OK | os.W_OK)):
        return "/dev/fuse is missing or not ours to open"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "neither root nor fusermount3"
    return None


def _loop_is_missing() -> str | None:
    if os.geteuid() != 0:
        return "loop devices need root"
    if not Path("/dev/loop-control").exists():
        return "no loop devices here (/dev/loop-control)"
    return None


def _unmet_need(item: pytest.Item) -> str | None:
    if item.get_closest_marker("slow") and not item.config.getoption("--full"):
        return "slow: only with --full"
    if item.get_closest_marker("fuse") and (reason := _fuse_is_missing()):
        return reason
    if item.get_closest_marker("loop") and (reason := _loop_is_missing()):
        return reason
    for marker in item.iter_markers("interop"):
        for program in marker.args:
            if shutil.which(program) is None:
                return f"{program} is not installed"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := _unmet_need(item):
        pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def _places_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """State and sockets: the host's belong to its mounts, and to other runs of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("places")
        patch.setenv("ORION_ISCSIFS_STATE", str(folder / "state"))
        patch.setenv("ORION_ISCSIFS_RUNTIME", str(folder / "run"))
        yield


@pytest.fixture
def cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passphrases that take no time: scrypt is slow on purpose."""
    monkeypatch.setattr(seal, "COST", seal.Cost(16, 1, 1))


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A temporary folder in memory, for backing files whose speed is the point."""
    root = Path("/dev/shm")
    if not os.access(root, os.W_OK):
        pytest.skip("/dev/shm is not ours to write")
    folder = root / f"orion-iscsifs-test-{os.getpid()}-{os.urandom(4).hex()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
