"""The command as a user calls it, over a fake data path (`tests.cli.fake`)."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orion_iscsifs.fuse import mountpoint

SIZE = 4 << 20
URL = "iscsi://h/iqn.2024-01.org.example:disk/1"
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Command:
    """Runs commands in an environment of their own."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.home / "mnt"

    @property
    def lun(self) -> Path:
        return self.folder / "lun1"

    @property
    def backing(self) -> Path:
        return self.home / "disk"

    def run(
        self, *words: str | Path, program: str = "orion-iscsifs", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*words, program=program),
            env={**self.environment, **environment},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def arguments(self, *words: str | Path, program: str = "orion-iscsifs") -> list[str]:
        return [sys.executable, "-m", "tests.cli.fake", program, *map(str, words)]

    def ok(self, *words: str | Path, **environment: str) -> str:
        done = self.run(*words, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def mount(self, *options: str, **environment: str) -> None:
        self.ok("mount", URL, self.folder, *options, **environment)

    def pid(self) -> int:
        """The daemon's."""
        import json

        mount = json.loads(self.ok("status", "--json", self.folder))["mounts"][0]
        pid: int = mount["pid"]
        return pid

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.home / "state/log").glob("*"))

    def wait_gone(self, timeout_s: float = 20) -> None:
        """Wait for the daemon's socket to go, which is the last thing but its exit."""
        deadline = time.monotonic() + timeout_s
        while any((self.home / "run").glob("*.sock")):
            assert time.monotonic() < deadline, "the daemon does not end"
            time.sleep(0.02)

    def is_mounted(self) -> bool:
        return mountpoint.find(str(self.folder)) is not None


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(
        tmp_path,
        {
            **os.environ,
            "ORION_ISCSIFS_STATE": str(tmp_path / "state"),
            "ORION_ISCSIFS_RUNTIME": str(tmp_path / "run"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "FAKE_FILE": str(tmp_path / "disk"),
            "PYTHONWARNINGS": "error",
        },
    )
    made.folder.mkdir()
    made.backing.write_bytes(os.urandom(SIZE))
    yield made
    if made.is_mounted():
        made.run("umount", "--force", "--timeout", "1", made.folder)
    if made.is_mounted():
        mountpoint.unmount(str(made.folder), lazy=True)
