"""Each property for some seconds under the fuzzer; with --full for a minute each."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hostile.properties import PROPERTIES

_ROOT = Path(__file__).parents[2]
_SHORT_S = 4
_LONG_S = 60
_GROUPS: Sequence[Sequence[str]] = (
    ["framing"],
    ["headers", "text"],
    ["initiator_login"],
    ["target_login"],
    ["sense_data", "vital_product_data", "parameter_data"],
    ["probing", "urls", "secrets", "options", "addresses"],
)
"""One process each: to start one takes two seconds."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no package for this platform"
)


def _fuzz(names: Sequence[str], seconds: int, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile.fuzz", *names]
    command += ["--seconds", str(seconds), "--seed", "7143", "--corpus", str(folder)]
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, errors="replace", timeout=seconds + 60
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    assert runs is not None, done.stderr[-4000:]
    assert int(runs[1]) > 100 * seconds, "too slow to find anything"
    assert not list(folder.glob("crash-*"))


@pytest.mark.parametrize("names", _GROUPS, ids=lambda names: names[0])
def test_some_seconds(names: Sequence[str], tmp_path: Path) -> None:
    _fuzz(names, _SHORT_S, tmp_path)


def test_nothing_is_left_out() -> None:
    assert sorted(name for names in _GROUPS for name in names) == sorted(PROPERTIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_a_minute(name: str, tmp_path: Path) -> None:
    _fuzz([name], _LONG_S, tmp_path)


def test_the_fuzzer_does_find_what_is_broken(tmp_path: Path) -> None:
    """A property that fails is reported, with the input that broke it."""
    program = (
        "import sys; from tests.hostile import fuzz, properties\n"
        "def check(data):\n    assert data[:1] != b'!'\n"
        "fuzz.PROPERTIES['text'] = check; fuzz.main()"
    )
    command = [sys.executable, "-c", program, "text", "--seconds", "30", "--seed", "1"]
    done = subprocess.run(
        [*command, "--corpus", str(tmp_path)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=90,
    )
    assert done.returncode != 0
    (crash,) = tmp_path.glob("crash-*")
    assert crash.read_bytes().startswith(b"!")
    assert "AssertionError" in done.stdout + done.stderr
